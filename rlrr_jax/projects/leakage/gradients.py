"""Shared gradients: what can be read off them exactly, and whose they are."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlrr_jax import methods
from rlrr_jax.projects.leakage.defences import flat


class Client(NamedTuple):
    """What computes gradients: everything here is known to the server.

    Attributes:
      model: a flax model.
      method: the `methods.Method`.
      frozen: the backbone's tree.
      trainable: the values at which gradients are taken, `{"adapter", "head"}`.
      precision: precision of matmuls.
    """

    model: Any
    method: Any
    frozen: Any
    trainable: Any
    precision: str = "highest"


def gradient(client: Client, images: jax.Array, labels: jax.Array) -> Any:
    """The gradient of the loss of a batch, a tree `{"adapter", "head"}`.

    The loss is the mean cross-entropy.

    Args:
      client: the `Client`.
      images: images [b, h, w, 3] in [-1, 1].
      labels: classes [b].
    """

    def loss(trainable: Any) -> jax.Array:
        params = methods.merge(client.method, client.frozen, trainable)
        logits = client.model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    with jax.default_matmul_precision(client.precision):
        return jax.grad(loss)(client.trainable)


def compiled(client: Client, function: Callable) -> Callable:
    """`function(client, ...)`, jitted, as a function of what comes after the client.

    Weights are arguments of the program: as constants XLA would fold them, which takes minutes.
    """

    @jax.jit
    def run(frozen: Any, trainable: Any, *args: Any) -> Any:
        return function(client._replace(frozen=frozen, trainable=trainable), *args)

    return functools.partial(run, client.frozen, client.trainable)


# Exact leaks ----------------------------------------------------------------------------------


def label(head: Any) -> int:
    """The class of a single image, from the gradient of the head.

    Of softmax probabilities p and label y the gradient of the bias is p - y: negative at y alone.
    """
    return int(np.argmin(head["bias"]))


def feature(head: Any) -> np.ndarray:
    """The inputs [D] of the head of a single image, exactly: the kernel's gradient is z (p - y)^T."""
    y = label(head)
    return np.asarray(head["kernel"])[:, y] / np.asarray(head["bias"])[y]


# Whose gradient is it? ------------------------------------------------------------------------


def similarities(
    client: Client, probes: list, images: Any, labels: Any, done: Callable[[int], None] = lambda n: None
) -> np.ndarray:
    """How alike the gradients of candidate images and of probes are: cosines [3, candidates, probes].

    First of the adapter's gradient, then of the head's, then of both as one vector.

    Args:
      client: the `Client`.
      probes: gradients that were shared, trees.
      images: candidates [n, h, w, 3] in [-1, 1].
      labels: their classes [n].
      done: function called with the number of candidates behind it, every now and then.
    """
    known = [jnp.stack([flat(probe[part]) for probe in probes]) for part in ("adapter", "head")]

    def compare(client: Client, known: list, images: jax.Array, labels: jax.Array) -> tuple:
        def one(pair: tuple) -> tuple:
            tree = gradient(client, pair[0][None], pair[1][None])
            parts = [flat(tree[part]) for part in ("adapter", "head")]
            return [k @ g for k, g in zip(known, parts)], [g @ g for g in parts]

        return jax.lax.map(one, (images, labels))

    run, size, found = compiled(client, compare), min(100, len(images)), []
    for i in range(0, len(images), size):
        index = np.minimum(np.arange(i, i + size), len(images) - 1)  # of one shape, compiled once
        found.append(run(known, images[index], labels[index]))
        done(min(size, len(images) - i))
    products, squares = jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *found)
    lengths = [np.square(np.asarray(k)).sum(1) for k in known]
    products, squares, lengths = ([*x, sum(x)] for x in (products, squares, lengths))
    tiny = np.finfo(np.float32).tiny
    cosine = lambda p, s, n: p / np.sqrt(np.maximum(s[:, None] * n[None], tiny))
    return np.stack([cosine(p, s, n) for p, s, n in zip(products, squares, lengths)])


def ranks(cosines: np.ndarray, true: Iterable[int]) -> np.ndarray:
    """Ranks, from 1, of a batch's images among all candidates; ties count half.

    Args:
      cosines: similarities of the candidates with the batch's gradient [n].
      true: numbers of the candidates that are in the batch.
    """
    others = np.delete(cosines, list(true))  # images of the batch do not stand in each other's way
    above = lambda x: (others > x).sum() + (others == x).sum() / 2
    return np.array([1 + above(cosines[i]) for i in true])


def scores(all_ranks: np.ndarray) -> dict[str, float]:
    """The share of images that are ranked first, and the mean reciprocal rank."""
    return {"top1": float((all_ranks < 1.5).mean()), "mrr": float((1 / all_ranks).mean())}
