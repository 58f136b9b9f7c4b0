"""Files of ViTs with rotary positions: DINOv3's own, transformers', timm's; and what is refused."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import rope_kinds
import safetensors.numpy
from flax.traverse_util import flatten_dict
from marks import quick
from scipy.special import erf

from rlrr_jax import models
from rlrr_jax.errors import UserError
from rlrr_jax.models import rope_vit
from rlrr_jax.weights import preprocessing, reader, rope_layouts

KINDS = ("dinov3", "dinov3, gated")
D, HEADS, DEPTH, HIDDEN, PATCH = 24, 2, 2, 48, 4


def draw(random, *shape, scale=0.3):
    return random.normal(0, scale, shape).astype(np.float32)


def official(gated):
    """Random arrays under the names of facebookresearch/dinov3 (models/vision_transformer.py)."""
    random = np.random.default_rng(0)
    norm = lambda: (1 + draw(random, D), draw(random, D))
    out = {
        "cls_token": draw(random, 1, 1, D),
        "storage_tokens": draw(random, 1, 4, D),
        "mask_token": draw(random, 1, D),
        "patch_embed.proj.weight": draw(random, D, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(random, D),
        "rope_embed.periods": (100 ** (np.arange(D // HEADS // 4) / (D // HEADS // 4))).astype(
            ml_dtypes.bfloat16
        ),
        **dict(zip(("norm.weight", "norm.bias"), norm())),
        **dict(zip(("local_cls_norm.weight", "local_cls_norm.bias"), norm())),
    }
    names = {"w1": (HIDDEN, D), "w2": (HIDDEN, D), "w3": (D, HIDDEN)}
    names = names if gated else {"fc1": (HIDDEN, D), "fc2": (D, HIDDEN)}
    for i in range(DEPTH):
        layers = {"attn.qkv": (3 * D, D), "attn.proj": (D, D)}
        layers |= {f"mlp.{name}": shape for name, shape in names.items()}
        block = {f"{name}.weight": draw(random, *shape) for name, shape in layers.items()}
        block |= {f"{name}.bias": draw(random, shape[0]) for name, shape in layers.items()}
        block["attn.qkv.bias_mask"] = np.repeat(np.float32([1, 0, 1]), D)
        for number in (1, 2):
            block |= {f"ls{number}.gamma": draw(random, D)}
            block |= dict(zip((f"norm{number}.weight", f"norm{number}.bias"), norm()))
        out |= {f"blocks.{i}.{name}": x for name, x in block.items()}
    return out


def forward(state, images):
    """The normalised tokens [B, 1 + 4 + h*w, D] of images [B, H, W, 3], as DINOv3 is defined."""
    at = lambda name: np.asarray(state[name], np.float64)
    dense = lambda x, name: x @ at(f"{name}.weight").T + at(f"{name}.bias")

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * at(f"{name}.weight") + at(f"{name}.bias")

    b, h, w = len(images), images.shape[1] // PATCH, images.shape[2] // PATCH
    patches = images.reshape(b, h, PATCH, w, PATCH, 3).astype(np.float64)
    x = np.einsum("bhpwqc,dcpq->bhwd", patches, at("patch_embed.proj.weight")) + at(
        "patch_embed.proj.bias"
    )
    first = [np.repeat(at(name), b, 0) for name in ("cls_token", "storage_tokens")]
    x = np.concatenate([*first, x.reshape(b, h * w, D)], 1)
    quarter = D // HEADS // 4
    angles = np.array(
        [
            [2 * np.pi * c / 100 ** (k / quarter) for c in place for k in range(quarter)] * 2
            for place in (
                (2 * (i + 0.5) / h - 1, 2 * (j + 0.5) / w - 1) for i in range(h) for j in range(w)
            )
        ]
    )

    def rotated(t):  # [b, heads, tokens, Dh]
        patches = t[:, :, 5:]
        half = patches.shape[-1] // 2
        other = np.concatenate([-patches[..., half:], patches[..., :half]], -1)
        return np.concatenate([t[:, :, :5], patches * np.cos(angles) + other * np.sin(angles)], 2)

    for i in range(DEPTH):
        name = f"blocks.{i}"
        bias = at(f"{name}.attn.qkv.bias") * at(f"{name}.attn.qkv.bias_mask")
        qkv = norm(x, f"{name}.norm1") @ at(f"{name}.attn.qkv.weight").T + bias
        q, k, v = qkv.reshape(b, -1, 3, HEADS, D // HEADS).transpose(2, 0, 3, 1, 4)
        logits = rotated(q) @ rotated(k).swapaxes(-1, -2) / np.sqrt(D // HEADS)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        y = dense(y.transpose(0, 2, 1, 3).reshape(b, -1, D), f"{name}.attn.proj")
        x = x + y * at(f"{name}.ls1.gamma")
        y = norm(x, f"{name}.norm2")
        if f"{name}.mlp.w1.weight" in state:
            gate = dense(y, f"{name}.mlp.w1")
            y = dense(gate / (1 + np.exp(-gate)) * dense(y, f"{name}.mlp.w2"), f"{name}.mlp.w3")
        else:
            y = dense(y, f"{name}.mlp.fc1")
            y = dense(y * (1 + erf(y / np.sqrt(2))) / 2, f"{name}.mlp.fc2")
        x = x + y * at(f"{name}.ls2.gamma")
    return norm(x, "norm")


def hugging(state, prefix=""):
    """The same arrays by transformers' names (5.24, models/dinov3_vit)."""
    out = {}
    leaves = {"cls_token": "cls_token", "storage_tokens": "register_tokens", "mask_token": "mask_token"}
    gated = "blocks.0.mlp.w1.weight" in state
    layers = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    layers = layers if gated else {"fc1": "up_proj", "fc2": "down_proj"}
    for key, value in state.items():
        if key in leaves:
            out[f"embeddings.{leaves[key]}"] = value.reshape(1, -1, D)
        elif key.startswith("patch_embed"):
            out[key.replace("patch_embed.proj", "embeddings.patch_embeddings")] = value
        elif "attn.qkv" in key and not key.endswith("mask"):
            name = key.replace("blocks", f"{prefix}layer").replace("attn.qkv", "attention.{}_proj")
            thirds = zip("qkv", np.split(value, 3))
            out |= {name.format(k): x for k, x in thirds if k != "k" or key.endswith("weight")}
        elif key.startswith("blocks"):
            name = key.replace("blocks", f"{prefix}layer").replace("attn.proj", "attention.o_proj")
            name = name.replace(".ls", ".layer_scale").replace(".gamma", ".lambda1")
            for ours, theirs in layers.items():
                name = name.replace(f"mlp.{ours}.", f"mlp.{theirs}.")
            if not name.endswith("bias_mask"):
                out[name] = value
        elif key.startswith("norm."):
            out[key] = value
    return out


def write(path, state):
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in state.items()}, path)
    return str(path)


def encoded(path, kind, images, notes=None):
    """The normalised tokens of our model, with the arrays of a file."""
    model = rope_kinds.model(kind)
    note = None if notes is None else notes.append
    size = images.shape[1:3]
    tree = reader.load(path, model=model, image_size=size, how=rope_kinds.HOW, note=note)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
        _, kept = run({"params": tree}, images)
    return np.asarray(kept["intermediates"]["encoded"][0])


def images(size):
    return np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=str)
def test_files_of_the_authors_give_what_their_definition_gives(kind, size, tmp_path):
    state, notes = official("gated" in kind), []
    path = write(tmp_path / "dinov3_vits16_pretrain.safetensors", state)
    wanted = forward(state, images(size))
    found = encoded(path, kind, images(size), notes)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert notes == [
        f"note: {path} has arrays that this model does not use: local_cls_norm.bias, "
        f"local_cls_norm.weight, mask_token, rope_embed.periods"
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_files_of_transformers_are_read_alike(kind, prefix, tmp_path):
    state = official("gated" in kind)
    path = write(tmp_path / "model.safetensors", hugging(state, prefix))
    wanted = forward(state, images((12, 20)))
    assert np.abs(encoded(path, kind, images((12, 20))) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_biases_that_timm_leaves_out_are_zero(tmp_path):
    """Its models without `_qkvb` have no biases of queries and values."""
    state = rope_kinds.state("dinov3", 16)
    state |= {key: 0 * x for key, x in state.items() if key.endswith(("q_bias", "v_bias"))}
    trees = []
    for name in ("with", "without"):
        left = {
            k: x for k, x in state.items() if name == "with" or not k.endswith(("q_bias", "v_bias"))
        }
        path = write(tmp_path / f"{name}.safetensors", left)
        model = rope_kinds.model("dinov3")
        trees.append(reader.load(path, model=model, image_size=16, how=rope_kinds.HOW, head=True))
    one, two = map(flatten_dict, trees)
    assert one.keys() == two.keys() and len(one) == 23
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=str(key))


@pytest.mark.parametrize("kind", rope_kinds.ATTRIBUTES)
def test_what_is_written_is_read_back(kind, tmp_path):
    state = rope_kinds.state(kind, 20)
    model = rope_kinds.model(kind)
    path = write(tmp_path / "x.safetensors", state)
    tree = reader.load(path, model=model, image_size=20, how=rope_kinds.HOW, head=True)
    again = write(tmp_path / "y.safetensors", rope_layouts.to_timm(tree))
    back = reader.load(again, model=model, image_size=20, how=rope_kinds.HOW, head=True)
    one, two = flatten_dict(tree), flatten_dict(back)
    assert one.keys() == two.keys()
    placed = [("pos_embedding",), ("embedding", "bias")]  # in one array where timm has one
    for key in one.keys() - set(placed if "pe_core" in kind else ()):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-6, atol=1e-6, err_msg=str(key))
    assert rope_layouts.to_timm(tree).keys() == state.keys()


# Refused --------------------------------------------------------------------------------------


def change(state, kind):
    """A file that is not quite DINOv3's."""
    if kind == "periods":
        return {**state, "rope_embed.periods": np.float32([1.0, 100.0, 10000.0])}
    if kind == "key":
        return {k: x for k, x in state.items() if not k.endswith("bias_mask")}
    if kind == "positions":
        return {**state, "pos_embed": np.zeros((1, 17, D), np.float32)}
    if kind == "gamma":
        return {**state, "blocks.0.ls1.gamma": np.ones(3, np.float32)}
    if kind == "norm":
        return {**state, "fc_norm.weight": np.ones(D, np.float32)}
    if kind == "two":
        return {**state, **{f"teacher.{key}": x for key, x in state.items()}}
    return {key: x for key, x in state.items() if "storage" not in key}


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "periods",
            "has rotary positions of other periods (rope_embed.periods), which are not computed",
        ),
        ("key", "has a bias of keys (blocks.0.attn.qkv.bias), which this model has not"),
        ("positions", "has a position embedding, unlike the model: check config.model.variant"),
        (
            "gamma",
            "the LayerScale of Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out has",
        ),
        ("two", "does not fit the model (check config.model): unknown: teacher.blocks"),
        (
            "tokens",
            "has other tokens or norms ({'cls': 1}) than the model ({'cls': 1, 'registers': 4})",
        ),
        ("norm", "its rotary positions may be of another kind; take another"),
    ],
)
def test_a_file_that_is_almost_one_is_refused(kind, message, tmp_path):
    path = write(tmp_path / "x.safetensors", change(official(False), kind))
    with pytest.raises(UserError) as e:
        encoded(path, "dinov3", images((16, 16)))
    assert message in str(e.value)


@pytest.mark.parametrize("layout", ["timm", "authors", "transformers"])
@pytest.mark.parametrize(
    "variant", quick(["dinov3_s16plus", "dinov3_s16", "eva02_t14", "pe_core_s16"], "dinov3_s16")
)
def test_a_file_of_another_variant_is_named(variant, layout, tmp_path):
    """Whatever is asked of it: a plain ViT, or another of the family."""
    if "dinov3" not in variant and layout != "timm":
        return
    whole = models.build(variant, 1)
    small = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), models.shapes(whole, 112))
    state = rope_layouts.to_timm(small)
    state = {key: np.zeros(x.shape, np.uint8) for key, x in state.items()}  # shapes tell it
    if layout != "timm":
        state = {k.replace("gamma_", "ls").replace("reg_", "storage_"): x for k, x in state.items()}
        state = {k.replace("fc1_g", "w1").replace("fc1_x", "w2"): x for k, x in state.items()}
        state = {k.replace("storage_token", "storage_tokens"): x for k, x in state.items()}
    if layout == "transformers":
        state = {k: x for k, x in state.items() if "token" not in k}
        state |= {"embeddings.patch_embeddings.weight": state.pop("patch_embed.proj.weight")}
        state = {k.replace("blocks.", "layer."): x for k, x in state.items()}
    path = write(tmp_path / "x.safetensors", state)
    for other in ("B/16", "dinov3_l16", "swin_t"):
        with pytest.raises(UserError, match=rf"is of {variant}: set config.model.variant={variant}"):
            reader.load(path, model=models.build(other, 1), image_size=224, how=rope_kinds.HOW)


# Cards ----------------------------------------------------------------------------------------


def card(folder, beside, name="x", variant="dinov3_s16", **other):
    path = folder / f"{name}.safetensors"
    write(path, {"x": np.zeros(1, np.float32)})
    for file, said in beside.items():
        (folder / file).write_text(json.dumps(said))
    return preprocessing.read(path, name, variant=variant, needed=False, **other)


DINO = {"model_type": "dinov3_vit", "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 16}
DINO |= {"num_attention_heads": 6, "intermediate_size": 1536, "rope_theta": 100.0, "image_size": 224}
PLUS = {**DINO, "use_gated_mlp": True, "hidden_act": "silu"}


def test_cards_of_transformers(tmp_path):
    pixels = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    found = card(tmp_path, {"config.json": DINO, "preprocessor_config.json": pixels})
    assert (found.gelu, found.norm_eps, found.num_heads, found.image_size) == ("exact", 1e-5, 6, 224)
    assert found.mean == (0.43, 0.411, 0.296)
    assert card(tmp_path, {"config.json": PLUS}, variant="dinov3_s16plus").gelu == "exact"


@pytest.mark.parametrize(
    "said, variant, message",
    [
        (PLUS, "dinov3_s16", "it has gated MLPs"),
        (DINO, "dinov3_s16plus", "it has plain MLPs"),
        ({**DINO, "rope_theta": 1e4}, "dinov3_s16", "its rope_theta is 10000.0"),
        ({**DINO, "key_bias": True}, "dinov3_s16", "its key_bias is True"),
        (DINO, "dinov3_b16", "its hidden_size is 384, that of dinov3_b16 768"),
        (DINO, "B/16", "its model_type is dinov3_vit"),
        ({**PLUS, "hidden_act": "gelu"}, "dinov3_s16plus", "its gated MLPs have the activation gelu"),
    ],
)
def test_cards_of_another_model_are_refused(said, variant, message, tmp_path):
    with pytest.raises(UserError) as e:
        card(tmp_path, {"config.json": said}, variant=variant)
    assert message in str(e.value) and "damaged" not in str(e.value)


@pytest.mark.parametrize("file", ["x.json", "config.json"])
@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "vit_pe_lang_large_patch14_448"])
def test_a_json_of_what_is_refused_is_not_called_damaged(file, name, tmp_path):
    said = {"architecture": name, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    with pytest.raises(
        UserError, match=f"{file} names {name}, which has rotary positions of another"
    ) as e:
        card(tmp_path, {file: said})
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize(
    "name, variant",
    [
        ("vit_small_plus_patch16_dinov3_qkvb.lvd1689m", "dinov3_s16plus"),
        ("vit_huge_plus_patch16_dinov3.lvd1689m", "dinov3_h16plus"),
        ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "dinov3_t16"),
        ("dinov3_vits16plus_pretrain_lvd1689m-4057cbaa", "dinov3_s16plus"),
        ("dinov3-vitb16-pretrain-lvd1689m", "dinov3_b16"),
        ("dinov3_vit7b16_pretrain_sat493m-a6675841", "dinov3_7b16"),
        ("vit_pe_core_base_patch16_224.fb", "pe_core_b16"),
        ("eva02_large_patch14_448.mim_m38m_ft_in22k", "eva02_l14"),
    ],
)
def test_names_tell_the_variant(name, variant, tmp_path):
    found = card(tmp_path, {}, name=name, variant=variant)
    assert found.variant == variant
    with pytest.raises(UserError, match=f"set config.model.variant={variant}"):
        card(tmp_path, {}, name=name, variant="B/16")
    if "dinov3" in name:
        sat = (0.43, 0.411, 0.296)
        assert found.mean == (sat if "sat493m" in name else preprocessing.IMAGENET[0])


@pytest.mark.parametrize("name", ["dinov3_vitl16plus_x", "vit_small_patch16_lingbot_dinov3"])
def test_names_of_others_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="it is not computed here"):
        card(tmp_path, {}, name=name, variant="B/16")


def test_every_variant_of_timms_table_is_one():
    from rlrr_jax.weights import architectures

    rotary = {x.variant for x in architectures.TIMM.values()} & rope_vit.VARIANTS.keys()
    assert rotary == rope_vit.VARIANTS.keys()


# Where timm and transformers are installed ------------------------------------------------------


@pytest.mark.parametrize("kind", rope_kinds.ATTRIBUTES)
@pytest.mark.parametrize("size", [(20, 20), (12, 28)], ids=str)
def test_timm_loads_what_is_written_and_agrees_where_it_is_installed(kind, size, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    theirs = rope_kinds.timms(kind, size)
    state = rope_kinds.state(kind, size)
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()}, strict=True)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images(size)).permute(0, 3, 1, 2)).numpy()
    found = rope_kinds.logits_of_a_file(kind, size, images(size), tmp_path)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers_is_read_where_it_is_installed(gated, tmp_path):
    """Saved by itself with its config.json."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = dict(hidden_act="silu", use_gated_mlp=True) if gated else {}
    config = transformers.DINOv3ViTConfig(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=HIDDEN,
        patch_size=PATCH, num_register_tokens=4, **kind,
    )  # fmt: skip
    model = transformers.DINOv3ViTModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path)
    x = images((12, 20))
    with torch.no_grad():
        wanted = model(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    path = str(tmp_path / "model.safetensors")
    found = encoded(path, "dinov3, gated" if gated else "dinov3", x)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
