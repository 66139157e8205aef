#!/usr/bin/env bash
# Show that a new slice can train, before a run starts on it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
smoke.sh --name NAME --zone ZONE --type TYPE [OPTION...] -- COMMAND...
On all workers at once: JAX sees all chips, each worker writes to the bucket of COMMAND's --run-dir, and a toy takes one step of
RL and one of the reheater there. Nothing is written into the run directory itself. Minutes; COMMAND is not started.

$OPTION_HELP
END
}

place_options "" "$@"
check_type
need_command
[[ -n $RUN_DIR ]] || die "expected a COMMAND with --run-dir gs://..., got ${COMMAND[*]}"
smoke_workers
say "the slice can train: $CHIPS chips, $RUN_DIR can be written"
