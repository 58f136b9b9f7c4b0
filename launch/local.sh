#!/usr/bin/env bash
# One machine: installs for its accelerator if need be, then runs.
#   launch/local.sh [--dry-run] <cpu|cuda13|tpu> --config configs/vtab.py:cifar --config.data.dir=...
# Started again with the same arguments, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
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
run exec "$venv/bin/python" -m rlrr_jax.main "$@"
