"""Compiles what a configuration would run, for devices that are not there, and says what it needs.

  python -m rlrr_jax.plan --config configs/vtab.py:all --topology v5e:4x4
  python -m rlrr_jax.plan --config configs/vtab.py:cifar,method=full --topology h100:1 --out plan

  --topology KIND:SHAPE  v5e, v5p, v6e (pip install 'jax[tpu]'), h100:N (jax[cuda13]), cpu:N
  --parts N              runs dealt out to N processes, each with its share of the devices
  --out DIR              where plan.md and plan.json go

Weights and images are not read. Seconds are a bound, the roofline's: bytes moved at full bandwidth or
matmuls at full speed, whichever takes longer. A real run takes longer.
"""

import os

if __name__ == "__main__":  # before JAX: nothing is run, and nobody's device is taken
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")

import pathlib

from absl import flags

from rlrr_jax import main as main_lib
from rlrr_jax.errors import UserError

_TOPOLOGY = flags.DEFINE_string("topology", None, "devices, such as v5e:4x4, h100:1 or cpu:8")
_PARTS = flags.DEFINE_integer("parts", 1, "processes to which runs are dealt out", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "folder for plan.md and plan.json")


def main(argv: list[str]) -> None:
    """Prints the tables."""
    from rlrr_jax.plan import groups, page, topology

    if argv[1:]:
        raise UserError(f"{argv[1]!r} belongs to no flag: see --help")
    config = main_lib.CONFIG.value
    if config is None or _TOPOLOGY.value is None:
        missing = "--config configs/vtab.py" if config is None else f"--topology {topology.NAMED}"
        raise UserError(f"a configuration and a topology are needed: add {missing}")
    out = _OUT.value and pathlib.Path(_OUT.value).expanduser()
    if out:
        out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    parts, name = _PARTS.value, _TOPOLOGY.value
    with topology.compiling_for(topology.share(name, parts) if parts > 1 else name) as devices:
        done = groups.measured(config, devices, print, parts)
    text = page.text(devices, done, parts)
    print(text)
    if out:
        page.write(out, text, devices, done)


def run() -> None:
    """The command."""
    main_lib.command(main, __doc__ or "")


if __name__ == "__main__":
    run()
