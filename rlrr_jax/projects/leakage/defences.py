"""What is done to a gradient before it is shared, to hide the images behind it.

Each is a function `(key, gradient) -> gradient`. `config.gradients` trains with one, as an optax
transformation made of a step's key, which shows what it costs; `python -m
rlrr_jax.projects.leakage` attacks what it leaves.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlrr_jax.methods.base import FIXED


def defend(defence: Callable, key: jax.Array, gradient: Any) -> Any:
    """A gradient `{"adapter", "head"}` behind one of `DEFENCES`; what is not trained stays zero."""
    adapter = dict(gradient["adapter"])
    fixed = {FIXED: adapter.pop(FIXED)} if FIXED in adapter else {}
    found = defence(key, {**gradient, "adapter": adapter})
    return {**found, "adapter": {**found["adapter"], **fixed}}


def flat(tree: Any) -> jax.Array:
    """All values of a tree in one vector."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([x.ravel() for x in leaves]) if leaves else jnp.zeros(0)


def clip_and_noise(key: jax.Array, tree: Any, norm: float, sigma: float) -> Any:
    """Clips a gradient to a norm and adds normal noise whose own norm is about `sigma * norm`.

    As in DP-SGD (Abadi et al., CCS 2016), but the batch is what is clipped, and sigma is of the whole
    noise instead of each value.
    """
    values = flat(tree)
    shrink = jnp.minimum(1, norm / jnp.maximum(jnp.linalg.norm(values), 1e-12))
    leaves, structure = jax.tree.flatten(tree)
    keys, level = jax.random.split(key, len(leaves)), sigma * norm / math.sqrt(values.size)
    noisy = [x * shrink + level * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(structure, noisy)


def prune(key: jax.Array, tree: Any, share: float) -> Any:
    """Sets that share of a gradient's values to zero, the smallest (Zhu et al., NeurIPS 2019)."""
    del key
    values = jnp.abs(flat(tree))
    least = jnp.quantile(values, share)
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) > least, x, 0), tree)


DEFENCES: dict[str, Callable[[jax.Array, Any], Any]] = {
    "noise1": functools.partial(clip_and_noise, norm=1.0, sigma=1.0),
    "noise10": functools.partial(clip_and_noise, norm=1.0, sigma=10.0),
    "prune90": functools.partial(prune, share=0.9),
    "prune99": functools.partial(prune, share=0.99),
}


def transformation(name: str) -> Callable[[jax.Array], optax.GradientTransformation]:
    """One of `DEFENCES` as `config.gradients` takes it: a function of the key of a step."""
    of_step = lambda key: optax.stateless(lambda grads, _: DEFENCES[name](key, grads))
    return of_step


noise1, noise10 = transformation("noise1"), transformation("noise10")
prune90, prune99 = transformation("prune90"), transformation("prune99")
