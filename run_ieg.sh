#!/usr/bin/env bash
# What a few clean images make of wrong labels: the baseline, L2R and IEG on CIFAR, several shares of noise, one table.
#
#   DOWNLOAD=1 ./run_ieg.sh                                       CIFAR-10 by torchvision, 40 and 80 % noise, ResNet-29: for a GPU
#   DATA_ROOT=cifar10 SEEDS="0 1 2" ./run_ieg.sh                  folders train/CLASS/*.png and test/CLASS/*.png
#   SET=cifar100 KIND=asymmetric NOISE="20 40" DOWNLOAD=1 ./run_ieg.sh
#   NETWORK=small STEPS=2376 BATCH=50 FLAGS="--train-images 1000 --test-images 2000 --first-period 180 --ema-decay 0.99" \
#     IEG_FLAGS="--ce-factor 1 --consistency-factor 5" DOWNLOAD=1 ./run_ieg.sh                          for a CPU
#
# Every row of a seed is the same network on the same images and noise. Everything finished is skipped, everything
# interrupted goes on. Exit codes: 0 done, 1 a run failed, 2 a mistake in the settings, 75 interrupted. Settings, by environment:
#   SET=cifar10|cifar100   KIND=uniform|asymmetric   NOISE="40 80" (percent)   PROBES=10 (clean images a class)   SEEDS="0 1 2"
#   NETWORK=resnet29 (wrn28-10, resnet50, small)   STEPS=100000   BATCH=100   ONLY="supervised ieg"   DATA_ROOT=data   DOWNLOAD=1
#   FLAGS="--ema-decay 0.99" (further flags of train_ieg.py, for all rows)   IEG_FLAGS="--ce-factor 1" (for the row ieg)
#   PRECISION   NPROC (processes a run)   JOBS (runs at a time)   SWEEP (its name; all is in runs/SWEEP)   DRY_RUN=1
set -euo pipefail
if [ -n "${DATA_ROOT:-}" ]; then DATA_ROOT=$(realpath -m "$DATA_ROOT"); fi # of the caller's folder
cd "$(dirname "$0")"
. ./setup.sh
. ./sweep.sh

MODE=labels
ROWS="supervised l2r ieg"
SET=${SET:-cifar10} KIND=${KIND:-uniform} NOISE=${NOISE:-40 80} PROBES=${PROBES:-10} SEEDS=${SEEDS:-0} ONLY=${ONLY:-}
NETWORK=${NETWORK:-resnet29} STEPS=${STEPS:-100000} BATCH=${BATCH:-100} NPROC=${NPROC:-1} DRY_RUN=${DRY_RUN:-} DOWNLOAD=${DOWNLOAD:-}
whole PROBES STEPS BATCH NPROC ${JOBS:+JOBS}
several_seeds
noise_levels
[ "$BATCH" -ge 2 ] || fail "BATCH=$BATCH: 2 or more"
[ -z "${DATA:-}" ] || fail "DATA=$DATA: images with labels are named by DATA_ROOT"
[[ $DOWNLOAD =~ ^1?$ ]] || fail "DOWNLOAD=$DOWNLOAD: 1, or nothing"
[ -n "$DOWNLOAD$DRY_RUN" ] || [ -d "${DATA_ROOT:-data}" ] || fail "DATA_ROOT=${DATA_ROOT:-data}: no such folder; DOWNLOAD=1 makes it"
[[ $SET =~ ^cifar100?$ ]] || fail "SET=$SET: cifar10 or cifar100"
[[ $KIND =~ ^(uniform|asymmetric)$ ]] || fail "KIND=$KIND: uniform or asymmetric"
[[ $NETWORK =~ ^(wrn28-10|resnet29|resnet50|small)$ ]] || fail "NETWORK=$NETWORK: wrn28-10, resnet29, resnet50 or small"
for row in $ONLY; do [[ " $ROWS " == *" $row "* ]] || fail "ONLY=$ONLY: no row $row; rows are $ROWS"; done
SWEEP=${SWEEP:-ieg-$SET-$KIND-$NETWORK-${PROBES}probes-${STEPS}x$BATCH} LOGS=runs/$SWEEP
machine
claim
train() { # row, noise, seed
  local more=()
  if [ "$1" = ieg ]; then more=(${IEG_FLAGS:-}); fi
  if [ -n "$DOWNLOAD" ]; then more+=(--download); fi
  run "noise$2/$1_s$3" train_ieg.py --dataset "${SET}_${KIND}_$(awk "BEGIN { print $2 / 100 }")" --method "$1" --network-name "$NETWORK" \
    --run_dir "$LOGS" --name "noise$2/$1_s$3" --seed "$3" --data-root "${DATA_ROOT:-data}" --max-iteration "$STEPS" --batch-size "$BATCH" \
    --probe-per-class "$PROBES" --precision "$PRECISION" ${FLAGS:-} "${more[@]}"
}
labels() {
  local seed noise row baseline=supervised
  for seed in $SEEDS; do
    for noise in $NOISE; do for row in $ROWS; do if wanted "$row"; then train "$row" "$noise" "$seed"; fi; done; done
  done
  finish
  if ! wanted supervised; then read -r baseline _ <<<"$ONLY"; fi
  stage utils/report.py "$LOGS" --baseline "$baseline"
  [ -n "$DRY_RUN" ] || echo "done in $((SECONDS - STARTED)) s; the table is $LOGS/table.md, the report $LOGS/report.html"
}
go
