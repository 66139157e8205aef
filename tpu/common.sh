# shellcheck shell=bash
# Sourced by the scripts beside it: options, what gcloud is called with, the states of a TPU.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PROGRAM=${0##*/}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
declare -A opt=()
COMMAND=() # what stands after --

# shellcheck disable=SC2034 # the scripts' --help
readonly OPTION_HELP='Options (or the environment; TPU_SPOT=1 and TPU_QUEUED=1 for the two without a value):
  --name NAME        TPU_NAME     of the TPU VM or queued resource
  --zone ZONE        TPU_ZONE     such as us-east5-a
  --project PROJECT  TPU_PROJECT  default: the one gcloud is set to
  --type TYPE        TPU_TYPE     v4-N and v5p-N count cores (2 a chip), v5litepod-N and v6e-N chips
  --slices N         TPU_SLICES   default 1; more are one queued resource with nodes NAME-0, NAME-1, ...
  --queued           TPU_QUEUED   wait in the queue for capacity instead of failing
  --spot             TPU_SPOT     cheaper, and may be taken away at any time
  --runtime VERSION  TPU_RUNTIME  of the VM image; default: by type
  --network NAME     TPU_NETWORK  default: gcloud'"'"'s; --subnetwork and --service-account (TPU_...) likewise
  --ref COMMIT       TPU_REF      of this checkout, to install; default HEAD
  --assets gs://...  TPU_ASSETS   folder with models/ and data/ that every worker copies; default: none
  --dry-run                       print the commands, run none
  --help'

die() {
  printf '%s: %s\n' "$PROGRAM" "$*" >&2
  exit 2
}

say() { [[ -n ${opt[dry-run]} ]] || printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# as_typed WORD... : the words as one would type them in a shell.
as_typed() {
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

exec 3>&1 # commands of a dry run go to the script's own output, also from within $(...)

# run WORD... : run a command; in a dry run print it instead.
run() {
  if [[ -n ${opt[dry-run]} ]]; then as_typed "$@" >&3; else "$@"; fi
}

SWITCHES=" delete dry-run queued spot watch yes " # options without a value

# read_options "NAME ..." ARGUMENT... : fill `opt` and COMMAND from the arguments, else from TPU_NAME, ...
read_options() {
  local allowed=" $1 dry-run " name value key
  shift
  for name in $allowed; do
    key=TPU_${name^^}
    key=${key//-/_}
    opt[$name]=${!key:-}
    [[ $SWITCHES != *" $name "* || ${opt[$name]} =~ ^1?$ ]] || die "$key: expected 1 or nothing, got ${opt[$name]}"
  done
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        COMMAND=("$@")
        return 0
        ;;
      --*) ;;
      *) die "expected an option, got $1; see --help" ;;
    esac
    name=${1%%=*}
    name=${name#--}
    [[ $allowed == *" $name "* ]] || die "unknown option --$name; see --help"
    if [[ $SWITCHES == *" $name "* ]]; then
      [[ $1 != *=* ]] || die "--$name takes no value"
      value=1
    elif [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      value=${2:-}
      shift
    fi
    [[ -n $value ]] || die "--$name needs a value"
    opt[$name]=$value
    shift
  done
}

# need TOOL : die unless it is installed (a dry run needs none).
need() {
  [[ -n ${opt[dry-run]} ]] || command -v "$1" >/dev/null || die "$1 not found; $2"
}

# place_options "NAME ..." ARGUMENT... : read_options with those of OPTION_HELP and a script's own; checks which TPU is meant.
place_options() {
  local common="name zone project type slices queued spot runtime network subnetwork service-account ref assets"
  read_options "$common $1" "${@:2}"
  local name=${opt[name]} zone=${opt[zone]}
  [[ -n $name ]] || die "expected --name or TPU_NAME, got neither"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] ||
    die "--name: expected lower-case letters, digits and dashes, at most 62, got $name"
  [[ -n $zone ]] || die "expected --zone or TPU_ZONE, got neither"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]+$ ]] || die "--zone: expected one such as us-east5-a, got $zone"
  : "${opt[slices]:=1}"
  [[ ${opt[slices]} =~ ^[1-9][0-9]*$ ]] || die "--slices: expected a number from 1, got ${opt[slices]}"
  ((opt[slices] == 1)) || opt[queued]=1
  PLACE=("--zone=$zone")
  [[ -z ${opt[project]} ]] || PLACE+=("--project=${opt[project]}")
  need gcloud "install the Google Cloud CLI"
}

# check_type : die unless --type is one we know; sets the runtime that goes with it, and CHIPS, of all slices.
check_type() {
  local runtime
  case ${opt[type]} in
    "") die "expected --type or TPU_TYPE, got neither" ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5e-*) die "--type: the accelerator type of v5e is v5litepod-N, got ${opt[type]}" ;;
    *) die "--type: expected v4-N, v5litepod-N, v5p-N or v6e-N, got ${opt[type]}" ;;
  esac
  [[ ${opt[type]#*-} =~ ^[1-9][0-9]*$ ]] || die "--type: expected a number after the dash, got ${opt[type]}"
  : "${opt[runtime]:=$runtime}"
  CHIPS=$((${opt[type]#*-} * opt[slices]))
  [[ ${opt[type]} != v4-* && ${opt[type]} != v5p-* ]] || CHIPS=$((CHIPS / 2))
}

# check_source : die unless --ref is a commit (COMMIT is then its hash) and --assets is a folder in a bucket.
check_source() {
  COMMIT=$(git -C "$ROOT" rev-parse --verify --quiet "${opt[ref]:-HEAD}^{commit}") ||
    die "--ref: expected a commit of $ROOT, got ${opt[ref]:-HEAD}"
  [[ -z ${opt[assets]} || ${opt[assets]} =~ ^gs://[a-z0-9][a-z0-9._-]+(/.*)?$ ]] ||
    die "--assets: expected gs://BUCKET/FOLDER, got ${opt[assets]}"
}

tpu() { run gcloud compute tpus "$@" "${PLACE[@]}"; }

node_names() {
  local i
  if ((opt[slices] == 1)); then
    printf '%s\n' "${opt[name]}"
  else
    for ((i = 0; i < opt[slices]; i++)); do printf '%s\n' "${opt[name]}-$i"; done
  fi
}

# on_workers COMMAND : a shell command on all workers of all slices; fails if it fails on one of them.
on_workers() {
  if ((opt[slices] == 1)); then
    tpu tpu-vm ssh "${opt[name]}" --worker=all "--command=$1"
  else
    tpu queued-resources ssh "${opt[name]}" --node=all --worker=all "--command=$1"
  fi
}

# to_workers FILE : copy a file to the home directory of all workers.
to_workers() {
  if ((opt[slices] == 1)); then
    tpu tpu-vm scp "$1" "${opt[name]}:" --worker=all
  else
    tpu queued-resources scp "$1" "${opt[name]}:" --node=all --worker=all
  fi
}

DRY_STATE=ABSENT # what a dry run takes the state to be, until it has created something

# described KIND NAME FORMAT : the state of one resource, or ABSENT; dies of any other error than "not found".
described() {
  local answer
  if [[ -n ${opt[dry-run]} ]]; then
    tpu "$1" describe "$2" "--format=value($3)"
    printf '%s\n' "$DRY_STATE"
    return 0
  fi
  if answer=$(tpu "$1" describe "$2" "--format=value($3)" 2>"$WORK/errors"); then
    printf '%s\n' "${answer:-UNKNOWN}"
  elif grep -q NOT_FOUND "$WORK/errors"; then
    echo ABSENT
  else
    cat "$WORK/errors" >&2
    die "gcloud could not describe $2"
  fi
}

# state : READY, or why not: ABSENT, a state of the queued resource, or that of the first node that is not READY.
state() {
  local found name
  if [[ -n ${opt[queued]} ]]; then
    found=$(described queued-resources "${opt[name]}" state.state) || exit 2
    if [[ $found != ACTIVE && $found != READY ]]; then
      printf '%s\n' "$found"
      return 0
    fi
  fi
  for name in $(node_names); do
    found=$(described tpu-vm "$name" state) || exit 2
    # A queued resource stays ACTIVE for a while after its node has gone.
    [[ $found != ABSENT || -z ${opt[queued]} ]] || found=TERMINATED
    [[ $found == READY ]] || break
  done
  printf '%s\n' "$found"
}

# is_lost STATE : whether the TPU has been taken away and what is left of it must be deleted.
is_lost() { [[ $1 == PREEMPTED || $1 == TERMINATED || $1 == SUSPENDED ]]; }

# is_stuck STATE : whether waiting does not help and deleting is not ours to decide.
is_stuck() { [[ $1 == FAILED || $1 == STOPPED || $1 == HIDDEN || $1 == UNKNOWN ]]; }

create_tpu() {
  local name=${opt[name]} which
  local more=()
  [[ -z ${opt[spot]} ]] || more+=(--spot)
  for which in network subnetwork service-account; do
    [[ -z ${opt[$which]} ]] || more+=("--$which=${opt[$which]}")
  done
  if [[ -z ${opt[queued]} ]]; then
    tpu tpu-vm create "$name" "--accelerator-type=${opt[type]}" "--version=${opt[runtime]}" ${more[@]+"${more[@]}"}
  else
    if ((opt[slices] == 1)); then more+=("--node-id=$name"); else more+=("--node-count=${opt[slices]}" "--node-prefix=$name"); fi
    tpu queued-resources create "$name" "--accelerator-type=${opt[type]}" "--runtime-version=${opt[runtime]}" "${more[@]}"
  fi
  DRY_STATE=READY
}

delete_tpu() {
  if [[ -n ${opt[queued]} ]]; then
    tpu queued-resources delete "${opt[name]}" --force --quiet
  else
    tpu tpu-vm delete "${opt[name]}" --quiet
  fi
}

pause() { [[ -n ${opt[dry-run]} ]] || sleep "${TPU_POLL_S:-30}"; }

# wait_until_ready : wait while the TPU is on its way; returns 1 if it is absent or lost ($NOW), dies if it will not come.
wait_until_ready() {
  local before=
  while true; do
    if ! NOW=$(state); then # gcloud has said why
      [[ -n ${opt[watch]:-} ]] || exit 2
      pause
      continue
    fi
    [[ $NOW != READY ]] || return 0
    if [[ $NOW == ABSENT ]] || is_lost "$NOW"; then return 1; fi
    ! is_stuck "$NOW" || die "${opt[name]} is $NOW: see gcloud's describe for the reason, then delete.sh"
    [[ $NOW == "$before" ]] || say "${opt[name]} is $NOW; waiting"
    before=$NOW
    pause
  done
}

# setup_workers : install COMMIT on all workers.
setup_workers() {
  local archive=$WORK/tsopsd.tar.gz
  run git -C "$ROOT" archive --format=tar.gz "--output=$archive" "$COMMIT" && to_workers "$archive" &&
    on_workers "! systemctl is-active --quiet tsopsd || { echo a run is going on here >&2; exit 1; }; \
rm -rf tsopsd/code && mkdir -p tsopsd/code && tar -xzf tsopsd.tar.gz -C tsopsd/code && \
tsopsd/code/tpu/worker.sh setup ${opt[assets]@Q}"
}

# start_command : start COMMAND on all workers; it goes on when ssh has ended.
start_command() { on_workers "tsopsd/code/tpu/worker.sh start ${COMMAND[*]@Q}"; }

# smoke_workers : one step of a toy on all workers, in the bucket of the run to come; nothing where COMMAND has no run directory.
smoke_workers() {
  [[ -z $RUN_DIR ]] || on_workers "tsopsd/code/tpu/worker.sh smoke ${RUN_DIR@Q} --devices $CHIPS"
}

# need_command : die unless there is a COMMAND, and its run directory (then RUN_DIR) outlives the machine.
need_command() {
  local i place=
  ((${#COMMAND[@]})) || die "expected -- COMMAND at the end, such as -- tsopsd train CONFIG --run-dir gs://my-bucket/runs/NAME"
  for ((i = 0; i < ${#COMMAND[@]}; i++)); do
    case ${COMMAND[i]} in
      --run-dir) place=${COMMAND[i + 1]:-} ;;
      --run-dir=*) place=${COMMAND[i]#*=} ;;
    esac
  done
  [[ $place =~ ^gs://[a-z0-9][a-z0-9._-]+/. ]] || [[ -z $place && ! " ${COMMAND[*]} " =~ \ (.*/)?tsopsd(_jax)?\ (train|demo)\  ]] ||
    die "--run-dir: expected gs://BUCKET/FOLDER, got ${place:-none}: the disks here go with the machine, and the run with them"
  RUN_DIR=$place
}
