"""PEFT's LoRA and HiRA: what is written is what its definition says, and what it wrote is read."""

import json

import jax
import numpy as np
import pytest
import rope_kinds
import safetensors.numpy
from flax.traverse_util import flatten_dict
from trees import folded, started

from rlrr_jax import adapters, cards, export, methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.projects.peft import __main__ as command
from rlrr_jax.projects.peft import layers
from rlrr_jax.weights import rope_layouts, vit_writers

SIZES = dict(width=24, depth=3, mlp_dim=48, num_heads=3, patch_size=4)
MODELS = {
    "vit": (vit.ViT(**SIZES, num_classes=5), vit_writers.to_timm),
    "dinov3, gated": (rope_kinds.model("dinov3, gated"), rope_layouts.to_timm),
}


def random(tree, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(draw.normal(0, 0.3, x.shape)), tree)


def defined(said, flat, state):
    """timm's state dict with PEFT's matrices in it, by its definition (tuners/lora, tuners/hira)."""
    out, root = dict(state), "base_model.model."
    for key, a in flat.items():
        if key.endswith((".lora_A.weight", ".hira_A")):
            b = flat[key.replace("_A", "_B")]
            name = (
                key.removeprefix(root).rsplit(".", 2 if key.endswith(".weight") else 1)[0] + ".weight"
            )
            if said["peft_type"] == "LORA":
                out[name] = state[name] + said["lora_alpha"] / said["r"] * b @ a
            else:
                out[name] = state[name] + state[name] * (b @ a)
    return out | {f"head.{x}": flat[f"{root}head.{x}"] for x in ("weight", "bias")}


@pytest.mark.parametrize(
    "name, options",
    [
        ("lora", dict(rank=2, alpha=6, targets="query+value+Dense_0")),
        ("lora", dict(rank=3, targets="key+out+Dense_1")),
        ("lora", dict(rank=3, alpha=6, rank_scale=1.0)),
        ("hira", dict(rank=2)),
        ("rlrr", dict(rank=2, shift=False, where="mha+ffn")),
        ("rlrr", dict(shift=False, where="ffn", sides="left")),
    ],
)
@pytest.mark.parametrize("of", MODELS)
def test_what_is_written_is_what_pefts_definition_says(of, name, options):
    model, to_timm = MODELS[of]
    frozen = random(models.shapes(model, 16), 0)
    method = methods.get(name, **options)
    trained = random(started(method, frozen), 1)
    kind, lows = layers.of_adapter(name, options, trained["adapter"], frozen)
    flat = layers.to_peft(kind, lows, trained["head"], gated="gated" in of)
    rank = {x.shape[0] for key, x in flat.items() if key.endswith(layers.KINDS[kind][0])}
    assert len(rank) == 1  # of all layers, since PEFT 0.21 passes over other ranks of HiRA's
    said = {"peft_type": kind, "r": rank.pop()}
    said["lora_alpha"] = said["r"]
    merged = folded(method, frozen, trained)
    wanted = to_timm(merged)
    found = defined(said, flat, to_timm(frozen))
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_allclose(found[key], x, rtol=2e-5, atol=2e-5, err_msg=key)
    again, given, adapter, head = layers.of_peft(said, flat, frozen, "x")
    back = folded(methods.get(again, **given), frozen, {"adapter": adapter, "head": head})
    one, two = map(flatten_dict, (back, merged))
    for key, x in two.items():
        np.testing.assert_allclose(one[key], x, rtol=2e-5, atol=2e-5, err_msg=str(key))


def of_peft(kind, names, rank=2, blocks=range(3)):
    """Random matrices under PEFT's names, by our layers."""
    draw, out = np.random.default_rng(2), {}
    for key, (outputs, inputs) in names.items():
        for i in blocks:
            first, second = (f"base_model.model.{key.format(i)}{end}" for end in layers.KINDS[kind])
            out[first] = np.float32(draw.normal(0, 0.3, (rank, inputs)))
            out[second] = np.float32(draw.normal(0, 0.3, (outputs, rank)))
    head = {"weight": np.float32(draw.normal(size=(5, 24))), "bias": np.zeros(5, np.float32)}
    return out | {f"base_model.model.head.{key}": x for key, x in head.items()}


@pytest.mark.parametrize("kind", layers.KINDS)
def test_a_dense_product_of_a_fused_layer_is_read(kind):
    """As PEFT trains it: query, key and value share the first matrix; some blocks are left out."""
    model, to_timm = MODELS["vit"]
    frozen = random(models.shapes(model, 16), 0)
    names = {"blocks.{}.attn.qkv": (72, 24), "blocks.{}.mlp.fc2": (24, 48)}
    flat = of_peft(kind, names, rank=3, blocks=(0, 2))
    said = {"peft_type": kind, "r": 3, "lora_alpha": 12, "alpha_pattern": {"attn.qkv": 12, "fc2": 12}}
    name, options, adapter, head = layers.of_peft(said, flat, frozen, "x")
    assert options == {"rank": 3, "targets": "query+key+value+Dense_1"}
    back = to_timm(
        methods.merge(methods.get(name, **options), frozen, {"adapter": adapter, "head": head})
    )
    for key, x in defined(said, flat, to_timm(frozen)).items():
        np.testing.assert_allclose(back[key], x, rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("new", [False, True])
def test_names_of_transformers_are_read_alike(new):
    frozen = models.shapes(MODELS["vit"][0], 16)
    timm = of_peft("LORA", {"blocks.{}.attn.proj": (24, 24), "blocks.{}.mlp.fc1": (48, 24)})
    theirs = {}
    for key, x in timm.items():
        key = key.replace("blocks", "vit.layers" if new else "vit.encoder.layer")
        key = key.replace("attn.proj", "attention.o_proj" if new else "attention.output.dense")
        key = key if new else key.replace("mlp.fc1", "intermediate.dense")
        theirs[key.replace("model.head.", "model.classifier.")] = x
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    one, two = (layers.of_peft(said, flat, frozen, "x") for flat in (timm, theirs))
    assert one[:2] == two[:2] == ("lora", {"rank": 2, "targets": "out+Dense_0"})
    for a, b in zip(jax.tree.leaves(one[2:]), jax.tree.leaves(two[2:])):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "pattern, scales",
    [
        ({"blocks.0.attn.qkv": 6}, (3, 2, 2)),
        ({r"blocks\.[01]\.attn\.qkv": 8}, (4, 4, 2)),
        ({"^blocks.2.attn.qkv": 6}, (2, 2, 3)),
        ({"kv": 6}, (2, 2, 2)),  # no whole word
        ({"qkv": 6, "blocks.0.attn.qkv": 8}, (3, 3, 3)),  # the first that fits
    ],
)
def test_patterns_are_matched_as_peft_does(pattern, scales):
    """utils/other.py, get_pattern_key: the whole of a name's last words, from its beginning."""
    frozen = models.shapes(MODELS["vit"][0], 16)
    flat = of_peft("LORA", {"blocks.{}.attn.qkv": (72, 24)})
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    base = layers.of_peft(plain, flat, frozen, "x")[2]["query"]["up"]
    said = {**plain, "lora_alpha": 4, "alpha_pattern": pattern}
    found = layers.of_peft(said, flat, frozen, "x")[2]["query"]["up"]
    np.testing.assert_allclose(found, base * np.array(scales)[:, None, None], rtol=1e-6)


# Refused --------------------------------------------------------------------------------------

GOOD = {"blocks.{}.attn.qkv": (72, 24)}


@pytest.mark.parametrize(
    "said, change, message",
    [
        ({"peft_type": "OFT"}, {}, "x is of OFT: only LoRA and HiRA are read"),
        ({"use_dora": True}, {}, "x says use_dora=True, which is not read here"),
        ({"init_lora_weights": "pissa"}, {}, "x says init_lora_weights=pissa, which is not read here"),
        ({"peft_type": ["LORA"]}, {}, "x is of ['LORA']: only LoRA and HiRA are read"),
        ({"alpha_pattern": {"(": 3}}, {}, "x has a damaged lora_alpha or alpha_pattern"),
        ({"alpha_pattern": ["a"]}, {}, "x has a damaged lora_alpha or alpha_pattern"),
        ({"lora_alpha": None}, {}, "x has a damaged lora_alpha or alpha_pattern"),
        (
            {},
            {"base_model.model.blocks.0.attn.qkv.lora_A.weight": np.ones(24, np.float32)},
            "x has matrices of (24,) and (72, 2) of blocks.0.attn.qkv: it is damaged",
        ),
        ({"bias": "all"}, {}, "x says bias=all, which is not read here"),
        (
            {},
            {"base_model.model.head.bias": None},
            "x has no head: save it with modules_to_save=['head']",
        ),
        (
            {},
            {"base_model.model.blocks.1.attn.qkv.lora_B.weight": None},
            "has not both matrices of each",
        ),
        (
            {},
            {"base_model.model.patch_embed.proj.lora_A.weight": np.ones((2, 3))},
            "is of no Dense layer",
        ),
        (
            {},
            {"base_model.model.blocks.0.attn.qkv.lora_A.weight": np.ones((2, 9), np.float32)},
            "x changes attn.qkv of block 0, which the backbone has not so",
        ),
        ({}, {"more": 3}, "x changes attn.qkv of block 3, which the backbone has not so"),
    ],
)
def test_what_is_not_read_is_named(said, change, message):
    flat = of_peft("LORA", GOOD, blocks=range(4) if "more" in change else range(3))
    flat = {key: x for key, x in {**flat, **change}.items() if x is not None and key != "more"}
    with pytest.raises(UserError) as e:
        layers.of_peft(
            {"peft_type": "LORA", "r": 2, **said}, flat, models.shapes(MODELS["vit"][0], 16), "x"
        )
    assert message in str(e.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ssf", {}, "PEFT has no place for ssf: only lora, hira and some of rlrr are written"),
        ("rlrr", {}, "train it with shift=False, where=mha+ffn (or one of them), or export to timm"),
        ("rlrr", dict(shift=False, where="mha", layers=2), "train it with no option layers"),
        ("rlrr", dict(shift=False, where="mha", residual=False), "train it with residual=True"),
    ],
)
def test_what_has_no_place_in_peft_is_named(name, options, message):
    frozen = models.shapes(MODELS["vit"][0], 16)
    with pytest.raises(UserError) as e:
        layers.of_adapter(name, options, {}, frozen)
    assert message in str(e.value)


def test_layer_scale_behind_a_lora_is_named(like, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"blocks.0.ls1.gamma": np.ones(3, np.float32)}, path)
    check = lambda kind, names: command._check_scale(like[0], kind, names, {"weights": str(path)})
    with pytest.raises(UserError, match="has LayerScale behind Dense_1 and out, which is folded here"):
        check("LORA", ("query", "out", "Dense_1"))
    check("HIRA", ("query", "out"))  # a factor is the same
    check("LORA", ("query", "Dense_0"))
    with pytest.raises(UserError, match="--weights names another place of it"):  # not: no LayerScale
        command._check_scale(like[0], "LORA", ("out",), {"weights": str(tmp_path / "none.safetensors")})
    for variant in ("swin_t", "eva02_b14"):
        with pytest.raises(UserError, match=f"are known here, not {variant}"):
            layers.check_backbone(variant)


# The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def like(tuned_runs):
    """A run of ours, and a LoRA on the same backbone for the same task."""
    adapter = adapters.read(adapters.find(tuned_runs / "hearts" / "rlrr" / "seed0"))
    options = {"rank": 2, "targets": "query+Dense_1"}
    method = methods.get("lora", **options)
    shapes = methods.start(
        method, jax.random.key(0), random(models.shapes(cards.model(adapter), 32), 0)
    )
    config = {**adapter.card["config"], "method": "lora", "method_kwargs": options}
    card = {**adapter.card, "method": "lora", "method_kwargs": options, "config": config}
    return adapter, adapters.Adapter(random(shapes, 3), {**card, "formula": methods.formula("lora")})


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["peft", *map(str, words)])
    command.main()


def test_an_adapter_goes_to_peft_and_comes_back(like, tuned_runs, tmp_path, monkeypatch, capsys):
    adapters.write(tmp_path / "lora.safetensors", like[1])
    run(
        monkeypatch,
        "write",
        tmp_path / "lora.safetensors",
        tmp_path / "p",
        "--base",
        tmp_path / "b.safetensors",
    )
    out = capsys.readouterr().out
    assert f"{tmp_path}/p: LORA of rank 2; read back, its logits differ by at most" in out
    assert f"model = peft.PeftModel.from_pretrained(model, '{tmp_path}/p')" in out
    said = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert said["target_modules"] == r"blocks\.\d+\.(attn\.qkv|mlp\.fc2)"
    theirs = defined(
        said,
        safetensors.numpy.load_file(tmp_path / "p" / "adapter_model.safetensors"),
        safetensors.numpy.load_file(tmp_path / "b.safetensors"),
    )
    backbone = adapters.backbone(like[1])
    for key, x in vit_writers.to_timm(adapters.merged(like[1], backbone.frozen)).items():
        np.testing.assert_allclose(theirs[key], x, rtol=1e-5, atol=1e-5, err_msg=key)
    back = tmp_path / "back.safetensors"
    run(monkeypatch, "read", tmp_path / "p", back, "--like", tuned_runs / "hearts" / "rlrr" / "seed0")
    assert f"{back}: lora of rank 2 on query+key+value+Dense_1" in capsys.readouterr().out
    one, two = (adapters.load(a, backbone) for a in (like[1], adapters.read(back)))
    assert export.compare(one, two) < 1e-6
    assert two.card["accuracy"]["test_acc"] is None and two.card["classes"] == like[0].card["classes"]


def test_files_that_are_none_are_named(like, tmp_path):
    with pytest.raises(UserError, match="has no readable files of PEFT"):
        command.read(tmp_path, like[0])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    flat = of_peft("LORA", {"blocks.{}.attn.proj": (96, 96)}, blocks=range(2))
    flat["base_model.model.head.weight"] = np.zeros((5, 96), np.float32)
    safetensors.numpy.save_file(flat, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match="has a head of 5 classes and 96 inputs, the run 16 and 96: give"
    ):
        command.read(tmp_path, like[0])


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_peft_computes_the_same_where_it_is_installed(kind, like, tmp_path):
    """PEFT's own classes on timm's model: what we write, and what PEFT saves of it again."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    peft, st = pytest.importorskip("peft"), pytest.importorskip("safetensors.torch")
    adapter = like[1]
    if kind == "hira":
        config = {**adapter.card["config"], "method": "hira"}
        card = {**adapter.card, "method": "hira", "config": config, "formula": methods.formula("hira")}
        adapter = adapters.Adapter(adapter.trainable, card)
    command.write(adapter, tmp_path / "p", tmp_path / "b.safetensors")
    size = models.BUNDLED
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=size["patch_size"], num_classes=16, embed_dim=size["width"],
        depth=size["depth"], num_heads=size["num_heads"], mlp_ratio=4, act_layer="gelu_tanh",
    )  # fmt: skip
    theirs.load_state_dict(st.load_file(tmp_path / "b.safetensors"))
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "p")).eval()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        wanted = theirs(pixels).numpy()
    ours = np.asarray(adapters.load(adapter).logits(images))
    assert np.abs(ours - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
    theirs.save_pretrained(tmp_path / "saved")
    again = np.asarray(adapters.load(command.read(tmp_path / "saved", like[0])).logits(images))
    assert np.abs(again - ours).max() < 1e-4 * max(1, np.abs(wanted).max())
