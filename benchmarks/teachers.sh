#!/usr/bin/env bash
# Which network makes the best teacher from a few trusted masks? One table in benchmarks/teachers.md.
#
#   DATA=ccp_person ./benchmarks/teachers.sh     a folder with image/ and mask/
#
# Every architecture is trained on the same 20 clean images, as run.sh trains its teacher, judges a list whose masks are
# coarse by 60 % (dilated) and is itself judged on the clean test list. All is in runs/teachers-...; what is there is skipped.
#   SEEDS="0 1"   SIZE=96   EPOCHS=60   ARCHS="Unet ..."   ENCODER=resnet18   PRECISION=fp32|bf16
set -euo pipefail
DATA=$(realpath "${DATA:?DATA=folder with image/ and mask/}")
cd "$(dirname "$0")/.."
. ./setup.sh
find_python requirements.txt || { echo "error: no Python with what requirements.txt asks for; run ./test.sh once" >&2; exit 2; }
SEEDS=${SEEDS:-0} SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-60} ENCODER=${ENCODER:-resnet18}
ARCHS=${ARCHS:-PointRend Unet DeepLabV3Plus UPerNet Segformer}
if [ -z "${PRECISION:-}" ]; then grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && PRECISION=bf16 || PRECISION=fp32; fi
OUT=runs/teachers-$(basename "$DATA")-$ENCODER-${SIZE}px-${EPOCHS}ep
LISTS=$OUT/lists NOISY=$OUT/lists/dilate
"$PY" utils/prepare_data.py folder --images "$DATA/image" --masks "$DATA/mask" --test 0.2 --out "$LISTS"
"$PY" utils/generate_noisy_label.py --train_csv "$LISTS/train.csv" --valid_csv "$LISTS/valid.csv" --ratios 60 \
  --levels 6 10 --op dilate --trusted 20 --out-csv "$NOISY" --out-masks "$OUT/noisy"

judge() { # name, checkpoints...: its masks of both lists, their scores, and the list it would clean
  local name=$1 list
  shift
  for list in "$LISTS/test.csv" "$NOISY/train_noisy_60.csv"; do
    local masks=$OUT/masks/$name/$(basename "$list" .csv)
    "$PY" utils/predict_mask.py --list "$list" --checkpoint "$@" --trusted "$NOISY/trusted.csv" --out "$masks" \
      --precision "$PRECISION"
    "$PY" utils/get_weight.py --list "$list" --teacher "$masks" --name "$name" --score bf --out "$OUT/scores"
  done
  "$PY" utils/get_weight.py --list "$list" --teacher "$masks" --name "$name" --score bf --write-labels --out "$OUT/scores"
}

for seed in $SEEDS; do
  all=()
  for arch in $ARCHS; do
    "$PY" train_without_weight.py --name "${arch}_s$seed" --run_dir "$OUT" --train_csv "$NOISY/trusted.csv" \
      --valid_csv "$NOISY/trusted.csv" --test_csv "$LISTS/test.csv" --seed "$seed" --arch "$arch" --encoder "$ENCODER" \
      --size "$SIZE" --epochs "$EPOCHS" --batch-size 8 --learning-rate 1e-3 --optimizer adamw --weight-decay 1e-2 \
      --scheduler cosine --augment strong --select last --precision "$PRECISION"
    judge "${arch}_s$seed" "$OUT/${arch}_s$seed/last.pt"
    all+=("$OUT/${arch}_s$seed/last.pt")
    "$PY" benchmarks/_teachers_table.py "$OUT"
  done
  if [ ${#all[@]} -gt 1 ]; then judge "ensemble_s$seed" "${all[@]}"; fi
done
"$PY" benchmarks/_teachers_table.py "$OUT"
