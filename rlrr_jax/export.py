"""A tuned model in the form others use: `python -m rlrr_jax.export RUN --to timm model.safetensors`.

Formats: `big_vision` (.npz, numbered blocks), `vit_jax` (.npz, the layout of 2020), `timm`
(.safetensors, its state dict), `transformers` (a folder for its ViTForImageClassification), `adapter`
(.safetensors, the trained values alone), `hub` (a folder with that and a model card for the Hugging
Face Hub; `--push user/name` uploads it). The first four are the merged model in float32, a plain one
(of Swin and ResNet `timm` alone);
every file is read back and its logits compared before the command reports that it is done.
"""

import copy
import io
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlrr_jax import adapters, config, files, models, sides
from rlrr_jax.errors import Parser, UserError, first_line, one_sentence, unknown
from rlrr_jax.models import exits, vit
from rlrr_jax.results import model_card, tables
from rlrr_jax.weights import reader, resnet_layouts, swin_layouts, vit_layouts

FORMATS = {  # endings of files; the last two are folders
    "big_vision": ".npz",
    "vit_jax": ".npz",
    "timm": ".safetensors",
    "adapter": ".safetensors",
    "transformers": "",
    "hub": "",
}
TRAINED = ("adapter", "hub")  # formats of the trained values alone, of every model
# What the others are made by, for each family of models.
LAYOUTS = {
    "vit": {
        "big_vision": vit_layouts.to_big_vision,
        "vit_jax": vit_layouts.to_vit_jax,
        "timm": vit_layouts.to_timm,
        "transformers": vit_layouts.to_transformers,
    },
    "swin": {"timm": swin_layouts.to_timm},
    "resnet": {"timm": resnet_layouts.to_timm},
}
HUB_FILE = "adapter.safetensors"  # in a folder for the Hub
TOLERANCE = 1e-4  # of logits; a file that differs more is not kept


def export(
    adapter: Any, to: str, out: Any, weights: str | None = None, cache_dir: str | None = None
) -> float:
    """Writes an adapter, or the model it makes, to a file and reads it back.

    Args:
      adapter: an `adapters.Adapter`.
      to: name of a format, see `FORMATS`.
      out: path of the file, whose ending must be the format's; of "transformers" and "hub" a folder.
      weights, cache_dir: see `adapters.backbone`.

    Returns:
      The largest difference between the logits of the model and of the file.

    Raises UserError for a wrong ending, a backbone that is not the adapter's, or a file that differs.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if to not in TRAINED and not adapters.method(adapter).folds:
        raise UserError(
            f"method {adapter.card['method']} folds into no weight, so {to} has no place for it: use "
            f"{', '.join(TRAINED)}"
        )
    family = models.family(adapter.card["model"])
    ending, layout = FORMATS[to], LAYOUTS[family].get(to)
    plain = not [key for key in vit.PARTS if adapter.run.model.get(key) is not None]
    if to not in ("timm", *TRAINED) and (layout is None or not plain):
        which = adapter.card["model"] + " with what it has besides" * (not plain)
        raise UserError(f"{which} is not exported to {to}: use timm, {', '.join(TRAINED)}")
    if to in ("hub", "transformers"):
        out = _export_folder(adapter, to, files.local(out))
    elif not str(out).endswith(ending) or files.local(out).name == ending:
        raise UserError(f"{to} files end in {ending}: {out} does not")
    out = files.local(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    files.writable(out)
    backbone = adapters.backbone(adapter, weights, cache_dir)
    tuned = adapters.load(adapter, backbone)
    if drops_exits(to, adapter):
        tuned = _ending(tuned)
    special = files.is_special(out)  # whose folder may be /dev
    target = pathlib.Path(files.through(out))  # a link stays
    beside = tempfile.gettempdir() if special else target.parent
    part = pathlib.Path(files.temporary(pathlib.Path(beside, out.name)))
    try:
        if layout is None:
            adapters.write(part, _portable(adapter))
            again = adapters.load(part, backbone)
        else:
            write(part, layout(tuned.params), card(adapter))
            again = tuned._replace(params=read(part, tuned))
        difference = _same_logits(tuned, again, out)
        files.write(out, part.read_bytes()) if special else part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return difference


def _portable(adapter: Any) -> Any:
    """An adapter whose card names no folder of this machine."""
    config = copy.deepcopy(adapter.card["config"])
    if own := config.get("own", {}).get("path"):
        config["own"]["path"] = pathlib.PurePath(own).name
    for group, key in (("data", "dir"), ("data", "cache_dir"), ("pretrained", "cache_dir")):
        config[group][key] = None
    return adapter._replace(card={**adapter.card, "config": config})


def drops_exits(to: str, adapter: Any) -> bool:
    """Whether an adapter has early exits for which a format has no place.

    An .npz file has, for those of one tree; the formats of other libraries have the last exit alone.
    """
    one_tree = FORMATS[to] == ".npz" and adapters.method(adapter).merge_exit is None
    return bool(adapter.run.model.get("exits")) and to not in TRAINED and not one_tree


def _ending(tuned):
    """A `Tuned` model without early exits."""
    head = {key: tuned.params["head"][key] for key in ("kernel", "bias")}
    model = tuned.model.clone(exits=())
    return tuned._replace(model=model, params={**tuned.params, "head": head}, exit_trees=())


def _export_folder(adapter, to, folder):
    """Writes what a format has beside its weights; returns the path of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if to == "hub":
        files.write(folder / "README.md", model_card.text(adapter.card))
        return folder / HUB_FILE
    for name, values in transformers_files(adapter).items():
        files.write_json(folder / name, values)
    return folder / "model.safetensors"


def _same_logits(tuned, again, out):
    """The largest difference between logits; UserError if it is too large."""
    difference = compare(tuned, again)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits of {out} would differ by {difference:.1g} from the model's: it was not "
            f"kept; please report this"
        )
    return difference


def transformers_files(adapter: Any) -> dict[str, dict]:
    """The JSON files that transformers wants beside a ViT's weights, by name."""
    model, card = adapters.model(adapter), adapter.card
    names, size = card["classes"], card["image_size"]  # a side, or [height, width]
    height, width = sides.pair(size)
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": "gelu" if model.gelu == "exact" else "gelu_pytorch_tanh",
        "layer_norm_eps": model.norm_eps,
        "image_size": size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
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
    return {"config.json": config, "preprocessor_config.json": pixels}


def push(folder: Any, repository: str, card: dict) -> str:
    """Uploads a folder made by `export` to the Hugging Face Hub; returns its address.

    Its own library does it, with its environment variables (HF_TOKEN, HF_ENDPOINT).

    Raises UserError if that is not installed, or if the upload fails.
    """
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError("--push needs huggingface_hub: pip install huggingface_hub") from e
    files.write(files.local(folder) / "README.md", model_card.text(card, f"hf:{repository}"))
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, exist_ok=True)
        names = ["README.md", HUB_FILE]
        api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=names)
    except Exception as e:  # of the network, the name, the token
        raise UserError(
            f"cannot upload to hf:{repository} ({first_line(e)}): check the name, the network and "
            f"HF_TOKEN; the folder {folder} is complete"
        ) from e
    return str(url)


def card(adapter: Any) -> dict:
    """What goes into the header of a timm file: the adapter's card, its pixels and its heads."""
    model = adapters.model(adapter)
    said = {"norm_eps": model.norm_eps}
    if models.family_of(model) == "vit":
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
    return reader.load(path, model=tuned.model, image_size=adapters.image_size(tuned.card), head=True)


def compare(one: Any, other: Any, number: int = 8) -> float:
    """The largest difference of the float32 logits of two `Tuned` models, on noise of several sizes."""
    height, width = sides.pair(adapters.image_size(one.card))
    keys = jax.random.split(jax.random.key(0))
    fine = jax.random.uniform(keys[0], (number, height, width, 3), minval=-1.0)
    coarse = jax.random.uniform(keys[1], (number, 4, 4, 3), minval=-1.0)
    images = jnp.concatenate([fine, jax.image.resize(coarse, fine.shape, "linear")])
    model = one.model.clone(dtype=jnp.float32)

    @jax.jit
    def logits(params):
        with jax.default_matmul_precision("highest"):
            if getattr(model, "exits", ()):
                return exits.apply(model, params, images)[0]
            return model.apply({"params": params}, images)

    return float(jnp.abs(logits(one.params) - logits(other.params)).max())


def advice(to: str, adapter: Any, out: Any) -> str:
    """How the file is used elsewhere."""
    card, classes = adapter.card, len(adapter.card["classes"])
    sizes = {**models.sizes(card["model"]), **config.architecture(adapter.run)}
    early, eps = sizes.pop("exits", ()), sizes.pop("norm_eps", 1e-6)
    if to == "timm" and models.family(card["model"]) == "resnet":
        return _resnet_advice(card, sizes, out)
    if to == "timm" and models.family(card["model"]) == "swin":
        return (
            f"timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.models.swin_transformer."
            f"SwinTransformer(img_size={card['image_size']}, num_classes={classes}, embed_dim="
            f"{sizes['width']}, depths={sizes['depths']}, num_heads={sizes['num_heads']}, window_size="
            f'{sizes["window"]}); model.load_state_dict(safetensors.torch.load_file("{out}"))'
        )
    if to == "timm":
        ratio = sizes["mlp_dim"] / sizes["width"]
        act = {"tanh": ', act_layer="gelu_tanh"', "quick": ', act_layer="quick_gelu"'}
        act = act.get(card["gelu"], "")
        plain = "vision_transformer.VisionTransformer"
        kind = "deit.VisionTransformerDistilled" if sizes.get("dist_token") else plain
        act += "".join(f", {k}={v}" for k, v in _timm_arguments(sizes).items())
        act += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps:g})" if eps != 1e-6 else ""
        return (
            f"timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.models.{kind}("
            f"img_size={adapters.image_size(card)}, patch_size={sizes['patch_size']}, "
            f"num_classes={classes}, embed_dim={sizes['width']}, depth={sizes['depth']}, "
            f"num_heads={sizes['num_heads']}, mlp_ratio={ratio:g}{act}); "
            f'model.load_state_dict(safetensors.torch.load_file("{out}"))'
        )
    if to in ("adapter", "hub"):
        local = to == "hub" and not str(out).startswith("hf:")
        file = files.local(out) / HUB_FILE if local else out
        return f"python -m rlrr_jax.predict --adapter {file} IMAGES..."
    if to == "transformers":
        return f'transformers: AutoModelForImageClassification.from_pretrained("{out}")'
    pool = ', pool_type="tok"' if to == "big_vision" else ""
    sizes = ", ".join(f"{name}={value}" for name, value in sizes.items())
    text = f"{to}, with pixels in [-1, 1]: ViT of num_classes={classes}, {sizes}{pool}"
    if early and not drops_exits(to, adapter):
        blocks = ", ".join(map(str, early))
        text += f"; head/exits are the heads after blocks {blocks}, which only rlrr_jax knows"
    if card["gelu"] == "exact":  # their code has the tanh form
        text += "; this model has the exact GELU: change nn.gelu(x) there to approximate=False"
    return text


def _timm_arguments(sizes):
    """Arguments of timm's ViT beside its sizes, of our attributes."""
    out = {}
    pool = sizes.get("pool", "token")
    if pool in ("avg", "map"):
        out |= {"global_pool": repr(pool), "fc_norm": bool(sizes.get("fc_norm"))}
    for ours, theirs in (("class_token",) * 2, ("pre_norm",) * 2, ("qk_norm",) * 2):
        out |= {theirs: sizes[ours]} if ours in sizes else {}
    if sizes.get("registers"):
        out |= {"reg_tokens": sizes["registers"], "no_embed_class": True}
    return out


def _resnet_advice(card, sizes, out):
    """How a ResNet is used with timm."""
    variant = card["model"]
    name = variant.replace("bit_", "resnetv2_") + "_bit" if variant.startswith("bit") else variant
    pixels = f"mean={sizes.get('mean', (0.5,) * 3)}, std={sizes.get('std', (0.5,) * 3)}"
    return (
        f'timm, with pixels of {pixels}: model = timm.create_model("{name}", num_classes='
        f'{len(card["classes"])}); model.load_state_dict(safetensors.torch.load_file("{out}"))'
    )


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="workdir with one run, a run's folder, or an adapter.safetensors")
    parser.add_argument("--to", required=True, help=", ".join(FORMATS))
    parser.add_argument("out", metavar="OUT", help="file to write; of hub and transformers a folder")
    parser.add_argument("--push", metavar="NAME", help="user/name on the Hub, for --to hub: uploads it")
    parser.add_argument("--weights", help="the backbone, if it is not where it was")
    parser.add_argument("--cache_dir", help="of downloaded weights; default ~/.cache/rlrr_jax")
    args = parser.parse_args()
    if args.push and args.to != "hub":
        raise UserError(f"--push uploads what --to hub writes, not {args.to}: add --to hub")
    path = adapters.find(args.run)
    adapter = adapters.read(path)
    difference = export(adapter, args.to, args.out, args.weights, args.cache_dir)
    acc = tables.percent(adapter.card["accuracy"].get("test_acc"))
    print(
        f"{args.out}: {adapter.card['method']} on {adapter.card['task']}"
        + f" (test accuracy {acc})" * bool(acc)
        + f", {_size(files.local(args.out)) / 1e6:.1f} MB; read back, its logits "
        f"differ by at most {difference:.1g}"
    )
    if drops_exits(args.to, adapter):
        print("note: early exits are left out; .npz files have those of methods other than met")
    if args.push:
        print(f"uploaded to {push(files.local(args.out), args.push, adapter.card)}")
    print(advice(args.to, adapter, f"hf:{args.push}" if args.push else args.out))


def _size(path):
    """Bytes of a file, or of those in a folder."""
    return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    one_sentence(main)
