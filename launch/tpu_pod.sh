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
state=
[ -n "$dry" ] || state=$("${tpu[@]}" describe "$name" "${where[@]}" --format "value(state)" 2>/dev/null || true)
if [ -n "$state" ] && [ "$state" != READY ]; then  # preempted
  run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
fi
if [ "$state" != READY ]; then
  run "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type "${TYPE:-v5litepod-16}" \
    --version "${VERSION:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
fi
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "rm -rf rlrr_jax"
run "${tpu[@]}" scp --recurse "$root" "$name:rlrr_jax" "${where[@]}" --worker all
install='cd rlrr_jax && python3 -m pip install -q uv && python3 -m uv venv -q --python 3.12 venv-tpu'
install+=' && python3 -m uv pip install -q --python venv-tpu/bin/python -e ".[tpu]" gcsfs'
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "$install"
arguments=$(printf '%q ' "$@")
train="cd rlrr_jax && venv-tpu/bin/python -m rlrr_jax.main --distributed=on $arguments"
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "$train"
all="$*"
workdir=${all##*--workdir=}
run mkdir -p "$root/runs"
run gcloud storage cp --recursive "${workdir%% *}" "$root/runs/"
