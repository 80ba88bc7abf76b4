#!/usr/bin/env bash
# Few masks and many images: the ladder from supervised training to U2PL, FixMatch and UniMatch, in one command, one table.
#
#   ./run_u2pl.sh                                                  the built-in demo set
#   DATA=my_folder LABELLED="1/16 1/8" SEEDS="0 1 2" ./run_u2pl.sh  images/ and masks/ in it, or a list (CSV: img,filename)
#   TRAIN=train.csv VALID=valid.csv TEST=test.csv CLASSES=11 LABELLED="46 92" ./run_u2pl.sh        lists that are there
#
# A seed draws the images that keep their masks, too; all rows of a seed have the same. Everything finished is skipped,
# everything interrupted goes on. Exit codes: 0 done, 1 a run failed, 2 a mistake in the settings, 75 interrupted (the same
# command goes on from here). Settings, by environment:
#   DATA, or TRAIN VALID TEST   DATA_ROOT   MORE (lists of further images without masks)   CLASSES
#   LABELLED="46 1/8" (images, or shares of the list)   SEEDS="0 1 2"   ONLY="supervised u2pl" (of the ROWS below)
#   EPOCHS (passes over the unlabelled images)  SIZE  BATCH  LR  OPTIMIZER  ARCH  ENCODER  ENCODER_WEIGHTS  PRECISION  AUGMENT
#   WIDTH (of PlainUNet)  WARM (epochs on masks alone)  UNSUP=1 (weight of pseudo-labels)  BANK  KEYS  FEATURES (of the contrast)
#   SELECT=best|last  NPROC (processes a run)  JOBS (runs at a time)  SWEEP (its name; all it writes is in runs/SWEEP)
#   DRY_RUN=1 (print the command lines)
set -euo pipefail
for name in DATA TRAIN VALID TEST DATA_ROOT; do # files of the caller's folder
  if [ -n "${!name:-}" ] && [ -e "${!name}" ]; then declare "$name=$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")"
. ./setup.sh
. ./sweep.sh

MODE=ladder
ROWS="supervised mean_teacher cutmix u2pl_no_contrast u2pl fixmatch unimatch all_masks"
AUGMENT=${AUGMENT:-crop} WARM=${WARM:-1} UNSUP=${UNSUP:-1} FEATURES=${FEATURES:-256}
usual
KEYS=${KEYS:-$((SIZE >= 256 ? 512 : 128))} BANK=${BANK:-$((SIZE >= 256 ? 30000 : 3000))}
whole KEYS BANK FEATURES
[[ $UNSUP =~ ^([0-9]+|[0-9]*\.[0-9]+)$ ]] || fail "UNSUP=$UNSUP: a number such as 0.3"
[[ $WARM =~ ^[0-9]+$ ]] || fail "WARM=$WARM: a whole number"
begin "u2pl-$SET-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep"
count_masks
SAME+=(--data_root "${DATA_ROOT:-.}" --arch "$ARCH" --encoder "$ENCODER" --scheduler poly --epochs "$EPOCHS" --batch-size "$BATCH")
CONTRAST=(--warm-epochs "$WARM" --bank "$BANK" --bank-first 0 --max-keys "$KEYS" --features "$FEATURES")
one() { # row, seed, masks: one run of the ladder
  local row=$1 seed=$2 name=labelled$3/$1_s$2 split=$LISTS/seed$2
  local flags=(--name "$name" --seed "$seed" "${SAME[@]}") few=("$split/labelled_$3.csv" --unlabelled_csv "$split/unlabelled_$3.csv")
  case $row in
    fixmatch|unimatch) run "$name" train_unimatch.py --train_csv "${few[@]}" --preset "$row" "${flags[@]}" --unsup-weight "$UNSUP" ;;
    all_masks) # every image with its mask, in as many steps
      run "$name" train_u2pl.py --train_csv "$TRAIN" --unlabelled_csv "$split/unlabelled_$3.csv" --preset supervised "${flags[@]}" ;;
    supervised) run "$name" train_u2pl.py --train_csv "${few[@]}" --preset "$row" "${flags[@]}" ;;
    *)
      run "$name" train_u2pl.py --train_csv "${few[@]}" --preset "$row" "${flags[@]}" "${CONTRAST[@]}" --unsup-weight "$UNSUP"
      ;;
  esac
}
ladder() {
  local seed count row folders=()
  for seed in $SEEDS; do
    stage utils/prepare_data.py split "$TRAIN" --labelled $COUNTS --seed "$seed" --keep-masks --data-root "${DATA_ROOT:-.}" \
      ${MORE:+--extra $MORE} --out "$LISTS/seed$seed"
    for count in $COUNTS; do for row in $ROWS; do if wanted "$row"; then one "$row" "$seed" "$count"; fi; done; done
  done
  finish
  for count in $COUNTS; do folders+=("$LOGS/labelled$count"); done
  stage utils/report.py "${folders[@]}" --score mIoU --baseline supervised --out "$LOGS"
  [ -n "$DRY_RUN" ] || echo "done in $((SECONDS - STARTED)) s; the table is $LOGS/table.md, the report $LOGS/report.html"
}
go
