#!/usr/bin/env bash
# One machine: installs for its accelerator if need be, then runs.
#   launch/local.sh <cpu|cuda13|tpu> --config configs/vtab.py:cifar --config.data.dir=...
# Started again with the same arguments, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
accelerator=${1:?which accelerator: cpu, cuda13 or tpu}
shift
case $accelerator in
  cpu) package=. ;;
  cuda13 | tpu) package=".[$accelerator]" ;;
  *) echo "error: unknown accelerator '$accelerator': write cpu, cuda13 or tpu" >&2; exit 1 ;;
esac
if [ ! -x "venv-$accelerator/bin/python" ]; then
  python3 -m venv "venv-$accelerator"
  "venv-$accelerator/bin/pip" install -q -e "$package"
fi
exec "venv-$accelerator/bin/python" -m rlrr_jax.main "$@"
