"""Equalities in float64: two float32 computations in another order are equal by luck."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np


def attention(query, key, value, implementation=None):
    """`jax.nn.dot_product_attention`, whose softmax is in float32 whatever it is given, in float64."""
    del implementation
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


def in_float64(function):
    """Runs a test with 64-bit types and the attention above."""

    @functools.wraps(function)
    def test(*args, **kwargs):
        with jax.enable_x64(True), mock.patch.object(jax.nn, "dot_product_attention", attention):
            return function(*args, **kwargs)

    return test


def double(tree):
    """A tree with its floating-point leaves in float64."""
    wide = lambda x: jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if wide(x) else x, tree)


def near(ours, theirs, tolerance, what=""):
    """AssertionError unless two arrays differ by less than a fraction of the second one's norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    gap, norm = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
    assert ours.shape == theirs.shape and gap <= tolerance * norm, (
        f"{what}: {gap / norm:.2g} of its norm"
    )
