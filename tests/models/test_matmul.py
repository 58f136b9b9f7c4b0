import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrr_jax import models
from rlrr_jax.models import blocks, matmul

RNG = np.random.default_rng(0)
PRECISIONS = ("highest", "bfloat16")


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def rounded(x, precision="bfloat16"):
    """float64 values of what a matmul multiplies."""
    x = np.asarray(x)
    return (x.astype(jnp.bfloat16) if precision == "bfloat16" else x).astype(np.float64)


def graded(function, precision, *args):
    """The value and the gradients for a cotangent, jitted: that is where XLA may refuse a form."""

    @jax.jit
    def run(cotangent, *args):
        with jax.default_matmul_precision(precision):
            out, back = jax.vjp(function, *args)
            return out, *back(cotangent)

    shape = jax.eval_shape(function, *args)
    cotangent = draw(*shape.shape)
    return cotangent, [np.asarray(x, np.float64) for x in run(cotangent.astype(shape.dtype), *args)]


def close(found, wanted, tolerance=2e-6):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inputs, outputs", [((24,), (40,)), ((24,), (4, 10)), ((4, 6), (40,))])
def test_a_dense_layer_sums_the_products_of_rounded_inputs_in_float32(precision, inputs, outputs):
    x, kernel = draw(3, 17, *inputs), draw(*inputs, *outputs)
    number = len(inputs)
    axes = tuple(range(x.ndim - number, x.ndim)), tuple(range(number))
    layer = lambda x, kernel: matmul.dot_general(x, kernel, (axes, ((), ())))
    g, found = graded(layer, precision, x, kernel)
    a, w, dy = (
        rounded(v, precision).reshape(s) for v, s in ((x, (51, 24)), (kernel, (24, 40)), (g, (51, 40)))
    )
    wanted = [(a @ w).reshape(g.shape), (dy @ w.T).reshape(x.shape), (a.T @ dy).reshape(kernel.shape)]
    close(found, wanted)
    if precision == "bfloat16":  # and no other sums are that near
        assert np.abs(found[0] - np.tensordot(x, kernel, number)).max() > 1e-3


def test_what_is_transposed_beside_a_product_is_computed_too():
    """XLA swaps the factors of a product whose result is transposed, to a form without bfloat16."""
    x, kernel = draw(51, 24), draw(24, 40)
    layer = lambda x, kernel: matmul.dot_general(x, kernel, (((1,), (0,)), ((), ())))
    g, found = graded(lambda x, kernel: layer(x, kernel).T, "bfloat16", x, kernel)
    a, w, dy = (rounded(v) for v in (x, kernel, g.T))
    close(found, [(a @ w).T, dy @ w.T, a.T @ dy])
    g, found = graded(lambda x, kernel: layer(x, kernel.T), "bfloat16", x, kernel.T)
    dy = rounded(g)
    close(found, [a @ w, dy @ w.T, dy.T @ a])


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("tokens, with_bias", [(17, False), (1, False), (17, True)])
def test_attention_is_the_library_s(tokens, with_bias):
    q, k, v = draw(2, tokens, 3, 8), draw(2, 17, 3, 8), draw(2, 17, 3, 8)
    bias = draw(1, 3, tokens, 17) if with_bias else None
    g, found = graded(lambda *x: matmul.attention(*x, bias), "highest", q, k, v)
    with jax.default_matmul_precision("highest"):
        out, back = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, bias=bias), q, k, v)
        close(found, [out, *back(g)], 1e-5)


def test_attention_of_windows_is_that_of_each():
    q, k, v = (draw(2, 5, 9, 3, 8) for _ in range(3))
    whole = matmul.attention(q, k, v)
    each = matmul.attention(*(x.reshape(10, 9, 3, 8) for x in (q, k, v)))
    close([whole], [np.asarray(each).reshape(whole.shape)])


def test_attention_in_bfloat16_rounds_what_it_multiplies():
    q, k, v = (draw(2, 17, 3, 8) for _ in range(3))
    g, (out, dq, dk, dv) = graded(matmul.attention, "bfloat16", q, k, v)
    heads = lambda x: np.moveaxis(x, -2, -3)
    a, b, c, dy = (heads(rounded(x)) for x in (q * np.float32(8**-0.5), k, v, g))
    p = softmax(a @ b.swapaxes(-1, -2))
    p16 = rounded(p.astype(np.float32))
    dp = dy @ c.swapaxes(-1, -2)
    ds = rounded((p * (dp - (p * dp).sum(-1, keepdims=True))).astype(np.float32))
    wanted = [p16 @ c, ds @ b * 8**-0.5, ds.swapaxes(-1, -2) @ a, p16.swapaxes(-1, -2) @ dy]
    close([heads(x) for x in (out, dq, dk, dv)], wanted, 4e-3)  # a rounding more or less


@pytest.mark.parametrize(
    "axes", [x for x in itertools.product((0, None), repeat=2) if any(i == 0 for i in x)]
)
def test_trials_together_are_trials_alone(axes):
    x = draw(3, 17, 24) if axes[0] == 0 else draw(17, 24)
    kernel = draw(3, 24, 40) if axes[1] == 0 else draw(24, 40)
    layer = lambda x, kernel: matmul.dot_general(x, kernel, (((1,), (0,)), ((), ())))
    _, together = graded(jax.vmap(layer, axes), "bfloat16", x, kernel)
    pick = lambda array, axis, i: array[i] if axis == 0 else array
    with jax.default_matmul_precision("bfloat16"):
        alone = [layer(pick(x, axes[0], i), pick(kernel, axes[1], i)) for i in range(3)]
    close([together[0]], [np.stack(alone)])


@pytest.mark.parametrize(
    "variant, size", [("bundled", 32), pytest.param("swin_t_2", 64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "precision, dtype",
    [("bfloat16", "float32"), pytest.param("default", "bfloat16", marks=pytest.mark.slow)],
)
def test_a_network_in_bfloat16_is_nearly_that_in_float32(variant, size, precision, dtype):
    def run(precision, dtype):
        model = models.build(variant, 10, dtype=jnp.dtype(dtype))
        images = jax.random.uniform(jax.random.key(1), (2, size, size, 3), minval=-1)
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]
        params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)

        @jax.jit
        def loss(params):
            with jax.default_matmul_precision(precision):
                return jax.value_and_grad(lambda p: (model.apply({"params": p}, images) ** 2).mean())(
                    params
                )

        return loss(params)

    (value, grads), (wanted, exact) = run(precision, dtype), run("highest", "float32")
    assert value != wanted and abs(value / wanted - 1) < 0.02
    norm = lambda tree: np.sqrt(
        sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree))
    )
    assert norm(jax.tree.map(jnp.subtract, grads, exact)) < 0.05 * norm(exact)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_flaxs(dtype):
    """Its values to the last bit, its gradients as those of flax's."""
    x = jnp.asarray(3 * draw(4, 5, 12) + 2, dtype)
    norms = [kind(epsilon=1e-6, dtype=dtype) for kind in (nn.LayerNorm, matmul.LayerNorm)]
    tree = {"scale": jnp.asarray(draw(12)), "bias": jnp.asarray(draw(12))}
    assert jax.tree.map(jnp.shape, norms[0].init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, norms[1].init(jax.random.key(0), x)
    )
    cotangent = draw(4, 5, 12)

    def values(norm):
        def loss(tree, x):
            y = norm.apply({"params": tree}, x)
            assert y.dtype == dtype
            return (y.astype(jnp.float32) * cotangent).sum(), y

        grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(tree, x)
        return y, grads

    (theirs, wanted), (ours, found) = map(values, norms)
    np.testing.assert_array_equal(ours, theirs)
    tolerance = 2e-5 if dtype == jnp.float32 else 0.03
    near = lambda a, b: np.testing.assert_allclose(
        np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    )
    jax.tree.map(near, found, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_mlp_keeps_what_its_matmul_gives(dtype):
    """Of its hidden values one array, before the activation, not the five that its gradient names."""
    x, mlp = jnp.asarray(draw(6, 3, 8), dtype), blocks.MlpBlock(32, "exact", dtype)
    tree = mlp.init(jax.random.key(0), x)
    _, back = jax.vjp(mlp.apply, tree, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
    hidden = [shape for shape in shapes if shape[-1:] == (32,) and math.prod(shape) == 6 * 3 * 32]
    assert len(hidden) == 2, shapes  # and what the second matmul multiplies


def test_an_attention_that_does_not_work_is_said_and_not_taken(capsys):
    """A machine without cuDNN stands for a GPU whose cuDNN is missing or too old."""
    matmul.fused_attention_works.cache_clear()
    assert matmul.fused_attention_works(16) is False and matmul.fused_attention_works(16) is False
    said = capsys.readouterr().out
    assert said.startswith("note: cuDNN's attention does not work here (") and said.count("note") == 1
    assert said.endswith("): XLA's is taken\n")
    assert [matmul.takes_heads_of(width) for width in (4, 64, 128, 136)] == [False, True, True, False]
