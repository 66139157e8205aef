#!/usr/bin/env bash
# Bring a run's metrics, evaluations, samples and page to this machine; checkpoints stay in the bucket.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
fetch.sh --run-dir gs://BUCKET/FOLDER [--to DIR] [--dry-run]
Copy all of a run's directory but its checkpoints to DIR (default: runs/NAME, as the folder is called); may be repeated, also
while the run goes on (the bucket has what stood at the last checkpoint). \`tsopsd report DIR\` makes the page anew.
END
}

read_options "run-dir to" "$@"
[[ ${opt[run-dir]} =~ ^gs://[a-z0-9][a-z0-9._-]+/. ]] || die "--run-dir: expected gs://BUCKET/FOLDER, got ${opt[run-dir]:-nothing}"
from=${opt[run-dir]%/}
: "${opt[to]:=runs/${from##*/}}"
need gcloud "install the Google Cloud CLI"
run mkdir -p "${opt[to]}"
run gcloud storage rsync --recursive '--exclude=^checkpoints/' "$from" "${opt[to]}"
say "${opt[to]} has all but the checkpoints"
