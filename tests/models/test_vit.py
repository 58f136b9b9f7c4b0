"""The ViT against a second formulation of it, and its drop path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from float64 import double, in_float64
from marks import quick
from trees import apply, images, random_tree

from rlrr_jax import models
from rlrr_jax.models import matmul, noise, vit

SMALL = dict(width=32, depth=3, mlp_dim=64, num_heads=4, patch_size=8, num_classes=7)


@pytest.mark.parametrize("gelu", quick(["tanh", "exact"], "tanh"))
@in_float64
def test_logits_equal_the_second_formulation(gelu):
    model = vit.ViT(**SMALL, gelu=gelu, dtype=jnp.float64)
    params = double(random_tree(model, 48))
    ours = apply(model, params, images())
    other = jax.jit(lambda p: reference.forward(p, images(), 4, gelu))(params)
    np.testing.assert_allclose(ours, other, rtol=0, atol=1e-10)


def test_gelus_differ():
    params = random_tree(vit.ViT(**SMALL), 48)
    tanh, exact = (apply(vit.ViT(**SMALL, gelu=g), params, images()) for g in ("tanh", "exact"))
    assert 1e-5 < float(jnp.abs(tanh - exact).max()) < 1e-2


@pytest.mark.parametrize(
    ("size", "pool"),
    [
        pytest.param(48, "token", marks=pytest.mark.slow),
        pytest.param(48, "avg", marks=pytest.mark.slow),
        pytest.param(40, "token", marks=pytest.mark.slow),
    ],
)
def test_fused_attention_is_attention(size, pool, monkeypatch):
    """With 37, 36 and 26 tokens: the same function of JAX, as XLA computes it, in cuDNN's place.

    Logits, the gradient of every parameter, and the last block of one query.
    """
    asked, function = [], jax.nn.dot_product_attention

    def xla(query, key, value, implementation, **lengths):
        asked.append(query.shape)
        return function(query, key, value, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    kind = dict(pool=pool, class_token=pool == "token", unroll=3)
    params = random_tree(vit.ViT(**SMALL, **kind), size)
    cotangent = np.random.default_rng(4).normal(size=(5, 7))

    def values(attention):
        model = vit.ViT(**SMALL, **kind, attention=attention)
        loss = lambda params: (
            model.apply({"params": params}, images(size=size), 0.3, keys(5)) * cotangent
        ).sum()
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(loss))(params)

    plain = values("xla")
    assert not asked
    fused = values("cudnn")
    tokens = (size // 8) ** 2 + (pool == "token")
    assert {shape[1] for shape in asked} == {tokens + tokens % 2}
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    jax.tree.map(near, plain, fused)


def test_trials_have_lengths_of_their_own(monkeypatch):
    """JAX's rule for `vmap` over cuDNN's attention reshapes them with queries, keys and values."""

    def look(query, key, value, query_seq_lengths, key_value_seq_lengths, implementation):
        assert implementation == "cudnn" and query.shape == (3, 6, 2, 8)
        for lengths in (query_seq_lengths, key_value_seq_lengths):
            assert isinstance(lengths, jax.core.Tracer) and lengths.shape == (3,)
        return query + query_seq_lengths[:, None, None, None]

    monkeypatch.setattr(jax.nn, "dot_product_attention", look)
    qkv = [jnp.zeros((4, 3, 6, 2, 8))] * 3
    out = jax.vmap(lambda *qkv: matmul.fused_attention(*qkv, number=5))(*qkv)
    assert out.shape == (4, 3, 6, 2, 8) and (out == 5).all()


@pytest.mark.parametrize("unroll", quick([1, 3], 3))
@in_float64
def test_remat_changes_no_gradient(unroll):
    params = double(random_tree(vit.ViT(**SMALL), 48))

    def loss(params, remat):
        model = vit.ViT(**SMALL, unroll=unroll, remat=remat, dtype=jnp.float64)
        return apply(model, params, images(), 0.3, keys(5)).var()

    plain, saved = (jax.grad(loss)(params, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), plain, saved)


@pytest.mark.parametrize(
    "pool, mode",
    [
        ("token", "element"),
        pytest.param("token", "sample", marks=pytest.mark.slow),
        pytest.param("both", "element", marks=pytest.mark.slow),
    ],
)
@in_float64
def test_unroll_changes_no_result(pool, mode):
    wide = dict(SMALL, dtype=jnp.float64, pool=pool, drop_path_mode=mode, dist_token=pool == "both")
    params = double(random_tree(vit.ViT(**wide), 48))

    def run(unroll, remat=False):
        model = vit.ViT(**wide, unroll=unroll, remat=remat)
        loss = lambda params: (apply(model, params, images(), 0.3, keys(5)) ** 2).mean()
        return jax.value_and_grad(loss)(params)

    for other in (run(3), run(3, remat=True)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), run(1), other)


def test_the_last_block_computes_what_is_pooled_alone():
    tokens, width, hidden = 37, SMALL["width"], SMALL["mlp_dim"]

    def flops(unroll, **more):
        model = vit.ViT(**SMALL, unroll=unroll)
        params = jax.eval_shape(model.init, jax.random.key(0), images(1))
        run = jax.jit(lambda params, x: model.apply(params, x, **more))
        return run.lower(params, images(1)).compile().cost_analysis()["flops"]

    idle = 2 * (tokens - 1) * (2 * width**2 + 2 * width * hidden + 2 * tokens * width)
    kept = flops(3, mutable=["intermediates"]) - flops(3)
    assert idle < kept < 1.2 * idle  # the rest is the softmax, GELU, and LayerNorms
    model = vit.ViT(**SMALL, unroll=3)
    params = random_tree(model, 48)
    _, more = model.apply({"params": params}, images(1), mutable=["intermediates"])
    assert more["intermediates"]["encoded"][0].shape == (1, tokens, width)


def test_bfloat16_computes_low_and_answers_in_float32():
    params = random_tree(vit.ViT(**SMALL), 48)
    low = apply(vit.ViT(**SMALL, dtype=jnp.bfloat16), params, images())
    high = apply(vit.ViT(**SMALL), params, images())
    assert low.dtype == jnp.float32
    gap = float(jnp.abs(low - high).max())
    assert 1e-4 < gap < 0.2 * float(jnp.abs(high).max())


@pytest.mark.parametrize(
    ("variant", "size", "millions"),
    [
        ("Ti/16", 224, 5.5),
        ("S/32", 224, 22.5),
        ("B/16", 224, 85.8),
        ("L/16", 384, 303.7),
        ("H/14", 224, 630.8),
    ],
)
def test_variants_have_the_published_sizes(variant, size, millions):
    model = models.build(variant, 1)
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), shape)["params"]
    params.pop("head")
    assert sum(x.size for x in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", ["b/16", "B16", "XL/16", "B/", "B/0", "B/-1"])
def test_unknown_variant_names_the_nearest(name):
    with pytest.raises(ValueError, match=r"unknown model variant '.*': did you mean '[BLS]/16'"):
        models.build(name, 1)


def test_size_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="50x50 is not divisible by the patch size 8"):
        vit.ViT(**SMALL).init(jax.random.key(0), jnp.zeros((1, 50, 50, 3)))


drawn = jax.jit(noise.drop_path_masks, static_argnums=(2, 3))


def keys(number):
    return jax.vmap(jax.random.key)(jnp.arange(number))


@pytest.mark.parametrize("mode", quick(["element", "sample"], "sample"))
def test_drop_path_of_one_branch(mode):
    x, rates = jnp.ones((400, 4, 6)), jnp.array([0.0, 0.25])
    masks = drawn(keys(400), rates, x.shape[1:], mode)
    assert masks.shape == (2, 2, 400, *((4, 2) if mode == "element" else (1, 1)))
    whole = noise.unpacked(masks, 6) if mode == "element" else masks
    assert whole[0].all()
    out = noise.drop_path(x, rates[1], masks[1, 0])
    kept = np.asarray(out) > 0
    np.testing.assert_allclose(np.asarray(out)[kept], 1 / 0.75, rtol=1e-6)
    per_example = kept.reshape(400, -1).mean(1)
    if mode == "sample":
        assert set(per_example) == {0.0, 1.0}
    else:
        assert 0.3 < per_example.min() and per_example.max() < 1.01 and per_example.std() > 0
    assert abs(kept.mean() - 0.75) < 0.06


def test_drop_path_rate_zero_changes_no_bit():
    model = vit.ViT(**SMALL)
    params = random_tree(model, 48)
    plain = apply(model, params, images())
    assert (apply(model, params, images(), 0.0, keys(5)) == plain).all()
    assert (apply(model, params, images(), 0.5, keys(5)) != plain).any()


def test_drop_path_rises_from_zero_at_the_first_block():
    model = vit.ViT(**{**SMALL, "depth": 1})
    params = random_tree(model, 48)
    out = apply(model, params, images(), 0.9, keys(5))
    assert (out == apply(model, params, images())).all()


@in_float64
def test_drop_path_noise_belongs_to_the_example_not_to_the_batch():
    model = vit.ViT(**SMALL, dtype=jnp.float64)
    params = double(random_tree(model, 48))
    whole = apply(model, params, images(), 0.5, keys(5))
    parts = [apply(model, params, images()[s], 0.5, keys(5)[s]) for s in (np.s_[:2], np.s_[2:])]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=0, atol=1e-10)


def test_branches_and_blocks_draw_different_noise():
    masks = np.asarray(drawn(keys(50), jnp.full(3, 0.5), (4, 6), "element"))
    draws = np.asarray(noise.unpacked(jnp.asarray(masks), 6)).reshape(6, -1)
    agreement = [(a == b).mean() for i, a in enumerate(draws) for b in draws[:i]]
    assert max(agreement) < 0.6
