#!/usr/bin/env bash
# Few masks, and many images of which only the classes are known: learning pseudo labels, both stages, one table.
#
#   ./run_lpl.sh                                                   the built-in demo set (one class: it shows that it works)
#   DATA=my_list.csv CLASSES=11 LABELLED="46 92" SEEDS="0 1 2" ./run_lpl.sh       a list (CSV: img,filename), or a folder
#   TRAIN=train.csv VALID=valid.csv TEST=test.csv WEAK=tags.csv CLASSES=11 LABELLED="46 92" ./run_lpl.sh    lists that are there
#
# Stage 1 trains networks that predict with the classes of an image (train_lpl.py), and is tested with them; these write
# masks of the weak images; stage 2 trains on true and written masks (train_without_weight.py), and is tested without
# classes. A seed draws the images that keep their masks, too. The other images of TRAIN are the weak ones, with the
# classes of their masks, unless WEAK names a list (CSV: img,label). Everything finished is skipped, everything interrupted
# goes on. Exit codes: 0 done, 1 a run failed, 2 a mistake in the settings, 75 interrupted (the same command goes on from
# here). Settings, by environment:
#   DATA, or TRAIN VALID TEST   DATA_ROOT   WEAK   CLASSES
#   LABELLED="46 1/8" (images, or shares of the list)   SEEDS="0 1 2"   ONLY="ce cce_pct" (of the ROWS below)
#   EPOCHS (passes over the weak images)  EPOCHS2 (of stage 2, over all)  SIZE  BATCH  BATCH2  LR  OPTIMIZER  ARCH  ENCODER
#   ENCODER_WEIGHTS  PRECISION  AUGMENT  SCALES="0.75 1 1.25" (of masks and tests, with mirrored images)  CRF=1 (of masks)
#   POWER (exponent of the image weight)  SELECT=best|last  NPROC (processes a run)  JOBS (runs at a time)
#   SWEEP (its name; all it writes is in runs/SWEEP)   DRY_RUN=1 (print the command lines)
set -euo pipefail
for name in DATA TRAIN VALID TEST WEAK DATA_ROOT; do # files of the caller's folder
  if [ -n "${!name:-}" ] && [ -e "${!name}" ]; then declare "$name=$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")"
. ./setup.sh

fail() {
  echo "error: $*" >&2
  exit 2
}
ROWS="supervised ce cce cce_pct all_masks"
ONLY=${ONLY:-$ROWS} LABELLED=${LABELLED:-1/16 1/8} SEEDS=${SEEDS:-0} CLASSES=${CLASSES:-1} DRY_RUN=${DRY_RUN:-}
SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-10} EPOCHS2=${EPOCHS2:-$EPOCHS} BATCH=${BATCH:-8} BATCH2=${BATCH2:-$((2 * BATCH))}
LR=${LR:-1e-3} OPTIMIZER=${OPTIMIZER:-adamw} POWER=${POWER:-8} SCALES=${SCALES:-0.75 1 1.25} CRF=${CRF:-}
ARCH=${ARCH:-DeepLabV3Plus} ENCODER=${ENCODER:-resnet18} ENCODER_WEIGHTS=${ENCODER_WEIGHTS:-none} AUGMENT=${AUGMENT:-crop}
NPROC=${NPROC:-1} JOBS=${JOBS:-1} SELECT=${SELECT:-best}
for name in EPOCHS EPOCHS2 SIZE BATCH BATCH2 NPROC JOBS CLASSES; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: a whole number of 1 or more"
done
[[ " $LABELLED " =~ ^(\ +[1-9][0-9]*(/[1-9][0-9]*)?)+\ +$ ]] || fail "LABELLED=$LABELLED: numbers or shares such as 1/16"
[[ " $SEEDS " =~ ^(\ +[0-9]+)+\ +$ ]] || fail "SEEDS=$SEEDS: numbers separated by blanks"
for name in $ONLY; do [[ " $ROWS " == *" $name "* ]] || fail "ONLY=$ONLY: no row $name; rows are $ROWS"; done
if [ -n "${TRAIN:-}" ]; then
  [ -n "${VALID:-}" ] || fail "TRAIN=$TRAIN: name a validation list too, VALID=list.csv"
  [ -z "${DATA:-}" ] || fail "DATA and TRAIN: name one of them"
  NAME=$(basename "$TRAIN" .csv)
else
  NAME=$(basename "${DATA:-demo}" .csv)
fi
SWEEP=${SWEEP:-lpl-$NAME-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep} LOGS=runs/${SWEEP}

PY=python PRECISION=${PRECISION:-}
[ -n "$DRY_RUN" ] || set_up requirements.txt
if [ -z "$PRECISION" ]; then
  if [ -n "$DRY_RUN" ] || "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo
  then PRECISION=bf16; else PRECISION=fp32; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > JOBS * NPROC ? $(nproc) / (JOBS * NPROC) : 1))}
LAUNCH=("$PY")
if [ "$NPROC" -gt 1 ]; then LAUNCH+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC"); fi

leave() { # exit code: what is still at work saves first
  trap '' INT TERM HUP
  local running
  running=$(jobs -rp)
  [ -z "$running" ] || kill -TERM $running 2>/dev/null || true
  wait
  [ "$1" != 75 ] || echo "interrupted; the same command goes on from here" >&2
  exit "$1"
}
trap 'exit 75' INT TERM HUP
trap 'leave $?' EXIT
if [ -z "$DRY_RUN" ]; then
  mkdir -p "$LOGS/logs"
  exec 9>>"$LOGS/.lock"
  flock -n 9 || fail "$LOGS: this sweep is at work already; wait for it, or set SWEEP=another_name"
  rm -f "$LOGS"/logs/*.code
fi
say() { # words of a command, so that a shell reads them back
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}
stage() { # a tool: its failure ends the sweep
  if [ -n "$DRY_RUN" ]; then say "$PY" "$@"; return; fi
  "$PY" "$@" & # bash would hear a signal only after the end of a command in the foreground
  wait $!
}
run() { # name, script, flags...: a training run in the background, up to JOBS at a time
  local name=$1 log=$LOGS/logs/${1//\//_}.log
  shift
  if [ -n "$DRY_RUN" ]; then say "${LAUNCH[@]}" "$@"; return; fi
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
  (
    child="" code=0
    trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
    "${LAUNCH[@]}" "$@" >"$log" 2>&1 &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done # a signal ends `wait`, not yet the run
    echo "$code" >"$log.code"
    echo "[$SECONDS s] $name: $([ $code = 0 ] || echo "exit code $code: ")$(tail -n 1 "$log" | cut -c1-150)"
  ) &
}

LISTS=$LOGS/lists
if [ -z "${TRAIN:-}" ]; then
  if [ -z "${DATA:-}" ]; then
    stage utils/prepare_data.py demo --out data/demo
    stage utils/prepare_data.py folder --images data/demo/image --masks data/demo/mask --test 0.2 --out "$LISTS"
  elif [ -f "$DATA" ]; then stage utils/prepare_data.py list "$DATA" --test 0.2 --out "$LISTS"
  else stage utils/prepare_data.py folder --images "$DATA/images" --masks "$DATA/masks" --test 0.2 --out "$LISTS"; fi
  TRAIN=$LISTS/train.csv VALID=$LISTS/valid.csv TEST=$LISTS/test.csv
fi
ROOT=${DATA_ROOT:-.} TESTED=""
if [ -n "${TEST:-}" ]; then
  TESTED=$LISTS/test_labels.csv
  stage utils/prepare_data.py image-labels "$TEST" --classes "$CLASSES" --data-root "$ROOT" --out "$TESTED"
fi
COUNTS=""
for share in $LABELLED; do
  if [[ $share == */* ]]; then
    [ -f "$TRAIN" ] || fail "LABELLED=$share: a share needs the list, which DRY_RUN does not write; give numbers"
    images=$(($(grep -c . "$TRAIN") - 1))
    share=$(((images * ${share%/*} + ${share#*/} - 1) / ${share#*/}))
  fi
  COUNTS+=" $share"
done
SAME=(--valid_csv "$VALID" --test_csv "${TEST:-}" --data_root "$ROOT" --classes "$CLASSES" --size "$SIZE" --arch "$ARCH"
  --encoder "$ENCODER" --encoder-weights "$ENCODER_WEIGHTS" --optimizer "$OPTIMIZER" --learning-rate "$LR" --weight-decay 1e-2
  --scheduler poly --augment "$AUGMENT" --select "$SELECT" --precision "$PRECISION" --run_dir "$LOGS")
LOOKS=(--scales $SCALES --flip)
each() { # function: calls it with every row of ONLY, seed and number of masks
  local row seed count
  for seed in $SEEDS; do for count in $COUNTS; do for row in $ROWS; do
    if [[ " $ONLY " == *" $row "* ]]; then "$1" "$row" "$seed" "$count"; fi
  done; done; done
}
halves() { few=$LISTS/seed$1/labelled_$2.csv weak=${WEAK:-$LISTS/seed$1/unlabelled_$2.csv}; } # seed, masks
done_with() { [ -n "$DRY_RUN" ] || [ "$(cat "$LOGS/logs/${1//\//_}.log.code" 2>/dev/null)" = 0 ]; } # name of a run
stage1() {
  local row=$1 few weak name=labelled$3/$1_stage1_s$2
  halves "$2" "$3"
  case $row in
    supervised|all_masks) # without classes, so of one stage, in as many steps as the others
      name=labelled$3/${row}_s$2
      if [ "$row" = all_masks ]; then few=$TRAIN; fi
      run "$name" train_u2pl.py --train_csv "$few" --unlabelled_csv "$weak" --preset supervised --name "$name" --seed "$2" \
        "${SAME[@]}" --epochs "$EPOCHS" --batch-size "$BATCH" ;;
    *) run "$name" train_lpl.py --train_csv "$few" --weak_csv "$weak" --preset "$row" --pct-power "$POWER" --name "$name" \
        --seed "$2" "${SAME[@]}" --epochs "$EPOCHS" --batch-size "$BATCH" ;;
  esac
}
masks() { # of the weak images, by what stage 1 has trained, and then its scores with the classes of the test images
  local row=$1 few weak name=labelled$3/$1_stage1_s$2
  halves "$2" "$3"
  case $row in supervised|all_masks) return ;; esac
  done_with "$name" || return 0
  stage utils/predict_mask.py --list "$weak" --image-labels --checkpoint "$LOGS/$name/$SELECT.pt" "${LOOKS[@]}" ${CRF:+--crf} \
    --true-masks "$few" --trusted --data-root "$ROOT" --out "$LOGS/masks/$name"
  scores "$name" --image-labels
}
stage2() {
  local name=labelled$3/$1_stage2_s$2
  case $1 in supervised|all_masks) return ;; esac
  done_with "labelled$3/$1_stage1_s$2" || return 0
  run "$name" train_without_weight.py --train_csv "$LOGS/masks/labelled$3/$1_stage1_s$2_with_true.csv" --name "$name" --seed "$2" \
    "${SAME[@]}" --epochs "$EPOCHS2" --batch-size "$BATCH2"
}
plain_scores() {
  local name=labelled$3/$1_stage2_s$2
  case $1 in supervised|all_masks) name=labelled$3/$1_s$2 ;; esac
  done_with "$name" || return 0
  scores "$name"
}
scores() { # name of a run, flags: at the images' own size, over scales
  local name=$1
  shift
  [ -n "$TESTED" ] || return 0
  if [ -z "$DRY_RUN" ] && [ "$LOGS/$name/scores.json" -nt "$LOGS/$name/$SELECT.pt" ]; then return; fi
  stage evaluate.py "$LOGS/$name/$SELECT.pt" --list "$TESTED" --data-root "$ROOT" "${LOOKS[@]}" --json "$LOGS/$name/scores.json" "$@"
}
all_done() { while [ -n "$(jobs -rp)" ]; do wait -n || true; done; }

for seed in $SEEDS; do
  stage utils/prepare_data.py split "$TRAIN" --labelled $COUNTS --seed "$seed" --keep-masks --image-labels --classes "$CLASSES" \
    --data-root "$ROOT" --out "$LISTS/seed$seed"
done
for step in stage1 masks stage2 plain_scores; do
  each "$step"
  all_done
done
FOLDERS=()
for count in $COUNTS; do FOLDERS+=("$LOGS/labelled$count"); done
if [[ " $ONLY " == *" supervised "* ]]; then BASELINE=supervised; else BASELINE=${ONLY%% *}_stage2; fi
stage utils/report.py "${FOLDERS[@]}" --score mIoU --baseline "${BASELINE/all_masks_stage2/all_masks}" --out "$LOGS"
[ -z "$DRY_RUN" ] || exit 0
CODES=$(cat "$LOGS"/logs/*.code)
if grep -qvxE '0|75|129|130|143' <<<"$CODES"; then echo "some runs failed; their logs: $LOGS/logs" >&2; exit 1; fi
if grep -qvx 0 <<<"$CODES"; then exit 75; fi
echo "done in $SECONDS s; the table is $LOGS/table.md, the report $LOGS/report.html"
