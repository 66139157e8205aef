#!/usr/bin/env bash
# Let the run save and stop on all workers; the TPU stays, and costs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
stop.sh --name NAME --zone ZONE [OPTION...]
Send the run one SIGTERM and wait until it has saved and ended (10 minutes at most). The TPU stays: run.sh with the same
command goes on, delete.sh ends the costs. A watch (resume.sh) ends too, and does not start the run again.

$OPTION_HELP
END
}

place_options "" "$@"
on_workers "tsopsd/code/tpu/worker.sh stop"
say "stopped; run.sh goes on, delete.sh ends the costs"
