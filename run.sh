#!/usr/bin/env bash
# The whole comparison in one command: data, noisy lists, teacher, weights, twelve runs and a clean upper bound, one table.
#
#   ./run.sh                       the built-in demo set, minutes on two CPU cores
#   DATA=my_folder ./run.sh        your own folder (images/ and masks/ in it) or list (CSV: img,filename)
#   ./run.sh paper                 the published setting, on data/Supervisely/{train,train_mask}
#
# Everything finished is skipped, everything interrupted goes on. Exit codes: 0 done, 1 a run failed, 2 a mistake in the
# settings or a sweep that is running already, 75 interrupted (the same command goes on). Settings, by environment:
#   DATA, TEST (clean test list)   NOISE="10 20 ... 60" (0: masks as they are)   OP=both|erode|dilate   LEVELS="6 10"
#   KINDS="polygon missing:0.3+box:0.7" instead of OP and LEVELS: each word is a noise of its own, + mixes   SEVERITY="0.8" or several
#   CLASSES=11 for masks of class indices (255 is ignored); KINDS is then jitter+polygon+missing+confusion if not given
#   SEEDS="0 1 2"  EPOCHS  SIZE  BATCH  LR  OPTIMIZER  ARCH  ENCODER  ENCODER_WEIGHTS  WIDTH (of PlainUNet)  PRECISION  AUGMENT
#   TEACHER=trusted|folds  TRUSTED=20 or a list of clean masks  TEACHER_EPOCHS  VALID=trusted|noisy  SELECT=best|last  STUDENT_THETA
#   ONLY="no_weight kd_bf gce" (rows; teacher_both kd_both cleaned gce sce nr_dice t_loss early_correction
#     spatial_correction l2r ieg run only where it names them; the last three use the trusted list in training)
#   NPROC (torchrun processes a run)  JOBS (runs at a time; each has its own NPROC GPUs)
#   SWEEP (its name; all it writes is in runs/SWEEP)  DRY_RUN=1 (print the command lines, ready to be executed)
#   LAUNCHER (words before a training script, as srun)  TORCHRUN (torchrun's flags, else --standalone): benchmarks/slurm.sh
set -euo pipefail
for name in DATA TEST TRUSTED; do # files of the caller's folder
  if [ -n "${!name:-}" ] && [ -e "${!name}" ] && ! [ "$PWD" -ef "$(dirname "$0")" ]; then declare "$name=$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")"
. ./setup.sh
. ./sweep.sh

MODE=${1:-sweep}
ROWS="clean no_weight teacher_miou teacher_bf teacher_bm teacher_pixel kd_miou kd_bf kd_bm kd_pixel"
ROWS+=" decoupling co_teaching co_teaching+ weights" MORE_ROWS="teacher_both kd_both cleaned gce sce nr_dice t_loss early_correction spatial_correction l2r ieg"
[ "$MODE" = paper ] || [ "$MODE" = sweep ] || fail "./run.sh $MODE: say nothing, or 'paper'"
NPROC=${NPROC:-1} DRY_RUN=${DRY_RUN:-} ONLY=${ONLY:-} SEEDS=${SEEDS:-0}
OP=${OP:-both} LEVELS=${LEVELS:-6 10} NOISE=${NOISE:-60} TEACHER=${TEACHER:-trusted} TRUSTED=${TRUSTED:-20}
CLASSES=${CLASSES:-1} KINDS=${KINDS:-} SEVERITY=${SEVERITY:-0.8}
ARCH=${ARCH:-Unet} ENCODER=${ENCODER:-resnet18} ENCODER_WEIGHTS=${ENCODER_WEIGHTS:-none} OPTIMIZER=${OPTIMIZER:-adamw}
LR=${LR:-1e-3} BATCH=${BATCH:-8} WIDTH=${WIDTH:-64} AUGMENT=${AUGMENT:-flip} SELECT=${SELECT:-best} TEST=${TEST:-}
if [ -n "${DATA:-}" ]; then SIZE=${SIZE:-321} EPOCHS=${EPOCHS:-40} FOLDS=${FOLDS:-3}
else SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-6} FOLDS=${FOLDS:-2}; fi
whole EPOCHS
TEACHER_EPOCHS=${TEACHER_EPOCHS:-$((EPOCHS > 60 ? EPOCHS : 60))}
VALID=${VALID:-$TEACHER}
whole SIZE BATCH WIDTH NPROC TEACHER_EPOCHS FOLDS CLASSES ${JOBS:+JOBS}
if [ "$CLASSES" -gt 1 ]; then
  [ -n "${DATA:-}" ] || fail "CLASSES=$CLASSES: the demo set has one class; name your own with DATA=list.csv"
  # there is no erosion and dilation of all classes at once
  [ -z "${NOISE//[0 ]/}" ] || KINDS=${KINDS:-jitter+polygon+missing+confusion}
fi
# teachers are scored at full size with 2 pixels of tolerance; the student at SIZE, where that is less (published: 321)
STUDENT_THETA=${STUDENT_THETA:-$((SIZE >= 241 ? 5 : 3))}
noise_levels
several_seeds
case $TEACHER in trusted|folds) ;; *) fail "TEACHER=$TEACHER: trusted or folds" ;; esac
case $VALID in trusted|noisy|folds) ;; *) fail "VALID=$VALID: trusted or noisy" ;; esac
for name in $ONLY; do
  [ "$MODE" = paper ] || [[ " $ROWS $MORE_ROWS " == *" $name "* ]] || fail "ONLY=$ONLY: no row $name; rows are $ROWS $MORE_ROWS"
done
case $OP in both|erode|dilate) ;; *) fail "OP=$OP: both, erode or dilate" ;; esac
for name in $KINDS; do
  [[ $name =~ ^[a-z_]+(:[0-9.]+)?(\+[a-z_]+(:[0-9.]+)?)*$ ]] || fail "KINDS=$KINDS: $name is not KIND, or KIND:CHANCE+KIND:CHANCE"
done
[[ " $SEVERITY " =~ ^(\ +0?\.[0-9]+)+\ +$ ]] || fail "SEVERITY=$SEVERITY: IoUs such as 0.8, separated by blanks"
if [ "$TEACHER" = trusted ] && [ ! -f "$TRUSTED" ]; then
  [[ $TRUSTED =~ ^[1-9][0-9]*$ ]] || fail "TRUSTED=$TRUSTED: a number of images, or a list of clean masks"
  if [[ " $NOISE " == *" 0 "* ]] && [ "$MODE" = sweep ]; then
    fail "NOISE=0 takes your masks as they are: name a list of clean ones with TRUSTED=list.csv, or TEACHER=folds"
  fi
fi

machine

train_flags() { # FLAGS: what all runs of the sweep share
  FLAGS=(--run_dir "$LOGS" --batch-size "$BATCH" --learning-rate "$LR" --size "$SIZE" --arch "$ARCH" --width "$WIDTH" --encoder "$ENCODER"
    --encoder-weights "$ENCODER_WEIGHTS" --optimizer "$OPTIMIZER" --weight-decay 1e-2 --scheduler cosine
    --precision "$PRECISION" --classes "$CLASSES")
}

start_teacher() { # noise, training list: begin what the weights of this noise need
  local noise=$1 list=$2 k
  TEACHERS=(teacher)
  if [ "$TEACHER" = trusted ]; then
    run teacher train_without_weight.py --name teacher --train_csv "$TRUSTED_LIST" --valid_csv "$TRUSTED_LIST" \
      --test_csv "$TEST" --epochs "$TEACHER_EPOCHS" --augment strong --select last "${FLAGS[@]}"
    return
  fi
  stage utils/prepare_data.py folds "$list" --k "$FOLDS" --out "$LOGS/folds$noise"
  TEACHERS=()
  for ((k = 0; k < FOLDS; k++)); do
    TEACHERS+=("folds$noise/teacher$k")
    run "folds$noise/teacher$k" train_without_weight.py --name "folds$noise/teacher$k" \
      --train_csv "$LOGS/folds$noise/fold${k}_train.csv" --valid_csv "$LOGS/folds$noise/fold${k}_held_out.csv" \
      --epochs "$EPOCHS" --augment strong --select last "${FLAGS[@]}"
  done
}

weights() { # noise, training list, folder of weights: the teacher's masks, the three weight lists, the pixels' support
  local list=$2 masks=$LOGS/masks/$TEACHER checkpoints=("${TEACHERS[@]/#/$LOGS/}") how=(--folds "$FOLDS")
  checkpoints=("${checkpoints[@]/%//last.pt}")
  if [ "$TEACHER" = trusted ]; then how=(--trusted); else masks+=_$1; fi
  if wanted teacher_pixel || wanted kd_pixel || [[ $ONLY == *_both* ]]; then masks=$LOGS/masks/${TEACHER}_$1 how+=(--support); fi
  SUPPORT_LIST=${masks}_support.csv
  await "${TEACHERS[@]}" &&
    stage utils/predict_mask.py --list "$list" --checkpoint "${checkpoints[@]}" "${how[@]}" --out "$masks" \
      --precision "$PRECISION" &&
    stage utils/get_weight.py --list "$list" --teacher "$masks" --name "$TEACHER" --classes "$CLASSES" --out "$3" &&
    { [[ $ONLY != *_both* ]] ||
      stage utils/get_weight.py --list "$SUPPORT_LIST" --teacher "$masks" --name "$TEACHER" --classes "$CLASSES" --score bf \
        --out "$LOGS/both"; } &&
    { [[ $ONLY != *cleaned* ]] ||
      stage utils/get_weight.py --list "$list" --teacher "$masks" --name "$TEACHER" --classes "$CLASSES" --out "$3" \
        --score bf --write-labels; }
}

sweep() {
  find_data
  local kind severity
  NOISED=$OP # the noise and the trusted list of other settings live beside it, not in its place
  [ "$LEVELS" = "6 10" ] || NOISED+=-${LEVELS// /to}
  [ -z "$KINDS" ] || NOISED=$(slug "$KINDS-$SEVERITY")
  [ "$TEACHER" = folds ] || [ "$TRUSTED" = 20 ] || [ -f "$TRUSTED" ] || NOISED+=-${TRUSTED}trusted
  [ "$CLASSES" = 1 ] || SET+=-${CLASSES}classes
  local default=$SET-$NOISED-$TEACHER-$ARCH-$ENCODER-${SIZE}px-${EPOCHS}ep
  SWEEP=${SWEEP:-$default} LOGS=runs/${SWEEP:-$default}
  LISTS=$LOGS/lists TEST=${TEST:-$LOGS/lists/test.csv}
  claim
  train_flags
  if [ -z "${DATA:-}" ]; then draw_demo; fi
  stage utils/prepare_data.py "${SOURCE[@]}" --out "$LISTS"
  TRUSTED_LIST=""
  if [ -f "$TRUSTED" ]; then TRUSTED_LIST=$TRUSTED TRUSTED=0; fi
  if [ -z "$KINDS" ]; then one_noise "$NOISED" "" --levels $LEVELS --op "$OP"; fi
  for kind in $KINDS; do
    for severity in $SEVERITY; do # a sweep may be given more kinds later, so nothing here is named after all of them
      one_noise "$(slug "$kind")-$severity" "-$(slug "$kind")-$severity" --kinds ${kind//+/ } --severity "$severity" --classes "$CLASSES"
    done
  done
  finish
  stage utils/report.py "$LOGS"
  [ -n "$DRY_RUN" ] || echo "done in $((SECONDS - STARTED)) s; the report is $LOGS/report.html, its table in table.md and table.csv"
}

slug() { local name=${1//[:_+]/-} && echo "${name// /_}"; } # kinds of noise -> part of a file name

one_noise() { # folder of lists, end of the noise's name, flags of the noise: the noisy lists, then every ratio
  local where=$1 end=$2 noisy=${NOISE//[^0-9 ]/} ratio own
  shift 2
  own=$LISTS/$where/trusted.csv
  TRUSTED_LIST=${TRUSTED_LIST:-$([ -z "$end" ] && echo "$own" || echo "$LISTS/trusted-$TRUSTED.csv")}
  if [ "$noisy" != 0 ]; then
    stage utils/generate_noisy_label.py --train_csv "$LISTS/train.csv" --valid_csv "$LISTS/valid.csv" \
      --ratios $(printf '%s\n' $NOISE | grep -vx 0) "$@" --trusted "$TRUSTED" --out-csv "$LISTS/$where" --out-masks "$LOGS/noisy/$where"
    if [ "$TRUSTED" = 0 ] || [ -z "$end" ]; then :
    elif [ -n "$DRY_RUN" ]; then say cp "$own" "$TRUSTED_LIST"
    elif [ ! -f "$TRUSTED_LIST" ]; then cp "$own" "$TRUSTED_LIST.part" && mv "$TRUSTED_LIST.part" "$TRUSTED_LIST"; fi # alike for every noise
  fi
  for ratio in $NOISE; do one_ratio "$ratio" "$LISTS/$where" "$ratio$([ "$ratio" = 0 ] || echo "$end")"; done
}

one_ratio() { # ratio, folder of lists, name of this noise: every row, all seeds; first those that need no weights
  local ratio=$1 list=$2/train_noisy_$1.csv valid=$2/valid_noisy_$1.csv noise=$3 seed score loss stem weighted="" code=0
  if [ "$ratio" = 0 ]; then list=$LISTS/train.csv valid=$LISTS/valid.csv; fi
  if [ "$VALID" = trusted ]; then valid=$TRUSTED_LIST; fi
  if [ -z "$ONLY" ] || [[ $ONLY == *teacher_* || $ONLY == *kd_* || $ONLY == *weights* || $ONLY == *cleaned* ]]; then weighted=1; fi
  row() { # row name, script, list, flags...
    local name=$1 script=$2 train=$3 folder=noise$noise
    shift 3
    if [ "$name" = clean ]; then folder=noise0; fi
    wanted "$name" || return 0
    run "$folder/${name}_s$seed" "$script" --name "$folder/${name}_s$seed" --train_csv "$train" --valid_csv "$valid" \
      --test_csv "$TEST" --epochs "$EPOCHS" --augment "$AUGMENT" --select "$SELECT" --seed "$seed" "${FLAGS[@]}" "$@"
  }
  if [ -n "$weighted" ]; then start_teacher "$noise" "$list"; fi
  for seed in $SEEDS; do
    row decoupling train_decoupling.py "$list"
    row co_teaching train_co_teaching.py "$list" --num-gradual $((EPOCHS / 10 + 1))
    row co_teaching+ train_co_teaching+.py "$list" --num-gradual $((EPOCHS / 10 + 1))
    if [ "$ratio" != 0 ]; then row clean train_without_weight.py "$LISTS/train.csv"; fi
    row no_weight train_without_weight.py "$list"
    if [ -z "$ONLY" ]; then continue; fi
    for loss in gce sce nr_dice t_loss; do row $loss train_without_weight.py "$list" --loss $loss; done
    row early_correction train_early_correction.py "$list"
    row spatial_correction train_spatial_correction.py "$list" --epochs $((3 * EPOCHS)) --rounds 2 --trusted_csv "$TRUSTED_LIST" \
      --min-bias "$(printf '%d.%04d' $((SIZE / 256)) $((SIZE % 256 * 10000 / 256)))" # a pixel at 256
    # both see the trusted list itself, which no_weight does not; so it cannot choose their checkpoint, too
    for score in l2r ieg; do
      row $score train_ieg_seg.py "$list" --method $score --probe_csv "$TRUSTED_LIST" \
        --select "$([ "$VALID" = trusted ] && echo last || echo "$SELECT")"
    done
  done
  if [ -z "$weighted" ]; then return; fi
  local weights=$LOGS/weights warmup=$((EPOCHS / 10))
  [ "$noise" = "$ratio" ] || weights+=/${noise#"$ratio"-}
  weights "$noise" "$list" "$weights" || code=$?
  unfinished $code "no weights for noise $noise %, so none of the rows with weights"
  [ $code = 0 ] || return 0
  stem=$weights/$(basename "$list" .csv)_${TEACHER}_weight
  for seed in $SEEDS; do
    for score in miou bf bm; do row teacher_$score train_with_Teacher_weight.py "${stem}_${score}score.csv"; done
    row teacher_pixel train_with_Teacher_weight.py "$SUPPORT_LIST" --level pixel
    for score in miou bf bm; do
      row kd_$score train_with_KDweight.py "${stem}_${score}score.csv" --quality $score --warmup "$warmup" \
        --student-theta "$STUDENT_THETA"
    done
    row kd_pixel train_with_KDweight.py "$SUPPORT_LIST" --level pixel --warmup "$warmup"
    if [[ $ONLY == *_both* ]]; then
      score=$LOGS/both/$(basename "$SUPPORT_LIST" .csv)_${TEACHER}_weight_bfscore.csv
      row teacher_both train_with_Teacher_weight.py "$score" --level both
      row kd_both train_with_KDweight.py "$score" --level both --warmup "$warmup"
    fi
    if [[ $ONLY == *cleaned* ]]; then row cleaned train_without_weight.py "${stem%_weight}_cleaned_bf.csv"; fi
  done
}

paper() { # the published setting; the ten command lines are those of the original README
  SET=Supervisely LOGS=runs SWEEP=paper
  local csv=data/csv own=data/csv/Supervisely name
  if [ -z "$DRY_RUN" ]; then
    if [ ! -d data/Supervisely/train ] || [ ! -d data/Supervisely/train_mask ]; then
      fail "data/Supervisely/train and train_mask are not there: put the 5711 images and masks (321x321, <id>.png) into them"
    fi
    claim
    stage utils/prepare_data.py folder --images data/Supervisely/train --masks data/Supervisely/train_mask --test 711 --out $own
    stage utils/generate_noisy_label.py --train_csv $own/train.csv --valid_csv $own/valid.csv --test_csv $own/test.csv \
      --preset nlkd --ratios 60 --trusted 20 --out-csv $own --out-masks data/Supervisely
    for name in test train_noisy_60 valid_noisy_60; do # the published lists, if they are here, stay
      [ -f $csv/$name.csv ] || { cp $own/$name.csv $csv/.$name.part && mv $csv/.$name.part $csv/$name.csv; }
    done
  fi
  if [ -z "$DRY_RUN" ] && [ ! -f $csv/train_noisy_60_PointRend_weight_bfscore.csv ]; then
    echo "the published PointRend weights are not in $csv: a DeepLabV3Plus trained on 20 clean images scores in their place"
    run teacher train_without_weight.py --name paper_teacher --train_csv $own/trusted.csv --valid_csv $own/trusted.csv \
      --epochs 400 --batch-size 4 --learning-rate 1e-3 --optimizer adamw --scheduler cosine --arch DeepLabV3Plus --encoder resnet50 \
      --augment strong --select last
    await teacher || { interrupted $? && exit 75; echo "error: the teacher failed; its log: runs/logs/teacher.log" >&2; exit 1; }
    stage utils/predict_mask.py --list $csv/train_noisy_60.csv --checkpoint runs/paper_teacher/last.pt \
      --out runs/paper_masks --trusted
    stage utils/get_weight.py --list $csv/train_noisy_60.csv --teacher runs/paper_masks --name PointRend --out $csv
  fi
  published() { # name, script, training list
    local full=(--valid_csv $csv/valid_noisy_60.csv --test_csv $csv/test.csv)
    if [ -n "$ONLY" ] && ! wanted "$1"; then return 0; fi
    run "$1" "$2" --train_csv "$csv/$3" "${full[@]}" --name "$1" --epochs 100 --batch-size 4 --learning-rate 0.1
  }
  local weight=train_noisy_60_PointRend_weight
  published train_noisy_60_noweight train_without_weight.py train_noisy_60.csv
  for name in miou bf bm; do
    published train_noisy_60_${name}weight_noKD train_with_Teacher_weight.py ${weight}_${name}score.csv
  done
  for name in miou bf bm; do
    published train_noisy_60_${name}weight_KD train_with_KDweight.py ${weight}_${name}score.csv
  done
  published train_decoupling train_decoupling.py train_noisy_60.csv
  published train_co_teaching train_co_teaching.py train_noisy_60.csv
  published train_co_teaching+ train_co_teaching+.py train_noisy_60.csv
  finish
  [ -n "$DRY_RUN" ] || stage utils/report.py runs/train_noisy_60_* runs/train_decoupling runs/train_co_teaching* --out runs/paper
}

go
