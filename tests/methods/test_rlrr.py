"""RLRR's start and what it trains; its merge is tested with those of all methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models.test_vit import SMALL
from trees import images, random_tree

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit

MODEL = vit.ViT(**SMALL)


@pytest.fixture(scope="module")
def frozen():
    return random_tree(MODEL, 48)


def test_merging_zero_scales_changes_no_bit(frozen):
    method = methods.get("rlrr")
    shapes = jax.eval_shape(method.init, jax.random.key(0), frozen)
    zero = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)
    names = flatten_dict(zero, sep="/")
    ones = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if path[-1].key == "scale" else x, zero
    )
    merged = jax.jit(method.merge)(frozen, ones)
    jax.tree.map(np.testing.assert_array_equal, merged, frozen)
    assert sum(name.endswith("/scale") for name in names) == 4


def test_identity_start_changes_no_bit_and_has_a_gradient(frozen):
    method = methods.get("rlrr", init="identity")
    trainable = jax.jit(method.init)(jax.random.key(0), frozen)
    merged = jax.jit(method.merge)(frozen, trainable)
    jax.tree.map(np.testing.assert_array_equal, merged, frozen)

    def loss(trainable):
        params = method.merge(frozen, trainable)
        return MODEL.apply({"params": params}, images()).var()

    grads = flatten_dict(jax.jit(jax.grad(loss))(trainable), sep="/")
    assert all(jnp.abs(v).max() > 0 for k, v in grads.items() if k.endswith("scale_in"))


@pytest.mark.parametrize(
    ("variant", "size", "count", "head"),
    [
        ("B/16", 224, 288_768, 76_900),
        ("L/16", 224, 765_952, 102_500),
        ("H/14", 224, 1_274_880, 128_100),
    ],
)
def test_published_counts(variant, size, count, head):
    model = models.build(variant, 100)
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    frozen = jax.eval_shape(model.init, jax.random.key(0), shape)["params"]
    start = functools.partial(methods.start, methods.get("rlrr"))
    trainable = jax.eval_shape(start, jax.random.key(0), frozen)
    assert methods.trainable_count(trainable) == count
    assert methods.head_count(trainable) == head


def test_start_has_the_authors_distribution():
    model = vit.ViT(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=8, num_classes=2)
    frozen = random_tree(model, 48)
    tree = jax.jit(methods.get("rlrr").init)(jax.random.key(5), frozen)
    fan_in = {"query": 96, "key": 96, "value": 96, "out": 96, "Dense_0": 96, "Dense_1": 384}
    for name, x in flatten_dict(tree, sep="/").items():
        module, leaf = name.split("/")[-2:]
        x = np.asarray(x)
        if leaf in ("scale_in", "scale_out"):
            bound = np.sqrt(6 / fan_in[module]) if leaf == "scale_in" else np.sqrt(6)
            assert 0.95 * bound < np.abs(x).max() <= bound, name
            assert abs(x.std() / bound - 1 / np.sqrt(3)) < 0.06, name
        elif (
            module != "head"
            and leaf in ("scale", "shift")
            and "kernel" not in name
            and ("Norm" in module or module in ("encoder_norm", "embedding"))
        ):
            assert abs(x.mean() - (leaf == "scale")) < 0.01, name
            assert 0.014 < x.std() < 0.026, name
        else:
            assert (x == 0).all(), name


def test_damped_is_the_paper_start_with_a_tenth_of_scale_in(frozen):
    paper, damped = (
        flatten_dict(jax.jit(methods.get("rlrr", init=i).init)(jax.random.key(0), frozen), sep="/")
        for i in ("paper", "damped")
    )
    for name, x in paper.items():
        factor = 0.1 if name.endswith("scale_in") else 1.0
        np.testing.assert_allclose(damped[name], factor * x, rtol=1e-6, err_msg=name)


def test_leaves_draw_different_numbers(frozen):
    tree = flatten_dict(jax.jit(methods.get("rlrr").init)(jax.random.key(0), frozen), sep="/")
    first = [
        float(x.ravel()[0]) for k, x in tree.items() if k.endswith(("scale_in", "scale_out", "/scale"))
    ]
    assert len(set(first)) == len(first)


def test_shapes_have_the_kernels_axes(frozen):
    tree = jax.jit(methods.get("rlrr").init)(jax.random.key(0), frozen)
    attention = tree["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    shapes = jax.tree.map(jnp.shape, attention, is_leaf=lambda x: hasattr(x, "shape"))
    assert shapes["query"] == {"scale_in": (3, 32), "scale_out": (3, 4, 8), "shift": (3, 4, 8)}
    assert shapes["out"] == {"scale_in": (3, 4, 8), "scale_out": (3, 32), "shift": (3, 32)}
    assert tree.keys() == {"embedding", "Transformer"}


def test_layers_of_any_network():
    """A convolution with a bias, a Dense without, as networks of a fork have them: the formula by hand."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    frozen = {
        "first": {"kernel": draw(2, 2, 3, 4), "bias": draw(4)},
        "second": {"kernel": draw(4, 5)},
        "head": {"kernel": draw(5, 2), "bias": draw(2)},
    }
    method = methods.get("rlrr", where="norm+conv+dense")
    methods.check("rlrr", method, frozen)
    adapter = jax.jit(method.init)(jax.random.key(0), frozen)
    adapter["first"]["shift"] += 0.5
    merged = jax.jit(method.merge)(frozen, adapter)
    left, right = (np.asarray(adapter["first"][name]) for name in ("scale_in", "scale_out"))
    for i, column, o, row in ((0, 0, 0, 0), (2, 1, 3, 0), (1, 0, 2, 1)):
        weight = frozen["first"]["kernel"][row, column, i, o]
        wanted = weight + weight * left[i, column] * right[o, row]
        assert merged["first"]["kernel"][row, column, i, o] == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(merged["first"]["bias"], frozen["first"]["bias"] + 0.5)
    scales = np.outer(adapter["second"]["scale_in"], adapter["second"]["scale_out"])
    weight = frozen["second"]["kernel"]
    np.testing.assert_allclose(merged["second"]["kernel"], weight + weight * scales, rtol=1e-5)
    assert merged["second"].keys() == {"kernel"} == frozen["second"].keys()
    assert jax.jit(methods.get("rlrr").init)(jax.random.key(0), frozen).keys() == {"first"}
    norm = {**frozen, "norm": {"scale": draw(5)}}
    with pytest.raises(
        UserError, match="does not fit this model: .* has no bias: leave norms out of its"
    ):
        methods.check("rlrr", method, norm)
    methods.check("rlrr", methods.get("rlrr", where="conv+dense"), norm)


def test_scaled_is_the_paper_start_less_where_a_kernel_is_narrow(frozen):
    """So on a backbone as wide as ViT-B the two are one."""
    paper, scaled = (
        flatten_dict(
            jax.jit(methods.get("rlrr", init=i, rank=2).init)(jax.random.key(0), frozen), sep="/"
        )
        for i in ("paper", "scaled")
    )
    for name, x in paper.items():
        inputs = 64 if "Dense_1" in name else 32  # of the kernels here
        factor = inputs / 768 if name.endswith("scale_in") else 1.0
        np.testing.assert_allclose(scaled[name], factor * x, rtol=1e-6, err_msg=name)
    wide = {"Dense_0": {"kernel": jnp.ones((768, 3)), "bias": jnp.ones(3)}}
    starts = [
        jax.jit(methods.get("rlrr", init=i, where="ffn").init)(jax.random.key(0), wide)
        for i in ("paper", "scaled")
    ]
    jax.tree.map(np.testing.assert_array_equal, *starts)
