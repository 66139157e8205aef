#!/usr/bin/env bash
# Start a command on all workers.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
run.sh --name NAME --zone ZONE [OPTION...] -- COMMAND...
Start the same command on every worker, in ~/tsopsd/code, as a systemd service that goes on when ssh has ended; its
output is appended to ~/tsopsd/state/train.log of the worker. For example:

  run.sh --name a --zone us-east5-a -- tsopsd train configs/paper/qwen3_4b.yaml --run-dir gs://my-bucket/runs/4b

$OPTION_HELP
END
}

place_options "" "$@"
need_command
start_command
say "started; logs.sh follows the log"
