"""A `job.Job` of shapes for devices that may not be there: what is compiled, without any weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import blockwise, feed, job, models, prefix, run_images, sides, step
from rlrr_jax import run as run_lib
from rlrr_jax.data import crops
from rlrr_jax.recipe import Recipe
from rlrr_jax.run import Run
from rlrr_jax.runtime import memory
from rlrr_jax.runtime import mesh as mesh_lib


def of(runs: list[Run], devices: list[Any]) -> job.Job:
    """What `job.build` makes of these runs, with shapes for arrays. Images have their full size.

    Args:
      runs: the trials.
      devices: all that there are.
    """
    run, recipe = runs[0], run_lib.together(runs)
    assert recipe.image_size is not None
    mesh = run_lib.mesh_of(runs, devices)
    frozen = models.shapes(recipe.model, recipe.image_size)
    side = sides.pair(recipe.crop_from or recipe.image_size)
    images, held_out = (
        jax.ShapeDtypeStruct((run.task.number(split), *side, 3), jnp.uint8) for split in run.splits
    )
    if number := prefix.blocks(recipe, run):
        recipe, frozen, images, held_out = _rest(recipe, frozen, (images, held_out), number, run, mesh)
    recipe, frozen = blockwise.applied(recipe, frozen, run.limits)
    source: Any = images
    if run.crops:
        source = crops.Crops(None, len(images), run.crop, run_images.pixels(run.config), run.seed)
    labels = np.zeros(len(images), np.int32)
    share = run.limits.image_gb
    budget = memory.limit() * feed.SHARE if share is None else share * 1e9
    fed = job.feed_of(runs, source, labels, budget)
    put = lambda spec, tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
    )
    stacked = lambda function: jax.eval_shape(
        lambda: jax.tree.map(lambda x: jnp.stack([x] * trials), function())
    )
    trials = len(runs) + -len(runs) % mesh.shape["trial"]
    return job.Job(
        runs=runs,
        recipe=recipe,
        mesh=mesh,
        frozen=mesh_lib.shapes(frozen, mesh),
        data=fed.shapes(mesh),
        feed=fed,
        held_out=(held_out, np.zeros(len(held_out), np.int32)),
        tested=None,
        hyper=put(P("trial"), stacked(lambda: run.hyper(labels))),
        init_keys=put(P("trial"), stacked(lambda: run.keys[0])),
        merge=step.map_merge(recipe.method, mesh),
        begun=0.0,
    )


def first(runs: list[Run], devices: list[Any]) -> tuple[Any, dict[str, Any], int] | None:
    """What computes the outputs of first blocks, once; None where nothing is computed once.

    Returns the function, its arguments, and in how many batches it sees the images of these runs.
    """
    run, recipe = runs[0], run_lib.together(runs)
    number = prefix.blocks(recipe, run)
    if not number or recipe.image_size is None:
        return None
    mesh = run_lib.mesh_of(runs, devices)
    side, whole = sides.pair(recipe.image_size), NamedSharding(mesh, P())
    frozen = models.shapes(recipe.model, recipe.image_size)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), frozen)
    slots = -(-prefix.BATCH // mesh.shape["data"]) * mesh.shape["data"]
    spread = NamedSharding(mesh, P("data"))
    images = jax.ShapeDtypeStruct((slots, *side, 3), jnp.uint8, sharding=spread)
    batches = sum(-(-run.task.number(split) // prefix.BATCH) for split in run.splits)
    function = prefix.program(recipe, number, run.flip, mesh)
    return function, {"weights": frozen, "images": images}, batches


def _rest(
    recipe: Recipe, frozen: Any, images: tuple, number: int, run: Run, mesh: Mesh
) -> tuple[Recipe, Any, Any, Any]:
    """What is left where first blocks are computed once: recipe, tree, and their outputs for images."""
    outputs = []
    for each, flip in zip(images, (run.flip, False)):
        program = prefix.program(recipe, number, flip, mesh)
        found = jax.eval_shape(program, frozen, jax.ShapeDtypeStruct((1, *each.shape[1:]), each.dtype))
        views = found.shape[1:] if flip or each is images[0] else found.shape[2:]
        outputs.append(jax.ShapeDtypeStruct((len(each), *views), found.dtype))
    if number == prefix.HEAD and outputs[0].size * outputs[0].dtype.itemsize <= prefix.MOST_REPEATED:
        outputs[0] = jax.ShapeDtypeStruct((len(images[0]), 2, outputs[0].shape[-1]), outputs[0].dtype)
    kept: list = []

    def cut(tree: Any) -> Any:
        left, own = prefix.rest(recipe, tree, number)
        kept.append(left)
        return own

    frozen = jax.eval_shape(cut, frozen)
    return kept[0], frozen, *outputs
