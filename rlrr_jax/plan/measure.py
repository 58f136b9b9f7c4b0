"""The programs of a group of runs, compiled, and what can be read from them."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import evaluate, job, step
from rlrr_jax.plan import flops, program
from rlrr_jax.plan.topology import Chip
from rlrr_jax.runtime import memory
from rlrr_jax.runtime import mesh as mesh_lib

Arguments = dict[str, Any]  # what they are called in the table -> shapes on the mesh


class Measured(NamedTuple):
    """A compiled program.

    Attributes:
      name: "train", "evaluate", "merge", or "first blocks", see `prefix`.
      of: what it was first compiled for, such as "cifar rlrr".
      seconds: that tracing and compiling took here.
      arguments: bytes on a device of each of its arguments.
      temporary: bytes of what lies there beside them while it runs.
      code: bytes of the program itself.
      collectives: kind -> number and bytes of a turn.
      flops: of a device and turn: a step, a batch, or all.
      moved: bytes that a device's memory moves in a turn, an upper bound.
      compiled: JAX's own object, which has its text.
      turn: seconds of a turn by the roofline; None of devices of which nothing is known.
    """

    name: str
    of: str
    seconds: float
    arguments: dict[str, int]
    temporary: int
    code: int
    collectives: dict[str, tuple[int, int]]
    flops: float
    moved: int
    compiled: Any
    turn: float | None

    @property
    def needs(self) -> int:
        """Bytes of a device while it runs: outputs lie in donated arguments."""
        return self.compiled.memory_analysis().argument_size_in_bytes + self.temporary


class Cache:
    """Programs that were measured, by what they are compiled from."""

    def __init__(self, chip: Chip | None, say: Callable[[str], None]) -> None:
        self.chip, self.say = chip, say
        self.known: dict[tuple, Measured] = {}

    def train(self, built: job.Job) -> Measured:
        """The steps; memory.TooLarge if they do not fit."""
        state, metrics = built.shapes()
        whole = NamedSharding(built.mesh, P())
        chunk = (jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),) * 3
        function = step.map_train_steps(built.recipe, built.mesh)
        arguments = {"weights": built.frozen, "images": built.data, "state": state, "metrics": metrics}
        arguments |= {"hyper": built.hyper, "chunk": chunk}
        with job.fitting(built):
            found = self._measured("train", function, arguments, built, loop=True)
        if self.chip:
            job.check_memory(built, found.compiled.memory_analysis(), memory.limit())
        return found

    def first(self, built: job.Job, function: Any, arguments: Arguments) -> Measured:
        """A batch that passes the first blocks, see `outline.first`."""
        return self._measured("first blocks", function, arguments, built, of=function)

    def merge(self, built: job.Job) -> Measured:
        """Weights and trained values to tuned weights."""
        arguments = {"weights": built.frozen, "state": _part(built)}
        return self._measured("merge", built.merge, arguments, built, of=built.recipe.method)

    def evaluate(self, built: job.Job) -> Measured:
        """A batch of held-out images."""
        recipe, mesh = built.recipe, built.mesh
        how = recipe.image_size, recipe.precision, mesh, recipe.crop_from
        params = mesh_lib.abstract(built.merge, mesh, built.frozen, _part(built))
        size = min(built.runs[0].limits.eval_batch_size, len(built.held_out[1]))
        slots = math.ceil(size / mesh.shape["data"]) * mesh.shape["data"]
        spread = NamedSharding(mesh, P("data"))
        shape, kind = built.held_out[0].shape[1:], built.held_out[0].dtype
        images = jax.ShapeDtypeStruct((slots, *shape), kind, sharding=spread)
        function = evaluate.map_eval_step(recipe.model, *how)
        return self._measured("evaluate", function, {"weights": params, "images": images}, built)

    def _measured(
        self,
        name: str,
        function: Any,
        arguments: Arguments,
        built: job.Job,
        loop: bool = False,
        of: Any = None,
    ) -> Measured:
        shapes, tree = jax.tree.flatten(tuple(arguments.values()))
        key = name, of or built.recipe, built.mesh, tuple(shapes), tree
        if key not in self.known:
            self.say(f"compiling: {name}, {built.runs[0].label}, {words(built)}")
            self.known[key] = self._compile(name, function, arguments, built, loop)
        return self.known[key]

    def _compile(
        self, name: str, function: Any, arguments: Arguments, built: job.Job, loop: bool
    ) -> Measured:
        begun = time.perf_counter()
        traced = function.trace(*arguments.values())
        compiled = traced.lower().compile()
        seconds, text = time.perf_counter() - begun, compiled.as_text()
        needs, each = compiled.memory_analysis(), flops.flops(traced.jaxpr.jaxpr)
        shared = name in ("merge", "first blocks")  # which are traced for all devices
        each /= built.mesh.size if shared else 1
        moved = sum(program.moved(text, loop).values())
        sent = program.collectives(text, loop) if built.mesh.size > 1 else {}  # to itself
        exact = built.recipe.precision == "highest"
        return Measured(
            name=name,
            of=built.runs[0].label,
            seconds=seconds,
            arguments={key: memory.size(x) for key, x in arguments.items()},
            temporary=needs.temp_size_in_bytes,
            code=needs.generated_code_size_in_bytes,
            collectives=sent,
            flops=each,
            moved=moved,
            compiled=compiled,
            turn=self.chip and _turn(self.chip, each, moved, sent, exact),
        )


def _turn(chip: Chip, flops: float, moved: float, sent: dict, exact: bool) -> float:
    """Seconds by the roofline: the larger of computing and moving, and what goes over the links."""
    computing = flops / (chip.float32 if exact else chip.bfloat16)
    return max(computing, moved / chip.bandwidth) + 2 * sum(n for _, n in sent.values()) / chip.link


def _part(built: job.Job) -> Any:
    """The trained trees that are merged at once."""
    state, _ = built.shapes()
    number = evaluate.at_once(built, memory.limit()) * built.mesh.shape["trial"]
    cut = lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype, sharding=x.sharding)
    return jax.tree.map(cut, step.tuned(state))


def words(built: job.Job) -> str:
    """`"3 trials on 16 devices (trial 2 x data 8)"`."""
    trials, mesh = len(built.runs), built.mesh
    many = f"{trials} trial{'s' * (trials > 1)} on {mesh.size} device{'s' * (mesh.size > 1)}"
    return many + f" (trial {mesh.shape['trial']} x data {mesh.shape['data']})" * (mesh.size > 1)


def seconds(built: job.Job, found: dict[str, Measured], batches: int) -> Iterator[tuple[str, float]]:
    """What a group takes on its devices, by program; nothing where no turn is known.

    Args:
      built: the outline of the group.
      found: its programs.
      batches: in how many its images pass the first blocks.
    """
    run = built.runs[0]
    if any(each.turn is None for each in found.values()):
        return
    steps = sum(built.steps(epoch) for epoch in range(run.epochs))
    if "first blocks" in found:
        yield "first blocks", batches * (found["first blocks"].turn or 0)
    yield "train", steps * (found["train"].turn or 0)
    held_out = len(built.held_out[1])
    batches = math.ceil(held_out / min(run.limits.eval_batch_size, held_out))
    here = len(built.init_keys) // built.mesh.shape["trial"]
    turns = sum(run.evaluated) * (here // evaluate.at_once(built, memory.limit()))
    yield "evaluate", turns * batches * (found["evaluate"].turn or 0)
    yield "merge", turns * (found["merge"].turn or 0)
