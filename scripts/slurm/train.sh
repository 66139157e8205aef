#!/usr/bin/env bash
# A run on the GPUs of a SLURM cluster. After a time limit, a preemption or a crash the job is queued again, and resumes.
#
#   sbatch --nodes=2 scripts/slurm/train.sh tsopsd train CONFIG --run-dir DIR     from the checkout's root
#   scripts/slurm/train.sh --dry-run tsopsd train CONFIG --run-dir DIR            print what it would start
#
# Options of sbatch before the script's name go before the lines below; partition and account are your cluster's. DIR lies on a
# file system that all nodes share. JAX gives each task the GPU with the task's number on its node: as many tasks as GPUs
# on a node, and each task sees all of them.
#SBATCH --job-name=tsopsd
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tsopsd-%j.log
set -euo pipefail

: "${TSOPSD_VENV:=.venv}"    # make env EXTRAS=cuda
: "${TSOPSD_RESTARTS:=20}"   # time limits, preemptions and crashes together

die() {
  echo "train.sh: $*" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
(($#)) || die "expected a command, such as tsopsd train CONFIG --run-dir DIR"
[[ " $* " == *" --run-dir"[\ =]* ]] || die "expected --run-dir DIR, on a file system that all nodes share, got none in: $*"
[[ -n $dry_run || -n ${SLURM_JOB_ID:-} ]] || die "expected to be started by sbatch (or with --dry-run)"
# A single task takes all GPUs of its node; several take one each, and JAX would leave the others idle.
nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-8} tasks=${SLURM_NTASKS_PER_NODE:-8}
((tasks == gpus || nodes * tasks == 1)) ||
  die "expected as many tasks as GPUs on a node, got $tasks and $gpus; sbatch --ntasks-per-node=$gpus"

export PATH="$TSOPSD_VENV/bin:$PATH"
start=(srun --gpu-bind=none --kill-on-bad-exit=0 "$@") # the others of a run end by themselves when one fails
if [[ -n $dry_run ]]; then
  echo "${start[*]@Q}"
  exit 0
fi
code=0
"${start[@]}" || code=$?
case $code in
  0) exit 0 ;;
  2 | 3 | 6)
    echo "train.sh: ended with $code; it is not queued again: mend what the log says, then the same sbatch" >&2
    exit "$code"
    ;;
esac
if ((${SLURM_RESTART_COUNT:-0} >= TSOPSD_RESTARTS)); then
  echo "train.sh: ended with $code after $TSOPSD_RESTARTS restarts; giving up" >&2
  exit "$code"
fi
echo "train.sh: ended with $code; the job is queued again, and resumes" >&2
scontrol requeue "$SLURM_JOB_ID"
