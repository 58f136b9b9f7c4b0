#!/usr/bin/env bash
# A TPU slice: makes it if it is not there, copies this clone, installs, runs on all workers, gathers.
#   launch/tpu_pod.sh [--dry-run] --config configs/vtab.py:all --config.data.dir=gs://bucket/tfds --workdir=gs://bucket/run
# Environment: TPU_NAME (required), ZONE (required), TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite),
# PROJECT (gcloud's), SPOT=1 for a preemptible one. The workdir must be on gs://, which all workers share.
# Started again with the same arguments, the run goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
name=${TPU_NAME:?set TPU_NAME to the name of the TPU}
zone=${ZONE:?set ZONE to the zone of the TPU, such as us-central1-a}
case " $* " in
  *" --workdir=gs://"*) ;;
  *) echo "error: the workers share no disk: add --workdir=gs://BUCKET/FOLDER" >&2; exit 1 ;;
esac
tpu=(gcloud compute tpus tpu-vm)
where=(--zone "$zone" ${PROJECT:+--project "$PROJECT"})
if [ -n "$dry" ] || ! "${tpu[@]}" describe "$name" "${where[@]}" >/dev/null 2>&1; then
  run "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type "${TYPE:-v5litepod-16}" \
    --version "${VERSION:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
fi
run "${tpu[@]}" scp --recurse "$root" "$name:rlrr_jax" "${where[@]}" --worker all
install='cd rlrr_jax && python3 -m venv venv-tpu && venv-tpu/bin/pip install -q -e ".[tpu]" gcsfs'
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "$install"
arguments=$(printf '%q ' "$@")
train="cd rlrr_jax && venv-tpu/bin/python -m rlrr_jax.main --distributed=on $arguments"
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "$train"
all="$*"
workdir=${all##*--workdir=}
run gcloud storage cp --recursive "${workdir%% *}" "$root/runs/"
