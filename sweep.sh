# Sourced by run.sh and the other sweeps: what every sweep needs to run its command lines side by side, and to go on later.
# It reads DRY_RUN, NPROC, JOBS, PRECISION, ONLY and SWEEP, and needs setup.sh. MODE names the function that runs everything.

fail() {
  echo "error: $*" >&2
  exit 2
}
whole() { # names of settings that are whole numbers
  local name
  for name in "$@"; do [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: a whole number of 1 or more"; done
}
there() { # names of settings that are files; a dry run needs none
  local name
  for name in "$@"; do
    [ -n "$DRY_RUN" ] || [ -z "${!name:-}" ] || [ -f "${!name}" ] || fail "$name=${!name}: no such file; correct the path"
  done
}
several_seeds() { [[ " $SEEDS " =~ ^(\ +[0-9]+)+\ +$ ]] || fail "SEEDS=$SEEDS: numbers separated by blanks"; }
noise_levels() {
  [[ " $NOISE " =~ ^(\ +(0|[1-9][0-9]?|100))+\ +$ ]] || fail "NOISE=$NOISE: percentages from 0 to 100, separated by blanks"
}
machine() { # sets PY, GPUS, JOBS, PRECISION and LAUNCH, the words before a training script
  if [ -z "$DRY_RUN" ]; then set_up requirements.txt $NEEDS
  elif [ "$MODE" = paper ] || ! find_python requirements.txt; then PY=python PRECISION=${PRECISION:-bf16}; fi
  GPUS=0
  if [ -z "$DRY_RUN" ] || [ -z "${PRECISION:-}" ]; then GPUS=$("$PY" -c 'import torch; print(torch.cuda.device_count())'); fi
  if [ "$GPUS" -gt 0 ]; then
    [ "$NPROC" -le "$GPUS" ] || fail "NPROC=$NPROC: there are $GPUS GPUs here"
    JOBS=${JOBS:-$((GPUS / NPROC))} PRECISION=${PRECISION:-bf16}
  else
    # two small runs side by side use two cores better than one after the other
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # it would count their threads
    JOBS=${JOBS:-$((cores < 4 ? cores : 4))}
    if [ -z "${PRECISION:-}" ]; then grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && PRECISION=bf16 || PRECISION=fp32; fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS * NPROC ? cores / (JOBS * NPROC) : 1))}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # a busy wait stalls everything as soon as the cores are shared
  fi
  LAUNCH=(${LAUNCHER:-} "$PY")
  if [ "$NPROC" -gt 1 ] || [ -n "${TORCHRUN:-}" ]; then
    LAUNCH+=(-m torch.distributed.run ${TORCHRUN:---standalone} "--nproc_per_node=$NPROC")
  fi
}

STARTED=$SECONDS PLAN=() # run folder, epochs, networks and training list of every run to come
FAILED=() INTERRUPTED="" PIDS=() LOGS=runs
NEEDS="" # a further file of requirements
declare -A STARTED_RUNS=()

interrupted() { [[ " 75 129 130 143 " == *" $1 "* ]]; } # exit code of a command that saved, or that a signal ended
leave() { # exit code: nothing is left running behind a sweep that ends; what is still at work saves first
  trap '' INT TERM HUP
  local running
  running=$(jobs -rp)
  [ -z "$running" ] || kill -TERM $running 2>/dev/null || true
  wait
  interrupted "$1" || exit "$1"
  echo "interrupted; the same command goes on from here" >&2
  exit 75
}
trap 'exit 75' INT TERM HUP
trap 'leave $?' EXIT

claim() { # the sweep's folder, for this process and all its children: two of one name would undo each other's work
  if [ -n "$DRY_RUN" ]; then return; fi
  mkdir -p "$LOGS/logs"
  # The children inherit the open file. After a kill -9 of this script its runs go on, and hold the lock until they end;
  # a second start is told of them. It does not wait, since it cannot know whether anybody wants them to go on.
  exec 9>>"$LOGS/.lock"
  if ! flock -n 9; then
    exec 9>&-
    local holders
    holders=$(find -L /proc/[0-9]*/fd -maxdepth 1 -samefile "$LOGS/.lock" 2>/dev/null | cut -d/ -f3 | sort -nu | xargs) || true
    fail "$LOGS: this sweep is at work already (process ${holders:-of another machine}); wait for it or kill it, or set SWEEP=another_name"
  fi
  rm -f "$LOGS"/logs/*.code
}
wanted() { [ -z "$ONLY" ] || [[ " $ONLY " == *" $1 "* ]]; }
say() { # words of a command, so that a shell reads them back
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}
stage() { # a tool: what it prints is shown; its failure ends the sweep, since all that follows needs it
  if [ -n "$DRY_RUN" ]; then say "$PY" "$@"; return; fi
  "$PY" "$@" & # bash would hear a signal only after the end of a command in the foreground
  wait $!
}
# No command substitution while runs are at work: a signal that meets one makes bash print a syntax error of its own.
any_at_work() { # takes the runs that have ended out of PIDS
  local slot
  for slot in "${!PIDS[@]}"; do kill -0 "${PIDS[slot]}" 2>/dev/null || unset "PIDS[slot]"; done
  [ ${#PIDS[@]} -gt 0 ]
}
free_slot() { # sets SLOT, the first of the JOBS places whose run has ended
  while any_at_work; do
    for ((SLOT = 0; SLOT < JOBS; SLOT++)); do [ -n "${PIDS[SLOT]:-}" ] || return 0; done
    wait -n || true
  done
  SLOT=0
}
slot_gpus() { # the NPROC GPUs of place SLOT, among those that this process may use; they are shared if JOBS asks for more
  local all=() own="" k
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"; fi
  for ((k = SLOT * NPROC; k < (SLOT + 1) * NPROC; k++)); do own+=,${all[k % GPUS]:-$((k % GPUS))}; done
  echo "${own#,}"
}
run() { # log name, script, flags...: a training run, in the background up to JOBS at a time
  local name=$1
  shift
  if [ -n "${STARTED_RUNS[$name]:-}" ]; then return; fi # the clean row and the trusted teacher serve every ratio
  STARTED_RUNS[$name]=1
  if [ -n "$DRY_RUN" ]; then say "${LAUNCH[@]}" "$@"; return; fi
  free_slot
  local log=$LOGS/logs/${name//\//_}.log
  (
    child="" stopped="" code=0
    trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
    trap '' HUP # the end of a terminal reaches run.sh, which sends TERM
    if [ "$GPUS" -gt 0 ]; then CUDA_VISIBLE_DEVICES=$(slot_gpus) && export CUDA_VISIBLE_DEVICES; fi
    "${LAUNCH[@]}" "$@" >"$log" 2>&1 &
    child=$!
    [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true # the signal came before `child` was known
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done # a signal ends `wait`, not yet the run
    [ -z "$stopped" ] || code=75
    echo "$code" >"$log.code"
    state=":"
    if interrupted $code; then state=" interrupted:"; elif [ $code != 0 ]; then state=" FAILED:"; fi
    [ -n "$stopped" ] || echo "[$((SECONDS - STARTED)) s$(left)] $name$state $(tail -n 1 "$log" | cut -c1-150)"
  ) &
  PIDS[SLOT]=$!
}
plan() { # before anything runs: what the whole sweep will run, from the command lines that DRY_RUN prints
  local word words name epochs list nets line folder
  while read -r line; do
    [[ $line == *train_*.py* ]] || continue
    name="" epochs=0 list="" nets=1 folder=runs
    [[ $line != *_decoupling.py* && $line != *_co_teaching* && $line != *"--preset cce_pct"* ]] || nets=2
    [[ $line != *"--method l2r"* ]] || nets=3 # what a step costs, in plain ones
    [[ $line != *"--method ieg"* ]] || nets=7
    read -ra words <<<"$line"
    for ((word = 0; word < ${#words[@]}; word++)); do
      case ${words[word]} in
        --run_dir) folder=${words[word + 1]} ;;
        --name) name=${words[word + 1]} ;;
        --epochs | --max-iteration) epochs=${words[word + 1]} ;;
        --train_csv | --unlabelled_csv | --weak_csv) list=${words[word + 1]} ;; # the longer one comes second
      esac
    done
    PLAN+=("$folder/$name $epochs $nets $list")
  done < <(DRY_RUN=1 "$MODE" 2>/dev/null || true)
  DONE=$(progress | cut -d' ' -f1)
}
progress() { # work that is done, work in all (epochs x networks x images), runs that are over, runs
  local entry folder epochs nets list images done=0 all=0 over=0 now log most=100
  for entry in "${PLAN[@]}"; do
    list=${entry##* }
    [ -f "$list" ] && images=$(wc -l <"$list") || images=0
    most=$((images > most ? images : most))
  done
  for entry in "${PLAN[@]}"; do
    read -r folder epochs nets list <<<"$entry"
    log=$folder/log.jsonl
    [ -f "$list" ] && images=$(wc -l <"$list") || images=$most # a list that a later kind of noise writes
    [ -f "$log" ] && now=$(grep -c '"epoch"' "$log") || now=0
    if [ "$now" -gt 0 ] && grep -q '"step"' "$log"; then now=$(grep -o '"step": [0-9]*' "$log" | tail -n 1 | cut -c9-); fi
    if grep -q '"split"' "$log" 2>/dev/null; then now=$epochs; fi # steps are rounded to whole passes
    done=$((done + (now < epochs ? now : epochs) * nets * images)) all=$((all + epochs * nets * images))
    over=$((over + (now >= epochs)))
  done
  echo "$done $all $over ${#PLAN[@]}"
}
left() { # "; 3 of 14 runs, about 12 min left" where a part of the work is done since the start
  local done all over runs seconds
  read -r done all over runs < <(progress)
  [ "$done" -gt "$DONE" ] || return 0
  seconds=$(((all - done) * (SECONDS - STARTED) / (done - DONE)))
  echo -n "; $over of $runs runs, about $((seconds < 90 ? seconds : (seconds + 30) / 60)) $([ $seconds -lt 90 ] && echo s || echo min) left"
}
code_of() { cat "$LOGS/logs/${1//\//_}.log.code" 2>/dev/null || echo 1; } # log name -> exit code of that run
await() { # log names of runs that what follows needs; the exit code of one that did not finish
  if [ -n "$DRY_RUN" ]; then return; fi
  local name
  for name in "$@"; do
    while [ ! -s "$LOGS/logs/${name//\//_}.log.code" ] && any_at_work; do wait -n || true; done
    [ "$(code_of "$name")" = 0 ] || return "$(code_of "$name")"
  done
}
finish() { # wait for all runs, then say which failed
  if [ -n "$DRY_RUN" ]; then return; fi
  while any_at_work; do wait -n || true; done
  local name
  for name in "${!STARTED_RUNS[@]}"; do unfinished "$(code_of "$name")" "$LOGS/logs/${name//\//_}.log"; done
}
unfinished() { # exit code, what: note it for the end, if it is no success
  if interrupted "$1"; then INTERRUPTED=1; elif [ "$1" != 0 ]; then FAILED+=("$2"); fi
}

find_data() { # sets SET, the name of the data, and SOURCE, how its lists are made
  local images=data/demo/image masks=data/demo/mask share=0.2
  if [ -n "$TEST" ]; then share=0; fi
  if [ -z "${DATA:-}" ]; then SET=demo; else SET=$(basename "${DATA%/}" .csv); fi
  if [ -n "${DATA:-}" ] && [ -f "$DATA" ]; then
    SOURCE=(list "$DATA" --test "$share")
    return
  elif [ -n "${DATA:-}" ]; then
    images=$(first_folder images image img JPEGImages train)
    masks=$(first_folder masks mask labels label train_mask)
  fi
  SOURCE=(folder --images "$images" --masks "$masks" --classes "$CLASSES" --test "$share")
}

first_folder() { # the first of these names that is a folder in DATA
  local name
  for name in "$@"; do [ -d "$DATA/$name" ] && { echo "$DATA/$name"; return; }; done
  fail "DATA=$DATA: no such list, or no folder in it named $*"
}

draw_demo() { # an input of every sweep without DATA: drawn once, also where two first sweeps begin side by side
  if [ -z "$DRY_RUN" ]; then
    mkdir -p data
    exec 8>>data/.demo.lock
    flock 8 &
    wait $!
  fi
  stage utils/prepare_data.py demo --out data/demo
  exec 8>&-
}

# What the sweeps beside run.sh have in common: lists that are given or made, and flags of all of their runs.

usual() { # settings without a value get one; then they are checked. ROWS and MORE_ROWS are the names that ONLY may have
  ONLY=${ONLY:-} SEEDS=${SEEDS:-0} CLASSES=${CLASSES:-1} DRY_RUN=${DRY_RUN:-} NPROC=${NPROC:-1} SELECT=${SELECT:-best}
  SIZE=${SIZE:-96} EPOCHS=${EPOCHS:-10} BATCH=${BATCH:-8} LR=${LR:-1e-3} OPTIMIZER=${OPTIMIZER:-adamw} WIDTH=${WIDTH:-64}
  ARCH=${ARCH:-Unet} ENCODER=${ENCODER:-resnet18} ENCODER_WEIGHTS=${ENCODER_WEIGHTS:-none} TEST=${TEST:-} LABELLED=${LABELLED:-1/16 1/8}
  whole EPOCHS SIZE BATCH NPROC CLASSES WIDTH ${JOBS:+JOBS}
  several_seeds
  [[ $SELECT =~ ^(best|last)$ ]] || fail "SELECT=$SELECT: best or last"
  there TRAIN VALID TEST
  [[ " $LABELLED " =~ ^(\ +[1-9][0-9]*(/[1-9][0-9]*)?)+\ +$ ]] || fail "LABELLED=$LABELLED: numbers or shares such as 1/16"
  local name
  for name in $ONLY; do
    [[ " $ROWS ${MORE_ROWS:-} " == *" $name "* ]] || fail "ONLY=$ONLY: no row $name; rows are $ROWS${MORE_ROWS:+ $MORE_ROWS}"
  done
  if [ -z "${TRAIN:-}" ]; then
    find_data
    return
  fi
  [ -n "${VALID:-}" ] || fail "TRAIN=$TRAIN: name a validation list too, VALID=list.csv"
  [ -z "${DATA:-}" ] || fail "DATA and TRAIN: name one of them"
  SET=$(basename "$TRAIN" .csv)
}
begin() { # name of the sweep: sets LOGS, LISTS, and TRAIN, VALID and TEST if they are not given; SAME, the flags of all runs
  SWEEP=${SWEEP:-$1} LOGS=runs/$SWEEP LISTS=$LOGS/lists
  machine
  claim
  if [ -z "${TRAIN:-}" ]; then
    if [ -z "${DATA:-}" ]; then draw_demo; fi
    stage utils/prepare_data.py "${SOURCE[@]}" --out "$LISTS"
    TRAIN=$LISTS/train.csv VALID=$LISTS/valid.csv TEST=${TEST:-$LISTS/test.csv}
  fi
  SAME=(--valid_csv "$VALID" --test_csv "$TEST" --classes "$CLASSES" --size "$SIZE" --width "$WIDTH"
    --encoder-weights "$ENCODER_WEIGHTS" --optimizer "$OPTIMIZER" --learning-rate "$LR" --weight-decay 1e-2
    --augment "$AUGMENT" --select "$SELECT" --precision "$PRECISION" --run_dir "$LOGS")
}
count_masks() { # sets COUNTS: how many images of TRAIN keep their masks, of LABELLED, where shares are rounded up
  local share images
  COUNTS=""
  for share in $LABELLED; do
    if [[ $share == */* ]]; then
      [ -f "$TRAIN" ] || fail "LABELLED=$share: a share needs the list, which DRY_RUN does not write; give numbers"
      images=$(($(grep -c . "$TRAIN") - 1))
      share=$(((images * ${share%/*} + ${share#*/} - 1) / ${share#*/}))
    fi
    COUNTS+=" $share"
  done
}

go() { # run MODE; then say what failed, or was interrupted, by the exit code too
  if [ -z "$DRY_RUN" ]; then plan; fi
  "$MODE"
  if [ ${#FAILED[@]} -gt 0 ]; then
    echo "${#FAILED[@]} failed; what and where:" >&2
    printf '  %s\n' "${FAILED[@]}" | sort >&2
    echo "(a run that was made with other settings: give this sweep a name of its own with SWEEP=name)" >&2
    exit 1
  fi
  if [ -n "$INTERRUPTED" ]; then exit 75; fi
}
