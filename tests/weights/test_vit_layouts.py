"""Weights from and to the PyTorch and JAX worlds, against plain ViTs that know only those names."""

import json
import re

import jax
import named_vits
import numpy as np
import pytest
import safetensors.numpy
import scipy.ndimage
from PIL import Image
from trees import apply

from rlrr_jax import config as config_lib
from rlrr_jax import models, run_model
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import positions, preprocessing, reader, vit_layouts, vit_writers

# What torch gives for the ramp below, by number of values.
PYTORCH = {
    3: [0.148149, 4.0, 14.074071],
    8: [-0.092834, 0.187561, 1.176514, 2.619385, 5.44165, 8.471436, 13.395081, 16.649841],
}
SIZES = dict(width=24, depth=3, mlp_dim=48, num_heads=3, patch_size=4)
MODEL = vit.ViT(**SIZES, num_classes=5, gelu="exact")
IMAGENET = reader.How(mean=preprocessing.IMAGENET[0], std=preprocessing.IMAGENET[1])
HALF = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF)


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
        return apply(model, params, images)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# In -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
def test_fused_qkv_layer_scale_and_other_pixels_come_in_right(scale, pixels, tmp_path):
    weights = named_vits.timm_weights(np.random.default_rng(0), scale=scale)
    path = write(tmp_path / "vit.safetensors", weights)
    tree = reader.load(path, model=MODEL, image_size=12, head=True, how=IMAGENET)
    mean, std = map(np.float32, preprocessing.IMAGENET)
    wanted = named_vits.timm(weights, (pixels - mean) / std, SIZES["num_heads"])
    close(logits(tree, 2 * pixels - 1), wanted)
    assert not np.allclose(wanted, named_vits.timm(weights, 2 * pixels - 1, 3), atol=0.01)


def test_the_head_is_zero_unless_asked_for(weights, tmp_path):
    path = write(tmp_path / "augreg.safetensors", weights)
    tree = reader.load(path, model=MODEL.clone(num_classes=7), image_size=12)
    assert tree["head"]["kernel"].shape == (24, 7) and not tree["head"]["kernel"].any()


def test_weights_without_biases_and_in_half_precision(weights, pixels, tmp_path):
    for name in [key for key in weights if key.endswith("qkv.bias")]:
        del weights[name]
    half = {k: v.astype(np.float16) for k, v in weights.items()}
    tree = reader.load(
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
    mean, std = map(np.float32, preprocessing.IMAGENET)
    trees = [
        reader.load(write(tmp_path / f"{name}.safetensors", w), model=MODEL, image_size=12)
        for name, w in {"mocov3": moco, "mae": mae}.items()
    ]
    del weights["head.weight"], weights["head.bias"]
    encoded = named_vits.timm(weights, (pixels - mean) / std, 3)
    for tree in trees:
        tree["head"]["kernel"] = np.eye(24, 5, dtype=np.float32)
        close(logits(tree, 2 * pixels - 1), encoded[:, :5])


def pillow(position, target):
    """Antialiased bicubic resize of [h, w, D] by Pillow, a float image for each channel."""
    image = lambda x: Image.fromarray(np.float32(x)).resize(target[::-1], Image.Resampling.BICUBIC)
    return np.stack([np.asarray(image(x)) for x in np.moveaxis(position, -1, 0)], -1)


@pytest.mark.parametrize("size", [8, 20, 28])
def test_each_world_resizes_the_position_embedding_by_its_own_rule(size, weights, tmp_path):
    position = weights["pos_embed"][0, 1:].reshape(3, 3, 24)
    write(tmp_path / "augreg.safetensors", weights)
    write(tmp_path / "hugging.safetensors", of_transformers(weights))
    np.savez(tmp_path / "jax.npz", **vit_writers.to_big_vision(reader.load(
        str(tmp_path / "augreg.safetensors"), model=MODEL, image_size=12)))  # fmt: skip
    side, notes = size // 4, []

    def load(name, rule=None):
        how = HALF._replace(resize=rule)
        options = dict(model=MODEL, image_size=size, how=how, note=notes.append)
        tree = reader.load(str(tmp_path / name), **options)
        return tree["pos_embedding"].reshape(side, side, 24)

    linear = scipy.ndimage.zoom(position, (side / 3, side / 3, 1), order=1)
    antialiased = pillow(position, (side, side))
    plain = load("augreg.safetensors", "bicubic_plain")
    np.testing.assert_allclose(load("augreg.safetensors"), antialiased, rtol=0, atol=2e-6)
    np.testing.assert_allclose(load("jax.npz"), linear, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(load("hugging.safetensors"), plain)
    np.testing.assert_allclose(load("augreg.safetensors", "linear"), linear, rtol=0, atol=1e-6)
    np.testing.assert_allclose(load("jax.npz", "bicubic"), antialiased, rtol=0, atol=2e-6)
    for one, other in ((linear, antialiased), (antialiased, plain), (linear, plain)):
        assert np.abs(one - other).max() > 0.01
    assert len(notes) == 6 and f"from 3 x 3 to {side} x {side} (pretrained.resize=bicubic)" in notes[1]


def test_plain_bicubic_is_pytorchs():
    """Values that torch 2.14.1 gives: F.interpolate(mode="bicubic", align_corners=False) of a ramp."""
    ramp = np.array([0.0, 1.0, 4.0, 9.0, 16.0]).reshape(5, 1, 1)
    for new, values in PYTORCH.items():
        ours = positions.resize_position(ramp, (new, 1), "bicubic_plain")
        np.testing.assert_allclose(ours[:, 0, 0], values, rtol=0, atol=2e-5)


@pytest.mark.parametrize("new", [3, 4, 7, 9])
def test_both_bicubics_are_pytorchs_where_it_is_installed(new):
    torch = pytest.importorskip("torch")
    position = np.random.default_rng(0).standard_normal((5, 5, 6)).astype(np.float32)
    image = torch.from_numpy(position).permute(2, 0, 1)[None]
    for rule, antialias in (("bicubic", True), ("bicubic_plain", False)):
        theirs = torch.nn.functional.interpolate(
            image, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias
        )
        ours = positions.resize_position(position, (new, new), rule)
        np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [224, 112])
def test_features_are_timms_where_it_is_installed(size, tmp_path):
    """A whole ViT-Ti of timm with random weights, brought to the size by timm's own code."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    torch.manual_seed(0)
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {k: v.numpy() for k, v in whole.state_dict().items()}
    path = write(tmp_path / "vit_tiny_patch16_224.augreg.safetensors", state)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=size, pretrained=True,
        pretrained_cfg_overlay={"file": path, "num_classes": 0, "custom_load": False},
    ).eval()  # fmt: skip
    images = np.random.default_rng(3).random((2, size, size, 3), np.float32) * 2 - 1
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    model = models.build("Ti/16", 192, gelu="exact")
    tree = reader.load(path, model=model, image_size=size)
    tree["head"]["kernel"] = np.eye(192, dtype=np.float32)
    ours = np.asarray(logits(tree, images, model))
    assert np.linalg.norm(ours - wanted) < 2e-5 * np.linalg.norm(wanted)


# transformers ---------------------------------------------------------------------------------


def of_transformers(weights, prefix="vit.", new=False):
    """The same weights by transformers' names, of files or (`new`) of its version 5 in memory."""
    out = {}
    leaves = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    stems = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    block = {
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj" if new else "attention.output.dense",
        "mlp.fc1": "mlp.fc1" if new else "intermediate.dense",
        "mlp.fc2": "mlp.fc2" if new else "output.dense",
    }  # fmt: skip
    names = ("q_proj", "k_proj", "v_proj") if new else ("query", "key", "value")
    inner = "attention" if new else "attention.attention"
    for key, value in weights.items():
        stem, _, part = key.rpartition(".")
        if key in leaves:
            out[prefix + leaves[key]] = value
        elif stem in stems:
            out[f"{prefix}{stems[stem]}.{part}"] = value
        elif stem == "head":
            out[f"classifier.{part}"] = value
        else:
            number, _, name = stem.removeprefix("blocks.").partition(".")
            layer = f"{prefix}layers.{number}" if new else f"{prefix}encoder.layer.{number}"
            if name == "attn.qkv":
                for n, x in zip(names, np.split(value, 3)):
                    out[f"{layer}.{inner}.{n}.{part}"] = x
            elif name in ("ls1", "ls2"):
                out[f"{layer}.layer_scale{name[-1]}.lambda1"] = value
            else:
                out[f"{layer}.{block[name]}.{part}"] = value
    return out


@pytest.mark.parametrize("new", [False, True])
def test_transformers_names_are_read(new, weights, pixels, tmp_path):
    path = write(tmp_path / "x.safetensors", of_transformers(weights, new=new))
    tree = reader.load(path, model=MODEL, image_size=12, how=HALF, head=True)
    close(logits(tree, 2 * pixels - 1), named_vits.timm(weights, 2 * pixels - 1, 3))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_models_of_transformers_are_read_where_it_is_installed(kind, pixels, tmp_path):
    """Saved by itself with its config.json; native size and another one."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=12, patch_size=4
    )
    sizes |= dict(image_size=12, patch_size=4)
    sizes |= dict(mlp_ratio=2) if kind == "Dinov2" else dict(intermediate_size=48)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    card = preprocessing.read(path, needed=False)
    assert (card.num_heads, card.resize, card.gelu) == (3, "bicubic_plain", "exact")
    assert card.norm_eps == config.layer_norm_eps
    ours = MODEL.clone(norm_eps=card.norm_eps, num_classes=24)
    for size in (12, 20):
        images = np.random.default_rng(2).random((2, size, size, 3), np.float32) * 2 - 1
        tree = reader.load(path, model=ours, image_size=size, how=HALF)
        tree["head"]["kernel"] = np.eye(24, dtype=np.float32)
        with torch.no_grad():
            options = {} if kind == "Dinov2" else {"interpolate_pos_encoding": True}
            theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2), **options)
        close(logits(tree, images, ours), theirs.last_hidden_state[:, 0].numpy())


ATTENTION = "MultiHeadDotProductAttention_0"
REFUSED = {
    "registers": (
        {"reg_token": (1, 4, 24)},
        "unknown: registers",  # which a model with registers has
    ),
    "attention pooling": ({"attn_pool.latent": (1, 1, 24)}, "attention pooling and a class token"),
    "before": ({"norm_pre.weight": (24,)}, "unknown: pre_norm/scale"),
    "normalised queries": (
        {"blocks.0.attn.q_norm.weight": (8,)},
        f"unknown: Transformer/encoderblock_0/{ATTENTION}/query_norm/scale",
    ),
    "gated MLP": ({"blocks.0.mlp.w12.weight": (9, 24)}, "gated MLPs (blocks.0.mlp.w12.weight)"),
    "rotary positions": (
        {"rope.freqs": (9,)},
        "rotary positions (rope.freqs), which this ViT does not",
    ),
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
        reader.load(write(tmp_path / "augreg.safetensors", weights), model=MODEL, image_size=12)


def test_weights_without_class_token_or_of_no_vit_are_refused(weights, tmp_path):
    del weights["cls_token"]
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    with pytest.raises(UserError, match="does not fit the model.*missing: cls"):
        reader.load(write(tmp_path / "a.safetensors", weights), model=MODEL, image_size=12, how=HALF)
    with pytest.raises(UserError, match="it is no Vision Transformer of timm's"):
        reader.load(
            write(tmp_path / "b.safetensors", {"conv1.weight": np.ones(3)}),
            **dict(model=MODEL, image_size=12, how=HALF),
        )


def test_damaged_safetensors_are_one_sentence(weights, tmp_path):
    path = tmp_path / "augreg.safetensors"
    write(path, weights)
    data = path.read_bytes()
    for bad in (data[:1000], b"", b"\xff" * 100, data[:8] + b"x" + data[9:]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="is no readable .safetensors file"):
            reader.load(str(path), model=MODEL, image_size=12)
    weights["norm.bias"][3] = np.nan
    write(path, weights)
    with pytest.raises(UserError, match="encoder_norm/bias in .* is not made of finite"):
        reader.load(str(path), model=MODEL, image_size=12)


# Pixels ---------------------------------------------------------------------------------------

PIXELS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 224, 224]}
TIMM = {"architecture": "vit_base_patch16_224", "pretrained_cfg": PIXELS, "global_pool": "token"}


def test_the_card_is_the_headers_the_configs_or_the_names(weights, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, weights)
    with pytest.raises(UserError, match="nothing says how the pixels of .*set config.pretrained.mean"):
        preprocessing.read(path)
    assert preprocessing.read(path, "hf:timm/vit_base_patch16_224.mae", variant="B/16")[:3] == (
        "exact",
        *preprocessing.IMAGENET,
    )
    assert preprocessing.read(path, "vit.augreg_in21k")[:3] == (
        "exact",
        preprocessing.HALF,
        preprocessing.HALF,
    )
    assert preprocessing.read(path, "/home/maeve/augreg/x.safetensors", needed=False).mean is None
    assert preprocessing.read(path, "/augreg/dinov2.safetensors")[:3] == (
        "exact",
        *preprocessing.IMAGENET,
    )
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    found = preprocessing.read(path, "dinov2")
    said = ("exact", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "config.json says so", 224, "token")
    assert found[:6] == said and found.resize == "bicubic"
    (tmp_path / "x.json").write_text(json.dumps({**TIMM, "model_args": {"act_layer": "gelu_tanh"}}))
    assert preprocessing.read(path).gelu == "tanh"
    (tmp_path / "x.json").write_text(json.dumps({**TIMM, "model_args": {"act_layer": "quick_gelu"}}))
    assert preprocessing.read(path).gelu == "quick"
    (tmp_path / "x.json").write_text(json.dumps({**TIMM, "model_args": {"act_layer": "silu"}}))
    with pytest.raises(UserError, match="the activation silu is none of gelu"):
        preprocessing.read(path)
    for bad in ("{", "[]", '{"pretrained_cfg": 1}', '{"model_args": [1]}', "[" * 100_000):
        (tmp_path / "x.json").write_text(bad)
        with pytest.raises(
            UserError, match="x.json (is (no config.json of timm|damaged)|says nothing of)"
        ):
            preprocessing.read(path)
    for mean, std in (
        ([0, 0], [1, 1]),
        (3, [1] * 3),
        ([0, 0, float("nan")], [1] * 3),
        ([0] * 3, [0] * 3),
    ):
        (tmp_path / "x.json").write_text(json.dumps({"mean": mean, "std": std}))
        with pytest.raises(UserError, match=r"is damaged \((mean|std) .* is not three numbers\)"):
            preprocessing.read(path)
    said = {"gelu": "tanh", "mean": [0.5] * 3, "std": [0.25] * 3}
    write(path, weights, {"rlrr_jax": json.dumps(said)})
    assert preprocessing.read(path)[:4] == (
        "tanh",
        preprocessing.HALF,
        (0.25,) * 3,
        "its header says so",
    )
    assert preprocessing.read("x.npz")[:4] == (
        "tanh",
        preprocessing.HALF,
        preprocessing.HALF,
        "its layout says so",
    )
    write(path, weights, {"rlrr_jax": json.dumps({**said, "gelu": "foo"})})
    with pytest.raises(UserError, match="what its header says of .* is damaged .unknown GELU 'foo'"):
        preprocessing.read(path)


def test_a_configuration_that_differs_from_the_card_is_said(weights, tmp_path):
    """The run takes what the card says where the configuration says nothing, and notes the rest."""
    (tmp_path / "config.json").write_text(json.dumps({**TIMM, "global_pool": "avg"}))
    path = write(tmp_path / "x.safetensors", weights)
    config = vtab.get_config("cifar")
    config.pretrained.name = path
    (run,) = config_lib.resolve(config)
    assert run.model.gelu is None
    notes = run_model.follow(run, path)
    assert (run.model.gelu, run.pretrained.mean) == ("exact", (0.1, 0.2, 0.3))
    assert notes == [f"note: {path} has pool=avg"]
    config.update(image_size=32)
    config.model.gelu = "tanh"
    config.pretrained.update(mean=preprocessing.HALF, std=preprocessing.HALF)
    (run,) = config_lib.resolve(config)
    said = "\n".join(run_model.follow(run, path))
    assert f"note: {path} has exact (config.json says so), config.model.gelu is tanh" in said
    assert (
        "has (0.1, 0.2, 0.3) (config.json says so), config.pretrained.mean is (0.5, 0.5, 0.5)" in said
    )
    assert "has 224 (config.json says so), config.image_size is 32" in said
    assert run.pretrained.mean == preprocessing.HALF


def test_several_models_in_one_file_are_not_guessed(weights, tmp_path):
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in weights.items()}
    with pytest.raises(UserError, match=r"holds several models \(student., teacher.\)"):
        reader.load(write(tmp_path / "dino.safetensors", both), model=MODEL, image_size=12)


def test_folding_half_changes_no_bit(weights, tmp_path):
    path = write(tmp_path / "x.safetensors", weights)
    tree = reader.load(path, model=MODEL, image_size=12, how=HALF)
    kernel = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(tree["embedding"]["kernel"], kernel)
    flat = {"embedding/kernel": kernel, "embedding/bias": weights["patch_embed.proj.bias"]}
    again = vit_layouts.fold_pixels(flat, preprocessing.HALF, preprocessing.HALF)
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
    named = vit_writers.to_big_vision(tree)
    close(named_vits.big_vision(named, 2 * pixels - 1, "exact"), logits(tree, 2 * pixels - 1))


def test_timm_names_load_into_a_plain_vit_with_these_names(tree, pixels):
    named = vit_writers.to_timm(tree)
    close(named_vits.timm(named, 2 * pixels - 1, 3), logits(tree, 2 * pixels - 1))


def test_timm_names_load_into_pytorch_modules(tree, pixels):
    """Strictly, into torch's own Conv2d, Linear, LayerNorm and attention under timm's names."""
    torch = pytest.importorskip("torch")
    import torch_timm

    model = torch_timm.ViT(24, 3, 48, 3, 4, 10, 5)
    model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in vit_writers.to_timm(tree).items()}, strict=True
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
        {k: torch.from_numpy(v) for k, v in vit_writers.to_timm(tree).items()}, strict=True
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(2 * pixels - 1).permute(0, 3, 1, 2)).numpy()
    close(logits(tree, 2 * pixels - 1), theirs)


@pytest.mark.parametrize("layout", [vit_writers.to_big_vision, vit_writers.to_vit_jax])
def test_npz_layouts_come_back_as_they_went(layout, tree, tmp_path):
    np.savez(tmp_path / "x.npz", **layout(tree))
    again = reader.load(str(tmp_path / "x.npz"), model=MODEL, image_size=12, head=True)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_the_timm_layout_comes_back_as_it_went(tree, tmp_path):
    path = write(tmp_path / "augreg.safetensors", vit_writers.to_timm(tree))
    again = reader.load(path, model=MODEL, image_size=12, head=True)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_names_of_the_layout_of_2020(tree):
    named = vit_writers.to_vit_jax(tree)
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
