#!/usr/bin/env bash
# The table of benchmarks/jsrt.md in one command: lists, teachers, weights, all runs, and the table in the page.
#
#   DATA=data/jsrt benchmarks/jsrt.sh                  # the published folder (images_train, lung_gts_train, ...)
#   ORGANS="lung heart clavicle" SIZE=256 WIDTH=64 EPOCHS=50 SEEDS="0 1 2" OUT=runs/jsrt256 PAGE= benchmarks/jsrt.sh     # as large as the paper's, for a GPU
#
# Everything finished is skipped, everything interrupted goes on. Settings, by environment:
#   ORGANS="lung heart" (clavicle: with more EPOCHS, it is small)   SEEDS="0"   SIZE=96   EPOCHS=12 (of one training)   TEACHER_EPOCHS=120   WIDTH=8   BATCH=8   LR=3e-3
#   ONLY="no_weight kd_bf" (rows)   PRECISION=bf16   NPROC (torchrun processes a run)   OUT=runs/jsrt
#   PAGE (page whose block `jsrt` gets the table; empty: none)
# Seeds come last in the order of the work, so that an interrupted one has whole rows of fewer seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
find_python requirements.txt || { echo "error: no Python with what requirements.txt asks for; run ./test.sh once" >&2; exit 2; }
DATA=${DATA:-data/jsrt} OUT=${OUT:-runs/jsrt} ORGANS=${ORGANS:-lung heart} SEEDS=${SEEDS:-0} NPROC=${NPROC:-1}
SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-12} WIDTH=${WIDTH:-8} BATCH=${BATCH:-8} LR=${LR:-3e-3} PRECISION=${PRECISION:-bf16}
TEACHER_EPOCHS=${TEACHER_EPOCHS:-$((10 * EPOCHS))} PAGE=${PAGE-benchmarks/jsrt.md} ONLY=${ONLY:-}
MIN_BIAS=$("$PY" -c "print($SIZE / 256)") # a pixel of the published size
LAUNCH=("$PY")
if [ "$NPROC" -gt 1 ]; then LAUNCH+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC"); fi
ROWS="clean no_weight teacher_bf kd_bf teacher_pixel kd_pixel spatial_correction spatial_distance gce sce nr_dice t_loss early_correction cleaned"
for name in $ONLY; do
  [[ " $ROWS " == *" $name "* ]] || { echo "error: ONLY=$ONLY: no row $name; rows are $ROWS" >&2; exit 2; }
done

train() { # name, script, list, flags...
  local name=$1 script=$2 list=$3
  shift 3
  mkdir -p "$HOME_OF/logs"
  "${LAUNCH[@]}" "$script" --run_dir "$HOME_OF" --name "$name" --train_csv "$list" --valid_csv "$LISTS/valid.csv" \
    --test_csv "$LISTS/test.csv" --size "$SIZE" --arch PlainUNet --width "$WIDTH" --batch-size "$BATCH" --learning-rate "$LR" \
    --optimizer adamw --weight-decay 1e-2 --scheduler cosine --precision "$PRECISION" "$@" >>"$HOME_OF/logs/${name//\//_}.log" 2>&1 ||
    { echo "error: $HOME_OF/$name failed: $(tail -n 1 "$HOME_OF/logs/${name//\//_}.log")" >&2; exit 1; }
  echo "$HOME_OF/$name: $(tail -n 1 "$HOME_OF/logs/${name//\//_}.log" | cut -c1-150)"
}
row() { # row, script, list, epochs, flags...; the published noise is in every mask
  local name=$1 script=$2 list=$3 epochs=$4 folder=noise100
  shift 4
  if [ "$name" = clean ]; then folder=noise0; fi
  [ -z "$ONLY" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  train "$folder/${name}_s$SEED" "$script" "$list" --epochs "$epochs" --seed "$SEED" "$@"
}
teacher() { # trained on the clean validation images, strongly augmented; its masks, weights and support of the noisy list
  train teacher train_without_weight.py "$LISTS/valid.csv" --epochs "$TEACHER_EPOCHS" --augment strong --select last
  "$PY" utils/predict_mask.py --list "$LISTS/train.csv" --checkpoint "$HOME_OF/teacher/last.pt" --trusted --support \
    --out "$HOME_OF/masks" --precision "$PRECISION"
  "$PY" utils/get_weight.py --list "$LISTS/train.csv" --teacher "$HOME_OF/masks" --name teacher --score bf --out "$HOME_OF/weights"
  "$PY" utils/get_weight.py --list "$LISTS/train.csv" --teacher "$HOME_OF/masks" --name teacher --score bf --write-labels \
    --threshold 0.9 --out "$HOME_OF/cleaned"
}
rows_of_seed() {
  local loss noisy=$LISTS/train.csv bf=$HOME_OF/weights/train_teacher_weight_bfscore.csv support=$HOME_OF/masks_support.csv
  row clean train_without_weight.py "$LISTS/train_clean.csv" "$EPOCHS"
  row no_weight train_without_weight.py "$noisy" "$EPOCHS"
  row spatial_correction train_spatial_correction.py "$noisy" $((3 * EPOCHS)) --rounds 2 --min-bias "$MIN_BIAS"
  row spatial_distance train_spatial_correction.py "$noisy" $((2 * EPOCHS)) --rounds 1 --min-bias "$MIN_BIAS" --correction distance
  row teacher_pixel train_with_Teacher_weight.py "$support" "$EPOCHS" --level pixel
  row kd_pixel train_with_KDweight.py "$support" "$EPOCHS" --level pixel --warmup $((EPOCHS / 10))
  for loss in gce sce nr_dice t_loss; do row $loss train_without_weight.py "$noisy" "$EPOCHS" --loss $loss; done
  row early_correction train_early_correction.py "$noisy" "$EPOCHS"
  row cleaned train_without_weight.py "$HOME_OF/cleaned/train_teacher_cleaned_bf.csv" "$EPOCHS"
  row teacher_bf train_with_Teacher_weight.py "$bf" "$EPOCHS"
  row kd_bf train_with_KDweight.py "$bf" "$EPOCHS" --quality bf --warmup $((EPOCHS / 10)) --student-theta $((SIZE >= 241 ? 5 : 3))
}

for SEED in $SEEDS; do
  for organ in $ORGANS; do
    HOME_OF=$OUT/$organ LISTS=$OUT/$organ/lists
    "$PY" utils/prepare_data.py jsrt --source "$DATA" --organ "$organ" --out "$LISTS"
    if [ -z "$ONLY" ] || [[ $ONLY == *teacher* || $ONLY == *kd_* || $ONLY == *cleaned* ]]; then teacher; fi
    rows_of_seed
  done
done
"$PY" utils/report.py $(for organ in $ORGANS; do echo "$OUT/$organ"; done) --out "$OUT" --score Dice ${PAGE:+--page "$PAGE" --block jsrt}
