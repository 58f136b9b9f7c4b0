"""The losses of early exits, which train heads of their own."""

from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.losses import Loss, Net, Values, correct, cross_entropies
from rlrr_jax.methods import base
from rlrr_jax.projects.exits import heads, met
from rlrr_jax.recipe import Batch


def answers(net: Net, batch: Batch, at: tuple) -> tuple[jax.Array, jax.Array]:
    """Logits and features of all exits, of one network or, with the method `met`, of one for each."""
    inputs, own = net.inputs(batch.images, batch.keys), net.trained["loss"]
    if not met.is_met(net.method):
        return heads.apply(net.model, net.params, own, at, *inputs)
    if (number := met.exits_of(net.trained["adapter"])) != len(at):
        raise UserError(
            f"config.loss_kwargs.at has {len(at)} exits, and option exits of method met is {number}: "
            f"give as many"
        )
    trees = met.trees(net.frozen, net.trained)
    return heads.apply_each(net.model, trees, own, at, *inputs)


def init(key: jax.Array, frozen: Any, classes: int, at: tuple = (), **options: Any) -> dict:
    """The heads of exits at the start; UserError unless a ViT has blocks `at` which they can be."""
    del key, options
    depth, width = base.one_width(frozen)
    heads.check(at, depth)
    return heads.empty(len(at), width, classes)


def exits(
    net: Net, batch: Batch, at: tuple = (), early: float = 1.0, distill: float = 1.0, graph: float = 0.1
) -> Values:
    """Cross-entropies of all exits of a ViT, distillation from the last, and a graph of labels.

    That is, of an image: the cross-entropy of the whole network, plus means over the early exits of
    `early` times theirs, `distill` times the Kullback-Leibler divergence from the last's probabilities
    (which get no gradient), and `graph` times the mean square of the difference of its features to
    those of the other images of its label in the batch, over all devices (where images are mixed, its
    own label, not its partner's). MET (Liu et al., 2024, see `met.py`) has the graph; its exact form is
    not public, and this is ours.

    Args:
      at: numbers of blocks after which there are exits.
      early: weight of their cross-entropies.
      distill: weight of the divergences.
      graph: weight of the differences of features.
    """
    every, features = answers(net, batch, at)
    losses = jax.vmap(cross_entropies, (1, None), 1)(every, batch)  # [b, E + 1]
    wanted = jax.lax.stop_gradient(jax.nn.log_softmax(every[:, -1]))[:, None]
    found = jax.nn.log_softmax(every[:, :-1])
    divergence = (jnp.exp(wanted) * (wanted - found)).sum(-1)
    distance = _to_own_class(features, batch)
    right = jax.vmap(correct, (1, None, 1), 1)(every, batch.labels, losses)
    values = {"acc": right[:, -1], "early_acc": right[:, :-1].mean(1), "distance": distance}
    extra = (early * losses[:, :-1] + distill * divergence).mean(1)
    return losses[:, -1] + extra + graph * distance, values


LOSS = Loss(exits, init)


def _to_own_class(features: jax.Array, batch: Batch) -> jax.Array:
    """Mean square [b] of the difference of features [b, E, D] to those of other images of the label."""
    mine = features, batch.labels, batch.mask, batch.slots
    others, labels, mask, slots = jax.lax.all_gather(mine, "data", tiled=True)
    alike = (batch.labels[:, None] == labels[None]) & (batch.slots[:, None] != slots[None])
    weight = alike * mask[None]
    # By |a|^2 - 2ab + |b|^2, so that no array [b, B, E, D] is made.
    flat, rest = features.reshape(len(features), -1), others.reshape(len(others), -1)
    squares = jnp.square(flat).sum(1)[:, None] + jnp.square(rest).sum(1)[None]
    squares = (squares - 2 * jnp.matmul(flat, rest.T, precision="highest")) / flat.shape[1]
    return (weight * squares).sum(1) / jnp.maximum(weight.sum(1), 1)
