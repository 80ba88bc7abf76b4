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
ROWS="baseline kl cwd dist cirkd lad" MORE_ROWS="skd ifvd at cwd_feature" AUGMENT=${AUGMENT:-flip}
NOISE=${NOISE:-0 60} KINDS=${KINDS:-polygon} SEVERITY=${SEVERITY:-0.7} STRIDE=${STRIDE:-8} SLOTS=${SLOTS:-2000}
usual
TEACHER_EPOCHS=${TEACHER_EPOCHS:-$((2 * EPOCHS))} TEACHER_ARCH=${TEACHER_ARCH:-$ARCH} TEACHER_ENCODER=${TEACHER_ENCODER:-$ENCODER}
whole TEACHER_EPOCHS STRIDE SLOTS
noise_levels
[[ $SEVERITY =~ ^0?\.[0-9]+$ ]] || fail "SEVERITY=$SEVERITY: an IoU such as 0.8"
begin "distill-$SET-$TEACHER_ARCH-$TEACHER_ENCODER-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep"
SAME+=(--batch-size "$BATCH" --scheduler cosine)
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
