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
# classes of their masks, unless WEAK names a list (CSV: img,label); images with masks are left out of it. Everything
# finished is skipped, everything interrupted goes on. Exit codes: 0 done, 1 a run failed, 2 a mistake in the settings,
# 75 interrupted (the same command goes on from here). Settings, by environment:
#   DATA, or TRAIN VALID TEST   DATA_ROOT   WEAK   CLASSES
#   LABELLED="46 1/8" (images, or shares of the list)   SEEDS="0 1 2"   ONLY="ce cce_pct" (of the ROWS below)
#   EPOCHS (passes over the weak images)  EPOCHS2 (of stage 2, over all)  SIZE  BATCH  BATCH2  LR  OPTIMIZER  ARCH  ENCODER
#   ENCODER_WEIGHTS  PRECISION  AUGMENT  SCALES="0.75 1 1.25" (of masks and tests, with mirrored images)  CRF=1 (of masks)
#   WIDTH (of PlainUNet)  POWER=8 (exponent of cce_pct's image weight)  SELECT=best|last  NPROC (processes a run)  JOBS (runs
#   at a time)  SWEEP (its name; all it writes is in runs/SWEEP)   DRY_RUN=1 (print the command lines)
# Another POWER, CRF or SCALES makes rows of its own in the same table (cce_pct_power2, cce_crf, cce_scales1): the runs
# before them that do not depend on it are used again.
set -euo pipefail
for name in DATA TRAIN VALID TEST WEAK DATA_ROOT; do # files of the caller's folder
  if [ -n "${!name:-}" ] && [ -e "${!name}" ]; then declare "$name=$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")"
. ./setup.sh
. ./sweep.sh

MODE=ladder
ROWS="supervised ce cce cce_pct all_masks"
ARCH=${ARCH:-DeepLabV3Plus} AUGMENT=${AUGMENT:-crop} POWER=${POWER:-8} SCALES=${SCALES:-0.75 1 1.25} CRF=${CRF:-} WEAK=${WEAK:-}
usual
EPOCHS2=${EPOCHS2:-$EPOCHS} BATCH2=${BATCH2:-$((2 * BATCH))}
whole EPOCHS2 BATCH2
number='([0-9]+\.?[0-9]*|\.[0-9]+)'
[[ $POWER =~ ^$number$ ]] || fail "POWER=$POWER: a number of 0 or more, such as 2 or 0.5"
[[ $CRF =~ ^[01]?$ ]] || fail "CRF=$CRF: 1 for masks that follow the edges of the image, else 0 or nothing"
CRF=${CRF#0} NEEDS=${CRF:+requirements-crf.txt}
[[ " $SCALES " =~ ^(\ +$number)+\ +$ ]] && printf '%s\n' $SCALES | awk '$1 < 0.05 || $1 > 20 { bad = 1 } END { exit bad }' ||
  fail "SCALES=$SCALES: numbers from 0.05 to 20, separated by blanks"
there WEAK
SCALES=$(echo $SCALES) SCALED="" # what these settings add to names, so that nothing that others made is taken for theirs
if [ "$SCALES" != "0.75 1 1.25" ]; then SCALED=_scales${SCALES// /-}; fi
MADE=${CRF:+_crf}$SCALED
begin "lpl-$SET-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep"
count_masks
ROOT=${DATA_ROOT:-.} TESTED=$LISTS/test_labels.csv LOOKS=(--scales $SCALES --flip)
SAME+=(--data_root "$ROOT" --arch "$ARCH" --encoder "$ENCODER" --scheduler poly)
each() { # function: calls it with every row that is wanted, seed and number of masks
  local row seed count
  for seed in $SEEDS; do
    for count in $COUNTS; do for row in $ROWS; do if wanted "$row"; then "$1" "$row" "$seed" "$count"; fi; done; done
  done
}
halves() { few=$LISTS/seed$1/labelled_$2.csv weak=$LISTS/seed$1/unlabelled_$2.csv; } # seed, masks
as() { # row: what it is called; cce_pct says its POWER where that is another one
  if [ "$1" = cce_pct ] && [ "$POWER" != 8 ]; then echo "cce_pct_power$POWER"; else echo "$1"; fi
}
alone() { [ "$1" = supervised ] || [ "$1" = all_masks ]; } # rows of a single stage, without classes
stage1() { # row, seed, masks
  local row=$1 few weak name more=()
  name=labelled$3/$(as "$1")_stage1_s$2
  if [ "$row" = cce_pct ]; then more=(--pct-power "$POWER"); fi
  halves "$2" "$3"
  local same=(--seed "$2" "${SAME[@]}" --epochs "$EPOCHS" --batch-size "$BATCH")
  if alone "$row"; then # in as many steps as the others
    name=labelled$3/${row}_s$2
    if [ "$row" = all_masks ]; then few=$TRAIN; fi
    run "$name" train_u2pl.py --train_csv "$few" --unlabelled_csv "$weak" --preset supervised --name "$name" "${same[@]}"
  else
    run "$name" train_lpl.py --train_csv "$few" --weak_csv "$weak" --preset "$row" "${more[@]}" --name "$name" "${same[@]}"
  fi
}
stage2() { # the same; its masks are those that stage 1 writes, which is tested with the classes of the test images
  local few weak first name masks row
  row=$(as "$1")
  first=labelled$3/${row}_stage1_s$2 name=labelled$3/${row}${MADE}_stage2_s$2 masks=$LOGS/masks/labelled$3/${row}${MADE}_stage1_s$2
  if alone "$1" || ! await "$first"; then return 0; fi
  halves "$2" "$3"
  stage utils/predict_mask.py --list "$weak" --image-labels --checkpoint "$LOGS/$first/$SELECT.pt" "${LOOKS[@]}" ${CRF:+--crf} \
    --true-masks "$few" --trusted --data-root "$ROOT" --out "$masks"
  scores "$first" --image-labels
  run "$name" train_without_weight.py --train_csv "${masks}_with_true.csv" --name "$name" --seed "$2" "${SAME[@]}" \
    --epochs "$EPOCHS2" --batch-size "$BATCH2"
}
plain_scores() { # without classes
  local name
  name=labelled$3/$(as "$1")${MADE}_stage2_s$2
  if alone "$1"; then name=labelled$3/$1_s$2; fi
  if ! await "$name"; then return 0; fi
  scores "$name"
}
scores() { # name of a run, flags: at the images' own size, over scales
  local net=$LOGS/$1/$SELECT.pt file=$LOGS/$1/scores$SCALED.json
  shift
  if [ -z "$TEST" ]; then return; fi
  if [ -z "$DRY_RUN" ] && [ "$file" -nt "$net" ] && [ "$file" -nt "$TESTED" ]; then return; fi
  stage evaluate.py "$net" --list "$TESTED" --data-root "$ROOT" "${LOOKS[@]}" --json "$file" "$@"
}
ladder() {
  local seed count folders=() baseline=supervised
  if [ -n "$TEST" ]; then
    stage utils/prepare_data.py image-labels "$TEST" --classes "$CLASSES" --data-root "$ROOT" --out "$TESTED"
  fi
  for seed in $SEEDS; do
    stage utils/prepare_data.py split "$TRAIN" --labelled $COUNTS --seed "$seed" --keep-masks --image-labels \
      --classes "$CLASSES" ${WEAK:+--weak "$WEAK"} --data-root "$ROOT" --out "$LISTS/seed$seed"
  done
  each stage1
  each stage2
  each plain_scores
  finish
  for count in $COUNTS; do folders+=("$LOGS/labelled$count"); done
  if ! wanted supervised; then baseline=$(as "${ONLY%% *}")${MADE}_stage2; fi
  stage utils/report.py "${folders[@]}" --score mIoU --baseline "${baseline/all_masks*/all_masks}" --out "$LOGS"
  [ -n "$DRY_RUN" ] || echo "done in $((SECONDS - STARTED)) s; the table is $LOGS/table.md, the report $LOGS/report.html"
}
go
