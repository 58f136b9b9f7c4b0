"""ViTs with more, or less, than a class token: read, computed, tuned, written."""

import json

import jax
import jax.numpy as jnp
import named_vits
import numpy as np
import pytest
import safetensors.numpy
from marks import quick

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import positions, preprocessing, reader, vit_layouts, vit_writers

KINDS = {
    "registers": dict(registers=4),
    "distilled": dict(dist_token=True, pool="both"),
    "clip": dict(pre_norm=True),
    "qk_norm": dict(qk_norm=True),
    "fc_norm": dict(fc_norm=True, pool="avg"),
    "avg": dict(class_token=False, pool="avg"),
    "map": dict(class_token=False, pool="map"),
}
SIZES = dict(width=24, depth=3, mlp_dim=48, num_heads=3, patch_size=4)
HALF = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")


def logits(params, images, model):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).uniform(-1, 1, (3, 12, 12, 3)).astype(np.float32)


def load(name, folder):
    weights, pool, gelu = named_vits.kind(np.random.default_rng(0), name)
    path = folder / "x.safetensors"
    safetensors.numpy.save_file(weights, path)
    parts = vit_layouts.parts(reader.array_shapes(path))
    model = vit.ViT(**SIZES, num_classes=5, gelu=gelu, **parts)
    tree = reader.load(path, model=model, image_size=12, how=HALF, head=True)
    return weights, pool, gelu, parts, model, tree


@pytest.mark.parametrize("name", quick(KINDS, "distilled", "clip", "fc_norm"))
def test_a_kind_is_seen_in_its_file_and_computed_as_timm_does(name, pictures, tmp_path):
    weights, pool, gelu, parts, model, tree = load(name, tmp_path)
    assert parts == KINDS[name]
    wanted = named_vits.timm(weights, pictures, 3, gelu, pool)
    ours = logits(tree, pictures, model)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
    # RLRR, out as timm has it, and in again.
    method = methods.get("rlrr", where="mha+ffn+norm+patch+pool")
    methods.check("rlrr", method, tree)
    adapter = jax.jit(method.init)(jax.random.key(0), tree)
    tuned = {**jax.jit(method.merge)(tree, adapter), "head": tree["head"]}
    state = vit_writers.to_timm(tuned)
    assert state.keys() == weights.keys()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in weights.items()}
    wanted = named_vits.timm(state, pictures, 3, gelu, pool)
    ours = logits(tuned, pictures, model)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_the_pooling_of_a_map_head_is_frozen_or_tuned(tmp_path):
    *_, tree = load("map", tmp_path)
    adapter = methods.check("rlrr", methods.get("rlrr"), tree)
    assert "MAPHead_0" not in adapter
    tuned = methods.check("rlrr", methods.get("rlrr", where="mha+pool"), tree)["MAPHead_0"]
    query = tuned["MultiHeadDotProductAttention_0"]["query"]
    assert {k: v.shape for k, v in query.items()} == {
        "scale_in": (24,), "scale_out": (3, 8), "shift": (3, 8)
    }  # fmt: skip
    assert tuned["LayerNorm_0"].keys() == {"scale", "shift"}
    assert "MAPHead_0" not in methods.check("ssf", methods.get("ssf"), tree)


def test_a_projection_is_kept_on_request(pictures, tmp_path):
    """CLIP's: a Dense without bias before the head; timm has it as the head."""
    weights, *_ = named_vits.kind(np.random.default_rng(0), "clip")
    weights["head.bias"] = np.zeros_like(weights["head.bias"])
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(weights, path)
    model = vit.ViT(**SIZES, num_classes=2, gelu="quick", pre_norm=True, projection=5)
    tree = reader.load(path, model=model, image_size=12, how=HALF)
    assert tree["projection"]["kernel"].shape == (24, 5)
    tree["head"]["kernel"] = np.eye(5, 2, dtype=np.float32)
    wanted = named_vits.timm(weights, pictures, 3, "quick")[:, :2]
    np.testing.assert_allclose(logits(tree, pictures, model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rope.freqs", (4,), "rotary positions"),
        ("blocks.0.attn.relative_position_bias_table", (9, 3), "relative positions"),
        ("blocks.0.mlp.w12.weight", (9, 3), "gated MLPs"),
        ("patch_embed.backbone.stem.conv.weight", (9, 3), "a convolutional stem"),
    ],
)
def test_what_is_refused_is_named(name, value, reason, tmp_path):
    weights, *_ = named_vits.kind(np.random.default_rng(0), "registers")
    safetensors.numpy.save_file(
        {**weights, name: np.zeros(value, np.float32)}, tmp_path / "x.safetensors"
    )
    model = vit.ViT(**SIZES, num_classes=5, registers=4)
    with pytest.raises(UserError, match=f"has {reason}.*take another"):
        reader.load(tmp_path / "x.safetensors", model=model, image_size=12, how=HALF)


def test_a_patch_embedding_is_resized_on_request(tmp_path):
    """Patches that are resized to 8 pixels give what they gave with 4, on smooth images."""
    weights, *_ = named_vits.kind(np.random.default_rng(0), "registers")
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(weights, path)
    model = vit.ViT(**{**SIZES, "patch_size": 8}, num_classes=5, registers=4)
    with pytest.raises(
        UserError, match=r"embedding/kernel is \(4, 4, 3, 24\) instead of \(8, 8, 3, 24\)"
    ):
        reader.load(path, model=model, image_size=24, how=HALF)
    notes = []
    how = HALF._replace(patch=True)
    tree = reader.load(path, model=model, image_size=24, how=how, note=notes.append)
    assert f"note: the patch embedding of {path} was resized from 4 to 8 pixels" in notes
    old = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    patch = np.random.default_rng(1).random((4, 4, 3)).astype(np.float32)
    large = jax.image.resize(patch, (8, 8, 3), "cubic")
    ours = jnp.einsum("ijc,ijcd->d", large, tree["embedding"]["kernel"])
    np.testing.assert_allclose(ours, np.einsum("ijc,ijcd->d", patch, old), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [8, 12, 20, 32])
def test_a_resized_patch_embedding_is_timms_where_it_is_installed(patch):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    kernel = np.random.default_rng(0).standard_normal((16, 16, 3, 5)).astype(np.float32)
    theirs = timm.layers.resample_patch_embed(
        torch.from_numpy(kernel).permute(3, 2, 0, 1), [patch, patch], interpolation="bicubic"
    )
    ours = positions.resize_patch(kernel, patch, "bicubic")
    np.testing.assert_allclose(ours, theirs.permute(2, 3, 1, 0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_pe_spatial_base_patch16_512", "vit_small_patch16_rope_224"])
def test_rotary_positions_that_only_a_name_tells_are_refused(name, tmp_path):
    weights, *_ = named_vits.kind(np.random.default_rng(0), "clip")
    path = tmp_path / f"{name}.safetensors"
    safetensors.numpy.save_file(weights, path)
    with pytest.raises(
        UserError, match=f"names {name}, which has rotary positions of another kind: .* another"
    ):
        preprocessing.read(path)
    path = path.rename(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    with pytest.raises(UserError, match=f"config.json names {name}.*rotary positions"):
        preprocessing.read(path)


# Against the libraries -------------------------------------------------------------------------

TIMM = {  # architecture, arguments, our variant, GELU, pool
    "registers": ("vit_small_patch14_reg4_dinov2", {}, "S/14", "exact"),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, "Ti/16", "exact"),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}, "B/16", "quick"),
    "fc_norm": ("vit_tiny_patch16_224", dict(global_pool="avg", fc_norm=True), "Ti/16", "exact"),
    "avg": ("vit_base_patch16_siglip_gap_224", {}, "B/16", "exact"),
    "map": ("vit_base_patch16_siglip_224", {}, "B/16", "exact"),
    "qk_norm": ("vit_tiny_patch16_224", dict(qk_norm=True), "Ti/16", "exact"),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 112])
@pytest.mark.parametrize("name", TIMM)
def test_logits_are_timms_where_it_is_installed(name, size, tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    architecture, arguments, variant, gelu = TIMM[name]
    torch.manual_seed(0)
    theirs = timm.create_model(architecture, num_classes=7, img_size=size, **arguments).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    path = tmp_path / f"{architecture}.safetensors"
    safetensors.numpy.save_file({k: v.numpy() for k, v in theirs.state_dict().items()}, path)
    images = np.random.default_rng(3).random((2, size, size, 3), np.float32) * 2 - 1
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    parts = vit_layouts.parts(reader.array_shapes(path))
    eps = theirs.norm_pre.eps if name == "clip" else 1e-6
    model = models.build(variant, 7, gelu=gelu, norm_eps=eps, **parts)
    tree = reader.load(path, model=model, image_size=size, how=HALF, head=True)
    ours = logits(tree, images, model)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
    state = {k: torch.from_numpy(np.array(v)) for k, v in vit_writers.to_timm(tree).items()}
    folded = {k: torch.ones_like(v) for k, v in theirs.state_dict().items() if k.endswith("gamma")}
    theirs.load_state_dict({**folded, **state}, strict=True)
    with torch.no_grad():
        again = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(again, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip", "registers"])
def test_features_are_transformers_where_it_is_installed(kind, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    if kind == "registers":
        config = transformers.Dinov2WithRegistersConfig(**sizes, mlp_ratio=4, num_register_tokens=4)
        theirs = transformers.Dinov2WithRegistersModel(config)
    else:
        name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
        config = getattr(transformers, f"{name}VisionConfig")(**sizes, intermediate_size=768)
        theirs = getattr(transformers, f"{name}VisionModel")(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    theirs.eval().save_pretrained(tmp_path)
    images = np.random.default_rng(3).random((2, 32, 32, 3), np.float32) * 2 - 1
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).pooler_output.numpy()
    path = tmp_path / "model.safetensors"
    card = preprocessing.read(path, needed=False)
    parts = vit_layouts.parts(reader.array_shapes(path))
    model = vit.ViT(192, 2, 768, 3, 8, 192, gelu=card.gelu, norm_eps=card.norm_eps, **parts)
    tree = reader.load(path, model=model, image_size=32, how=HALF._replace(resize=card.resize))
    tree["head"]["kernel"] = np.eye(192, dtype=np.float32)
    ours = logits(tree, jnp.array(images), model)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
