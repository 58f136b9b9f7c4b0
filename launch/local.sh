#!/usr/bin/env bash
# One machine: installs for its accelerator if need be, then runs.
#   (in the clone) launch/local.sh <cpu|cuda13|tpu> --config configs/vtab.py:cifar --config.data.dir=...
# Started again with the same arguments, it goes on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
accelerator=${1:?which accelerator: cpu, cuda13 or tpu}
shift
case $accelerator in
  cpu) package=$root ;;
  cuda13 | tpu) package="$root[$accelerator]" ;;
  *) echo "error: unknown accelerator '$accelerator': write cpu, cuda13 or tpu" >&2; exit 1 ;;
esac
venv=$root/venv-$accelerator
if ! "$venv/bin/python" -c "import rlrr_jax.main" 2>/dev/null; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q -e "$package"
fi
# Large arrays in huge pages: faster on CPUs; benchmarks/peers.py --peers rlrr, with and without, tells.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$venv/bin/python" -m rlrr_jax.main "$@"
