"""Swin V2 against numbers recorded from timm, its formulas, and its files."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import swinv2_kinds
from flax.traverse_util import flatten_dict
from marks import quick

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import swinv2
from rlrr_jax.weights import architectures, preprocessing, reader, swinv2_layouts

RECORDED = {  # timm 1.0.31's logits of `swinv2_kinds`
    "plain": [[0.59443, 1.86822, -1.92877], [0.79293, 1.55982, -1.93345]],
    "pretrained": [[0.55694, 1.83021, -1.89316], [0.70909, 1.43826, -1.90913]],
    "whole": [[0.62692, 1.75024, -2.18077], [0.70857, 1.34611, -2.01948]],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return swinv2_kinds.tree("plain", tmp_path_factory.mktemp("swinv2"))


@pytest.mark.parametrize("kind", quick(RECORDED, "pretrained"))
def test_logits_are_those_recorded_from_timm(kind, tmp_path):
    params = swinv2_kinds.tree(kind, tmp_path)
    np.testing.assert_allclose(swinv2_kinds.logits(kind, params), RECORDED[kind], rtol=2e-5, atol=2e-5)


def test_distances_are_the_papers():
    """sign(d) log2(1 + |d|) / log2(8), d from -8 to 8 (section 3.3), rows first."""
    found = swinv2.coordinates(3, 0)
    values = [np.sign(d) * np.log2(1 + abs(d)) / np.log2(8) for d in (-8, -4, 0, 4, 8)]
    np.testing.assert_allclose(found, [(a, b) for a in values for b in values], atol=1e-6)
    wide = swinv2.coordinates(3, 2)  # of windows that are larger than those of pretraining
    assert wide.max() == pytest.approx(np.log2(17) / 3)


@pytest.mark.slow
def test_all_ways_to_run_the_blocks_give_the_same(tree):
    want = swinv2_kinds.logits("plain", tree)
    for options in ({"unroll": 2}, {"remat": True}):
        np.testing.assert_allclose(swinv2_kinds.logits("plain", tree, **options), want, atol=1e-5)
    low = swinv2_kinds.logits("plain", tree, dtype="bfloat16")
    assert np.linalg.norm(low - want) < 2e-2 * np.linalg.norm(want)


def test_rlrr_has_nothing_for_what_computes_positions(tree):
    """Scales and shifts of every Dense but those, of the merging and of every norm; keys have no shift."""
    flat = flatten_dict(jax.eval_shape(methods.get("rlrr").init, jax.random.key(0), tree), sep="/")
    assert not [key for key in flat if "cpb" in key or "logit_scale" in key or "key/shift" in key]
    assert [k for k in flat if "merge" in k] == [
        f"stage_0/merge/reduction/{x}" for x in ("scale_in", "scale_out")
    ]


@pytest.mark.slow
def test_zero_scales_leave_it_alone(tree):
    method = methods.get("rlrr")
    adapter = method.init(jax.random.key(0), tree)
    merged = method.merge(tree, jax.tree.map(lambda x: x * 0 if x.ndim > 1 else x, adapter))
    for kind in ("plain", "shifted"):
        block = lambda tree, kind=kind: tree["stage_1"]["encoderblock"][kind]["WindowAttention_0"]
        np.testing.assert_array_equal(block(merged)["query"]["kernel"], block(tree)["query"]["kernel"])


def test_variants_are_what_their_names_say():
    assert models.sizes("swinv2_b") == dict(
        width=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), patch_size=4, window=8
    )
    model = models.build("swinv2_l_12to24", 2)
    assert (model.window, model.pretrained_window, model.width) == (24, 12, 192)
    # As timm's pretrained_window_sizes=(12, 12, 12, 6).
    assert [model.block_options(i)["pretrained_window"] for i in range(4)] == [12, 12, 12, 6]
    sizes = {"swinv2_t": 256, "swinv2_s_16": 256, "swinv2_b_12": 192, "swinv2_b_12to24": 384}
    assert {name: models.default_size(name) for name in sizes} == sizes
    named = {x.variant for x in architectures.TIMM.values() if x.variant.startswith("swinv2")}
    assert len(named) == 12 and all(models.family(name) == "swinv2" for name in named)


# Files ----------------------------------------------------------------------------------------


def older(state):
    """The official names: merging at the end of a stage, with buffers."""
    out = {}
    for key, x in state.items():
        key = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        out[key] = x
        if key.endswith("logit_scale"):
            table = swinv2.coordinates(4, 0).reshape(1, 7, 7, 2)
            out[key.replace("logit_scale", "relative_coords_table")] = table
            out[key.replace("logit_scale", "relative_position_index")] = np.zeros((16, 16), np.int64)
    return out


def hugging(state):
    """transformers' names."""
    out = {}
    renames = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "patch_embed.norm": "embeddings.norm",
        "layers.1.downsample": "encoder.layers.0.downsample",
        "norm.": "layernorm.",
        "layers": "encoder.layers",
    }
    inner = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "attn.q_bias": "attention.self.query.bias",
        "attn.v_bias": "attention.self.value.bias", "attn.logit_scale": "attention.self.logit_scale",
        "attn.cpb_mlp": "attention.self.continuous_position_bias_mlp",
    }  # fmt: skip
    for key, x in state.items():
        name = next((key.replace(a, b, 1) for a, b in renames.items() if key.startswith(a)), key)
        name = name.replace("head.fc", "classifier")
        if ".blocks." in name:
            for a, b in inner.items():
                name = name.replace(f".{a}", f".{b}")
        prefix = "" if name.startswith("classifier") else "swinv2."
        if "attn.qkv.weight" in name:
            for third, part in zip(("query", "key", "value"), np.split(x, 3)):
                out[prefix + name.replace("attn.qkv", f"attention.self.{third}")] = part
        else:
            out[prefix + name] = x
    return out


@pytest.mark.parametrize("layout", [older, hugging], ids=["official", "transformers"])
def test_layouts_are_read_alike(layout, tree, tmp_path):
    found = flatten_dict(swinv2_kinds.tree("plain", tmp_path, layout(swinv2_kinds.state("plain"))))
    wanted = flatten_dict(tree)
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_array_equal(found[key], x, err_msg=str(key))


@pytest.mark.parametrize("window, before", [(4, 3), pytest.param(8, 0, marks=pytest.mark.slow)])
def test_buffers_of_other_windows_are_refused(window, before, tmp_path):
    """No other array shows them."""
    state, side = older(swinv2_kinds.state("plain")), 2 * window - 1
    key = "layers.0.blocks.0.attn.relative_coords_table"
    state[key] = swinv2.coordinates(window, before).reshape(1, side, side, 2)
    with pytest.raises(
        UserError, match=f"has windows of {window} tokens or was pretrained with others"
    ):
        swinv2_kinds.tree("plain", tmp_path, state)


@pytest.mark.parametrize(
    "name, variant",
    [
        ("swinv2_tiny_patch4_window8_256", "swinv2_t"),
        ("swinv2-base-patch4-window12to16-192to256-22kto1k-ft", "swinv2_b_12to16"),
        ("swinv2_large_patch4_window12_192_22k", "swinv2_l_12"),
    ],
)
def test_names_of_the_authors_and_of_transformers_are_known(name, variant):
    assert architectures.by_name(name, name).variant == variant


def test_what_is_written_is_what_was_read(tree):
    state = swinv2_kinds.state("plain")
    back = swinv2_layouts.to_timm(tree)
    assert back.keys() == state.keys()
    for key, x in state.items():
        np.testing.assert_allclose(back[key], x, rtol=1e-6, atol=1e-7, err_msg=key)


def test_a_swin_and_a_swin_v2_are_not_taken_for_each_other(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(swinv2_kinds.state("plain"), path)
    first = models.build("swin_t", 3)
    with pytest.raises(UserError, match="is of a Swin V2: set config.model.variant to one, such as"):
        reader.load(path, model=first, image_size=224, how=swinv2_kinds.HOW)
    state = {k: x for k, x in swinv2_kinds.state("plain").items() if "logit_scale" not in k}
    with pytest.raises(UserError, match=r"holds no Swin V2 \(no logit_scale\): check"):
        swinv2_kinds.tree("plain", tmp_path, state)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"window_size": 16}, "its window_size is 16, that of swinv2_b_12to16 16"),
        ({"window_size": 24}, "its window_size is 24, that of swinv2_b_12to16 16"),
        ({"pretrained_window_sizes": [0] * 4}, "its pretrained_window_sizes is [0, 0, 0, 0], that of"),
        ({"model_type": "swin"}, "its model_type is swin"),
    ],
)
def test_a_card_with_other_windows_is_refused(said, message, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, path)
    good = {"model_type": "swinv2", "window_size": 16, "pretrained_window_sizes": [12, 12, 12, 6]}
    (tmp_path / "config.json").write_text(json.dumps({**good, "num_heads": [4, 8, 16, 32], **said}))
    read = lambda: preprocessing.read(path, variant="swinv2_b_12to16", needed=False)
    if said == {"window_size": 16}:
        assert (read().gelu, read().norm_eps) == ("exact", 1e-5)
        return
    with pytest.raises(UserError) as e:
        read()
    assert message in str(e.value)


# Where timm and transformers are installed ----------------------------------------------------


@pytest.mark.parametrize("kind", RECORDED)
def test_timm_loads_what_is_written_and_agrees_where_it_is_installed(kind, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    theirs, params = swinv2_kinds.timms(kind), swinv2_kinds.tree(kind, tmp_path)
    state = swinv2_layouts.to_timm(params)
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()}, strict=True)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(swinv2_kinds.images(kind)).permute(0, 3, 1, 2)).numpy()
    found = swinv2_kinds.logits(kind, params)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_swinv2_of_transformers_is_read_where_it_is_installed(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[1, 2], window_size=4,
        pretrained_window_sizes=[0, 0],
    )  # fmt: skip
    model = transformers.Swinv2Model(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("logit_scale" in name), std=0.3)
    model.save_pretrained(tmp_path)
    x = swinv2_kinds.images("plain")
    with torch.no_grad():
        wanted = model(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    ours = swinv2_kinds.model("plain")
    path = str(tmp_path / "model.safetensors")
    params = reader.load(path, model=ours, image_size=32, how=swinv2_kinds.HOW)
    with jax.default_matmul_precision("highest"):
        _, kept = ours.apply({"params": params}, x, mutable=["intermediates"])
    found = np.asarray(kept["intermediates"]["encoded"][0])
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
