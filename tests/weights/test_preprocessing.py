"""What shapes do not show: taken from the file that says it, known by name, or said to be a guess."""

import json
import re

import jax
import named_vits
import numpy as np
import pytest
import safetensors.numpy
from weights.test_vit_layouts import of_transformers

from rlrr_jax import config as config_lib
from rlrr_jax import models, run_model, suite
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import names, preprocessing, reader, vit_writers

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}


def write(path, weights, **metadata):
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in weights.items()}, path, metadata
    )
    return path


def small(grid=2, **changes):
    """Weights of a ViT-Ti/16 for 32 pixels by timm's names."""
    sizes = dict(width=192, depth=12, mlp=768, patch=16, classes=5, scale=False)
    return named_vits.timm_weights(np.random.default_rng(0), grid=grid, **{**sizes, **changes})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny") / "x.safetensors", small())


def follow(path, variant="S/16", name=None, **changes):
    """What a run takes from a file, and its notes."""
    config = vtab.get_config("digits,method=linear")
    config.model.variant, config.pretrained.name, config.image_size = variant, str(name or path), 32
    config.model.update(changes)
    (run,) = config_lib.resolve(config)
    return run, run_model.follow(run, path)


SMALL = {"architecture": "vit_small_patch16_224", "pretrained_cfg": HALF}
HEADS = {
    "timm's model_args": ({**SMALL, "model_args": {"num_heads": 12}}, "x", 12, 0),
    "timm's architecture": (SMALL, "mae", 6, 0),
    "transformers": ({"model_type": "vit", "num_attention_heads": 8}, "x", 8, 0),
    "nobody": ({"pretrained_cfg": HALF}, "x", None, 1),
    "MoCo v3's exception": (None, "mocov3-vit-s-300ep", 12, 0),
    "a name of timm's": (None, "vit_small_patch16_224.augreg_in21k", 6, 0),
    "DINO's": (None, "dino_vits16", 6, 0),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_heads_come_from_whoever_says_them(what, tmp_path):
    config, name, heads, notes = HEADS[what]
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"gelu": "exact"} if what == "nobody" else {}
    if what == "transformers":
        (tmp_path / "preprocessor_config.json").write_text(
            '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
        )
    run, said = follow(path, **given)
    said = [note for note in said if "how many attention heads" in note]
    assert len(said) == notes and run.model.num_heads == (heads or 6)
    assert run_model.build_model(run).num_heads == run.model.num_heads
    if notes:
        assert (
            f"nothing says how many attention heads {path} has" in said[0] and "6 are taken" in said[0]
        )
    asked, said = follow(path, num_heads=24, **given)  # who asks for others is told
    assert asked.model.num_heads == 24
    assert [
        n for n in said if "attention heads" in n or "has 12" in n or "has 8" in n or "has 6" in n
    ] == (
        [f"note: {path} has {heads} ({said_by(config)}), config.model.num_heads is 24"] if heads else []
    )


def said_by(config):
    return "config.json says so" if config else "its name says so"


@pytest.mark.parametrize(("heads", "taken"), [(3, "cudnn"), (48, "xla")])
def test_heads_that_cudnn_does_not_take_are_xlas(heads, taken, tiny):
    """Of 64 and of 4 values; a run of a GPU, which this machine has not."""
    config = vtab.get_config("digits,method=linear")
    config.model.variant, config.pretrained.name, config.image_size = "Ti/16", str(tiny), 32
    config.pretrained.mean = config.pretrained.std = preprocessing.HALF
    config.model.gelu, config.model.num_heads = "exact", heads
    (run,) = config_lib.resolve(config)
    run.model.attention = "cudnn"
    notes = [note for note in run_model.follow(run, str(tiny)) if "cuDNN" in note]
    said = ["note: cuDNN's attention takes no heads of 4 values: XLA's is taken"]
    assert run.model.attention == taken and notes == said * (taken == "xla")


def test_heads_that_do_not_divide_the_width_are_one_sentence(tiny):
    with pytest.raises(UserError, match="num_heads=7 does not divide the model's width 192"):
        follow(tiny, "Ti/16", num_heads=7)


def test_twelve_heads_are_not_six(tmp_path):
    """A file answers differently for 6 and 12 heads, and is refused for the wrong number."""
    sizes = dict(width=48, depth=2, mlp=96, patch=4, grid=3, classes=5)
    weights = named_vits.timm_weights(np.random.default_rng(0), **sizes)
    path = write(tmp_path / "x.safetensors", weights)
    config = {"model_args": {"num_heads": 12}, "pretrained_cfg": HALF}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = vit.ViT(48, 2, 96, 12, 4, 5, gelu="exact")
    images = np.random.default_rng(1).random((2, 12, 12, 3), np.float32)
    tree = reader.load(str(path), model=model, image_size=12, head=True)
    ours = jax.jit(model.apply)({"params": tree}, images)
    np.testing.assert_allclose(ours, named_vits.timm(weights, images, 12), rtol=0, atol=1e-4)
    assert np.abs(ours - named_vits.timm(weights, images, 6)).max() > 0.01
    with pytest.raises(UserError, match=r"has 12 attention heads \(config.json says so\), the model 6"):
        reader.load(str(path), model=model.clone(num_heads=6), image_size=12)


OTHERS = {
    "another architecture": (
        "vit_tiny_patch16_224.augreg",
        {"architecture": "vit_base_patch14_dinov2"},
    ),
    "unknown": ("vit_tiny_patch16_224.augreg", {"architecture": "vit_tiny_patch16_rope_224"}),
    "near": ("augreg_x", {"architecture": "vit_tiny_patch16_256"}),
    "another size": ("augreg_x", {"architecture": "vit_base_patch16_224"}),
    "another patch": ("augreg_x", {"architecture": "vit_tiny_patch8_224"}),
    "another kind": ("augreg_x", {"model_type": "swin", "hidden_size": 192}),
    "another width": ("augreg_x", {"model_type": "vit", "hidden_size": 768}),
    "something else": ("augreg_x", {"name": "my experiment"}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_config_of_another_model_is_refused_or_passed_over_as_asked(what, tmp_path):
    name, config = OTHERS[what]
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"")
    imagenet = dict(zip(("mean", "std"), preprocessing.IMAGENET))
    if what != "something else":
        config = {**config, "pretrained_cfg": imagenet}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json") as e:
        follow(path, "Ti/16")
    assert "damaged" not in str(e.value) and str(e.value).count(": ") >= 1
    assert ("has rotary positions" in str(e.value)) == (what == "unknown")
    config = vtab.get_config("digits,method=linear")
    config.model.variant, config.pretrained.name, config.image_size = "Ti/16", str(path), 32
    config.pretrained.ignore_json, config.model.gelu = True, "tanh"
    (run,) = config_lib.resolve(config)
    with pytest.raises(UserError, match="nothing says how the pixels of .* is passed over, as"):
        run_model.follow(run, path)
    config.pretrained.mean = config.pretrained.std = preprocessing.HALF
    (run,) = config_lib.resolve(config)
    notes = run_model.follow(run, path)
    assert (
        f"note: {tmp_path}/config.json is passed over, as config.pretrained.ignore_json says" in notes
    )
    assert run.model.gelu == "tanh"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.dino", "vit_tiny_patch16_224_ft"])
def test_the_config_of_the_same_model_is_taken(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": HALF}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run, notes = follow(path, "Ti/16")
    assert run.pretrained.mean == preprocessing.HALF and not [n for n in notes if "passed over" in n]


def test_transformers_configs_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    vit_config = {"model_type": "vit", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 192}
    (tmp_path / "config.json").write_text(json.dumps({**vit_config, "num_attention_heads": 3}))
    with pytest.raises(UserError, match="nothing says how the pixels"):
        follow(path, "Ti/16")
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    run, _ = follow(path, "Ti/16")
    assert (run.model.gelu, run.model.num_heads, run.model.norm_eps) == ("tanh", 3, 1e-12)
    assert (run.pretrained.mean, run.pretrained.resize) == ((0.1, 0.2, 0.3), "bicubic_plain")
    assert run_model.build_model(run).norm_eps == 1e-12
    (tmp_path / "config.json").write_text(json.dumps({**vit_config, "hidden_act": "silu"}))
    with pytest.raises(UserError, match="config.json: the activation silu is none of gelu"):
        follow(path, "Ti/16")


# Arrays of no use ------------------------------------------------------------------------------

UNUSED = ("pre_logits.fc.weight", "head.mlp.0.weight", "head.last_layer.weight_g", "head.fc.weight")
UNUSED += (
    "head_dist.weight",
    "fc_norm.weight",
    "mask_token",
    "decoder_pos_embed",
    "epoch",
    "position_ids",
)


def load(path, notes, variant="Ti/16"):
    how = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF)
    model = models.build(variant, 5)
    return reader.load(str(path), model=model, image_size=32, how=how, note=notes.append)


@pytest.mark.parametrize("kind", ["timm", "transformers", "npz"])
def test_harmless_arrays_are_passed_over_with_a_note(kind, tmp_path):
    weights, notes = small(), []
    if kind == "npz":
        path = write(tmp_path / "x.safetensors", weights)
        flat = vit_writers.to_big_vision(load(path, notes))
        more = {f"params/{name.replace('.', '/')}": np.ones(2, np.float32) for name in UNUSED}
        np.savez(tmp_path / "x.npz", **flat, **more, **{"opt/0/count": np.int32(7)})
        load(tmp_path / "x.npz", notes)
    else:
        weights = of_transformers(weights, prefix="") if kind == "transformers" else weights
        stem = "embeddings." if kind == "transformers" else ""
        more = {name: np.ones(2, np.float32) for name in UNUSED}
        more |= {f"{stem}position_ids": np.arange(5), "pooler.dense.bias": np.ones(2, np.float32)}
        load(write(tmp_path / "x.safetensors", {**weights, **more}), notes)
    (note,) = [n for n in notes if "does not use" in n]
    assert "(and " in note and "decoder_pos_embed" in note and "epoch" in note
    bad = {**small(), "blocks.0.attn.q_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(UserError, match="unknown: Transformer/encoderblock_0/.*/query_norm/scale"):
        load(write(tmp_path / "y.safetensors", bad), notes)


def test_shards_are_read_as_one_file(tiny, tmp_path):
    weights = safetensors.numpy.load_file(tiny)
    shard = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(weights)}
    for file in set(shard.values()):
        write(tmp_path / file, {k: v for k, v in weights.items() if shard[k] == file})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    whole, notes = load(tiny, []), []
    for name in (index, tmp_path):  # the folder, too
        tree = load(name, notes)
        assert all(map(np.array_equal, *map(jax.tree.leaves, (tree, whole))))
    path, digest = names.fetch(str(index))
    assert path == str(index) and re.fullmatch("[0-9a-f]{64}", digest)
    second = tmp_path / "model-00002-of-00002.safetensors"
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    assert names.fetch(str(index))[1] != digest
    second.unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors, which model.safe"):
        load(index, notes)
    index.write_text("{}")
    with pytest.raises(UserError, match="is no index of .safetensors files"):
        load(index, notes)


def test_float8_is_named(tiny, tmp_path):
    """A header that says F8_E4M3 for one array, as files of large models do."""
    data = {"norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    header = json.dumps(data).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"norm.weight in .* is float8 \(F8_E4M3\).*float32"):
        load(path, [])


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        *(("deit_tiny_x", 0.485), ("vit_small_patch14_dinov2.lvd142m", 0.485), ("mae-b", 0.485)),
        *(("swin_tiny", 0.485), ("deit3_small", 0.485), ("vit.augreg_in21k", 0.5)),
        *(("swindle", None), ("maemodel", None), ("dinosaurs", None)),
    ],
)
def test_whole_words_of_a_name_say_how_pixels_are_normalised(name, mean, tmp_path):
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    card = preprocessing.read(tmp_path / f"{name}.safetensors", needed=False)
    assert (card.mean and card.mean[0], card.by_name) == (mean, mean is not None)


# Whole runs ------------------------------------------------------------------------------------


def test_a_default_is_not_computed_where_the_value_was_given(tiny):
    """There are no public weights for B/14, and none are needed: the README's DINOv2."""
    config = vtab.get_config("cifar")
    config.model.variant = "B/14"
    config.pretrained.name = "hf:timm/vit_base_patch14_dinov2.lvd142m"
    (run,) = config_lib.resolve(config)
    assert run.pretrained.name == "hf:timm/vit_base_patch14_dinov2.lvd142m"
    config.pretrained.name = None
    with pytest.raises(UserError, match="no public weights are known for B/14"):
        config_lib.resolve(config)


@pytest.mark.slow
def test_a_run_says_what_was_guessed_and_keeps_it(tiny, tmp_path, capsys):
    config = vtab.get_config("digits,method=linear")
    config.model.variant, config.pretrained.name, config.image_size = "Ti/16", str(tiny), 48
    config.pretrained.mean = config.pretrained.std = preprocessing.HALF
    config.model.gelu = "exact"
    config.epochs, config.num_devices = 1, 1
    (row,), _ = suite.run(config, tmp_path / "a")
    out = capsys.readouterr().out
    assert out.count("nothing says how many attention heads") == 1
    assert out.count("was resized from 2 x 2 to 3 x 3 (pretrained.resize=bicubic)") == 1
    assert row["resize"] == "bicubic" and row["config"]["pretrained"]["resize"] == "bicubic"
    config.pretrained.resize = "linear"
    (other,), _ = suite.run(config, tmp_path / "b")
    assert other["setting"] != row["setting"] and other["train_loss"] != row["train_loss"]


def test_a_folder_is_read_as_the_file_in_it(tmp_path):
    """With the file's own GELU, not that of the JAX weights; with a slash at its end or without."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = {"model_type": "vit", "hidden_act": "gelu", "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    for name in (tmp_path, f"{tmp_path}/"):
        run, notes = follow(tmp_path / "model.safetensors", "Ti/16", name=name)
        assert run.model.gelu == "exact" and not notes
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json is damaged"):
        follow(tmp_path / "model.safetensors", "Ti/16", name=tmp_path)


@pytest.mark.parametrize("name", ["https://h/model.safetensors?download=true", "gs://b/vit.npz"])
def test_the_ending_of_an_address_is_its_paths(name):
    assert names.address(name) == name
