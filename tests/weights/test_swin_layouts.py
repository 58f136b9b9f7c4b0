"""Public layouts of Swin: timm's two generations, the official one, transformers'; and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from marks import quick

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import swin
from rlrr_jax.weights import preprocessing, reader, swin_layouts

TINY = swin.Swin(8, (2, 2), (1, 2), 4, 4, num_classes=3)
APPLY = jax.jit(lambda params, images: TINY.apply({"params": params}, images))
HOW = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")


@pytest.fixture(scope="module")
def tree():
    random = np.random.default_rng(0)
    noise = lambda x: random.normal(0, 0.2, x.shape).astype(np.float32)
    return jax.tree.map(noise, models.shapes(TINY, 32))


def zero_bias(tree):
    """The tree as public files can hold it: merging without a bias."""
    node = tree["stage_0"]["merge"]
    reduction = {**node["reduction"], "bias": jnp.zeros_like(node["reduction"]["bias"])}
    return {**tree, "stage_0": {**tree["stage_0"], "merge": {**node, "reduction": reduction}}}


def older(state):
    """timm's newer names as its older and the official ones, with the official buffers."""
    out = {}
    for key, value in state.items():
        key = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        out[key] = value
        if key.endswith("relative_position_bias_table"):
            out[key.replace("bias_table", "index")] = np.zeros((16, 16), np.int64)
    out["layers.0.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    return out


def hugging(state):
    """timm's newer names as transformers'."""
    out = {}
    renames = {
        "patch_embed.proj": "swin.embeddings.patch_embeddings.projection",
        "patch_embed.norm": "swin.embeddings.norm",
        "head.fc": "classifier",
        "layers.1.downsample": "swin.encoder.layers.0.downsample",
    }
    inner = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        "attn.relative": "attention.self.relative",
    }  # fmt: skip
    for key, value in state.items():
        name = next((key.replace(a, b) for a, b in renames.items() if key.startswith(a)), key)
        name = name.replace("norm.", "swin.layernorm.", 1) if key.startswith("norm.") else name
        if key.startswith("layers") and "blocks" in key:
            name = f"swin.encoder.{key}"
            for a, b in inner.items():
                name = name.replace(f".{a}", f".{b}")
        if "attn.qkv" in key:
            for third, part in zip(("query", "key", "value"), np.split(value, 3)):
                out[name.replace("attn.qkv", f"attention.self.{third}")] = part
        else:
            out[name] = value
    return out


LAYOUTS = {"timm": lambda x: x, "official": older, "transformers": hugging}


@pytest.mark.parametrize("layout", quick(LAYOUTS, "official"))
def test_layouts_are_read_alike(layout, tree, tmp_path):
    path = tmp_path / "swin.safetensors"
    tree = zero_bias(tree)
    safetensors.numpy.save_file(LAYOUTS[layout](swin_layouts.to_timm(tree)), path)
    notes = []
    again = reader.load(path, model=TINY, image_size=32, how=HOW, head=True, note=notes.append)
    a, b = flatten_dict(tree, sep="/"), flatten_dict(again, sep="/")
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert bool(notes) == (layout == "official")  # its buffers


def test_a_bias_of_the_merging_is_folded_on_export(tree, tmp_path):
    path = tmp_path / "swin.safetensors"
    state = swin_layouts.to_timm(tree)
    assert "layers.1.downsample.reduction.bias" not in state  # timm has none
    safetensors.numpy.save_file(state, path)
    again = reader.load(path, model=TINY, image_size=32, how=HOW, head=True)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    one, other = (APPLY(x, images) for x in (tree, again))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_pixels_of_imagenet_are_folded(tree, tmp_path):
    path = tmp_path / "swin_x.safetensors"
    safetensors.numpy.save_file(swin_layouts.to_timm(zero_bias(tree)), path)
    mean, std = preprocessing.IMAGENET
    ours = reader.load(path, model=TINY, image_size=32, head=True)  # by its name
    pixels = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    wanted = APPLY(
        zero_bias(tree), (pixels - np.array(mean)[None, None, None]) / np.array(std)[None, None, None]
    )
    np.testing.assert_allclose(APPLY(ours, 2 * pixels - 1), wanted, atol=2e-4)


def test_wrong_files_are_named(tree, tmp_path):
    path = tmp_path / "swin.safetensors"
    state = swin_layouts.to_timm(tree)
    del state["norm.weight"]
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match="does not fit the model .*missing: norm/scale"):
        reader.load(path, model=TINY, image_size=32, how=HOW)
    vit = {"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32)}
    safetensors.numpy.save_file(vit, path)
    with pytest.raises(UserError, match="holds no Swin Transformer"):
        reader.load(path, model=TINY, image_size=32, how=HOW)
    with pytest.raises(UserError, match="is no file of such a model: give"):
        reader.load("bundled", model=TINY, image_size=32, how=HOW)
    other = {k.replace("WindowAttention", "x"): v for k, v in swin_layouts.to_timm(tree).items()}
    other["layers.0.blocks.0.attn.relative_position_bias_table"] = np.zeros((9, 1), np.float32)
    safetensors.numpy.save_file(other, path)
    with pytest.raises(
        UserError, match=r"relative_position_bias_table is \(9, 1\) instead of \(49, 1\)"
    ):
        reader.load(path, model=TINY, image_size=32, how=HOW)


def randomised(torch, module, std=0.05):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module.eval()


def features(tree, images, model):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x))(tree, images))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["swin_t", "swin_b"])
def test_logits_are_timms_where_it_is_installed(variant, tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    torch.manual_seed(0)
    name = {"swin_t": "swin_tiny_patch4_window7_224", "swin_b": "swin_base_patch4_window7_224"}[variant]
    theirs = randomised(torch, timm.create_model(name, num_classes=7))
    images = np.random.default_rng(3).random((2, 224, 224, 3), np.float32) * 2 - 1
    to_torch = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = theirs(to_torch(images)).numpy()
    model, state = models.build(variant, 7), {k: v.numpy() for k, v in theirs.state_dict().items()}
    path = tmp_path / f"{name}.safetensors"
    for names in (state, official(state)):
        safetensors.numpy.save_file(names, path)
        tree = reader.load(path, model=model, image_size=224, how=HOW, head=True)
        ours = features(tree, images, model)
        assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
    # Tuned by RLRR, exported, and loaded strictly by timm.
    rlrr = methods.get("rlrr")
    tuned = {**rlrr.merge(tree, rlrr.init(jax.random.key(1), tree)), "head": tree["head"]}
    assert jnp.abs(tuned["stage_0"]["merge"]["reduction"]["bias"]).max() == 0
    shift = lambda x: x + 0.1
    tuned["stage_0"]["merge"]["reduction"]["bias"] = shift(
        tuned["stage_0"]["merge"]["reduction"]["bias"]
    )
    state = {k: torch.from_numpy(v) for k, v in swin_layouts.to_timm(tuned).items()}
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        wanted = theirs(to_torch(images)).numpy()
    assert np.linalg.norm(features(tuned, images, model) - wanted) < 1e-4 * np.linalg.norm(wanted)


def official(state):
    """timm's newer names as the official ones."""
    moved = {f"layers.{s + 1}.downsample": f"layers.{s}.downsample" for s in range(3)}
    rename = lambda key: next((key.replace(a, b) for a, b in moved.items() if a in key), key)
    return {rename(key).replace("head.fc", "head"): value for key, value in state.items()}


@pytest.mark.slow
def test_logits_are_transformers_where_it_is_installed(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.SwinConfig(num_labels=5, drop_path_rate=0.0)  # Swin-T
    theirs = randomised(torch, transformers.SwinForImageClassification(config))
    images = np.random.default_rng(3).random((2, 224, 224, 3), np.float32) * 2 - 1
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.numpy()
    theirs.save_pretrained(tmp_path)
    model = models.build("swin_t", 5)
    tree = reader.load(tmp_path / "model.safetensors", model=model, image_size=224, how=HOW, head=True)
    ours = features(tree, images, model)
    assert np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)
