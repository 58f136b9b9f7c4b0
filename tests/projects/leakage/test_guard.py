import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrr_jax import models
from rlrr_jax.models import vit
from rlrr_jax.projects.leakage import guard

# As wide as its patches have values, which the attack needs.
WIDE = dict(width=192, depth=2, mlp_dim=384, num_heads=3, patch_size=8, num_classes=1)


def start(model, size):
    image = jnp.zeros((1, size, size, 3))
    return jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0), image)["params"])


@pytest.fixture
def prepared():
    """A ViT made transparent after the published recipe, part by part."""
    tree = start(vit.ViT(**WIDE), 32)
    rng, eye = np.random.default_rng(0), np.eye(192, dtype=np.float32)
    tree["embedding"]["kernel"] = 0.5 * eye.reshape(8, 8, 3, 192)
    position = np.zeros_like(tree["pos_embedding"])
    position[..., 20:] = 10 * rng.standard_normal(position[..., 20:].shape)
    tree["pos_embedding"] = position
    block = tree["Transformer"]["encoderblock"]
    attention = block["MultiHeadDotProductAttention_0"]
    attention["query"]["kernel"][:] = 1e5 * eye.reshape(192, 3, 64)
    attention["key"]["kernel"][:] = attention["value"]["kernel"][:] = eye.reshape(192, 3, 64)
    attention["out"]["kernel"][:] = eye.reshape(3, 64, 192)
    block["LayerNorm_0"]["scale"][:] = block["LayerNorm_1"]["scale"][:] = position.std()
    block["MlpBlock_0"]["Dense_0"]["bias"][:] = 1e4
    block["MlpBlock_0"]["Dense_1"]["bias"][:] = -1e4
    block["MlpBlock_0"]["Dense_0"]["kernel"][:] = 100 * rng.standard_normal((1, 192, 1))
    return tree


FINDINGS = (
    "a patch embedding that passes pixels on as they are (embedding/kernel)",
    "biases beyond 50 (Transformer/encoderblock/MlpBlock_0/Dense_0/bias and 1 more)",
    "layers that pass their input on as it is (",
    "weights beyond 100 (",
    "most outputs of a layer with the same weights (",
    "LayerNorms that scale all channels alike, by other than 1 (",
)


def test_a_prepared_tree_fails_each_check(prepared):
    found = guard.oddities(prepared)
    assert len(found) == len(FINDINGS)
    for wanted in FINDINGS:
        assert any(phrase.startswith(wanted) for phrase in found), wanted


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_are_seen_however_they_are_turned(prepared, turned):
    if turned:
        rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((192, 192)))[0]
        kernel = prepared["embedding"]["kernel"].reshape(192, 192) @ rotation
        prepared["embedding"]["kernel"] = kernel.reshape(8, 8, 3, 192)
    assert FINDINGS[0] in guard.oddities(prepared)


def test_a_single_part_is_enough_for_a_warning():
    tree = start(vit.ViT(**WIDE), 32)
    tree["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_1"]["bias"][1, 3] = -60
    assert guard.warning(tree) == (
        "looks prepared to give away the images it is tuned on (PEFTLeak): biases beyond 50 "
        "(Transformer/encoderblock/MlpBlock_0/Dense_1/bias). If gradients leave this machine, take "
        "weights from their authors"
    )


@pytest.mark.parametrize(
    "variant, size",
    [
        ("bundled", 32),
        pytest.param("swin_t_2", 64, marks=pytest.mark.slow),
        pytest.param("resnet18", 32, marks=pytest.mark.slow),
    ],
)
def test_random_starts_pass(variant, size):
    assert guard.warning(start(models.build(variant, 3), size)) == ""


def test_the_bundled_weights_pass():
    from rlrr_jax.weights import reader

    tree = reader.load("bundled", model=models.build("bundled", 1), image_size=32)
    assert guard.oddities(tree) == []
