#!/usr/bin/env bash
# One machine: installs for its accelerator if need be, then runs.
#   launch/local.sh [--dry-run] [--parts N] <cpu|cuda13|tpu> --config configs/vtab.py:all --config.data.dir=...
# --parts N starts N processes, each with a GPU, a chip of the TPU or a share of the cores of its own, and each
# trains its share of the runs. It ends when all have ended, with the worst of their exit codes.
# Started again with the same arguments, it goes on where it stopped, also with another N.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
dry=''
parts=''
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ "${1:-}" = --parts ]; then
  parts=${2:-}
  [[ $parts =~ ^[1-9][0-9]*$ ]] || { echo "error: --parts ${parts:-''} is no number of processes: write --parts 8" >&2; exit 1; }
  shift 2
fi
accelerator=${1:?which accelerator: cpu, cuda13 or tpu}
shift
case $accelerator in
  cpu) package=$root ;;
  cuda13 | tpu) package="${root}[$accelerator]" ;;
  *) echo "error: unknown accelerator '$accelerator': write cpu, cuda13 or tpu" >&2; exit 1 ;;
esac
venv=$root/venv-$accelerator
if [ -n "$dry" ] || ! "$venv/bin/python" -c "import rlrr_jax.main" 2>/dev/null; then
  run python3 -m venv "$venv"
  run "$venv/bin/pip" install -q -e "$package"
fi
# Large arrays in huge pages: faster on CPUs; benchmarks/peers.py --peers rlrr, with and without, tells.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
if [ -z "$parts" ]; then run exec "$venv/bin/python" -m rlrr_jax.main "$@"; exit; fi

# What process $1, from 0, sees: of the GPUs, chips or cores that this one does.
own() {
  case $accelerator in
    cuda13)
      IFS=, read -ra seen <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((parts - 1)))}"
      if [ "$parts" -gt "${#seen[@]}" ]; then
        echo "error: --parts $parts are more than the GPUs of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" >&2; exit 1
      fi
      place=(env "CUDA_VISIBLE_DEVICES=${seen[$1]}") ;;
    tpu)
      place=(env "TPU_PROCESS_BOUNDS=1,1,1" "TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1" "TPU_VISIBLE_CHIPS=$1") ;;
    cpu)
      mapfile -t seen < <(python3 -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep="\n")')
      each=$((${#seen[@]} / parts))
      if [ "$each" = 0 ]; then echo "error: --parts $parts are more than the ${#seen[@]} cores" >&2; exit 1; fi
      place=(taskset -c "$(IFS=,; echo "${seen[*]:$1 * each:each}")") ;;
  esac
}
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} PYTHONUNBUFFERED=1  # lines of several processes, not bars
prefix() { trap '' TERM INT HUP USR1; stdbuf -oL tr '\r' '\n' | sed -u "s|^|$1|"; }  # until the end
pids=()
stopped=''
stop() { stopped=1; kill -TERM "${pids[@]}" 2>/dev/null || true; }  # they save and exit with 75, see README.md
trap stop TERM INT HUP USR1
for ((i = 0; i < parts; i++)); do
  if [ -n "$stopped" ]; then break; fi
  own "$i"
  command=("${place[@]}" "$venv/bin/python" -m rlrr_jax.main "--part=$((i + 1))/$parts" "$@")
  if [ -n "$dry" ]; then run "${command[@]}"; continue; fi
  "${command[@]}" > >(prefix "[$((i + 1))/$parts] ") 2>&1 &
  pids+=($!)
done
if [ -n "$stopped" ]; then stop; fi  # also what began when the signal came
worst=$((i < parts ? 75 : 0))
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do  # a signal ended the wait, not the process
    code=0
    wait "$pid" || code=$?
  done
  if [ -n "$stopped" ] && [ "$code" = 143 ]; then code=75; fi  # stopped before it began
  if [ "$code" != 0 ] && { [ "$worst" = 0 ] || [ "$worst" = 75 ]; }; then worst=$code; fi
done
sleep 0.2  # what is still in the pipes
exit "$worst"
