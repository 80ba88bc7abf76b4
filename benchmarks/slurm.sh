#!/usr/bin/env bash
#SBATCH --job-name=nlkd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%A_%a.log
# The sweep of run.sh on a cluster, one array task a run. From the folder of run.sh, with the settings of run.sh by environment:
#
#   export DATA=my_folder NOISE="20 60" SEEDS="0 1 2"; mkdir -p runs           # SLURM does not make the folder of the logs
#   id=$(sbatch --parsable --output=runs/slurm-%j.log benchmarks/slurm.sh prepare)       # lists, teacher, weights
#   n=$(benchmarks/slurm.sh count)                                                       # training runs of the sweep
#   sbatch --dependency=afterok:$id --array=0-$((n - 1)) benchmarks/slurm.sh             # task i is run i
#   benchmarks/slurm.sh table                                                            # of what is finished by then
#
# Two minutes before its time is up a task saves its exact state and is queued again. Options for other nodes go to sbatch, the
# same ones to both jobs, since a run goes on only on as many processes as it began with: --gpus-per-node=4 is four GPUs a run,
# --nodes=2 two machines a run. Without SLURM, `SLURM_ARRAY_TASK_ID=3 bash benchmarks/slurm.sh` does run 3.
set -euo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
# slurmd runs a copy of this script, so its own folder says nothing
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -f run.sh ] || fail "$PWD: no run.sh here; submit from its folder"
export PRECISION=${PRECISION:-bf16} # not by the hardware: the nodes must agree, and the login node has no GPU
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch
  export JOBS=1 LAUNCHER="srun --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1"
  export TORCHRUN="--nnodes=$SLURM_JOB_NUM_NODES --rdzv_backend=c10d --rdzv_endpoint=$head:$((20000 + SLURM_JOB_ID % 10000)) --rdzv_id=$SLURM_JOB_ID"
fi

what=${1:-task}
if [ "$what" = prepare ]; then
  command="env ONLY=weights ./run.sh"
else
  plan=$(DRY_RUN=1 ./run.sh)
  mapfile -t runs < <(grep -E '^([^ ]+ )+train_[A-Za-z_+]+\.py ' <<<"$plan")
  case $what in
  count)
    echo ${#runs[@]}
    exit
    ;;
  table) command=$(tail -n 1 <<<"$plan") ;;
  task)
    task=${SLURM_ARRAY_TASK_ID:-}
    [[ $task =~ ^[0-9]+$ ]] || fail "no SLURM_ARRAY_TASK_ID: submit with --array=0-$((${#runs[@]} - 1)), or say prepare, count or table"
    [ "$task" -lt ${#runs[@]} ] || fail "task $task: the sweep has ${#runs[@]} runs, counted from 0"
    command=${runs[task]}
    ;;
  *) fail "$0 $what: say prepare, count, table, or nothing in an array task" ;;
  esac
fi

child="" stopped="" code=0
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
eval "exec $command" & # in the background, since bash would hear a signal only after the end of a command in the foreground
child=$!
[ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true # the signal came before `child` was known
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done # a signal ends `wait`, not yet the run
if [ "$code" = 0 ] || { [ "$code" != 75 ] && [ -z "$stopped" ]; }; then exit "$code"; fi

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}
# a job that was cancelled, or that SLURM itself requeues after a preemption, is no longer running
if [ -n "$job" ] && [[ $(scontrol show job "$job") == *JobState=RUNNING* ]]; then
  echo "interrupted; queued again to go on from here"
  scontrol requeue "$job"
fi
exit 75
