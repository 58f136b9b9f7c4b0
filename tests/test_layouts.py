"""Weights from and to the PyTorch and JAX worlds, against plain ViTs that know only those names."""

import json
import re

import jax
import named_vits
import numpy as np
import pytest
import safetensors.numpy

from configs import vtab
from rlrr_jax import cards, layouts, pretrained
from rlrr_jax import config as config_lib
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit

SIZES = dict(width=24, depth=3, mlp_dim=48, num_heads=3, patch_size=4)
MODEL = vit.ViT(**SIZES, num_classes=5, gelu="exact")
IMAGENET = dict(mean=cards.IMAGENET[0], std=cards.IMAGENET[1])


@pytest.fixture
def weights():
    return named_vits.timm_weights(np.random.default_rng(0))


@pytest.fixture(scope="module")
def pixels():
    """Images in [0, 1]."""
    return np.random.default_rng(1).random((4, 12, 12, 3), np.float32)


def write(path, weights, metadata=None):
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in weights.items()}, path, metadata
    )
    return str(path)


def logits(params, images, model=MODEL):
    with jax.default_matmul_precision("highest"):
        return model.apply({"params": params}, images)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# In -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
def test_fused_qkv_layer_scale_and_other_pixels_come_in_right(scale, pixels, tmp_path):
    weights = named_vits.timm_weights(np.random.default_rng(0), scale=scale)
    path = write(tmp_path / "vit.safetensors", weights)
    tree = pretrained.load(path, model=MODEL, image_size=12, head=True, **IMAGENET)
    mean, std = map(np.float32, cards.IMAGENET)
    wanted = named_vits.timm(weights, (pixels - mean) / std, SIZES["num_heads"])
    close(logits(tree, 2 * pixels - 1), wanted)
    assert not np.allclose(wanted, named_vits.timm(weights, 2 * pixels - 1, 3), atol=0.01)


def test_the_head_is_zero_unless_asked_for(weights, tmp_path):
    path = write(tmp_path / "augreg.safetensors", weights)
    tree = pretrained.load(path, model=MODEL.clone(num_classes=7), image_size=12)
    assert tree["head"]["kernel"].shape == (24, 7) and not tree["head"]["kernel"].any()


def test_weights_without_biases_and_in_half_precision(weights, pixels, tmp_path):
    for name in [key for key in weights if key.endswith("qkv.bias")]:
        del weights[name]
    half = {k: v.astype(np.float16) for k, v in weights.items()}
    tree = pretrained.load(
        write(tmp_path / "augreg.safetensors", half), model=MODEL, image_size=12, head=True
    )
    whole = {k: v.astype(np.float32) for k, v in half.items()}
    whole |= {f"blocks.{i}.attn.qkv.bias": np.zeros(72, np.float32) for i in range(3)}
    close(logits(tree, 2 * pixels - 1), named_vits.timm(whole, 2 * pixels - 1, 3))


def test_moco_v3_takes_the_base_encoder_and_mae_only_the_encoder(weights, pixels, tmp_path):
    other = {k: v + 1 for k, v in weights.items()}
    moco = {f"module.momentum_encoder.{k}": v for k, v in other.items()}
    moco |= {f"module.base_encoder.{k}": v for k, v in weights.items() if not k.startswith("head")}
    moco |= {"module.base_encoder.head.0.weight": weights["cls_token"]}
    moco |= {"module.predictor.0.weight": weights["cls_token"]}
    mae = {k: v for k, v in weights.items() if not k.startswith("head")}
    mae |= {"mask_token": weights["cls_token"], "decoder_pos_embed": weights["pos_embed"]}
    mae |= {
        "decoder_blocks.0.norm1.weight": weights["norm.weight"],
        "decoder_pred.bias": weights["norm.bias"],
    }
    mean, std = map(np.float32, cards.IMAGENET)
    trees = [
        pretrained.load(write(tmp_path / f"{name}.safetensors", w), model=MODEL, image_size=12)
        for name, w in {"mocov3": moco, "mae": mae}.items()
    ]
    del weights["head.weight"], weights["head.bias"]
    encoded = named_vits.timm(weights, (pixels - mean) / std, 3)
    for tree in trees:
        tree["head"]["kernel"] = np.eye(24, 5, dtype=np.float32)
        close(logits(tree, 2 * pixels - 1), encoded[:, :5])


def test_another_image_size_resizes_the_position_embedding(weights, tmp_path):
    path = write(tmp_path / "augreg.safetensors", weights)
    tree = pretrained.load(path, model=MODEL, image_size=20)
    assert tree["pos_embedding"].shape == (1, 25, 24)
    np.testing.assert_allclose(tree["pos_embedding"][0, 0], weights["pos_embed"][0, 1], atol=1e-6)


REFUSED = {
    "registers": (
        {"reg_token": (1, 4, 24)},
        "has register tokens (reg_token), which this ViT does not",
    ),
    "attention pooling": ({"attn_pool.q": (24,)}, "has attention pooling instead of a class token"),
    "before": ({"norm_pre.weight": (24,)}, "has a LayerNorm before its first block (norm_pre.weight)"),
    "normalised queries": (
        {"blocks.0.attn.q_norm.weight": (8,)},
        "unknown: Transformer/encoderblock_0/attn.q_norm.weight",
    ),
    "gated MLP": ({"blocks.0.mlp.w12.weight": (9, 24)}, "mlp.w12.weight"),
    "layer scale": ({"blocks.0.ls1.gamma": (7,)}, "the LayerScale of"),
    "heads": ({"blocks.0.attn.qkv.weight": (73, 24)}, "attn.qkv.weight"),
    "scalar": ({"blocks.0.attn.qkv.weight": ()}, "attn.qkv.weight"),
    "width": ({"cls_token": (1, 1, 23)}, "cls is (1, 1, 23) instead of (1, 1, 24)"),
    "three blocks": (
        {"blocks.3.norm1.bias": (24,)},
        "unknown: Transformer/encoderblock_3/LayerNorm_0/bias",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_our_vit_does_not_have_is_refused(what, weights, tmp_path):
    changes, message = REFUSED[what]
    weights |= {k: np.ones(shape, np.float32) for k, shape in changes.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        pretrained.load(write(tmp_path / "augreg.safetensors", weights), model=MODEL, image_size=12)


def test_weights_without_class_token_or_of_no_vit_are_refused(weights, tmp_path):
    del weights["cls_token"]
    with pytest.raises(UserError, match="has no class token"):
        pretrained.load(write(tmp_path / "a.safetensors", weights), model=MODEL, image_size=12)
    with pytest.raises(UserError, match="it is no Vision Transformer of timm's"):
        pretrained.load(
            write(tmp_path / "b.safetensors", {"conv1.weight": np.ones(3)}), model=MODEL, image_size=12
        )


def test_damaged_safetensors_are_one_sentence(weights, tmp_path):
    path = tmp_path / "augreg.safetensors"
    write(path, weights)
    data = path.read_bytes()
    for bad in (data[:1000], b"", b"\xff" * 100, data[:8] + b"x" + data[9:]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="is no readable .safetensors file"):
            pretrained.load(str(path), model=MODEL, image_size=12)
    weights["norm.bias"][3] = np.nan
    write(path, weights)
    with pytest.raises(UserError, match="encoder_norm/bias in .* is not made of finite"):
        pretrained.load(str(path), model=MODEL, image_size=12)


# Pixels ---------------------------------------------------------------------------------------

PIXELS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 224, 224]}
TIMM = {"architecture": "vit_tiny", "pretrained_cfg": PIXELS, "global_pool": "token"}


def test_the_card_is_the_headers_the_configs_or_the_names(weights, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, weights)
    with pytest.raises(UserError, match="nothing says how the pixels of .*set config.pretrained.mean"):
        cards.read(path)
    assert cards.read(path, "hf:timm/vit_base_patch16_224.mae")[:3] == ("exact", *cards.IMAGENET)
    assert cards.read(path, "vit.augreg_in21k")[:3] == ("exact", cards.HALF, cards.HALF)
    assert cards.read(path, "/home/maeve/augreg/x.safetensors", needed=False) is None
    assert cards.read(path, "/augreg/dinov2.safetensors")[:3] == ("exact", *cards.IMAGENET)
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    found = cards.read(path, "dinov2")
    assert found == ("exact", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "config.json", 224, "token")
    (tmp_path / "x.json").write_text(json.dumps({**TIMM, "model_args": {"act_layer": "gelu_tanh"}}))
    assert cards.read(path).gelu == "tanh"
    (tmp_path / "x.json").write_text(json.dumps({**TIMM, "model_args": {"act_layer": "quick_gelu"}}))
    with pytest.raises(UserError, match="the activation quick_gelu is none of gelu"):
        cards.read(path)
    for bad in ("{", "[]", '{"pretrained_cfg": 1}', '{"model_args": [1]}', "[" * 100_000):
        (tmp_path / "x.json").write_text(bad)
        with pytest.raises(UserError, match="x.json is no config.json of timm"):
            cards.read(path)
    for mean, std in (
        ([0, 0], [1, 1]),
        (3, [1] * 3),
        ([0, 0, float("nan")], [1] * 3),
        ([0] * 3, [0] * 3),
    ):
        (tmp_path / "x.json").write_text(json.dumps({"mean": mean, "std": std}))
        with pytest.raises(UserError, match=r"is damaged \((mean|std) .* is not three numbers\)"):
            cards.read(path)
    said = {"gelu": "tanh", "mean": [0.5] * 3, "std": [0.25] * 3}
    write(path, weights, {"rlrr_jax": json.dumps(said)})
    assert cards.read(path)[:4] == ("tanh", cards.HALF, (0.25,) * 3, "its header")
    assert cards.read("x.npz")[:4] == ("tanh", cards.HALF, cards.HALF, "its layout")
    write(path, weights, {"rlrr_jax": json.dumps({**said, "gelu": "foo"})})
    with pytest.raises(UserError, match="what its header says of .* is damaged .unknown GELU 'foo'"):
        cards.read(path)


def test_a_configuration_that_differs_from_the_card_is_said(weights, tmp_path):
    """The run takes what the card says where the configuration says nothing, and notes the rest."""
    (tmp_path / "config.json").write_text(json.dumps({**TIMM, "global_pool": "avg"}))
    path = write(tmp_path / "x.safetensors", weights)
    config = vtab.get_config("cifar")
    config.pretrained.name = path
    (run,) = config_lib.resolve(config)
    assert run.model.gelu is None
    notes = config_lib.follow(run, path)
    assert (run.model.gelu, run.pretrained.mean) == ("exact", (0.1, 0.2, 0.3))
    assert notes == [f"note: {path} pools by avg (says config.json), not by class token"]
    config.update(image_size=32)
    config.model.gelu = "tanh"
    config.pretrained.update(mean=cards.HALF, std=cards.HALF)
    (run,) = config_lib.resolve(config)
    said = "\n".join(config_lib.follow(run, path))
    assert f"note: {path} has exact (says config.json), config.model.gelu is tanh" in said
    assert "has (0.1, 0.2, 0.3) (says config.json), config.pretrained.mean is (0.5, 0.5, 0.5)" in said
    assert "has 224 (says config.json), config.image_size is 32" in said
    assert run.pretrained.mean == cards.HALF


def test_several_models_in_one_file_are_not_guessed(weights, tmp_path):
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in weights.items()}
    with pytest.raises(UserError, match=r"holds several models \(student., teacher.\)"):
        pretrained.load(write(tmp_path / "dino.safetensors", both), model=MODEL, image_size=12)


def test_folding_half_changes_no_bit(weights, tmp_path):
    path = write(tmp_path / "x.safetensors", weights)
    tree = pretrained.load(path, model=MODEL, image_size=12, mean=cards.HALF, std=cards.HALF)
    kernel = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(tree["embedding"]["kernel"], kernel)
    flat = {"embedding/kernel": kernel, "embedding/bias": weights["patch_embed.proj.bias"]}
    again = layouts.fold_pixels(flat, cards.HALF, cards.HALF)
    for key in flat:
        np.testing.assert_array_equal(again[key], flat[key])


# Out ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree():
    """A random tree, head included."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, 12, 12, 3), np.float32))
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes["params"])


def test_big_vision_names_load_into_a_plain_vit_with_these_names(tree, pixels):
    named = layouts.to_big_vision(tree)
    close(named_vits.big_vision(named, 2 * pixels - 1, "exact"), logits(tree, 2 * pixels - 1))


def test_timm_names_load_into_a_plain_vit_with_these_names(tree, pixels):
    named = layouts.to_timm(tree)
    close(named_vits.timm(named, 2 * pixels - 1, 3), logits(tree, 2 * pixels - 1))


def test_timm_names_load_into_pytorch_modules(tree, pixels):
    """Strictly, into torch's own Conv2d, Linear, LayerNorm and attention under timm's names."""
    torch = pytest.importorskip("torch")
    import torch_timm

    model = torch_timm.ViT(24, 3, 48, 3, 4, 10, 5)
    model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in layouts.to_timm(tree).items()}, strict=True
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(2 * pixels - 1).permute(0, 3, 1, 2)).numpy()
    close(logits(tree, 2 * pixels - 1), theirs)


def test_timm_names_load_into_timm(tree, pixels):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    sizes = dict(
        embed_dim=24, depth=3, num_heads=3, mlp_ratio=2, patch_size=4, img_size=12, num_classes=5
    )
    model = timm.models.vision_transformer.VisionTransformer(**sizes).eval()  # as export advises
    model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in layouts.to_timm(tree).items()}, strict=True
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(2 * pixels - 1).permute(0, 3, 1, 2)).numpy()
    close(logits(tree, 2 * pixels - 1), theirs)


@pytest.mark.parametrize("layout", [layouts.to_big_vision, layouts.to_vit_jax])
def test_npz_layouts_come_back_as_they_went(layout, tree, tmp_path):
    np.savez(tmp_path / "x.npz", **layout(tree))
    again = pretrained.load(str(tmp_path / "x.npz"), model=MODEL, image_size=12, head=True)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_the_timm_layout_comes_back_as_it_went(tree, tmp_path):
    path = write(tmp_path / "augreg.safetensors", layouts.to_timm(tree))
    again = pretrained.load(path, model=MODEL, image_size=12, head=True)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_names_of_the_layout_of_2020(tree):
    named = layouts.to_vit_jax(tree)
    assert named["Transformer/posembed_input/pos_embedding"].shape == (1, 10, 24)
    assert not named["Transformer/posembed_input/pos_embedding"][0, 0].any()
    block = "Transformer/encoderblock_2"
    for name in (
        "MultiHeadDotProductAttention_1/query/kernel",
        "LayerNorm_2/scale",
        "MlpBlock_3/Dense_1/bias",
    ):
        assert f"{block}/{name}" in named
    assert not [name for name in named if "MlpBlock_0" in name or "LayerNorm_1" in name]
