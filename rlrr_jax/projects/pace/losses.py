"""PACE: consistency of passes with noise on what was changed (Ni, Zhang and Koniusz, NeurIPS 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from rlrr_jax.errors import UserError
from rlrr_jax.losses import Net, Values, correct, cross_entropies
from rlrr_jax.methods.sites import block_numbers
from rlrr_jax.projects.pace import change
from rlrr_jax.projects.pace.change import Noise
from rlrr_jax.recipe import Batch


def pace(net: Net, batch: Batch, lam: float = 1.0, sigma: float = 1.0) -> Values:
    """Consistency of two passes with different noise on what was changed (PACE, section 3).

    Cross-entropy of the first, plus `lam` times the squared distance of their logits, summed over
    classes. Both have the same drop path. A step costs about four plain ones.

    Args:
      lam: weight of the distance.
      sigma: standard deviation of the noise in the second block, see `change.Noise`.
    """
    first, second = (_forward(net, batch, _noise(batch, i, sigma)) for i in range(2))
    return _consistent(first, second, batch, lam)


def pace_lazy(net: Net, batch: Batch, lam: float = 1.0, sigma: float = 1.0, every: int = 2) -> Values:
    """PACE of half the images in every k-th step, cross-entropy with noise alone in the others.

    A step costs about two plain ones. The half is every second image of the batch, where the
    authors take the first half: the order is random.

    Args:
      lam: weight of the distance.
      sigma: standard deviation of the noise.
      every: k.
    """

    def half(batch: Batch) -> Values:
        here, rows = _every_second(batch)
        losses, values = pace(net, here, lam, sigma)
        total, mine = jax.lax.psum((batch.mask.sum(), here.mask.sum()), "data")
        spread = lambda x: jnp.zeros(len(batch.mask)).at[rows].add(x * here.mask) * (total / mine)
        return spread(losses), {name: spread(x) for name, x in values.items()}

    def whole(batch: Batch) -> Values:
        logits = _forward(net, batch, _noise(batch, 0, sigma))
        losses, values = _consistent(logits, logits, batch, lam)
        return losses, {name: x.astype(jnp.float32) for name, x in values.items()}

    return jax.lax.cond(batch.step % every == 0, half, whole, batch)


def pace_fast(net: Net, batch: Batch, lam: float = 0.1, sigma: float = 1.0) -> Values:
    """PACE to the logits that the same image had an epoch ago, which are 0 before the first.

    A step costs about two plain ones; the table of logits lies on the device.

    Args:
      lam: weight of the distance; smaller than that of `pace`, as its authors advise.
      sigma: standard deviation of the noise; larger.
    """
    logits = _forward(net, batch, _noise(batch, 0, sigma))
    assert batch.remembered is not None
    losses, values = _consistent(logits, batch.remembered, batch, lam)
    return losses, {**values, "remember": logits}


def _forward(net: Net, batch: Batch, noise: Noise) -> jax.Array:
    """Logits of a batch with noise on what was changed; UserError where nothing is."""
    folded = flatten_dict(net.params).keys() == flatten_dict(net.frozen).keys()
    if not folded or not block_numbers(change.split(net.frozen, net.params)[1]):
        raise UserError(
            "pace puts noise on changed Dense layers of blocks, and this method changes none of this "
            "model: take another loss"
        )
    return change.apply(net.model, net.frozen, net.params, noise, *net.inputs(batch.images, batch.keys))


def _noise(batch: Batch, number: int, sigma: Any) -> Noise:
    """The noise of a pass over the batch."""
    fold = lambda key: jax.random.fold_in(key, 2**16 + number)  # drop path has smaller numbers
    return Noise(jax.vmap(fold)(batch.keys), sigma)


def _consistent(first: jax.Array, second: jax.Array, batch: Batch, lam: Any) -> Values:
    """Cross-entropy of the first logits, and their weighted distance to the second."""
    losses = cross_entropies(first, batch)
    distance = jnp.square(first - second).sum(-1)
    values = {"acc": correct(first, batch.labels, losses), "distance": distance}
    return losses + lam * distance, values


def _every_second(batch: Batch) -> tuple[Batch, jax.Array]:
    """The images in even places of the whole batch, on however many devices, and their rows."""
    number = len(batch.mask)
    rows = 2 * jnp.arange(-(-number // 2)) + batch.slots[0] % 2
    there = rows < number
    rows = jnp.minimum(rows, number - 1)
    arrays = {name: x[rows] for name, x in batch._asdict().items() if x is not None and name != "step"}
    return batch._replace(**{**arrays, "mask": arrays["mask"] * there}), rows
