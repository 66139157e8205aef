#!/usr/bin/env bash
# Install a commit of this checkout on all workers, and copy models and data to them.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
setup.sh --name NAME --zone ZONE [--ref COMMIT] [--assets gs://BUCKET/FOLDER] [OPTION...]
On every worker: ~/tsopsd/code (the commit), ~/tsopsd/venv (Python 3.12 by uv, the package with its extras tpu and gcs),
~/tsopsd/assets (a copy of --assets; code/models and code/data point there). May be repeated.

$OPTION_HELP
END
}

place_options "" "$@"
check_source
setup_workers
say "set up with commit $COMMIT"
