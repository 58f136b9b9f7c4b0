"""The best epoch: the trained trees of the epoch with the best score on images set aside.

What is kept goes with a checkpoint, so that a resumed run ends as an uninterrupted one. Trials that
train together each keep their own, and each ends for itself: one whose patience is over stays as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax.runtime import distributed
from rlrr_jax.runtime import mesh as mesh_lib

NONE = -1  # epoch of a trial that has kept none


@functools.lru_cache(8)
def map_start(mesh: Mesh) -> Callable:
    """A jitted function from trained trees [T, ...] to what is kept before the first epoch.

    That is `tree`, its `score` and `epoch`, and the `last` epoch [T], after which patience was over, or
    `NONE`.
    """

    def start(trained: Any) -> dict[str, Any]:
        tree = jax.tree.map(jnp.copy, trained)  # training donates what it is given
        score = jnp.full(len(jax.tree.leaves(tree)[0]), -jnp.inf, jnp.float32)
        epoch, last = (jnp.full(len(score), NONE, jnp.int32) for _ in range(2))  # both are donated
        return _placed({"tree": tree, "score": score, "epoch": epoch, "last": last}, mesh)

    return jax.jit(start)


def update(
    kept: dict, trained: Any, scores: list[float | None], epoch: int, patience: int | None, mesh: Mesh
) -> dict:
    """What is kept after an epoch.

    Args:
      kept: what was kept before.
      trained: the trained trees [T, ...] after the epoch.
      scores: of each real trial; None is of no use.
      epoch: its number.
      patience: epochs without a better one after which a trial is over; None is never.
      mesh: the devices.
    """
    number = len(kept["score"])
    filled = [-np.inf if score is None else score for score in scores]
    filled += filled[-1:] * (number - len(filled))  # spares are the last trial again
    given = mesh_lib.put(mesh, P("trial"), np.array(filled, np.float32))
    return _update(mesh)(kept, trained, given, np.int32(epoch), np.int32(patience or 2**30))


def _placed(tree: Any, mesh: Mesh) -> Any:
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), mesh_lib.specs(tree, mesh, "trial"))
    return jax.lax.with_sharding_constraint(tree, lies)


@functools.lru_cache(8)
def _update(mesh: Mesh) -> Callable:
    def one(kept: dict, trained: Any, score: Any, epoch: Any, patience: Any) -> dict:
        better = (kept["last"] == NONE) & (score > kept["score"])
        choose = lambda new, old: jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)
        out = choose(
            {"tree": trained, "score": score, "epoch": epoch}, {k: kept[k] for k in kept if k != "last"}
        )
        over = (kept["last"] == NONE) & (epoch - out["epoch"] >= patience) & (out["epoch"] != NONE)
        return {**out, "last": jnp.where(over, epoch, kept["last"])}

    many = jax.vmap(one, (0, 0, 0, None, None))
    return jax.jit(lambda *args: _placed(many(*args), mesh), donate_argnums=0)


def over(kept: dict | None) -> bool:
    """Whether the patience of every trial is over."""
    return kept is not None and bool((np.asarray(distributed.fetch(kept["last"])) != NONE).all())
