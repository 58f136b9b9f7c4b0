"""A tuned model in the form others use: `python -m rlrr_jax.export RUN --to timm model.safetensors`.

Formats: `big_vision` (.npz, numbered blocks), `vit_jax` (.npz, the layout of 2020), `timm`
(.safetensors, its state dict), `adapter` (.safetensors, the trained values alone). All but the adapter
are the merged ViT in float32, a plain one; every file is read back and its logits compared before the
command says that it is done.
"""

import io
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlrr_jax import adapters, config, files, models
from rlrr_jax.errors import Parser, UserError, one_sentence, unknown
from rlrr_jax.results import tables
from rlrr_jax.weights import reader, vit_layouts

FORMATS = {
    "big_vision": (".npz", vit_layouts.to_big_vision),
    "vit_jax": (".npz", vit_layouts.to_vit_jax),
    "timm": (".safetensors", vit_layouts.to_timm),
    "adapter": (".safetensors", None),
}
TOLERANCE = 1e-4  # of logits; a file that differs more is not kept


def find_adapter(path: Any) -> Any:
    """The adapter of a file, of a run's folder, or of a workdir with one finished run.

    Raises UserError, naming the choices, if there are several or none.
    """
    path = files.local(path)
    if path.is_file():
        return path
    found = adapters.finished(path)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"there is no finished run in {path}: give a workdir, a run's folder or an adapter"
        )
    names = [str(p.parent.relative_to(path)) for p in found]
    raise UserError(f"{path} holds {len(found)} runs: add one of {', '.join(names[:30])} to the path")


def export(
    adapter: Any, to: str, out: Any, weights: str | None = None, cache_dir: str | None = None
) -> float:
    """Writes an adapter, or the ViT it makes, to a file and reads it back.

    Args:
      adapter: an `adapters.Adapter`.
      to: name of a format, see `FORMATS`.
      out: path of the file; its ending must be the format's.
      weights, cache_dir: see `adapters.backbone`.

    Returns:
      The largest difference between the logits of the model and of the file.

    Raises UserError for a wrong ending, a backbone that is not the adapter's, or a file that differs.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    ending, layout = FORMATS[to]
    if not str(out).endswith(ending) or files.local(out).name == ending:
        raise UserError(f"{to} files end in {ending}: {out} does not")
    out = files.local(out).absolute()  # no public name
    out.parent.mkdir(parents=True, exist_ok=True)
    backbone = adapters.backbone(adapter, weights, cache_dir)
    tuned = adapters.load(adapter, backbone)
    special = files.is_special(out)  # whose folder may be /dev
    target = pathlib.Path(files.through(out))  # a link stays
    beside = pathlib.Path(tempfile.gettempdir(), out.name) if special else target
    part = pathlib.Path(files.temporary(beside))
    try:
        if to == "adapter":
            adapters.write(part, adapter)
            again = adapters.load(part, backbone)
        else:
            write(part, layout(tuned.params), card(adapter))
            again = tuned._replace(params=read(part, tuned))
        difference = _same_logits(tuned, again, out)
        if special:
            files.write(out, part.read_bytes())
        else:
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return difference


def _same_logits(tuned, again, out):
    """The largest difference between logits; UserError if it is too large."""
    difference = compare(tuned, again)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits of {out} would differ by {difference:.1g} from the model's: it was not "
            f"kept; please report this"
        )
    return difference


def card(adapter: Any) -> dict:
    """What goes into the header of a timm file: the adapter's card, its pixels and its heads."""
    model = adapters.model(adapter)
    heads = {"num_heads": model.num_heads, "norm_eps": model.norm_eps}
    return {**adapter.card, "mean": [0.5] * 3, "std": [0.5] * 3, **heads}


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
    return reader.load(path, model=tuned.model, image_size=tuned.card["image_size"], head=True)


def compare(one: Any, other: Any, number: int = 8) -> float:
    """The largest difference of the float32 logits of two `Tuned` models, on noise of several sizes."""
    size = one.card["image_size"]
    keys = jax.random.split(jax.random.key(0))
    fine = jax.random.uniform(keys[0], (number, size, size, 3), minval=-1.0)
    coarse = jax.random.uniform(keys[1], (number, 4, 4, 3), minval=-1.0)
    images = jnp.concatenate([fine, jax.image.resize(coarse, fine.shape, "linear")])
    model = one.model.clone(dtype=jnp.float32)

    @jax.jit
    def logits(params):
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, images)

    return float(jnp.abs(logits(one.params) - logits(other.params)).max())


def advice(to: str, adapter: Any, out: Any) -> str:
    """How the file is used elsewhere."""
    card, classes = adapter.card, len(adapter.card["classes"])
    sizes = {**models.sizes(card["model"]), **config.architecture(adapter.run)}
    eps = sizes.pop("norm_eps", 1e-6)
    if to == "timm":
        ratio = sizes["mlp_dim"] / sizes["width"]
        act = ', act_layer="gelu_tanh"' if card["gelu"] == "tanh" else ""
        act += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps:g})" if eps != 1e-6 else ""
        return (
            f"timm, with pixels in [-1, 1] (mean = std = 0.5): model = timm.models.vision_transformer."
            f"VisionTransformer(img_size={card['image_size']}, patch_size={sizes['patch_size']}, "
            f"num_classes={classes}, embed_dim={sizes['width']}, depth={sizes['depth']}, "
            f"num_heads={sizes['num_heads']}, mlp_ratio={ratio:g}{act}); "
            f'model.load_state_dict(safetensors.torch.load_file("{out}"))'
        )
    if to == "adapter":
        return f"python -m rlrr_jax.predict --adapter {out} IMAGES..."
    pool = ', pool_type="tok"' if to == "big_vision" else ""
    sizes = ", ".join(f"{name}={value}" for name, value in sizes.items())
    text = f"{to}, with pixels in [-1, 1]: ViT of num_classes={classes}, {sizes}{pool}"
    if card["gelu"] == "exact":  # their code has the tanh form
        text += "; this model has the exact GELU: change nn.gelu(x) there to approximate=False"
    return text


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="workdir with one run, a run's folder, or an adapter.safetensors")
    parser.add_argument("--to", required=True, help=", ".join(FORMATS))
    parser.add_argument("out", metavar="OUT", help="file to write")
    parser.add_argument("--weights", help="the backbone, if it is not where it was")
    parser.add_argument("--cache_dir", help="of downloaded weights; default ~/.cache/rlrr_jax")
    args = parser.parse_args()
    path = find_adapter(args.run)
    adapter = adapters.read(path)
    difference = export(adapter, args.to, args.out, args.weights, args.cache_dir)
    acc = tables.percent(adapter.card["accuracy"].get("test_acc"))
    print(
        f"{args.out}: {adapter.card['method']} on {adapter.card['task']}"
        + f" (test accuracy {acc})" * bool(acc)
        + f", {files.local(args.out).stat().st_size / 1e6:.1f} MB; read back, its logits "
        f"differ by at most {difference:.1g}"
    )
    print(advice(args.to, adapter, args.out))


if __name__ == "__main__":
    one_sentence(main)
