"""The losses of early exits, which train heads of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.losses import Loss, Net, Values, correct, cross_entropies
from rlrr_jax.methods import base
from rlrr_jax.projects.exits import heads, met
from rlrr_jax.recipe import Batch


def one_tree(net: Net, batch: Batch, at: tuple) -> tuple[jax.Array, jax.Array]:
    """Logits and features of all exits of one network, see `heads.apply`."""
    inputs = net.inputs(batch.images, batch.keys)
    return heads.apply(net.model, net.params, net.trained["loss"], at, *inputs)


def tree_each(net: Net, batch: Batch, at: tuple) -> tuple[jax.Array, jax.Array]:
    """Logits and features of exits that have a network each, of the method `met`."""
    if (number := met.exits_of(net.trained["adapter"])) != len(at):
        raise UserError(
            f"config.loss_kwargs.at has {len(at)} exits, and the method's option exits is {number}: "
            f"give as many (method met has a network for each exit, others have not)"
        )
    trees = met.trees(net.frozen, net.trained)
    inputs = net.inputs(batch.images, batch.keys)
    return heads.apply_each(net.model, trees, net.trained["loss"], at, *inputs)


def init(key: jax.Array, frozen: Any, classes: int, at: tuple = (), **options: Any) -> dict:
    """The heads of exits at the start; UserError unless a ViT has blocks `at` which they can be."""
    del key, options
    depth, width = base.one_width(frozen)
    heads.check(at, depth)
    return heads.empty(len(at), width, classes)


def _all(
    answers: Callable, net: Net, batch: Batch, at: tuple, early: Any, distill: Any, graph: Any
) -> Values:
    """Cross-entropies of all exits of a ViT, distillation from the last, and a graph of labels.

    That is, of an image: the cross-entropy of the whole network, plus means over the early exits of
    `early` times theirs, `distill` times the Kullback-Leibler divergence from the last's probabilities
    (which get no gradient), and `graph` times the mean square of the difference of its features to
    those of the other images of its label in the batch, over all devices (where images are mixed, its
    own label, not its partner's). MET (Liu et al., 2024, see `met.py`) has the graph; its exact form is
    not public, and this is ours.
    """
    every, features = answers(net, batch, at)
    losses = jax.vmap(cross_entropies, (1, None), 1)(every, batch)  # [b, E + 1]
    wanted = jax.lax.stop_gradient(jax.nn.log_softmax(every[:, -1]))[:, None]
    found = jax.nn.log_softmax(every[:, :-1])
    divergence = (jnp.exp(wanted) * (wanted - found)).sum(-1)
    distance = _to_own_class(features, batch)
    right = jax.vmap(correct, (1, None, 1), 1)(every, batch.labels, losses)
    values = {
        "acc": right[:, -1],
        "early_acc": right[:, :-1].mean(1),
        "distance": distance,
    }
    extra = (early * losses[:, :-1] + distill * divergence).mean(1)
    return losses[:, -1] + extra + graph * distance, values


def _exits(
    net: Net,
    batch: Batch,
    at: tuple = (),
    early: float = 1.0,
    distill: float = 1.0,
    graph: float = 0.1,
) -> Values:
    """Exits after the blocks `at` of one network, see `_all`."""
    return _all(one_tree, net, batch, at, early, distill, graph)


def _met(
    net: Net,
    batch: Batch,
    at: tuple = (),
    early: float = 1.0,
    distill: float = 1.0,
    graph: float = 0.1,
) -> Values:
    """Exits after the blocks `at`, a network each, see `_all`."""
    return _all(tree_each, net, batch, at, early, distill, graph)


exits_loss, met_loss = Loss(_exits, init), Loss(_met, init)


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
