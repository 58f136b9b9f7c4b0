"""The card of an adapter, what a trained tree belongs to; one from outside is checked here."""

import copy
import functools
import json
import math
import pathlib
import re
import urllib.parse
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import rlrr_jax
from rlrr_jax import files, hub, lookup, losses, methods, metrics, models, run_images, run_model, sides
from rlrr_jax.data import crops
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.models import vit
from rlrr_jax.weights import names, positions, values, vit_layouts

FORMAT = 1  # of the card


_KEYS = ("method", "method_kwargs", "formula", "backbone", "backbone_sha256", "model", "gelu")
_KEYS += ("image_size", "task", "classes", "accuracy", "config")


class Adapter(NamedTuple):
    """A trained tree and its card, plain values:

    `format`, `method`, `method_kwargs`, `formula`, `backbone` (name), `backbone_sha256`, `model`,
    `gelu`, `image_size`, `value_range` (of the pixels the model takes), `task`, `classes` (their
    names), `dataset`, `accuracy` (fractions), `versions`, and the whole `config` of the run.
    """

    trainable: Any
    card: dict

    @property
    def run(self) -> ConfigDict:
        """The configuration that trained it."""
        return ConfigDict(self.card["config"])


def card(run: ConfigDict, marks: dict, classes: list[str], accuracy: dict) -> dict:
    """The card of an adapter that a run trained.

    Args:
      marks: `backbone_sha256` and `dataset`.
      classes: their names.
      accuracy: name -> fraction or None.
    """
    return {
        "format": FORMAT,
        "method": run.method,
        "method_kwargs": run.method_kwargs.to_dict(),
        "formula": methods.formula(run.method),
        "backbone": run.pretrained.name,
        "model": run.model.variant,
        "gelu": run.model.gelu,
        "image_size": _plain_size(run_images.size_of(run)),
        "value_range": [-1, 1],
        "task": run.task,
        "classes": list(classes),
        "accuracy": accuracy,
        "versions": {m.__name__: m.__version__ for m in (rlrr_jax, jax, flax)},
        "config": {key: value for key, value in run.to_dict().items() if key != "head_classes"},
        **marks,
    }


def portable(adapter: Adapter) -> Adapter:
    """An adapter whose card names no folder, user or secret of this machine: what is exported."""
    config = copy.deepcopy(adapter.card["config"])
    path = config.get("own", {}).get("path")
    if path and not hub.is_name(path.removeprefix(hub.PREFIX)):
        prefix = re.match(r"(hf|tfds):|", path)[0]  # type: ignore[index]
        config["own"]["path"] = prefix + _last_part(path.removeprefix(prefix))
    for group, key in (("data", "dir"), ("data", "cache_dir"), ("pretrained", "cache_dir")):
        config[group][key] = None
    name = _portable_name(config["pretrained"]["name"])
    config["pretrained"]["name"] = name
    backbone = _portable_name(str(adapter.card["backbone"]))
    return adapter._replace(card={**adapter.card, "config": config, "backbone": backbone})


def _portable_name(name: str) -> str:
    """A name of weights: of a local file without its folder, of an address without what signs it."""
    file, subtree = names.split_subtree(name)
    if "://" in file:
        parts = urllib.parse.urlsplit(file)
        secret = re.search(r"(?i)sign|token|key|cred|password|secret", parts.query)
        host = parts.netloc.rpartition("@")[2]
        file = parts._replace(netloc=host, query="" if secret else parts.query).geturl()
    elif file != "bundled" and file not in names.ALIASES and not file.startswith(hub.PREFIX):
        public = file.startswith(names.FOLDERS) and not files.local(file).exists()
        file = file if public else _last_part(file)
    return f"{file}:{subtree}" if subtree else file


def _last_part(path: str) -> str:
    return pathlib.PurePath(path).name or "images"


def parsed(path: Any, metadata: dict[str, str]) -> dict[str, Any]:
    """The card in the header of a file; UserError for none, another format, or one that lacks keys."""
    try:
        card = json.loads(metadata.get("rlrr_jax", ""))
        if not isinstance(card, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} was not written by rlrr_jax: it has no card in its header") from e
    if card.get("format") != FORMAT:
        raise UserError(
            f"the card of {path} has format {card.get('format')}, this version of rlrr_jax reads "
            f"{FORMAT}: use the version that wrote it, or export it again"
        )
    if missing := [key for key in _KEYS if key not in card]:
        raise UserError(f"the card of {path} lacks {', '.join(missing)}: export it again")
    return card


def trained_shapes(path: Any, card: dict[str, Any], trains: bool) -> dict[str, Any]:
    """Shapes of the tree that the card's method, and its loss if that `trains`, make; checks a card."""
    try:
        _check_kinds(card)
        method = methods.get(card["method"], **plain(card["method_kwargs"]))
        formula = methods.formula(card["method"])
        if card["formula"] != formula:
            raise ValueError(f"trained as {card['formula']!r}, this version computes {formula!r}")
        _check_run(card)
        shapes = models.shapes(model_of(card), image_size(card))
        start = functools.partial(methods.start, method)
        if trains:
            options = losses.fixed(plain(card["config"]["loss_kwargs"]))
            start = functools.partial(losses.start, losses.get(card["config"]["loss"], options), method)
        return jax.eval_shape(start, jax.random.key(0), shapes)
    except lookup.NotAllowed:  # which says how it is let run
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(
            f"{path} is of another version of method {card['method']} ({first_line(e)}): use the "
            f"version of rlrr_jax that wrote it"
        ) from e


_NUMBER = (int, float, type(None))


_KINDS = {  # of what a card says; each name is there
    **dict.fromkeys(("method", "formula", "backbone", "backbone_sha256", "model", "task"), str),
    **dict.fromkeys(("method_kwargs", "accuracy", "config", "versions"), dict),
    "classes": list,
}


_GROUPS = ("data", "pretrained", "model", "method_kwargs")  # of the configuration


_PLAIN = {"protocol": str, "seed": int, "eval_batch_size": int, "precision": str, "dtype": str}


def _check_kinds(card):
    """ValueError unless a card's values are of the kinds that runs write."""
    for name, kind in _KINDS.items():
        if not isinstance(card.get(name), kind):
            raise ValueError(f"its {name} is no {kind.__name__}")
    config = card["config"]
    for name, kind in {**dict.fromkeys(_GROUPS, dict), **_PLAIN}.items():
        if not isinstance(config.get(name), kind) or isinstance(config[name], bool):
            raise ValueError(f"its config.{name} is no {kind.__name__}")
    given = config["pretrained"]
    if missing := {"name", "grid", "mean", "std", "resize", "resize_patch"} - given.keys():
        raise ValueError(f"its config.pretrained has no {min(missing)}")
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x < 1 << 12
    grid = given["grid"]
    if grid is not None and not (isinstance(grid, list) and len(grid) == 2 and all(map(whole, grid))):
        raise ValueError(f"its config.pretrained.grid {grid!r} is no two numbers of patches")
    if given.get("resize") not in (None, *positions.RESIZES):
        raise ValueError("its config.pretrained.resize is none")
    own = config.get("own")
    paths = [config["data"].get("dir"), config["data"].get("cache_dir"), own and own.get("path")]
    paths += [config["pretrained"].get("cache_dir"), card.get("dataset")]
    if not all(isinstance(path, str | None) for path in paths) or not isinstance(own, dict):
        raise ValueError("one of its paths is no text")
    if not all(isinstance(x, _NUMBER) for x in card["accuracy"].values()):
        raise ValueError("its accuracies are no numbers")
    _check_answers(card)


def _check_answers(card):
    """ValueError unless what a card says of answers can be used."""
    if not isinstance(card.get("answers") or {}, dict):
        raise ValueError("its answers are no object")
    said = answers(card)
    if said["kind"] not in metrics.KINDS:
        raise ValueError(f"its labels are of the kind {said['kind']!r}")
    number = lambda x: isinstance(x, float | int) and not isinstance(x, bool) and 0 <= x < math.inf
    given = said["thresholds"]
    several = isinstance(given, list) and len(given) == len(card["classes"])
    if not (several and all(map(number, given))) and given != 0.5:
        raise ValueError("its thresholds are not one number of each label")
    if not number(said["temperature"]):
        raise ValueError("its temperature is no number")


def _check_run(card):
    """ValueError (or whatever a strange card raises) unless images can be brought to the model."""
    run = ConfigDict(card["config"])
    values.check(run.model.gelu or "exact", run.pretrained.mean, run.pretrained.std)
    if not isinstance(run.pretrained.name, str) or not isinstance(card["accuracy"], dict):
        raise ValueError("its backbone has no name, or its accuracies are none")
    if not card["classes"] or not all(isinstance(name, str) for name in card["classes"]):
        raise ValueError("its classes are no names")
    size, model = run_images.size_of(run), model_of(card)
    longest = 1000 * getattr(model, "patch_size", 16)
    if _plain_size(size) != card["image_size"] or not 0 < max(sides.pair(size)) < longest:
        raise ValueError(f"its images have {sides.text(size)} pixels")
    models.check_size(model, size)
    if (run.crop and run.crop_from < run.image_size) or run.eval_batch_size < 1:
        raise ValueError("its images or batches are too small")
    with jax.default_matmul_precision(run.precision):
        pass


def model_of(card: dict[str, Any]) -> Any:
    """The flax model that a card describes."""
    run = ConfigDict(card["config"])
    return models.build(
        run.model.variant,
        len(card["classes"]),
        **run_model.architecture(run),
        gelu=run.model.gelu,
        unroll=models.default_unroll(run.model.variant),
        dtype=jnp.dtype(run.dtype),
    )


def image_size(card: dict) -> sides.Size:
    """Size of the images that the model of a card takes."""
    return run_images.size_of(ConfigDict(card["config"]))


def pixels(card: dict) -> tuple[sides.Size, int | None]:
    """`image_size`, and the side of what its middle is cut from on the device, or None."""
    run = card["config"]
    return image_size(card), run["crop_from"] if run["crop"] == crops.SQUARE else None


def _plain_size(size):
    """A size as JSON has it: one side, or [height, width]."""
    return size if isinstance(size, int) else list(size)


def subtree(name: str) -> str:
    """The `:subtree` of a name; those that the reader finds by itself are none."""
    subtree = names.split_subtree(name)[1].strip("/")
    return "" if f"{subtree}/" in vit_layouts.PREFIXES else subtree


def how(card: dict[str, Any]) -> dict[str, Any]:
    """What besides the file decides about a frozen tree, plain values."""
    run, given = ConfigDict(card["config"]), card["config"]["pretrained"]
    how = {"subtree": subtree(run.pretrained.name), "image_size": card["image_size"]}
    how["resize"] = given["resize"] or "linear"
    how["num_heads"] = getattr(model_of(card), "num_heads", None)
    how |= {k: v for k in vit.PARTS if (v := run.model.get(k)) is not None}
    how |= {"depth": depth} if (depth := run.model.get("depth")) else {}
    how |= {"resize_patch": True} if given["resize_patch"] else {}
    return {**how, **{key: json.loads(json.dumps(given[key])) for key in ("grid", "mean", "std")}}


def answers(card: dict[str, Any]) -> dict[str, Any]:
    """How a model's outputs are read: `kind` of its labels, see `metrics`, `temperature`, `thresholds`.

    The temperature is in the head already. Thresholds are of each label; 0.5 where none were chosen.
    """
    said = card.get("answers") or {}
    return {"kind": "class", "temperature": 1.0, "thresholds": 0.5, **said}


def plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options read from JSON, where tuples became lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}


def method(adapter: Adapter) -> methods.Method:
    """The `methods.Method` of an adapter."""
    return methods.get(adapter.card["method"], **plain(adapter.card["method_kwargs"]))


def model(adapter: Adapter) -> Any:
    """The flax model that an adapter's card describes."""
    return model_of(adapter.card)
