#!/usr/bin/env bash
# What is done on a worker (a TPU VM): called over ssh by the scripts beside it.
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BASE=$(dirname "$CODE")
STATE=$BASE/state
UNIT=tsopsd

usage() {
  cat <<END
worker.sh setup [ASSETS] | start COMMAND... | status COMMAND... [--dry-run before the verb]
On a TPU VM, from ~/tsopsd/code: install the package and copy ASSETS (gs://...); start a command as the systemd
service $UNIT; say how it stands: bare, none, running, or the exit code with which that command ended.
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

# A service, not a child of ssh: it outlives the login, and when the machine is shut down systemd sends SIGTERM to the
# supervisor alone (mixed) while the network still stands, then waits. TPUs need pinned memory, so no limit on it.
start() {
  (($#)) || die "expected a command"
  [[ -n $DRY_RUN || -f $STATE/ready ]] || die "not set up; run setup.sh"
  [[ -n $DRY_RUN ]] || ! running || die "a run is going on here; resume.sh --watch follows it"
  run rm -f "$STATE/exit_code"
  [[ -n $DRY_RUN ]] || echo "${*@Q}" >"$STATE/command"
  run sudo systemd-run --quiet --collect "--unit=$UNIT" "--uid=$(id -un)" "--working-directory=$CODE" \
    "--setenv=PATH=$BASE/venv/bin:$PATH" --property=KillMode=mixed --property=TimeoutStopSec=10min \
    --property=After=network-online.target --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \
    "$BASE/venv/bin/python" "$CODE/tpu/supervise.py" "$STATE" "$@"
}

# After a reboot there is neither a service nor an exit code: none.
status() {
  if running; then
    echo "tsopsd-status running"
  elif [[ ! -f $STATE/ready ]]; then
    echo "tsopsd-status bare"
  elif [[ -f $STATE/exit_code && $(<"$STATE/command") == "${*@Q}" ]]; then
    echo "tsopsd-status $(<"$STATE/exit_code")"
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
  setup | start | status) "$@" ;;
  *) die "expected setup, start or status, got ${1:-nothing}" ;;
esac
