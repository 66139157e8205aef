#!/usr/bin/env bash
# What is done on a worker (a TPU VM): called over ssh by the scripts beside it.
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BASE=$(dirname "$CODE")
STATE=$BASE/state
UNIT=tsopsd

usage() {
  cat <<END
worker.sh setup [ASSETS] | smoke RUN_DIR --devices N | start COMMAND... | status COMMAND... | stop  [--dry-run before the verb]
On a TPU VM, from ~/tsopsd/code: install the package and copy ASSETS (gs://...); run smoke.py; start a command as the
systemd service $UNIT; say how it stands: bare, none, running, stopped, or the exit code with which that command ended;
let it save and stop.
END
}

die() {
  echo "worker.sh on $(hostname): $*" >&2
  exit 2
}

DRY_RUN=
run() {
  if [[ -n $DRY_RUN ]]; then echo "${*@Q}"; else "$@"; fi
}

running() { systemctl is-active --quiet "$UNIT"; }

# The images' Python may be 3.10; uv brings its own, without root and without waiting for apt's lock.
setup() {
  local uv=(python3 -m uv) folder
  run env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv
  run "${uv[@]}" venv --quiet --allow-existing --python 3.12 "$BASE/venv"
  run "${uv[@]}" pip install --quiet --python "$BASE/venv/bin/python" --editable "${CODE}[tpu,gcs]"
  run mkdir -p "$STATE" "$BASE/assets"
  [[ -z ${1:-} ]] || run gcloud storage rsync --recursive "$1" "$BASE/assets"
  for folder in models data; do run ln -sfn "$BASE/assets/$folder" "$CODE/$folder"; done
  run "$BASE/venv/bin/python" -c 'import gcsfs, jax, tsopsd_jax'
  run touch "$STATE/ready"
}

# service NAME OPTION... -- PROGRAM... : run with the venv's Python as a systemd service. TPUs need pinned memory: no limit
# on it.
service() {
  local name=$1 options=()
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  run sudo systemd-run --quiet --collect "--unit=$name" "--uid=$(id -un)" "--working-directory=$CODE" \
    "--setenv=PATH=$BASE/venv/bin:$PATH" --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \
    "${options[@]}" "$BASE/venv/bin/python" "${@:2}"
}

smoke() {
  [[ -n $DRY_RUN || -f $STATE/ready ]] || die "not set up; run setup.sh"
  [[ -n $DRY_RUN ]] || ! running || die "a run is going on here, on all devices; stop.sh stops it"
  service "$UNIT-smoke" --wait --pipe -- "$CODE/tpu/smoke.py" "$@"
}

# A service, not a child of ssh: it outlives the login, and when the machine is shut down systemd sends SIGTERM to the
# supervisor alone (mixed) while the network still stands, then waits.
start() {
  (($#)) || die "expected a command"
  [[ -n $DRY_RUN || -f $STATE/ready ]] || die "not set up; run setup.sh"
  [[ -n $DRY_RUN ]] || ! running || die "a run is going on here; resume.sh --watch follows it"
  run rm -f "$STATE/exit_code" "$STATE/stopped"
  [[ -n $DRY_RUN ]] || echo "${*@Q}" >"$STATE/command"
  service "$UNIT" --property=KillMode=mixed --property=TimeoutStopSec=10min --property=After=network-online.target -- \
    "$CODE/tpu/supervise.py" "$STATE" "$@"
}

# stop : SIGTERM to the supervisor, which passes it on; returns when the command has saved and ended, or after 10 minutes.
stop() {
  [[ -n $DRY_RUN ]] || running || die "no run is going on here"
  run touch "$STATE/stopped"
  run sudo systemctl stop "$UNIT"
  [[ -z $DRY_RUN ]] || return 0
  echo "$(hostname): ended with $(cat "$STATE/exit_code" 2>/dev/null || echo "no exit code: it did not save in time")"
}

# After a reboot there is neither a service nor an exit code: none.
status() {
  if running; then
    echo "tsopsd-status running"
  elif [[ ! -f $STATE/ready ]]; then
    echo "tsopsd-status bare"
  elif [[ -f $STATE/exit_code && $(<"$STATE/command") == "${*@Q}" ]]; then
    local code
    code=$(<"$STATE/exit_code")
    [[ $code != 4 || ! -f $STATE/stopped ]] || code=stopped # on purpose: a watch must not start it again
    echo "tsopsd-status $code"
  else
    echo "tsopsd-status none"
  fi
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
case ${1:-} in
  -h | --help) usage ;;
  setup | smoke | start | status | stop) "$@" ;;
  *) die "expected setup, smoke, start, status or stop, got ${1:-nothing}" ;;
esac
