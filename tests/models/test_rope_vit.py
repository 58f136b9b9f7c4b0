"""ViTs with rotary positions, against DINOv3's definition in NumPy and numbers recorded from timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rope_kinds
from marks import quick

from rlrr_jax import checks, lookup, methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.models import rope_vit, vit

TINY = rope_kinds.model("dinov3, gated", depth=3)
GRID = (12, 20)  # pixels, 3 x 5 patches


def noise(tree, seed=0, scale=0.3):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(random.normal(0, scale, x.shape)), tree)


def images(size=GRID, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


@jax.jit
def highest(tree, x):
    with jax.default_matmul_precision("highest"):
        return TINY.apply({"params": tree}, x)


@pytest.fixture(scope="module")
def tree():
    return noise(models.shapes(TINY, GRID))


# Rotation -------------------------------------------------------------------------------------


def angles_of_the_definition(h, w, width):
    """As in facebookresearch/dinov3, layers/rope_position_encoding.py, one patch after the other."""
    periods = [100 ** (2 * k / (width / 2)) for k in range(width // 4)]
    rows = []
    for i in range(h):
        for j in range(w):
            y, x = 2 * (i + 0.5) / h - 1, 2 * (j + 0.5) / w - 1
            rows.append([2 * np.pi * c / p for c in (y, x) for p in periods] * 2)
    return np.array(rows)


def test_angles_are_those_of_the_definition():
    ours = rope_vit.Rotary()
    np.testing.assert_allclose(
        ours.angles(ours.places((3, 5)), 16), angles_of_the_definition(3, 5, 16), atol=2e-6
    )


@pytest.mark.parametrize("neighbours", [False, True])
def test_a_rotation_keeps_lengths_and_what_comes_before_patches(neighbours):
    rotary = rope_vit.Rotary(neighbours=neighbours)
    x = np.random.default_rng(0).normal(size=(2, 5 + 6, 3, 16)).astype(np.float32)
    turned = rotary.function(rotary.places((2, 3)), 16, before=5)(x)
    np.testing.assert_array_equal(turned[:, :5], x[:, :5])
    assert np.abs(turned[:, 5:] - x[:, 5:]).max() > 0.5
    norms = lambda x: np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norms(turned), norms(x), rtol=1e-5)
    more = np.concatenate([x, x[:, :1]], 1)  # one behind, as cuDNN's attention may need
    again = rotary.function(rotary.places((2, 3)), 16, before=5)(more)
    np.testing.assert_array_equal(again[:, -1], x[:, 0])


def test_products_of_rotated_patches_depend_on_their_distance_alone():
    rotary, random = rope_vit.Rotary(), np.random.default_rng(0)
    q, k = (random.normal(size=(1, 6, 2, 16)).astype(np.float32) for _ in range(2))

    def products(moved):
        rotate = rotary.function(rotary.places((2, 3)) + jnp.broadcast_to(moved, (6, 2)), 16, before=0)
        return jnp.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k), precision="highest")

    np.testing.assert_allclose(products(0.0), products(jnp.array([0.7, -0.3])), atol=1e-5)
    assert np.abs(products(0.0) - jnp.einsum("bqhd,bkhd->bhqk", q, k)).max() > 0.5


# The model ------------------------------------------------------------------------------------

RECORDED = {  # timm 1.0.31's logits of `rope_kinds`, at 20 x 20 and at 12 x 28 pixels
    "dinov3": (
        [[-0.71566, 0.25466, -0.5517], [-0.97204, -0.21658, -1.88539]],
        [[-1.03495, -0.65164, -1.85794], [-1.66438, -0.47653, -2.31628]],
    ),
    "dinov3, gated": (
        [[-0.60242, -1.17698, -0.51226], [0.0847, 0.32965, -0.07598]],
        [[0.20139, -0.81381, 2.21549], [-0.35308, 1.77801, 1.62594]],
    ),
    "pe_core": (
        [[4.00746, 2.88679, -0.2334], [4.38217, 1.37238, 1.83087]],
        [[4.33286, 2.22866, 0.05971], [4.69382, 0.61261, 1.48959]],
    ),
    "pe_core, no class token": (
        [[-8.54065, 5.31665, 3.49003], [-9.07814, 5.1749, 3.93585]],
        [[-10.05099, 4.63218, 3.50004], [-6.7503, 4.21482, 2.78749]],
    ),
    "eva02": (
        [[-1.99854, 0.63375, 0.24776], [-0.92105, 1.66816, 0.5061]],
        [[-1.35128, 1.83833, -0.4938], [-0.88152, 1.49649, -0.37611]],
    ),
    "eva02, norm": (
        [[-0.89311, 2.99162, 0.64374], [-0.79159, 2.21895, -0.94589]],
        [[-0.63496, 3.04497, -0.91533], [-0.85908, 3.13273, 0.39593]],
    ),
}


@pytest.mark.parametrize("kind", quick(RECORDED, "dinov3", "eva02", "pe_core"))
def test_logits_are_those_recorded_from_timm(kind, tmp_path):
    for size, wanted in zip(((20, 20), (12, 28)), RECORDED[kind]):
        got = rope_kinds.logits_of_a_file(kind, size, images(size), tmp_path)
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=3e-5)


def test_all_ways_to_run_the_blocks_give_the_same(tree):
    want = highest(tree, images())
    for options in ({"unroll": 3}, {"remat": True}, {"unroll": 3, "remat": True}):
        other = TINY.clone(**options)
        with jax.default_matmul_precision("highest"):
            got = jax.jit(other.apply)({"params": tree}, images())
        np.testing.assert_allclose(got, want, atol=1e-5)
    low = TINY.clone(dtype=jnp.bfloat16)
    got = np.asarray(jax.jit(low.apply)({"params": tree}, images()))
    assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)


@pytest.mark.slow
def test_a_model_in_two_parts_is_the_whole(tree):
    first, own = vit.part(TINY, tree, slice(2))
    rest, left = vit.part(TINY, tree, slice(2, None), GRID)
    assert rest.grid == (3, 5)
    with jax.default_matmul_precision("highest"):
        tokens = first.apply({"params": own}, images())
        got = rest.apply({"params": left}, tokens)
    assert tokens.shape == (2, 1 + 4 + 15, 24)
    np.testing.assert_allclose(got, highest(tree, images()), atol=1e-5)


@pytest.mark.slow
def test_positions_are_moved_in_training_alone_each_image_by_its_own_key(tree):
    keys = jax.random.split(jax.random.key(0), 2)
    moved = TINY.clone(position_noise=(0.1, 1.1, 2.0))
    apply = lambda model, keys: model.apply({"params": tree}, images(), 0.0, keys)
    still = apply(TINY, None)
    np.testing.assert_array_equal(apply(moved, None), still)
    one, two = apply(moved, keys), apply(moved, keys[::-1])
    assert np.abs(one - still).max() > 1e-3 and np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(
        apply(TINY.clone(position_noise=(0.0, 1.0, 1.0)), keys), still, atol=1e-5
    )
    alone = moved.apply({"params": tree}, images()[1:], 0.0, keys[1:])
    np.testing.assert_allclose(alone[0], one[1], atol=1e-5)


def test_positions_are_moved_as_far_as_asked():
    keys = jax.random.split(jax.random.key(0), 4000)
    one = jnp.ones((1, 2))
    far = np.asarray(rope_vit.moved(one, (0.5, 1.0, 1.0), keys))[:, 0]
    assert 0.5 <= far.min() < 0.52 and 1.48 < far.max() <= 1.5
    both = np.asarray(rope_vit.moved(one, (0.0, 1.0, 2.0), keys))[:, 0]
    np.testing.assert_allclose(both[:, 0], both[:, 1])
    assert 0.5 <= both.min() < 0.51 and 1.98 < both.max() <= 2.0
    assert abs(np.log(both).mean()) < 0.03  # as often smaller as larger
    each = np.asarray(rope_vit.moved(one, (0.0, 1.2, 1.0), keys))[:, 0]
    assert np.abs(each[:, 0] - each[:, 1]).max() > 0.2 and each.max() <= 1.2 + 1e-6


def test_a_block_of_vits_gets_the_rotation_unless_it_attends_by_itself(monkeypatch):
    monkeypatch.setattr(lookup, "_ALLOWED", {"test_rope_vit:Own", "test_rope_vit:Attends"})
    block = models.build("dinov3_t16", 2, block="test_rope_vit:Own").block
    assert "Own" in [c.__name__ for c in block.__mro__] and block.attend is rope_vit.Block.attend
    assert models.build("dinov3_t16", 2, block="test_rope_vit:Own").block is block  # programs are kept
    with pytest.raises(UserError, match=r"has another attend than rlrr_jax.models.rope_vit.Block: der"):
        models.build("dinov3_t16", 2, block="test_rope_vit:Attends")


class Own(vit.Block):
    pass


class Attends(vit.Block):
    def attend(self, x, context):
        return x


# Methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, values",
    [("dinov3_s16", 139_776), ("dinov3_s16plus", 181_248), ("dinov3_7b16", 4_440_064)],
)
def test_rlrr_trains_what_the_layers_have(variant, values):
    frozen = models.shapes(models.build(variant, 5), 32)
    adapter = jax.eval_shape(methods.get("rlrr").init, jax.random.key(0), frozen)
    size = models.sizes(variant)
    d, m, gated = size["width"], size["mlp_dim"], size.get("gated", False)
    biases = len(size.get("qkv_bias", "qv"))
    dense = 4 * 2 * d + (biases + 1) * d + (2 if gated else 1) * (d + 2 * m) + m + 2 * d
    count = size["depth"] * (dense + 4 * d) + 2 * d + 2 * d  # norms of blocks; the last, the patches
    assert sum(x.size for x in jax.tree.leaves(adapter)) == count == values
    block = adapter["Transformer"]["encoderblock"]
    assert "shift" not in block["MultiHeadDotProductAttention_0"]["key"]


@pytest.mark.parametrize("where", ["attention", "mlp"])
def test_what_goes_before_layers_without_a_bias_is_folded_exactly(where, tree):
    """The shift of an adapter before attention has no place in a key without a bias."""
    random = np.random.default_rng(0)
    down, up = random.normal(0, 0.3, (3, 24, 4)), random.normal(0, 0.3, (3, 4, 24))
    shift, x = random.normal(0, 0.3, (3, 24)), random.normal(0, 1, (3, 7, 24))
    merged = base.prepend(tree, where, *(jnp.float32(a) for a in (down, up, shift)))

    def layers(tree):
        block = tree["Transformer"]["encoderblock"]
        norm = block["LayerNorm_0" if where == "attention" else "LayerNorm_1"]
        y = x * norm["scale"][:, None] + norm["bias"][:, None]
        if tree is not merged:
            y = y + y @ down @ up + shift[:, None]
        mine = base.dense(tree, base.AFTER_NORM[where])
        assert list(mine) == list(base.AFTER_NORM[where])
        weights = {name: base.weights(tree, site) for name, site in mine.items()}
        no = lambda bias: 0 if bias is None else bias[:, None]
        return {name: y @ kernel + no(bias) for name, (kernel, bias) in weights.items()}

    for name, wanted in layers(tree).items():
        np.testing.assert_allclose(layers(merged)[name], wanted, atol=2e-5, err_msg=name)


def test_heads_that_axes_do_not_share_are_named():
    with pytest.raises(UserError, match="num_heads=32 makes heads of 6 values, which rows and columns"):
        checks.heads("dinov3_t16", 32)
    checks.heads("dinov3_t16", 6)
