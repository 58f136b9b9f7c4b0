"""Adapters of PEFT: `python -m rlrr_jax.projects.peft write RUN DIR`, or `read DIR OUT --like RUN`.

write: a LoRA, a HiRA, or an RLRR that is one, for timm's model of the same backbone.
read:  a LoRA or HiRA that PEFT trained on timm's or transformers' ViT, as an adapter of ours. What PEFT
       does not say (classes, pixels, the backbone) is taken from a run of ours on that backbone, of
       whatever method: method=linear is trained in seconds.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy

from rlrr_jax import adapters, cards, elsewhere, export, files, methods, models
from rlrr_jax.adapters import Adapter
from rlrr_jax.errors import Parser, UserError, first_line, one_sentence
from rlrr_jax.projects.peft import layers
from rlrr_jax.weights import reader

FILES = ("adapter_model.safetensors", "adapter_config.json")


def write(adapter: Adapter, folder: Any, base: Any = None, **where: Any) -> str:
    """Writes PEFT's two files; returns how they are used.

    Args:
      adapter: an `adapters.Adapter`.
      folder: a new folder, or one that has these files.
      base: file to write the backbone to, as timm's state dict for pixels in [-1, 1]; None: none.
      **where: where the backbone is, see `adapters.backbone`.

    Raises UserError for what neither LoRA nor HiRA can be.
    """
    folder = files.local(folder)
    export.check_folder(folder, FILES)
    if base is not None:
        files.writable(base)
    card, variant = adapter.card, adapter.card["model"]
    model = cards.model(adapter)
    shapes = models.shapes(model, cards.image_size(card))
    kind, lows = layers.of_adapter(
        card["method"], card["method_kwargs"], adapter.trainable["adapter"], shapes
    )
    layers.check_backbone(variant)
    if base is None:
        _check_scale(adapter, kind, lows, where)
        if adapter.run.model.get("depth"):
            raise UserError("the run has fewer blocks than its backbone's file: add --base FILE")
    backbone = adapters.backbone(adapter, **where)
    flat = layers.to_peft(kind, lows, adapter.trainable["head"], getattr(model, "gated", False))
    first = {key: x for key, x in flat.items() if key.endswith(layers.KINDS[kind][0])}
    rank = max(map(len, first.values()))
    found = {re.escape(re.sub(r".*blocks\.\d+\.(\w+\.\w+)\..*", r"\1", key)) for key in first}
    said = {
        "peft_type": kind,
        "r": rank,
        "target_modules": rf"blocks\.\d+\.({'|'.join(sorted(found))})",
        "modules_to_save": ["head"],
        "base_model_name_or_path": card["backbone"],
        "inference_mode": True,
        **({"lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"} if kind == "LORA" else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / FILES[0], safetensors.numpy.save(flat, metadata={"format": "pt"}))
    files.write_json(folder / FILES[1], said)
    tuned = adapters.load(adapter, backbone)
    again = adapters.load(_adapter(folder, adapter), backbone)
    if not (difference := export.compare(tuned, again)) <= export.TOLERANCE:
        raise UserError(
            f"the logits of {folder} differ by {difference:.1g} from ours: please report this"
        )
    if base is not None:
        state = export.LAYOUTS[models.family(variant)]["timm"](
            {**backbone.frozen, "head": adapter.trainable["head"]}
        )
        files.write(base, safetensors.numpy.save(state, metadata={"format": "pt"}))
    print(f"{folder}: {kind} of rank {rank}; read back, its logits differ by at most {difference:.1g}")
    given, then = adapter.run.pretrained, f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
    if base is None:
        mean, std = tuple(given.mean), tuple(given.std)
        return (
            f"model: timm's of {card['backbone']} with its weights, {len(card['classes'])} classes, "
            f"for pixels of mean {mean} and deviation {std}; model = {then}"
        )
    return f"{elsewhere.advice('timm', adapter, base)}; model = {then}"


def _check_scale(adapter: Adapter, kind: str, names: Any, where: dict) -> None:
    """UserError if a LoRA changes a layer behind which the backbone's file has LayerScale."""
    behind = sorted({"out", "Dense_1"} & set(names))
    if kind != "LORA" or not behind:
        return
    path, _ = adapters.located(adapter, **where)
    shapes = reader.array_shapes(path)
    if any(key.endswith((".gamma", ".gamma_1", ".lambda1")) for key in shapes):
        raise UserError(
            f"the backbone has LayerScale behind {' and '.join(behind)}, which is folded here: what "
            f"LoRA adds there would be another in PEFT; train other targets, or hira, or add --base"
        )


def read(folder: Any, like: Adapter, **where: Any) -> Adapter:
    """An `adapters.Adapter` of what PEFT trained, for the task and backbone of a run of ours.

    Args:
      folder: of PEFT's files.
      like: the run's adapter.
      **where: where its backbone is, see `adapters.backbone`.

    Raises UserError for other kinds, damaged files, and a head of other classes.
    """
    found = _adapter(folder, like)
    layers.check_backbone(like.card["model"])
    _check_scale(like, found.card["method"].upper(), found.trainable["adapter"], where)
    return found


def _adapter(folder: Any, like: Adapter) -> Adapter:
    """What PEFT trained, for the task and backbone of a run of ours."""
    folder = files.local(folder)
    try:
        said = json.loads((folder / FILES[1]).read_text())
        flat = safetensors.numpy.load_file(folder / FILES[0])
    except Exception as e:  # a damaged file can raise anything
        raise UserError(
            f"{folder} has no readable files of PEFT ({first_line(e)}): save it again"
        ) from e
    if not isinstance(said, dict):
        raise UserError(f"{folder / FILES[1]} is no object: save it again")
    shapes = models.shapes(cards.model(like), cards.image_size(like.card))
    name, options, adapter, head = layers.of_peft(said, flat, shapes, folder)
    if (found := head["kernel"].shape) != (wanted := shapes["head"]["kernel"].shape):
        raise UserError(
            f"{folder} has a head of {found[-1]} classes and {found[0]} inputs, the run {wanted[-1]} "
            f"and {wanted[0]}: give a run on the same classes and backbone"
        )
    nothing = dict.fromkeys(like.card["accuracy"])
    config = {**like.card["config"], "method": name, "method_kwargs": options}
    config |= {"loss": "cross_entropy", "loss_kwargs": {}}
    card = {**like.card, "method": name, "method_kwargs": options, "formula": methods.formula(name)}
    return Adapter({"adapter": adapter, "head": head}, {**card, "accuracy": nothing, "config": config})


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("source", help="a run or adapter of ours; or a folder of PEFT's")
    parser.add_argument("out", help="folder to write; or an adapter of ours, .safetensors")
    parser.add_argument("--like", help="of read: a run of ours on the same backbone and classes")
    parser.add_argument("--base", help="of write: file for the backbone, too, as timm's state dict")
    adapters.add_flags(parser)
    args = parser.parse_args()
    if args.what == "write":
        adapter = adapters.read(adapters.find(args.source))
        print(write(adapter, args.out, args.base, **adapters.given(args)))
        return
    if args.like is None:
        raise UserError(
            "PEFT says neither classes nor pixels: add --like RUN, a run of ours on that backbone"
        )
    if not args.out.endswith(".safetensors"):
        raise UserError(f"{args.out} does not end in .safetensors: name such a file")
    found = read(args.source, adapters.read(adapters.find(args.like)), **adapters.given(args))
    adapters.write(pathlib.Path(args.out).expanduser(), found)
    number = sum(np.size(x) for node in found.trainable["adapter"].values() for x in node.values())
    print(
        f"{args.out}: {found.card['method']} of rank {found.card['method_kwargs']['rank']} on "
        f"{found.card['method_kwargs']['targets']}, {number:,} values; python -m rlrr_jax.predict "
        f"--adapter {args.out} IMAGES..."
    )


if __name__ == "__main__":
    one_sentence(main)
