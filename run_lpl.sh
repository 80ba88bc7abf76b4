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
#   WIDTH (of PlainUNet)  POWER (exponent of the image weight)  SELECT=best|last  NPROC (processes a run)  JOBS (runs at a time)
#   SWEEP (its name; all it writes is in runs/SWEEP)   DRY_RUN=1 (print the command lines)
set -euo pipefail
for name in DATA TRAIN VALID TEST WEAK DATA_ROOT; do # files of the caller's folder
  if [ -n "${!name:-}" ] && [ -e "${!name}" ]; then declare "$name=$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")"
. ./setup.sh
. ./sweep.sh

MODE=ladder
ROWS="supervised ce cce cce_pct all_masks"
ONLY=${ONLY:-} LABELLED=${LABELLED:-1/16 1/8} SEEDS=${SEEDS:-0} CLASSES=${CLASSES:-1} DRY_RUN=${DRY_RUN:-}
SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-10} EPOCHS2=${EPOCHS2:-$EPOCHS} BATCH=${BATCH:-8} BATCH2=${BATCH2:-$((2 * BATCH))}
LR=${LR:-1e-3} OPTIMIZER=${OPTIMIZER:-adamw} POWER=${POWER:-8} SCALES=${SCALES:-0.75 1 1.25} CRF=${CRF:-}
ARCH=${ARCH:-DeepLabV3Plus} ENCODER=${ENCODER:-resnet18} ENCODER_WEIGHTS=${ENCODER_WEIGHTS:-none} AUGMENT=${AUGMENT:-crop}
NPROC=${NPROC:-1} SELECT=${SELECT:-best} TEST=${TEST:-} WEAK=${WEAK:-} WIDTH=${WIDTH:-64}
whole EPOCHS EPOCHS2 SIZE BATCH BATCH2 NPROC CLASSES WIDTH ${JOBS:+JOBS}
[[ " $LABELLED " =~ ^(\ +[1-9][0-9]*(/[1-9][0-9]*)?)+\ +$ ]] || fail "LABELLED=$LABELLED: numbers or shares such as 1/16"
several_seeds
for name in $ONLY; do [[ " $ROWS " == *" $name "* ]] || fail "ONLY=$ONLY: no row $name; rows are $ROWS"; done
if [ -n "${TRAIN:-}" ]; then
  [ -n "${VALID:-}" ] || fail "TRAIN=$TRAIN: name a validation list too, VALID=list.csv"
  [ -z "${DATA:-}" ] || fail "DATA and TRAIN: name one of them"
  SET=$(basename "$TRAIN" .csv)
else
  find_data
fi
SWEEP=${SWEEP:-lpl-$SET-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep} LOGS=runs/${SWEEP}

machine
claim

LISTS=$LOGS/lists
if [ -z "${TRAIN:-}" ]; then
  if [ -z "${DATA:-}" ]; then draw_demo; fi
  stage utils/prepare_data.py "${SOURCE[@]}" --out "$LISTS"
  TRAIN=$LISTS/train.csv VALID=$LISTS/valid.csv TEST=${TEST:-$LISTS/test.csv}
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
ROOT=${DATA_ROOT:-.} TESTED=$LISTS/test_labels.csv LOOKS=(--scales $SCALES --flip)
SAME=(--valid_csv "$VALID" --test_csv "$TEST" --data_root "$ROOT" --classes "$CLASSES" --size "$SIZE" --arch "$ARCH"
  --width "$WIDTH" --encoder "$ENCODER" --encoder-weights "$ENCODER_WEIGHTS" --optimizer "$OPTIMIZER" --learning-rate "$LR"
  --weight-decay 1e-2 --scheduler poly --augment "$AUGMENT" --select "$SELECT" --precision "$PRECISION" --run_dir "$LOGS")
each() { # function: calls it with every row that is wanted, seed and number of masks
  local row seed count
  for seed in $SEEDS; do
    for count in $COUNTS; do for row in $ROWS; do if wanted "$row"; then "$1" "$row" "$seed" "$count"; fi; done; done
  done
}
halves() { few=$LISTS/seed$1/labelled_$2.csv weak=${WEAK:-$LISTS/seed$1/unlabelled_$2.csv}; } # seed, masks
alone() { [ "$1" = supervised ] || [ "$1" = all_masks ]; } # rows of a single stage, without classes
stage1() { # row, seed, masks
  local row=$1 few weak name=labelled$3/$1_stage1_s$2
  halves "$2" "$3"
  local same=(--seed "$2" "${SAME[@]}" --epochs "$EPOCHS" --batch-size "$BATCH")
  if alone "$row"; then # in as many steps as the others
    name=labelled$3/${row}_s$2
    if [ "$row" = all_masks ]; then few=$TRAIN; fi
    run "$name" train_u2pl.py --train_csv "$few" --unlabelled_csv "$weak" --preset supervised --name "$name" "${same[@]}"
  else
    run "$name" train_lpl.py --train_csv "$few" --weak_csv "$weak" --preset "$row" --pct-power "$POWER" --name "$name" "${same[@]}"
  fi
}
stage2() { # the same; its masks are those that stage 1 writes, which is tested with the classes of the test images
  local few weak first=labelled$3/$1_stage1_s$2 name=labelled$3/$1_stage2_s$2
  if alone "$1" || ! await "$first"; then return 0; fi
  halves "$2" "$3"
  stage utils/predict_mask.py --list "$weak" --image-labels --checkpoint "$LOGS/$first/$SELECT.pt" "${LOOKS[@]}" ${CRF:+--crf} \
    --true-masks "$few" --trusted --data-root "$ROOT" --out "$LOGS/masks/$first"
  scores "$first" --image-labels
  run "$name" train_without_weight.py --train_csv "$LOGS/masks/${first}_with_true.csv" --name "$name" --seed "$2" "${SAME[@]}" \
    --epochs "$EPOCHS2" --batch-size "$BATCH2"
}
plain_scores() { # without classes
  local name=labelled$3/$1_stage2_s$2
  if alone "$1"; then name=labelled$3/$1_s$2; fi
  if ! await "$name"; then return 0; fi
  scores "$name"
}
scores() { # name of a run, flags: at the images' own size, over scales
  local name=$1
  shift
  if [ -z "$TEST" ]; then return; fi
  if [ -z "$DRY_RUN" ] && [ "$LOGS/$name/scores.json" -nt "$LOGS/$name/$SELECT.pt" ]; then return; fi
  stage evaluate.py "$LOGS/$name/$SELECT.pt" --list "$TESTED" --data-root "$ROOT" "${LOOKS[@]}" --json "$LOGS/$name/scores.json" "$@"
}
ladder() {
  local seed count folders=() baseline=supervised
  if [ -n "$TEST" ]; then
    stage utils/prepare_data.py image-labels "$TEST" --classes "$CLASSES" --data-root "$ROOT" --out "$TESTED"
  fi
  for seed in $SEEDS; do
    stage utils/prepare_data.py split "$TRAIN" --labelled $COUNTS --seed "$seed" --keep-masks --image-labels \
      --classes "$CLASSES" --data-root "$ROOT" --out "$LISTS/seed$seed"
  done
  each stage1
  each stage2
  each plain_scores
  finish
  for count in $COUNTS; do folders+=("$LOGS/labelled$count"); done
  if ! wanted supervised; then baseline=${ONLY%% *}_stage2; fi
  stage utils/report.py "${folders[@]}" --score mIoU --baseline "${baseline/all_masks_stage2/all_masks}" --out "$LOGS"
  [ -n "$DRY_RUN" ] || echo "done in $((SECONDS - STARTED)) s; the table is $LOGS/table.md, the report $LOGS/report.html"
}
go
