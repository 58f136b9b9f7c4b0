#!/usr/bin/env bash
# A TPU slice: makes it if it is not there, sends what is committed here, installs, runs on all workers, gathers.
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
case $state in
  "" | READY) ;;
  PREEMPTED | TERMINATED)  # nothing is left of it but its name
    run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
    state= ;;
  STOPPED) run "${tpu[@]}" start "$name" "${where[@]}" ;;
  *) echo "error: the TPU $name is $state: wait until it is READY, or set another TPU_NAME" >&2; exit 1 ;;
esac
if [ -z "$state" ]; then
  run "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type "${TYPE:-v5litepod-16}" \
    --version "${VERSION:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
fi
if ! git -C "$root" rev-parse --quiet --verify HEAD >/dev/null; then
  echo "error: $root is no clone with a commit, which is what is sent: clone it, or commit" >&2; exit 1
fi
changed=$(git -C "$root" status --short)
if [ -n "$changed" ]; then
  printf 'note: what is committed is sent, and not these:\n%s\n' "$changed" >&2
fi
archive=$(mktemp -d)/rlrr_jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
run git -C "$root" archive --format tar.gz --output "$archive" HEAD
run "${tpu[@]}" scp "$archive" "$name:rlrr_jax.tar.gz" "${where[@]}" --worker all
install='rm -rf rlrr_jax && mkdir rlrr_jax && tar xzf rlrr_jax.tar.gz -C rlrr_jax && cd rlrr_jax && python3 -m pip install -q uv && python3 -m uv venv -q --python 3.12 venv-tpu'
install+=' && python3 -m uv pip install -q --python venv-tpu/bin/python -e ".[tpu]" gcsfs'
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "$install"
arguments=$(printf '%q ' "$@")
train="cd rlrr_jax && venv-tpu/bin/python -m rlrr_jax.main --distributed=on $arguments"
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "$train"
all="$*"
workdir=${all##*--workdir=}
run mkdir -p "$root/runs"
run gcloud storage cp --recursive "${workdir%% *}" "$root/runs/"
