"""SNELL against its formula in loops; what stays, what is trained, and what a run costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_vit import SMALL
from trees import random_tree

from rlrr_jax import methods, suite
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.models import vit
from rlrr_jax.projects.snell.method import method, quantile

FROZEN = random_tree(vit.ViT(**SMALL), 16)


def in_loops(node, sparsity, softmax):
    """The change of one block's kernel, entry by entry in float64."""
    left, right = (np.asarray(node[key], np.float64) for key in ("inputs", "outputs"))
    out = np.zeros((left.shape[1], right.shape[1]))
    for i in range(len(out)):
        for o in range(out.shape[1]):
            apart = [np.linalg.norm(left[h, i] - right[h, o]) for h in range(2)]
            out[i, o] = 0.1 * (apart[0] - apart[1])
        if softmax:
            exps = np.exp(out[i] / node["gamma"])
            out[i] += node["alpha"] * exps / exps.sum() + node["beta"]
    least = np.quantile(np.abs(out), sparsity)
    return np.where(np.abs(out) > least, out * np.abs(out), 0)


@pytest.mark.parametrize("share", [0.0, 0.35, 0.8, 1.0])
def test_the_quantile_is_numpys(share):
    """Of values of which many are alike, too."""
    x = np.abs(np.random.default_rng(0).normal(size=(3, 24, 40))).astype(np.float32)
    x[1, :10], x[2] = 0.5, 0
    found = jax.jit(quantile, static_argnums=1)(x, share)
    np.testing.assert_allclose(found, np.quantile(x, share, (1, 2), keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("softmax", [False, True])
def test_the_change_is_that_of_the_formula(softmax):
    snell = method(rank=4, sparsity=0.7, softmax=softmax)
    adapter = jax.jit(snell.init)(jax.random.key(0), FROZEN)
    moved = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), adapter)
    sizes = base.dense(FROZEN)
    for name in ("query", "Dense_1"):
        before, after = (
            base.weights(tree, sizes[name])[0] for tree in (FROZEN, jax.jit(snell.merge)(FROZEN, moved))
        )
        for block in range(len(before)):
            node = jax.tree.map(lambda x, block=block: np.asarray(x[block]), moved[name])
            wanted = in_loops(node, 0.7, softmax)
            np.testing.assert_allclose(after[block] - before[block], wanted, atol=2e-6)
            assert abs((wanted == 0).mean() - 0.7) < 0.01


def test_a_gradient_goes_through_what_stays_alone_and_not_through_its_size():
    snell = method(rank=4, sparsity=0.5)
    adapter = jax.jit(snell.init)(jax.random.key(0), FROZEN)
    node = jax.tree.map(lambda x: x[:1], adapter["query"])
    site = base.dense(FROZEN)["query"]
    kernel = lambda a: base.weights(snell.merge(FROZEN, a), site)[0][0]
    grads = jax.jit(jax.grad(lambda a: kernel(a).sum()))(adapter)["query"]["inputs"][0]
    left, right = (np.asarray(node[key][0], np.float64) for key in ("inputs", "outputs"))
    apart = np.linalg.norm(left[:, :, None] - right[:, None], axis=-1)  # [2, in, out]
    change = 0.1 * (apart[0] - apart[1])
    kept = np.abs(change) * (np.abs(change) > np.quantile(np.abs(change), 0.5))
    direction = (left[:, :, None] - right[:, None]) / apart[..., None]
    wanted = 0.1 * np.einsum("hion,io,h->hin", direction, kept, [1, -1])
    np.testing.assert_allclose(grads, wanted, rtol=1e-3, atol=1e-6)


def test_it_starts_near_the_identity_and_keeps_its_contract():
    methods.check("snell", methods.get("snell"), FROZEN)
    adapter = jax.jit(methods.get("snell").init)(jax.random.key(0), FROZEN)
    site = base.dense(FROZEN)["query"]
    assert adapter["query"]["inputs"].shape == (site.depth, 2, site.inputs, 16)
    params = jax.jit(methods.get("snell").merge)(FROZEN, adapter)
    change = np.abs(np.asarray(base.weights(params, site)[0] - base.weights(FROZEN, site)[0]))
    assert 0 < change.max() < 0.004 and abs((change == 0).mean() - 0.8) < 0.01
    same = jax.tree.map(lambda x: x * 0 + 0.5, adapter)  # all distances are alike: no NaN at 0
    total = lambda a: base.weights(methods.get("snell").merge(FROZEN, a), site)[0].sum()
    grads = jax.jit(jax.grad(total))(same)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "option rank=3 must be even"),
        ({"rank": 0}, "option rank=0 must be a whole number greater than 0"),
        ({"sparsity": 1.0}, "option sparsity=1.0 must be at least 0 and less than 1"),
        ({"softmax": 1}, "option softmax=1 must be True or False"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        method(**options)


@pytest.mark.slow
def test_it_learns(tmp_path):
    config = vtab.get_config("digits,method=snell")
    config.epochs, config.num_devices, config.lr = 4, 1, 0.01
    rows, problems = suite.run(config, tmp_path)
    assert not problems and rows[0]["test_acc_final"] > 0.9
