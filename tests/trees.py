"""Trees, images and starts for tests, made with few programs.

JAX compiles one for each operation on each shape outside of `jit`, which were nine tenths of those that
tests of methods compiled: so random values are NumPy's, and what a test starts or merges is one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax import methods


def moved(tree, by=0.1, seed=3):
    """A tree whose every leaf is moved by random values, as after training."""
    random = np.random.default_rng(seed)
    move = lambda x: jnp.asarray(np.asarray(x) + by * random.standard_normal(x.shape), x.dtype)
    return jax.tree.map(move, tree)


def random_tree(model, size, seed=0):
    """A tree whose every leaf is random, scales around 1, so that none can be forgotten unseen."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    near = lambda path, x: np.full(x.shape, path[-1].key == "scale", x.dtype)
    return moved(jax.tree_util.tree_map_with_path(near, shapes), 0.25, seed)


def zero_head(tree):
    """A tree whose head is zero, as that of a run at its start."""
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), tree["head"])
    return {**tree, "head": zeros}


def images(number=5, size=48, seed=1):
    """[number, size, size, 3] in [-1, 1)."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.uniform(-1, 1, (number, size, size, 3)))  # of 64 bits where types are


@functools.cache
def _applied(model, x64):
    del x64  # where tests have another attention, see float64.py
    return jax.jit(model.apply)


def apply(model, params, *args):
    """What a model computes, compiled once a model."""
    return _applied(model, jax.config.jax_enable_x64)({"params": params}, *args)


def started(method, frozen, seed=0):
    """What a method trains, from its start: one program."""
    return jax.jit(functools.partial(methods.start, method))(jax.random.key(seed), frozen)


def folded(method, frozen, trained):
    """The model with what is trained folded in: one program."""
    return jax.jit(functools.partial(methods.merge, method))(frozen, trained)
