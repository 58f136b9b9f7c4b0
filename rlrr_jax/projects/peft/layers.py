"""Names and matrices of PEFT's LoRA and HiRA, and those of ours."""

import re
from typing import Any, NamedTuple

import numpy as np

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

THIRDS = ("query", "key", "value")
ROOT = "base_model.model."
KINDS = {"LORA": (".lora_A.weight", ".lora_B.weight"), "HIRA": (".hira_A", ".hira_B")}
# Options of PEFT's LoRA that change what is computed, and starts that leave the backbone as it is.
_OTHERWISE = ("use_dora", "lora_bias", "fan_in_fan_out", "use_rslora", "use_qalora", "use_bdlora")
_OTHERWISE += ("alora_invocation_tokens", "monteclora_config", "velora_config", "kasa_config")
_OTHERWISE += ("arrow_config", "layer_replication", "target_parameters", "trainable_token_indices")
_INITS = ("gaussian", "eva", "orthogonal")
# Names of a layer in a block, of timm and of transformers -> ours; "qkv" is three of ours.
_OURS = {
    "attn.qkv": "qkv",
    **{f"attn.{name[0]}_proj": name for name in THIRDS},
    **{f"attention.{name[0]}_proj": name for name in THIRDS},
    **{f"attention.attention.{name}": name for name in THIRDS},
    **dict.fromkeys(("attn.proj", "attention.output.dense", "attention.o_proj"), "out"),
    **dict.fromkeys(("mlp.fc1", "intermediate.dense", "mlp.fc1_x", "mlp.up_proj"), "Dense_0"),
    **dict.fromkeys(("mlp.fc2", "output.dense", "mlp.down_proj"), "Dense_1"),
    **dict.fromkeys(("mlp.fc1_g", "mlp.gate_proj"), "gate"),
}
_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|layers?)\.(\d+)\.(.+)")
_HEAD = re.compile(r"(?:head|classifier)\.(weight|bias)")


class Low(NamedTuple):
    """What is added to a layer of each block, or to 1 where it is a factor.

    Attributes:
      down: [L, in, r].
      up: [L, r, out].
    """

    down: np.ndarray
    up: np.ndarray


# To -------------------------------------------------------------------------------------------


def of_adapter(name: str, options: dict, adapter: Any, frozen: Any) -> tuple[str, dict[str, Low]]:
    """PEFT's kind of an adapter of ours, and the product of each layer.

    Args:
      name: the method.
      options: its options, as given.
      adapter: what it trained.
      frozen: the backbone's tree, of arrays or of shapes.

    Raises UserError for what neither LoRA nor HiRA can be.
    """
    given = {**methods.options(name), **options}
    if name == "lora":
        scale = (given["alpha"] or given["rank"]) / given["rank"]
        of_ranks = lambda x: x["scale"][..., None] if "scale" in x else 1.0
        low = lambda x: Low(np.asarray(x["down"]), np.asarray(scale * of_ranks(x) * x["up"]))
        return "LORA", {name: low(x) for name, x in adapter.items()}
    if name == "hira":
        return "HIRA", {k: Low(np.asarray(x["down"]), x["up"]) for k, x in adapter.items()}
    if name != "rlrr":
        raise UserError(f"PEFT has no place for {name}: only lora, hira and some of rlrr are written")
    asked = {"with_weight": True, "residual": True, "shift": False}
    wrong = [f"{key}={value}" for key, value in asked.items() if given[key] != value]
    if set(given["where"].split("+")) - {"mha", "ffn"}:
        wrong += ["where=mha+ffn (or one of them)"]
    if wrong or given["layers"] is not None:
        need = ", ".join(wrong) or "no option layers"
        raise UserError(
            f"RLRR is HiRA of its rank where it has no shifts and leaves norms and patches alone: "
            f"train it with {need}, or export to timm"
        )
    found = {}
    for layer, site in base.dense(frozen).items():
        try:
            node = base.subtree(adapter, site.path)
        except KeyError:  # where= has left it out
            continue
        rank, depth = given["rank"], site.depth
        ones = lambda n, depth=depth: np.ones((depth, n), np.float32)
        left = np.asarray(node.get("scale_in", ones(site.inputs))).reshape(depth, -1, rank)
        right = np.asarray(node.get("scale_out", ones(site.outputs))).reshape(depth, rank, -1)
        found[layer] = Low(left, right)
    return "HIRA", found


def to_peft(kind: str, layers: dict[str, Low], head: Any, gated: bool) -> dict[str, np.ndarray]:
    """Arrays by PEFT's names, on timm's ViT; all of one rank, the smaller with zeros.

    Args:
      kind: a key of `KINDS`.
      layers: the product of each of our layers.
      head: kernel and bias.
      gated: whether MLPs are gated.
    """
    names = {"out": "attn.proj", "gate": "mlp.fc1_g", "Dense_1": "mlp.fc2"}
    names["Dense_0"] = "mlp.fc1_x" if gated else "mlp.fc1"
    made = {names[name]: low for name, low in layers.items() if name in names}
    if thirds := {name: low for name, low in layers.items() if name in THIRDS}:
        made["attn.qkv"] = _in_one(thirds)
    rank = max(low.down.shape[-1] for low in made.values())
    first, second = KINDS[kind]
    out = {f"{ROOT}head.weight": np.asarray(head["kernel"]).T, f"{ROOT}head.bias": head["bias"]}
    for name, low in made.items():
        more = rank - low.down.shape[-1]
        for i, (down, up) in enumerate(zip(low.down, low.up)):
            start = f"{ROOT}blocks.{i}.{name}"
            out[start + first] = np.pad(down, ((0, 0), (0, more))).T  # [r, in]
            out[start + second] = np.pad(up, ((0, more), (0, 0))).T  # [out, r]
    return {key: np.ascontiguousarray(x, np.float32) for key, x in out.items()}


def _in_one(thirds: dict[str, Low]) -> Low:
    """The product of a fused query, key and value: the ranks of each side by side."""
    width = next(iter(thirds.values())).up.shape[-1]
    down = np.concatenate([low.down for low in thirds.values()], -1)
    rows = []
    for name, low in thirds.items():
        place = THIRDS.index(name)
        rows.append(np.pad(low.up, ((0, 0), (0, 0), (place * width, (2 - place) * width))))
    return Low(down, np.concatenate(rows, 1))


# From -----------------------------------------------------------------------------------------


def of_peft(said: dict, flat: dict, frozen: Any, path: Any) -> tuple[str, dict, dict, dict]:
    """Our method, its options, what it trained, and the head, of PEFT's files.

    Args:
      said: its configuration.
      flat: arrays by its names.
      frozen: the backbone's tree, of arrays or of shapes.
      path: where they are from, for messages.

    Raises UserError for other kinds than LoRA and HiRA, for options that change what is computed, and
    for layers that are not the backbone's.
    """
    kind = said.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path} is of {kind}: only LoRA and HiRA are read")
    for key in _OTHERWISE:
        if said.get(key):
            raise UserError(f"{path} says {key}={said[key]}, which is not read here")
    kept = {"bias": ("none",), "init_lora_weights": (True, False, None, *_INITS)}
    for key, values in kept.items():  # other starts change the backbone itself
        if said.get(key, values[0]) not in values:
            raise UserError(f"{path} says {key}={said[key]}, which is not read here")
    head, pairs = _sorted(kind, flat, path)
    sites, found = base.dense(frozen), {}
    for (name, i), (a, b, full) in pairs.items():
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(f"{path} has matrices of {a.shape} and {b.shape} of {full}: it is damaged")
        scale = _scale(said, full, len(a), path) if kind == "LORA" else 1.0
        layer, parts = _OURS[name], (b * scale,)
        names = THIRDS if layer == "qkv" else (layer,)
        parts = np.split(b * scale, len(names)) if len(b) % len(names) == 0 else parts * len(names)
        for ours, up in zip(names, parts):
            site = sites.get(ours)
            if site is None or i >= site.depth or (a.shape[1], len(up)) != (site.inputs, site.outputs):
                raise UserError(f"{path} changes {name} of block {i}, which the backbone has not so")
            found.setdefault(ours, {})[i] = (a.T, up.T)
    rank = max(down.shape[-1] for blocks in found.values() for down, _ in blocks.values())
    adapter = {name: _stacked(sites[name], blocks, rank) for name, blocks in found.items()}
    options = {"rank": rank, "targets": "+".join(name for name in base.DENSE if name in adapter)}
    return kind.lower(), options, {name: adapter[name] for name in base.DENSE if name in adapter}, head


def _sorted(kind: str, flat: dict, path: Any) -> tuple[dict, dict]:
    """The head, and of each layer and block PEFT's two matrices."""
    head, pairs = {}, {}
    for key, value in flat.items():
        name, value = key.removeprefix(ROOT), np.asarray(value, np.float32)
        ends = [end for end in KINDS[kind] if name.endswith(end)]
        block = _BLOCK.fullmatch(name.removesuffix(ends[0])) if ends else None
        if part := _HEAD.fullmatch(name):
            head |= {"kernel": value.T} if part[1] == "weight" else {"bias": value}
        elif block and block[2] in _OURS:
            full = name.removesuffix(ends[0])
            pair = pairs.setdefault((block[2], int(block[1])), [None, None, full])
            if pair[2] != full:
                raise UserError(f"{path} has {full} and {pair[2]}, which are one layer here")
            pair[KINDS[kind].index(ends[0])] = value
        else:
            raise UserError(f"{path} has {key}, which is of no Dense layer of a ViT's blocks")
    if head.keys() != {"kernel", "bias"}:
        raise UserError(
            f"{path} has no head: save it with modules_to_save=['head'] (or ['classifier'])"
        )
    if not pairs or any(x is None for pair in pairs.values() for x in pair):
        raise UserError(f"{path} has not both matrices of each layer: it is damaged, or empty")
    return head, pairs


def _scale(said: dict, name: str, rank: int, path: Any) -> float:
    """What LoRA's product of a layer is multiplied by: by the first pattern that fits its name."""
    try:
        patterns = (said.get("alpha_pattern") or {}).items()
        own = [x for key, x in patterns if re.match(rf"(.*\.)?({key})$", name)]
        return float(own[0] if own else said.get("lora_alpha", 8)) / rank
    except (AttributeError, TypeError, ValueError, re.error) as e:
        raise UserError(f"{path} has a damaged lora_alpha or alpha_pattern ({e}): save it again") from e


def _stacked(site: Any, blocks: dict, rank: int) -> dict:
    """Matrices of all blocks, zero in those that have none."""
    down = np.zeros((site.depth, site.inputs, rank), np.float32)
    up = np.zeros((site.depth, rank, site.outputs), np.float32)
    for i, (a, b) in blocks.items():
        down[i, :, : a.shape[-1]], up[i, : len(b)] = a, b
    return {"down": down, "up": up}


def check_backbone(variant: str) -> None:
    """UserError for a backbone whose layers PEFT's names do not fit."""
    if not models.is_vit(variant) or variant.startswith("eva02"):
        raise UserError(
            f"only ViTs with timm's fused query, key and value are known here, not {variant}"
        )
