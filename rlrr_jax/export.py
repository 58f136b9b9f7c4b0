"""A tuned model in the form others use: `python -m rlrr_jax.export RUN --to timm model.safetensors`.

Formats: `big_vision` (.npz, numbered blocks), `vit_jax` (.npz, the layout of 2020), `timm`
(.safetensors, its state dict), `transformers` (a folder for its ViTForImageClassification), `adapter`
(.safetensors, the trained values alone), `hub` (a folder with that and a model card for the Hugging
Face Hub; `--push user/name` uploads it), and graphs that take pixels and give shares, see `graphs`:
`stablehlo` and `savedmodel` (folders), and `onnx`. The first four are the merged model in float32, a
plain one (of families other than ViTs `timm` alone). Every file is read back and its answers compared
before the command reports that it is done.
"""

import io
import json
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlrr_jax import adapters, cards, elsewhere, files, graphs, metrics, models, run_model, sides
from rlrr_jax.data import crops
from rlrr_jax.data.examples import some
from rlrr_jax.errors import Parser, UserError, one_sentence, unknown
from rlrr_jax.models import vit
from rlrr_jax.results import model_card, tables
from rlrr_jax.weights import reader, vit_writers

FORMATS = {  # endings of files; folders have none
    "big_vision": ".npz",
    "vit_jax": ".npz",
    "timm": ".safetensors",
    "adapter": ".safetensors",
    "transformers": "",
    "hub": "",
    "stablehlo": "",
    "savedmodel": "",
    "onnx": ".onnx",
}
TRAINED = ("adapter", "hub")  # formats of the trained values alone, of every model
# What the others are made by, for each family of models.
LAYOUTS = {k: {"timm": x.to_timm} for k, x in reader.LAYOUTS.items() if hasattr(x, "to_timm")}
LAYOUTS["vit"] = {
    "big_vision": vit_writers.to_big_vision,
    "vit_jax": vit_writers.to_vit_jax,
    "timm": vit_writers.to_timm,
    "transformers": vit_writers.to_transformers,
}
FOLDERS = {  # formats that are folders, and their files, the weights first
    "hub": (model_card.FILE, model_card.NAME),
    "transformers": ("model.safetensors", "config.json", "preprocessor_config.json"),
    **{name: graph.files for name, graph in graphs.FORMATS.items() if graph.files},
}
TOLERANCE = 1e-4  # of logits; a file that differs more is not kept


def export(adapter: Any, to: str, out: Any, **where: Any) -> float:
    """Writes an adapter, or the model it makes, to a file and reads it back.

    Args:
      adapter: an `adapters.Adapter`.
      to: name of a format, see `FORMATS`.
      out: path of the file, whose ending must be the format's; of "transformers" and "hub" a folder.
      **where: where the backbone is, see `adapters.backbone`.

    Returns:
      The largest difference between the logits of the model and of the file; of a graph between shares.

    Raises UserError for a wrong ending, a backbone that is not the adapter's, or a file that differs.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    any_model = to in TRAINED or to in graphs.FORMATS
    if to in graphs.FORMATS:
        graphs.check(to)
    block = run_model.architecture(adapter.run).get("block")
    if not any_model and block:
        raise UserError(
            f"the blocks of this model are {block}, for which {to} has no place: use "
            f"{' or '.join((*TRAINED, *graphs.FORMATS))}"
        )
    family = models.family(adapter.card["model"])
    layouts = LAYOUTS.get(family, {})
    ending, layout = FORMATS[to], layouts.get(to)
    plain = not [key for key in vit.PARTS if adapter.run.model.get(key) is not None]
    if not any_model and (layout is None or (not plain and to != "timm")):
        which = adapter.card["model"] + " with what it has besides" * (not plain)
        others = ["timm"] * ("timm" in layouts) + [*TRAINED, *graphs.FORMATS]
        raise UserError(f"{which} is not exported to {to}: use {', '.join(others)}")
    if not any_model:
        _check_plain(adapter, to, family)
    name, out = out, files.local(out).absolute()
    if to in FOLDERS:
        check_folder(out, FOLDERS[to])
    elif not str(name).endswith(ending) or out.name == ending:
        raise UserError(f"{to} files end in {ending}: {name} does not")
    out.parent.mkdir(parents=True, exist_ok=True)
    if to not in FOLDERS:
        files.writable(out)
    backbone = adapters.backbone(adapter, **where)
    adapter = cards.portable(adapter)
    tuned = adapters.load(adapter, backbone)
    if getattr(tuned.model, "projection", 0) and not any_model:
        tuned = _one_head(tuned)
    special = files.is_special(out)  # whose folder may be /dev
    target = pathlib.Path(files.through(out))  # a link stays
    with tempfile.TemporaryDirectory(dir=None if special else target.parent, prefix=".part") as beside:
        made = pathlib.Path(beside)
        weights = made / (FOLDERS[to][0] if to in FOLDERS else out.name)
        if to in graphs.FORMATS:
            made = made / "graph" if to in FOLDERS else made
            difference = graphs.made(to, adapter, tuned, made if to in FOLDERS else weights)
        elif layout is None:
            adapters.write(weights, adapter)
            difference = compare(tuned, adapters.load(weights, backbone))
        else:
            write(weights, layout(tuned.params), card(adapter))
            difference = compare(tuned, tuned._replace(params=read(weights, tuned)))
        if not difference <= (graphs.TOLERANCE if to in graphs.FORMATS else TOLERANCE):
            raise UserError(
                f"the answers of {out} would differ by {difference:.1g} from the model's: it was not "
                f"kept; please report this"
            )
        _write_beside(adapter, to, made, out)
        if to in FOLDERS:
            target.mkdir(exist_ok=True)
            for path in made.iterdir():
                if (target / path.name).is_dir():
                    shutil.rmtree(target / path.name)
                path.replace(target / path.name)
        elif special:
            files.write(out, weights.read_bytes())
        else:
            weights.replace(target)
    return difference


def _check_plain(adapter, to, family):
    """UserError for a model that timm's function of its name does not build."""
    if family not in ("rope_vit", "swinv2", "convnext"):
        return
    plain_name = adapter.card["model"]
    model, plain = cards.model(adapter), models.build(plain_name, 1)
    for key in ("gelu", "norm_eps", "num_heads"):
        if getattr(model, key) != getattr(plain, key):
            raise UserError(
                f"config.model.{key}={getattr(model, key)} is not what {to} has in {plain_name}"
                f": use {' or '.join(TRAINED)}"
            )


def check_folder(folder: pathlib.Path, names: tuple[str, ...]) -> None:
    """UserError unless a folder is new, or has what an earlier export wrote and no more.

    Args:
      folder: the folder.
      names: files that are to be written; the first is the one of the weights.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    others = [name for name in there if name not in names]
    if there and names[0] not in there:
        others = there  # a README.md of something else
    if others:
        raise UserError(f"{folder} has other files ({some(others)}): name a new folder")


def _write_beside(adapter, to, made, out):
    """Writes what a format has beside its weights; a card that somebody edited stays as it is."""
    if to == "hub":
        if model_card.is_edited(out / model_card.NAME):
            print(f"note: {out / model_card.NAME} was edited, and is kept")
        else:
            files.write(made / model_card.NAME, model_card.text(adapter.card))
    elif to == "transformers":
        for name, values in transformers_files(adapter).items():
            files.write_json(made / name, values)


def _one_head(tuned):
    """A `Tuned` model whose projection and head, both linear, are one head."""
    params = {key: x for key, x in tuned.params.items() if key != "projection"}
    kernel = np.float64(tuned.params["projection"]["kernel"]) @ np.float64(params["head"]["kernel"])
    params["head"] = {**params["head"], "kernel": np.float32(kernel)}
    return tuned._replace(model=tuned.model.clone(projection=0), params=params)


_HF_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


def transformers_files(adapter: Any) -> dict[str, dict]:
    """The JSON files that transformers wants beside a ViT's weights, by name."""
    model, card = cards.model(adapter), adapter.card
    names, size = card["classes"], card["image_size"]  # a side, or [height, width]
    height, width = sides.pair(size)
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": _HF_GELU[model.gelu],
        "layer_norm_eps": model.norm_eps,
        "image_size": size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    kinds = {"labels": "multi_label_classification", "value": "regression"}
    if problem := kinds.get(cards.answers(card)["kind"]):
        config["problem_type"] = problem
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # Pillow's number for bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if (crop := adapter.run.crop) is not None:  # CLIP's processor cuts out the middle
        side = adapter.run.crop_from
        whole = {"height": side, "width": side} if crop == crops.SQUARE else {"shortest_edge": side}
        pixels |= {"image_processor_type": "CLIPImageProcessor", "size": whole}
        pixels |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
        pixels |= {"do_convert_rgb": True}
        pixels |= {} if crop == crops.SQUARE else {"resample": 2}  # bilinear, as near as it has
    return {"config.json": config, "preprocessor_config.json": pixels}


def card(adapter: Any) -> dict:
    """What goes into the header of a timm file: the adapter's card, its pixels and its heads."""
    model = cards.model(adapter)
    said = {"norm_eps": model.norm_eps}
    if isinstance(model, vit.ViT):
        said["num_heads"] = model.num_heads
    pixels = {key: list(getattr(model, key, [0.5] * 3)) for key in ("mean", "std")}
    return {**adapter.card, **pixels, **said}


def write(path: Any, flat: dict, card: dict) -> None:
    """Writes arrays by name, as `.npz` or, with the card in its header, as `.safetensors`."""
    if path.suffix == ".npz":
        data = io.BytesIO()
        np.savez(data, **flat)
        files.write(path, data.getbuffer())
    else:
        metadata = {"format": "pt", "rlrr_jax": json.dumps(card, sort_keys=True)}
        files.write(path, safetensors.numpy.save(flat, metadata=metadata))


def read(path: Any, tuned: Any) -> dict:
    """The tree in a file, head included."""
    size, how = cards.image_size(tuned.card), None
    if patch := getattr(tuned.model, "patch_size", None):
        height, width = sides.pair(size)
        how = reader.How(grid=(height // patch, width // patch))
    return reader.load(path, model=tuned.model, image_size=size, how=how, head=True)


def compare(one: Any, other: Any, number: int = 8) -> float:
    """The largest difference of the float32 logits of two `Tuned` models, on noise of several sizes."""
    height, width = sides.pair(cards.image_size(one.card))
    keys = jax.random.split(jax.random.key(0))
    fine = jax.random.uniform(keys[0], (number, height, width, 3), minval=-1.0)
    coarse = jax.random.uniform(keys[1], (number, 4, 4, 3), minval=-1.0)
    images = jnp.concatenate([fine, jax.image.resize(coarse, fine.shape, "linear")])
    model = one.model.clone(dtype=jnp.float32)

    @jax.jit
    def logits(params):
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, images)

    return float(jnp.abs(logits(one.params) - logits(other.params)).max())


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="workdir with one run, a run's folder, or an adapter.safetensors")
    parser.add_argument("--to", required=True, help=", ".join(FORMATS))
    parser.add_argument("out", metavar="OUT", help="file to write; of hub and transformers a folder")
    parser.add_argument("--push", metavar="NAME", help="user/name on the Hub, for --to hub: uploads it")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="of --push: only you see it; the default")
    seen.add_argument("--public", action="store_true", help="of --push: everybody sees it")
    adapters.add_flags(parser)
    args = parser.parse_args()
    if args.push and args.to != "hub":
        raise UserError(f"--push uploads what --to hub writes, not {args.to}: add --to hub")
    path = adapters.find(args.run)
    adapter = adapters.read(path)
    difference = export(adapter, args.to, args.out, **adapters.given(args))
    kind, tested = cards.answers(adapter.card)["kind"], adapter.card["accuracy"].get("test_acc")
    acc = tables.scores(metrics.KINDS[kind].score, [tested])
    print(
        f"{args.out}: {adapter.card['method']} on {adapter.card['task']}"
        + f" (test{' accuracy' * (kind == 'class')} {acc})" * bool(acc and tested is not None)
        + f", {_size(files.local(args.out)) / 1e6:.1f} MB; read back, its "
        f"{'shares' if args.to in graphs.FORMATS else 'logits'} differ by at most {difference:.1g}"
    )
    if "loss" in adapter.trainable and args.to not in TRAINED:  # which have no place for it
        print(f"note: what config.loss={adapter.run.loss} trained beside the head is left out")
    if args.push:
        card = cards.portable(adapter).card
        url = model_card.push(files.local(args.out), args.push, card, args.public)
        print(f"uploaded to {url}")
    print(elsewhere.advice(args.to, adapter, f"hf:{args.push}" if args.push else args.out))


def _size(path):
    """Bytes of a file, or of those in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    one_sentence(main)
