#!/usr/bin/env bash
# What a teacher adds to the masks: distillation losses and label-assisted distillation, clean and noisy masks, one table.
#
#   ./run_distill.sh                                             the built-in demo set
#   DATA=my_folder SEEDS="0 1 2" ./run_distill.sh                images/ and masks/ in it, or a list (CSV: img,filename)
#   TRAIN=train.csv VALID=valid.csv TEST=test.csv CLASSES=11 NOISE="0 60" ./run_distill.sh        lists that are there
#
# Of every noise there are one ordinary and one label-assisted teacher (trained on the same, maybe noisy, list), and of every
# seed one student a row: same network, lists, steps and flags. Everything finished is skipped, everything interrupted goes
# on. Exit codes: 0 done, 1 a run failed, 2 a mistake in the settings, 75 interrupted. Settings, by environment:
#   DATA, or TRAIN VALID TEST   DATA_ROOT   CLASSES   NOISE="0 60" (percent of noisy masks)   KINDS=polygon   SEVERITY=0.7
#   SEEDS="0 1 2"   ONLY="kl lad" (of the ROWS and MORE_ROWS below)   STRIDE (of what losses compare)   SLOTS (CIRKD's queue)
#   EPOCHS  TEACHER_EPOCHS  SIZE  BATCH  LR  OPTIMIZER  ARCH  ENCODER  TEACHER_ARCH  TEACHER_ENCODER  ENCODER_WEIGHTS
#   WIDTH (of PlainUNet)  PRECISION  AUGMENT  SELECT=best|last  NPROC (processes a run)  JOBS (runs at a time)
#   SWEEP (its name; all it writes is in runs/SWEEP)   DRY_RUN=1 (print the command lines)
set -euo pipefail
for name in DATA TRAIN VALID TEST DATA_ROOT; do # files of the caller's folder
  if [ -n "${!name:-}" ] && [ -e "${!name}" ]; then declare "$name=$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")"
. ./setup.sh
. ./sweep.sh

MODE=lessons
ROWS="baseline kl cwd dist cirkd lad" MORE_ROWS="skd ifvd at cwd_feature" ONLY=${ONLY:-} SEEDS=${SEEDS:-0} DRY_RUN=${DRY_RUN:-}
CLASSES=${CLASSES:-1} NOISE=${NOISE:-0 60} KINDS=${KINDS:-polygon} SEVERITY=${SEVERITY:-0.7} TEST=${TEST:-}
SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-10} TEACHER_EPOCHS=${TEACHER_EPOCHS:-$((2 * EPOCHS))} BATCH=${BATCH:-8} LR=${LR:-1e-3}
OPTIMIZER=${OPTIMIZER:-adamw} ARCH=${ARCH:-Unet} ENCODER=${ENCODER:-resnet18} ENCODER_WEIGHTS=${ENCODER_WEIGHTS:-none}
TEACHER_ARCH=${TEACHER_ARCH:-$ARCH} TEACHER_ENCODER=${TEACHER_ENCODER:-$ENCODER} WIDTH=${WIDTH:-64}
AUGMENT=${AUGMENT:-flip} SELECT=${SELECT:-best} NPROC=${NPROC:-1} STRIDE=${STRIDE:-8} SLOTS=${SLOTS:-2000}
whole EPOCHS TEACHER_EPOCHS SIZE BATCH NPROC CLASSES WIDTH STRIDE SLOTS ${JOBS:+JOBS}
several_seeds
[[ " $NOISE " =~ ^(\ +(0|[1-9][0-9]?|100))+\ +$ ]] || fail "NOISE=$NOISE: percentages from 0 to 100, separated by blanks"
[[ $SEVERITY =~ ^0?\.[0-9]+$ ]] || fail "SEVERITY=$SEVERITY: an IoU such as 0.8"
for name in $ONLY; do [[ " $ROWS $MORE_ROWS " == *" $name "* ]] || fail "ONLY=$ONLY: no row $name; rows are $ROWS $MORE_ROWS"; done
if [ -n "${TRAIN:-}" ]; then
  [ -n "${VALID:-}" ] || fail "TRAIN=$TRAIN: name a validation list too, VALID=list.csv"
  [ -z "${DATA:-}" ] || fail "DATA and TRAIN: name one of them"
  SET=$(basename "$TRAIN" .csv)
else
  find_data
fi
SWEEP=${SWEEP:-distill-$SET-$TEACHER_ARCH-$TEACHER_ENCODER-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep} LOGS=runs/${SWEEP}
machine
claim

LISTS=$LOGS/lists
if [ -z "${TRAIN:-}" ]; then
  if [ -z "${DATA:-}" ]; then draw_demo; fi
  stage utils/prepare_data.py "${SOURCE[@]}" --out "$LISTS"
  TRAIN=$LISTS/train.csv VALID=$LISTS/valid.csv TEST=${TEST:-$LISTS/test.csv}
fi
SAME=(--valid_csv "$VALID" --test_csv "$TEST" --classes "$CLASSES" --size "$SIZE" --width "$WIDTH"
  --encoder-weights "$ENCODER_WEIGHTS" --optimizer "$OPTIMIZER" --learning-rate "$LR" --weight-decay 1e-2 --scheduler cosine
  --batch-size "$BATCH" --augment "$AUGMENT" --select "$SELECT" --precision "$PRECISION" --run_dir "$LOGS")
row() { # row, noise, seed, training list, root of its paths: one student
  local name=noise$2/$1_s$3 teacher=teacher
  wanted "$1" || return 0
  if [ "$1" = lad ]; then teacher=lad_teacher; fi
  local flags=(--name "$name" --seed "$3" --train_csv "$4" --data_root "$5" --epochs "$EPOCHS" --arch "$ARCH" --encoder "$ENCODER")
  local taught=(--teacher "$LOGS/noise$2/$teacher/$SELECT.pt" --distill-stride "$STRIDE" --cirkd-slots "$SLOTS")
  case $1 in
    baseline) run "$name" train_without_weight.py "${flags[@]}" "${SAME[@]}" ;;
    lad) run "$name" train_lad_student.py "${flags[@]}" "${SAME[@]}" "${taught[@]}" ;;
    cirkd) run "$name" train_distill.py "${flags[@]}" "${SAME[@]}" "${taught[@]}" --distill kl,cirkd ;;
    *) run "$name" train_distill.py "${flags[@]}" "${SAME[@]}" "${taught[@]}" --distill "$1" ;;
  esac
}
teachers() { # noise, training list, root of its paths: sets TEACHERS, those that the rows need
  local row flags=(--train_csv "$2" --data_root "$3" --epochs "$TEACHER_EPOCHS" --arch "$TEACHER_ARCH" --encoder "$TEACHER_ENCODER")
  TEACHERS=()
  for row in ${ONLY:-$ROWS}; do
    case $row in baseline|lad) ;; *) TEACHERS=("noise$1/teacher") ;; esac
  done
  if [ ${#TEACHERS[@]} -gt 0 ]; then run "noise$1/teacher" train_without_weight.py --name "noise$1/teacher" "${flags[@]}" "${SAME[@]}"; fi
  if ! wanted lad; then return; fi
  TEACHERS+=("noise$1/lad_teacher")
  run "noise$1/lad_teacher" train_lad_teacher.py --name "noise$1/lad_teacher" "${flags[@]}" "${SAME[@]}"
}
lessons() {
  local ratio seed name list noise root
  for ratio in $NOISE; do
    list=$TRAIN noise=0 root=${DATA_ROOT:-.}
    if [ "$ratio" != 0 ]; then
      stage utils/generate_noisy_label.py --train_csv "$TRAIN" --valid_csv "$VALID" --data_root "$root" --ratios "$ratio" --kinds "$KINDS" \
        --severity "$SEVERITY" --classes "$CLASSES" --out-csv "$LISTS/$KINDS-$SEVERITY" --out-masks "$LOGS/noisy/$KINDS-$SEVERITY"
      list=$LISTS/$KINDS-$SEVERITY/train_noisy_$ratio.csv noise=$ratio-$KINDS-$SEVERITY
    fi
    for seed in $SEEDS; do row baseline "$noise" "$seed" "$list" "$root"; done
    teachers "$noise" "$list" "$root"
    await "${TEACHERS[@]}" || { unfinished $? "no teachers for noise $noise, so no students"; continue; }
    for seed in $SEEDS; do
      for name in ${ONLY:-$ROWS}; do if [ "$name" != baseline ]; then row "$name" "$noise" "$seed" "$list" "$root"; fi; done
    done
  done
  finish
  stage utils/report.py "$LOGS" --score mIoU --baseline baseline
  [ -n "$DRY_RUN" ] || echo "done in $((SECONDS - STARTED)) s; the table is $LOGS/table.md, the report $LOGS/report.html"
}
go
