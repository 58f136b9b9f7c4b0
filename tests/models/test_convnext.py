"""ConvNeXt against its definition in NumPy, and files of all who have weights of it."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from marks import quick
from scipy.special import erf

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import convnext
from rlrr_jax.weights import convnext_layouts, preprocessing, reader

TINY = convnext.ConvNeXt(width=8, depths=(1, 2), num_classes=3)
HOW = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")


def arrays(model):
    """Random arrays by timm's names."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), models.shapes(model, 64))
    random, out = np.random.default_rng(0), {}
    for name, x in sorted(convnext_layouts.to_timm(zeros).items()):
        near = 1.0 if name.endswith("weight") and x.ndim == 1 else 0.0
        out[name] = (near + random.normal(0, 0.3, x.shape)).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def state():
    return arrays(TINY)


def images(size):
    return np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


def forward(state, images, widths=(8, 16), depths=(1, 2)):
    """Logits of images, as ConvNeXt is defined, by timm's names."""
    at = lambda name: np.asarray(state[name], np.float64)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * at(f"{name}.weight") + at(f"{name}.bias")

    def strided(x, name, side):  # a convolution whose stride is its size
        b, h, w, c = x.shape
        x = x.reshape(b, h // side, side, w // side, side, c)
        return np.einsum("bhpwqc,ocpq->bhwo", x, at(f"{name}.weight")) + at(f"{name}.bias")

    def depthwise(x, name):
        padded, out = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0))), np.zeros_like(x)
        for i in range(7):
            for j in range(7):
                part = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
                out += part * at(f"{name}.weight")[:, 0, i, j]
        return out + at(f"{name}.bias")

    x = norm(strided(images.astype(np.float64), "stem.0", 4), "stem.1")
    for stage, depth in enumerate(depths):
        if stage:
            start = f"stages.{stage}.downsample"
            x = strided(norm(x, f"{start}.0"), f"{start}.1", 2)
        assert x.shape[-1] == widths[stage]
        for i in range(depth):
            name = f"stages.{stage}.blocks.{i}"
            y = norm(depthwise(x, f"{name}.conv_dw"), f"{name}.norm")
            y = y @ at(f"{name}.mlp.fc1.weight").T + at(f"{name}.mlp.fc1.bias")
            y = y * (1 + erf(y / np.sqrt(2))) / 2
            y = y @ at(f"{name}.mlp.fc2.weight").T + at(f"{name}.mlp.fc2.bias")
            x = x + y * at(f"{name}.gamma")
    x = norm(x.mean((1, 2)), "head.norm")
    return x @ at("head.fc.weight").T + at("head.fc.bias")


def official(state):
    """The authors' names (facebookresearch/ConvNeXt), which DINOv3's have, too, with norms beside."""
    out = {"norms.3.weight": np.ones(16, np.float32)}
    for key, x in state.items():
        key = key.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        key = key.replace("stages.1.downsample.", "downsample_layers.1.").replace("conv_dw", "dwconv")
        key = key.replace("mlp.fc", "pwconv").replace("head.norm", "norm").replace("head.fc", "head")
        out[key] = x
    return out


def hugging(state):
    """transformers' names of ConvNeXt."""
    out = {}
    for key, x in state.items():
        key = key.replace("stem.0", "embeddings.patch_embeddings").replace(
            "stem.1", "embeddings.layernorm"
        )
        key = key.replace(".blocks.", ".layers.").replace(".downsample.", ".downsampling_layer.")
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        key = key.replace("gamma", "layer_scale_parameter").replace("head.fc", "classifier")
        key = key.replace("head.norm", "layernorm").replace(".norm.", ".layernorm.")
        key = f"encoder.{key}" if key.startswith("stages") else key
        out[key if key.startswith("classifier") else f"convnext.{key}"] = x
    return out


def hugging_dinov3(state):
    """transformers' names of DINOv3's, which has no head."""
    out = {}
    for key, x in state.items():
        key = key.replace("stem.", "stages.0.downsample_layers.").replace(".blocks.", ".layers.")
        key = key.replace(".downsample.", ".downsample_layers.").replace("conv_dw", "depthwise_conv")
        key = key.replace("mlp.fc", "pointwise_conv").replace("head.norm", "layer_norm")
        key = key.replace(".norm.", ".layer_norm.")
        out[key.replace("head.fc", "classifier")] = x
    return out


def as_convolutions(state):
    """timm's `conv_mlp`: Dense layers as convolutions of 1 x 1."""
    return {k: x[..., None, None] if ".mlp." in k and x.ndim == 2 else x for k, x in state.items()}


LAYOUTS = {
    "timm": lambda x: x,
    "official": official,
    "transformers": hugging,
    "dinov3": hugging_dinov3,
    "conv_mlp": as_convolutions,
}


def tree(state, folder, size=(16, 24)):
    path = folder / "x.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in state.items()}, path)
    return reader.load(path, model=TINY, image_size=size, how=HOW, head=True)


def logits(params, x, **other):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(TINY.clone(**other).apply)({"params": params}, x))


@pytest.mark.parametrize("layout", quick(LAYOUTS, "timm", "dinov3"))
def test_files_give_what_the_definition_gives(layout, state, tmp_path):
    params = tree(LAYOUTS[layout](state), tmp_path)
    for size in ((16, 24), (32, 32)):
        wanted = forward(state, images(size))
        assert np.abs(logits(params, images(size)) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_all_ways_to_run_the_blocks_give_the_same(state, tmp_path):
    params, x = tree(state, tmp_path), images((16, 24))
    want = logits(params, x)
    for options in ({"unroll": 2}, {"remat": True}):
        np.testing.assert_allclose(logits(params, x, **options), want, atol=1e-5)
    low = logits(params, x, dtype="bfloat16")
    assert np.linalg.norm(low - want) < 2e-2 * np.linalg.norm(want)


def test_both_ways_to_convolve_each_channel_are_one():
    draw = np.random.default_rng(0)
    x, kernel = draw.normal(size=(2, 5, 9, 6)), draw.normal(size=(7, 7, 1, 6))
    x, kernel = np.float32(x), np.float32(kernel)
    with jax.default_matmul_precision("highest"):
        wanted = convnext._convolved(x, kernel)
    np.testing.assert_allclose(convnext._shifted(x, kernel), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_drop_path_leaves_out_whole_branches(state, tmp_path):
    params, x = tree(state, tmp_path), images((16, 24))
    keys = jax.random.split(jax.random.key(0), 2)
    apply = lambda rate, keys: np.asarray(TINY.apply({"params": params}, x, rate, keys))
    np.testing.assert_allclose(apply(0.0, keys), apply(0.0, None), atol=1e-6)
    assert np.abs(apply(0.5, keys) - apply(0.0, None)).max() > 1e-3
    alone = np.asarray(TINY.apply({"params": params}, x[1:], 0.5, keys[1:]))
    np.testing.assert_allclose(apply(0.5, keys)[1:], alone, atol=1e-5)


def test_what_is_written_is_what_was_read(state, tmp_path):
    params = tree(state, tmp_path)
    again = tree(convnext_layouts.to_timm(params), tmp_path)
    assert convnext_layouts.to_timm(params).keys() == state.keys()
    one, two = flatten_dict(params), flatten_dict(again)
    for key, x in one.items():
        np.testing.assert_array_equal(two[key], x, err_msg=str(key))


def test_rlrr_rescales_each_channels_kernel(state, tmp_path):
    """A depthwise kernel is a matrix of (1, column) by (channel, row), as every convolution's."""
    params = tree(state, tmp_path)
    method = methods.get("rlrr")
    adapter = jax.jit(method.init)(jax.random.key(0), params)
    node = adapter["stage_1"]["encoderblock"]["dwconv"]
    assert {k: x.shape for k, x in node.items()} == {
        "scale_in": (2, 1, 7), "scale_out": (2, 16, 7), "shift": (2, 16),
    }  # fmt: skip
    merged = jax.jit(method.merge)(params, adapter)["stage_1"]["encoderblock"]["dwconv"]["kernel"]
    kernel = params["stage_1"]["encoderblock"]["dwconv"]["kernel"]
    node = jax.tree.map(np.asarray, node)
    factor = 1 + np.einsum("lw,loh->lhwo", node["scale_in"][:, 0], node["scale_out"])
    np.testing.assert_allclose(merged, kernel * factor[:, :, :, None], rtol=1e-5, atol=1e-6)
    assert set(adapter["stage_1"]) == {"encoderblock", "merge"} and "patch_embed" not in adapter
    kernels = {1: kernel[0], 0: params["stage_0"]["encoderblock"]["dwconv"]["kernel"][0]}
    assert all(np.isfinite(x).all() for x in kernels.values())


def test_what_it_has_not_is_named():
    shapes = models.shapes(TINY, 16)
    with pytest.raises(UserError, match=r"it changes query\+value, of which this model has none"):
        methods.get("lora").init(jax.random.key(0), shapes)
    assert list(methods.get("lora", targets="Dense_0").init(jax.random.key(0), shapes)) == [
        "stage_0.Dense_0",
        "stage_1.Dense_0",
    ]


# Refused --------------------------------------------------------------------------------------


def test_what_is_almost_one_is_refused(state, tmp_path):
    grn = {**state, "stages.0.blocks.0.mlp.grn.weight": np.ones(32, np.float32)}
    with pytest.raises(UserError, match=r"is of ConvNeXt V2 \(stages.0.blocks.0.mlp.grn.weight\)"):
        tree(grn, tmp_path)
    with pytest.raises(UserError, match=r"holds no ConvNeXt \(no stem\): check config.model.variant"):
        tree({k: x for k, x in state.items() if "stem" not in k}, tmp_path)
    with pytest.raises(UserError, match=r"missing: stage_1/block_0/dwconv/bias"):
        tree({k: x for k, x in state.items() if k != "stages.1.blocks.0.conv_dw.bias"}, tmp_path)
    with pytest.raises(
        UserError, match="image size 20 is not divisible by 8, .* set config.image_width to 16"
    ):
        models.check_size(TINY, (16, 20))


@pytest.mark.parametrize(
    "name, variant",
    [
        ("convnext_tiny.fb_in22k", "convnext_t"),
        ("convnext_base.dinov3_lvd1689m", "convnext_b"),
        ("dinov3_convnext_large_pretrain_lvd1689m-61fa432d", "convnext_l"),
        ("dinov3-convnext-small-pretrain-lvd1689m", "convnext_s"),
    ],
)
def test_names_tell_the_variant(name, variant, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, path)
    card = preprocessing.read(path, name, variant=variant)
    assert (card.variant, card.mean) == (variant, preprocessing.IMAGENET[0])
    with pytest.raises(UserError, match=f"set config.model.variant={variant}"):
        preprocessing.read(path, name, variant="B/16")


@pytest.mark.parametrize(
    "name", ["convnextv2_tiny.fcmae", "convnext_xlarge.fb_in22k", "convnext_nano.in12k"]
)
def test_names_of_others_are_refused(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match="it is not computed here"):
        preprocessing.read(path, name, variant="convnext_t")


@pytest.mark.parametrize("kind, eps", [("convnext", 1e-12), ("dinov3_convnext", 1e-6)])
def test_cards_of_transformers(kind, eps, tmp_path):
    """Its ConvNeXt says the epsilon of its last norm; those of the original have one for all."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, path)
    said = {"model_type": kind, "layer_norm_eps": eps, "hidden_act": "gelu", "image_size": 224}
    (tmp_path / "config.json").write_text(json.dumps(said))
    card = preprocessing.read(path, variant="convnext_t", needed=False)
    assert (card.norm_eps, card.gelu) == (1e-6, "exact")
    note = "gives the last norm an epsilon of 1e-12: 1e-06 is taken for all, as in the original"
    assert [text.partition("config.json ")[2] for text in card.notes] == [note] * (eps == 1e-12)
    with pytest.raises(UserError, match=f"its model_type is {kind}"):
        preprocessing.read(path, variant="B/16", needed=False)


# Where timm and transformers are installed ----------------------------------------------------


@pytest.mark.parametrize("size", [(32, 64), (64, 64)], ids=str)
def test_timm_loads_what_is_written_and_agrees_where_it_is_installed(size, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    ours = TINY.clone(depths=(1, 2, 1, 1))
    theirs = timm.models.convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 32, 64), num_classes=3)
    state, path = arrays(ours), tmp_path / "x.safetensors"
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()}, strict=True)
    with torch.no_grad():
        wanted = theirs.eval()(torch.from_numpy(images(size)).permute(0, 3, 1, 2)).numpy()
    safetensors.numpy.save_file(state, path)
    params = reader.load(path, model=ours, image_size=size, how=HOW, head=True)
    found = logits(params, images(size), depths=(1, 2, 1, 1))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["ConvNext", "DINOv3ConvNext"])
def test_models_of_transformers_are_read_where_it_is_installed(kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 32, 64])
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**sizes)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path)
    x = images((64, 96))
    with torch.no_grad():
        wanted = model(torch.from_numpy(x).permute(0, 3, 1, 2)).pooler_output.numpy()
    ours = TINY.clone(depths=(1, 2, 1, 1))
    path = str(tmp_path / "model.safetensors")
    params = reader.load(path, model=ours, image_size=(64, 96), how=HOW)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(models.head_inputs(ours, params, x))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
