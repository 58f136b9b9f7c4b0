"""The table of rlrr_jax/methods/README.md: what each method can change of a kernel, and what not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_vit import SMALL
from trees import moved, random_tree

from rlrr_jax import methods
from rlrr_jax.methods import base
from rlrr_jax.models import vit


@pytest.fixture(scope="module")
def frozen():
    return random_tree(vit.ViT(**SMALL), 48)


def matrices(tree, name):
    """[L, in, out], float64."""
    node = base.subtree(tree, base.dense(tree)[name].path)
    return np.asarray(node["kernel"], np.float64).reshape(base.sizes(tree)[name])


def pair(frozen, method, name, **options):
    """W and W' of every block after all adapters have moved."""
    method = methods.get(method, **options)
    merged = jax.jit(method.merge)(frozen, moved(jax.jit(method.init)(jax.random.key(0), frozen)))
    return list(zip(matrices(frozen, name), matrices(merged, name)))


def rank(x):
    values = np.linalg.svd(x, compute_uv=False)
    return int((values > 1e-5 * values[0]).sum())


def inside(x, y):
    """Whether the columns of x lie in the space of y's columns."""
    basis = np.linalg.svd(y, full_matrices=False)[0]
    return np.abs(x - basis @ (basis.T @ x)).max() < 1e-4 * np.abs(x).max()


@pytest.mark.parametrize(
    ("method", "options", "name", "expected"),
    [
        ("lora", dict(rank=3), "query", 3),
        ("vera", dict(rank=5), "query", 5),
        ("fact", dict(rank=4), "out", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("vera", dict(rank=256), "query", 32),
                ("fact", dict(rank=4, kind="tk"), "out", 4),
                ("arc", dict(bottleneck=5), "Dense_0", 5),
                ("repadapter", dict(hidden=6), "Dense_0", 6),
                ("hta", dict(rank=1), "query", 32),
            )
        ),
        ("ssf", dict(), "Dense_0", 32),
        ("rlrr", dict(), "query", 32),
        ("rlrr", dict(with_weight=False), "query", 1),
    ],
)
def test_rank_of_the_change(method, options, name, expected, frozen):
    for before, after in pair(frozen, method, name, **options):
        assert rank(after - before) == expected


@pytest.mark.parametrize("r", [1, 3])
def test_rlrrs_factor_has_its_rank_and_the_change_has_full_rank(r, frozen):
    for before, after in pair(frozen, "rlrr", "Dense_0", rank=r):
        assert rank(after / before - 1) == r
        assert rank(after - before) == 32


@pytest.mark.slow
def test_one_sided_changes_keep_one_of_the_singular_subspaces(frozen):
    """Of kernels that are not square: the column space of [64, 32], the row space of [32, 64]."""
    for method, options in (
        ("ssf", {}),
        ("rlrr", dict(sides="right")),
        ("dora", dict(targets="Dense_1")),
    ):
        keeps = method != "dora"
        assert all(inside(a, b) == keeps for b, a in pair(frozen, method, "Dense_1", **options))
    for method in ("arc", "repadapter"):
        assert all(inside(a.T, b.T) for b, a in pair(frozen, method, "Dense_0"))
    assert all(inside(a.T, b.T) for b, a in pair(frozen, "rlrr", "Dense_0", sides="left"))
    for name, turn in (("Dense_1", lambda x: x), ("Dense_0", lambda x: x.T)):
        assert not any(inside(turn(a), turn(b)) for b, a in pair(frozen, "rlrr", name))


def test_ssf_is_rlrr_on_the_right_without_the_residual(frozen):
    """On kernels; its scaled bias is absorbed by the free shift."""
    ssf, rlrr = methods.get("ssf"), methods.get("rlrr", sides="right", residual=False)
    theirs = moved(jax.jit(ssf.init)(jax.random.key(0), frozen))

    def translate(ours, node, weights):
        if "scale" not in node:
            return {k: translate(ours[k], node[k], weights[k]) for k in node} if ours else ours
        if "scale" in ours:  # a LayerNorm or the patch embedding: the same in both
            return node
        shift = node["shift"] + weights["bias"] * (node["scale"] - 1)
        return {"scale_out": node["scale"], "shift": shift}

    shapes = jax.jit(rlrr.init)(jax.random.key(0), frozen)
    parts = {k: translate(shapes[k], theirs[k], frozen[k]) for k in ("Transformer", "embedding")}
    a = jax.jit(ssf.merge)(frozen, theirs)
    b = jax.jit(rlrr.merge)(frozen, parts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a, b)


def test_lora_with_a_shift_is_rlrr_without_the_weight(frozen):
    rlrr = methods.get("rlrr", with_weight=False, where="mha", rank=2)
    lora = methods.get("lora", targets="query+key+value+out", rank=2)
    tree = moved(jax.jit(rlrr.init)(jax.random.key(0), frozen))
    nodes = base.subtree(tree, base.dense(frozen)["query"].path[:-1])
    same = {}
    for name, node in nodes.items():
        depth = len(node["shift"])
        down = node["scale_in"].reshape(depth, -1, 2)
        same[name] = {"down": down, "up": node["scale_out"].reshape(depth, 2, -1)}
    for name in nodes:
        ours, theirs = (
            matrices(jax.jit(m.merge)(frozen, t), name) for m, t in ((rlrr, tree), (lora, same))
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_dora_is_lora_with_its_columns_rescaled(frozen):
    method = methods.get("dora", rank=3)
    tree = moved(jax.jit(method.init)(jax.random.key(0), frozen))
    after = matrices(jax.jit(method.merge)(frozen, tree), "query")
    np.testing.assert_allclose(
        np.linalg.norm(after, axis=1), jnp.abs(tree["query"]["magnitude"]), rtol=1e-4
    )
    lora = matrices(jax.jit(methods.get("lora", rank=3).merge)(frozen, tree), "query")
    ratio = after / lora
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-3)


def test_apla_changes_the_chosen_columns_alone(frozen):
    for before, after in pair(frozen, "apla", "out", columns=5):
        assert (np.abs(after - before).max(0) > 0).sum() == 5
