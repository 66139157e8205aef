#!/usr/bin/env bash
# Start a run on GKE.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
  cat <<END
gke/submit.sh --name NAME --image IMAGE --topology KIND:SHAPE --bucket BUCKET [OPTION...] -- COMMAND...
Fill in jobset.yaml and apply it with kubectl. The cluster has JobSet, the Cloud Storage FUSE driver and a node pool for
each slice (README.md). BUCKET/assets is mounted as models/ and data/. For example:

  gke/submit.sh --name a --image IMAGE --topology v5p:4x4x4 --bucket my-bucket -- \\
    tsopsd train configs/paper/qwen3_4b.yaml --run-dir gs://my-bucket/runs/4b

  --name NAME             of the JobSet (TPU_NAME; so with each option)
  --image IMAGE           as pushed
  --topology KIND:SHAPE   of one slice, as for \`tsopsd plan\`: v4:2x2x4, v5e:4x8, v5p:4x4x4, v6e:8x8
  --bucket BUCKET         without gs://
  --slices N              default 1
  --spot                  on Spot VMs
  --restarts N            after failures and preemptions together; default 100
  --service-account NAME  of Kubernetes; default: default
  --namespace NAME        default: kubectl's
  --dry-run               print the command and the manifest, run nothing
END
}

# hosts_of KIND SHAPE : sets ACCELERATOR, HOSTS and CHIPS (of a host) for one slice.
hosts_of() {
  local kind=$1 shape=$2 chips=$((${2//x/*})) dimensions=3 whole=4
  case $kind in
    v4) ACCELERATOR=tpu-v4-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice dimensions=2 whole=8 ;;
    v6e) ACCELERATOR=tpu-v6e-slice dimensions=2 whole=8 ;;
    *) die "--topology: expected v4, v5e, v5p or v6e before the colon, got $kind" ;;
  esac
  (($(tr -dc x <<<"$shape" | wc -c) == dimensions - 1)) ||
    die "--topology: expected $dimensions numbers for $kind, got $shape"
  if ((chips <= whole)); then HOSTS=1 CHIPS=$chips; else HOSTS=$((chips / 4)) CHIPS=4; fi
  ((HOSTS * CHIPS == chips)) || die "--topology: expected a multiple of 4 chips, got $shape: $chips"
}

# json WORD... : a JSON list of strings.
json() {
  local word list=
  for word; do
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${list#, }"
}

# filled_in : jobset.yaml with its ${...} replaced by the variables of those names.
filled_in() {
  local text key
  text=$(<"$ROOT/tpu/gke/jobset.yaml")
  for key in NAME RESTARTS SLICES HOSTS SERVICE_ACCOUNT ACCELERATOR TOPOLOGY SPOT IMAGE COMMAND CHIPS BUCKET; do
    text=${text//"\${$key}"/"${values[$key]}"}
  done
  if [[ -z ${opt[spot]} ]]; then grep -v gke-spot <<<"$text"; else printf '%s\n' "$text"; fi
}

read_options "name image topology bucket slices spot restarts service-account namespace" "$@"
need_command
: "${opt[slices]:=1}" "${opt[restarts]:=100}" "${opt[service-account]:=default}"
for each in name image topology bucket; do [[ -n ${opt[$each]} ]] || die "expected --$each"; done
[[ ${opt[name]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  die "--name: expected lower-case letters, digits and dashes, at most 40, got ${opt[name]}"
[[ ${opt[image]} =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || die "--image: expected an image's name, got ${opt[image]}"
[[ ${opt[bucket]} =~ ^[a-z0-9][a-z0-9._-]+$ ]] || die "--bucket: expected its name without gs://, got ${opt[bucket]}"
[[ ${opt[service-account]} =~ ^[a-z0-9][a-z0-9.-]*$ ]] ||
  die "--service-account: expected the name of a Kubernetes service account, got ${opt[service-account]}"
[[ ${opt[topology]} =~ ^[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
  die "--topology: expected KIND:SHAPE such as v5p:4x4x4, got ${opt[topology]}"
for each in slices restarts; do
  [[ ${opt[$each]} =~ ^[1-9][0-9]*$ ]] || die "--$each: expected a number from 1, got ${opt[$each]}"
done
hosts_of "${opt[topology]%%:*}" "${opt[topology]#*:}"
need kubectl "install it and get the cluster's credentials"

declare -A values=(
  [NAME]=${opt[name]} [RESTARTS]=${opt[restarts]} [SLICES]=${opt[slices]} [HOSTS]=$HOSTS [CHIPS]=$CHIPS
  [SERVICE_ACCOUNT]=${opt[service-account]} [ACCELERATOR]=$ACCELERATOR [TOPOLOGY]=${opt[topology]#*:}
  [SPOT]='"true"' [IMAGE]=${opt[image]} [COMMAND]=$(json "${COMMAND[@]}") [BUCKET]=${opt[bucket]}
)
filled_in >"$WORK/jobset.yaml"
[[ -z ${opt[dry-run]} ]] || cat "$WORK/jobset.yaml"
# create, not apply: a JobSet of that name that is there already is an error, not a change.
run kubectl create "--filename=$WORK/jobset.yaml" ${opt[namespace]:+"--namespace=${opt[namespace]}"}
