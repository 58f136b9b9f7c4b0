"""Devices that are not there, for which programs are compiled all the same."""

import contextlib
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from rlrr_jax import backend
from rlrr_jax.errors import UserError, first_line, unknown


class Chip(NamedTuple):
    """What a kind of chip can do, by its maker's own page.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      memory: bytes that JAX may use.
      bandwidth: bytes a second of that memory.
      bfloat16: FLOPs a second of matmuls in bfloat16.
      float32: FLOPs a second of matmuls in float32, at JAX's precision "highest".
      link: bytes a second that it sends to other chips.
    """

    platform: str
    memory: float
    bandwidth: float
    bfloat16: float
    float32: float
    link: float


GIB = 2**30
# https://docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, links in one direction: memory less what
# XLA keeps of it; "highest" multiplies six times in bfloat16. NVIDIA's data sheet of the H100 SXM,
# without sparsity; JAX takes three quarters of its memory.
CHIPS = {
    "v5e": Chip("tpu", 15.75 * GIB, 8.19e11, 197e12, 197e12 / 6, 2.0e11),
    "v5p": Chip("tpu", 94.75 * GIB, 2.765e12, 459e12, 459e12 / 6, 6.0e11),
    "v6e": Chip("tpu", 31.25 * GIB, 1.638e12, 918e12, 918e12 / 6, 4.0e11),
    "h100": Chip("gpu", 0.75 * 79.1 * GIB, 3.35e12, 989e12, 67e12, 4.5e11),
}
NAMED = "v5e:4x4, h100:1 or cpu:8"


class Topology(NamedTuple):
    """Chips of a kind.

    Attributes:
      name: as it was typed, such as "v5e:4x4".
      chip: the `Chip`; None of CPUs, of which nothing is known.
      devices: what programs are compiled for.
    """

    name: str
    chip: Chip | None
    devices: list[Any]


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[Topology]:
    """Makes everything as it is on devices that are not there: forms, defaults, what fits.

    Args:
      name: a kind and a number or shape, such as "v5e:4x4", "h100:1" or "cpu:8".

    Raises UserError for an unknown name, and without the wheel that knows the devices.
    """
    found = find(name)
    platform = found.chip.platform if found.chip else "cpu"
    with backend.compiling_for(platform, len(found.devices), found.chip and int(found.chip.memory)):
        yield found


def find(name: str) -> Topology:
    """The `Topology` of a name, see `compiling_for`."""
    kind, _, shape = name.partition(":")
    if kind not in (*CHIPS, "cpu"):
        raise unknown("topology", name, [f"{known}:{shape or 1}" for known in (*CHIPS, "cpu")])
    number = r"[1-9]\d*"
    shapes = {"h100": "[1-8]", "cpu": number}  # the GPUs of a machine
    if not re.fullmatch(shapes.get(kind, f"{number}(x{number})+"), shape):
        raise UserError(f"the topology {name} has no number or shape of devices: write {NAMED}")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", int(shape))  # fails if there are devices already
        return Topology(name, None, jax.devices("cpu"))
    extra = "cuda13" if kind == "h100" else "tpu"
    try:
        devices = h100s(int(shape)) if kind == "h100" else tpus(name)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"there is no {name} ({first_line(e)}): write another shape") from e
    except (NotImplementedError, RuntimeError, ImportError) as e:
        raise UserError(f"{name} is unknown here ({first_line(e)}): pip install 'jax[{extra}]'") from e
    return Topology(name, CHIPS[kind], devices)


def share(name: str, parts: int) -> str:
    """The topology of each of so many processes that have the devices of another to themselves.

    Raises UserError where these do not divide into processes of one host.
    """
    kind, _, shape = name.partition(":")
    sides = [int(side) for side in re.findall(r"\d+", shape)]
    if not sides:
        return name  # which `find` refuses
    number, rest = divmod(math.prod(sides), parts)
    chip = CHIPS.get(kind)
    if chip and chip.platform == "tpu":
        flat = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4"}.get(number)  # of a host
        own = flat and flat + "x1" * (len(sides) - 2)
    else:
        own = str(number) if number else None
    if rest or own is None:
        raise UserError(
            f"{name} does not divide into {parts} parts of a host's 1, 2, 4 or 8 devices: write "
            f"another --parts"
        )
    return f"{kind}:{own}"


def tpus(name: str) -> list[Any]:
    """The chips of a topology; one process at a time."""
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    few = math.prod(sides) < 4  # of a host's four
    host = {"chips_per_host_bounds": (*sides, 1)[:3]} if few else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **host)
    return list(found.devices)


def h100s(number: int) -> list[Any]:
    """H100s of one machine, as `h100.txt` describes each."""
    import jax._src.cudnn.fused_attention_stablehlo as cudnn
    from jax._src import xla_bridge

    jax.devices("cpu")  # which looks for plugins, once
    bridge: Any = xla_bridge
    known = bridge.canonicalize_platform  # which knows no platform without a device
    bridge.canonicalize_platform = lambda name: "cuda" if name in ("cuda", "gpu") else known(name)
    cudnn.check_compute_capability = lambda wanted: float(wanted) <= 9.0
    cudnn.is_cuda_compute_capability_equal = lambda wanted: wanted == "9.0"
    config = (pathlib.Path(__file__).parent / "h100.txt").read_text()
    shape = {"target_config": config, "topology": f"1x1x{number}"}
    return list(topologies.get_topology_desc(platform="cuda", **shape).devices)
