"""Trained adapters: read, checked, put on their backbone, combined.

    backbone = adapters.backbone("runs/x/hearts/rlrr/seed0/adapter.safetensors")
    hearts = adapters.load("runs/x/hearts/rlrr/seed0/adapter.safetensors", backbone)
    digits = adapters.load("runs/x/digits/rlrr/seed0/adapter.safetensors", backbone)
    logits = hearts.logits(images)  # uint8 [B, h, w, 3]

An adapter is a trained tree with a card: what it belongs to and what it was trained on.
"""

import argparse
import contextlib
import copy
import functools
import json
import pathlib
import re
import urllib.parse
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import rlrr_jax
from rlrr_jax import files, hub, lookup, losses, methods, models, run_images, run_model, sides
from rlrr_jax.data import crops, resize, store
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.models import vit
from rlrr_jax.weights import names, preprocessing, reader, vit_layouts

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


class Backbone(NamedTuple):
    """Frozen weights that adapters share: their tree, the file's SHA-256, and how it was read."""

    frozen: Any
    sha256: str
    how: dict


class Tuned(NamedTuple):
    """A merged model: a plain one of flax, its tree, and the adapter's card."""

    model: Any
    params: Any
    card: dict

    def logits(self, images: Any) -> jax.Array:
        """Logits [B, classes] of images uint8 [B, h, w, 3], computed as the run evaluated.

        Raises UserError for other arrays: images in [0, 1] would be taken for black ones.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"images must be uint8 [B, h, w, 3], not {images.dtype} {list(images.shape)}: give "
                f"pixels from 0 to 255"
            )
        run = self.card["config"]
        crop_from = run["crop_from"] if run["crop"] == crops.SQUARE else None
        how = (image_size(self.card), crop_from), run["precision"]
        return _logits(self.model, *how)(self.params, images)


@functools.lru_cache(16)
def _logits(model, pixels, precision):
    @jax.jit
    def logits(params, images):
        with jax.default_matmul_precision(precision):
            return model.apply({"params": params}, resize.normalize(images, *pixels))

    return logits


def write(path: Any, adapter: Adapter) -> None:
    """Writes an adapter as safetensors, leaves named by their path, the card as JSON under `rlrr_jax`.

    One key: with several, the order in the file would be random.
    """
    flat = {k: np.asarray(v, order="C") for k, v in _flat(adapter.trainable).items()}
    metadata = {"rlrr_jax": json.dumps(adapter.card, sort_keys=True)}
    files.write(path, safetensors.numpy.save(flat, metadata=metadata))


def _flat(trained):
    """A trained tree by the names of files: head, and what a loss trained, beside the method's."""
    rest = {name: node for name, node in trained.items() if name != "adapter"}
    return flatten_dict({**trained["adapter"], **rest}, sep="/")


def _tree(flat):
    """The trained tree that `_flat` took apart."""
    tree = unflatten_dict(flat, sep="/")
    rest = {name: tree.pop(name) for name in ("head", "loss") if name in tree}
    return {**rest, "adapter": tree}


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


def finished(workdir: Any) -> list:
    """Paths of the adapters of finished runs below a folder, without those of a search."""
    found = [path for path in files.walk(workdir) if path.name == "adapter.safetensors"]
    searched = lambda path: "search" in path.relative_to(workdir).parts
    return [p for p in found if (p.parent / "result.json").exists() and not searched(p)]


def find(path: Any) -> Any:
    """The adapter of a file, of a run's folder, or of a workdir with one finished run.

    A repository `hf:user/name` is returned as it is. Raises UserError, naming the choices, if there are
    several or none.
    """
    if str(path).startswith(hub.PREFIX):
        return path
    path = files.local(path)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"there is no adapter {path}: give an adapter.safetensors of a finished run")
    found = finished(path)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"there is no finished run in {path}: give a workdir, a run's folder or an adapter"
        )
    runs = [str(p.parent.relative_to(path)) for p in found]
    raise UserError(f"{path} holds {len(found)} runs: add one of {', '.join(runs[:30])} to the path")


def read(path: Any) -> Adapter:
    """The `Adapter` in a file, or in a repository `hf:user/name` of the Hugging Face Hub.

    Raises UserError if it is missing, damaged, none of ours, of another version of its method, or if a
    name or shape is not what its method trains on its model.
    """
    if str(path).startswith(hub.PREFIX):
        path = hub.file(str(path).removeprefix(hub.PREFIX), "adapter.safetensors")
    path = files.local(path)
    if not path.is_file():
        raise UserError(f"there is no adapter {path}: give an adapter.safetensors of a finished run")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            card = _card(path, file.metadata() or {})
            slices = {key: file.get_slice(key) for key in file.keys()}
            kind = lambda x: {"F32": "float32"}.get(x.get_dtype(), x.get_dtype())
            found = {key: (tuple(x.get_shape()), kind(x)) for key, x in slices.items()}
            trains = any(key.startswith("loss/") for key in found)
            tree = _wanted(path, card, trains)
            wanted = {k: (v.shape, str(v.dtype)) for k, v in _flat(tree).items()}
            problems = reader.differences(found, wanted)
            flat = {} if problems else {key: file.get_tensor(key) for key in wanted}
    except UserError:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise UserError(
            f"{path} is no readable .safetensors file ({first_line(e)}): it may be truncated; copy or "
            f"export it again"
        ) from e
    problems += [f"{k} is not finite" for k, v in flat.items() if not np.isfinite(v).all()]
    if problems:
        raise UserError(
            f"{path} is no adapter of method {card['method']} on {card['config']['model']['variant']} "
            f"({problems[0]}): export it again"
        )
    return Adapter(_tree(flat), card)


def _card(path, metadata):
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


def _wanted(path, card, trains):
    """Shapes of the tree that the card's method, and its loss if that `trains`, make; checks a card."""
    try:
        _check_kinds(card)
        method = methods.get(card["method"], **_plain(card["method_kwargs"]))
        formula = methods.formula(card["method"])
        if card["formula"] != formula:
            raise ValueError(f"trained as {card['formula']!r}, this version computes {formula!r}")
        _check_run(card)
        shapes = models.shapes(_model(card), image_size(card))
        start = functools.partial(methods.start, method)
        if trains:
            options = losses.fixed(_plain(card["config"]["loss_kwargs"]))
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
    if given.get("resize") not in (None, *reader.RESIZES):
        raise ValueError("its config.pretrained.resize is none")
    own = config.get("own")
    paths = [config["data"].get("dir"), config["data"].get("cache_dir"), own and own.get("path")]
    paths += [config["pretrained"].get("cache_dir"), card.get("dataset")]
    if not all(isinstance(path, str | None) for path in paths) or not isinstance(own, dict):
        raise ValueError("one of its paths is no text")
    if not all(isinstance(x, _NUMBER) for x in card["accuracy"].values()):
        raise ValueError("its accuracies are no numbers")


def _check_run(card):
    """ValueError (or whatever a strange card raises) unless images can be brought to the model."""
    run = ConfigDict(card["config"])
    preprocessing.check(run.model.gelu or "exact", run.pretrained.mean, run.pretrained.std)
    if not isinstance(run.pretrained.name, str) or not isinstance(card["accuracy"], dict):
        raise ValueError("its backbone has no name, or its accuracies are none")
    if not card["classes"] or not all(isinstance(name, str) for name in card["classes"]):
        raise ValueError("its classes are no names")
    size, model = run_images.size_of(run), _model(card)
    longest = 1000 * getattr(model, "patch_size", 16)
    if _plain_size(size) != card["image_size"] or not 0 < max(sides.pair(size)) < longest:
        raise ValueError(f"its images have {sides.text(size)} pixels")
    models.check_size(model, size)
    if (run.crop and run.crop_from < run.image_size) or run.eval_batch_size < 1:
        raise ValueError("its images or batches are too small")
    with jax.default_matmul_precision(run.precision):
        pass


def _model(card):
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


def _plain_size(size):
    """A size as JSON has it: one side, or [height, width]."""
    return size if isinstance(size, int) else list(size)


def _subtree(name):
    """The `:subtree` of a name; those that the reader finds by itself are none."""
    subtree = names.split_subtree(name)[1].strip("/")
    return "" if f"{subtree}/" in vit_layouts.PREFIXES else subtree


def _how(card):
    """What besides the file decides about a frozen tree, plain values."""
    run, given = ConfigDict(card["config"]), card["config"]["pretrained"]
    how = {"subtree": _subtree(run.pretrained.name), "image_size": card["image_size"]}
    how["resize"] = given["resize"] or "linear"
    how["num_heads"] = getattr(_model(card), "num_heads", None)
    how |= {k: v for k in vit.PARTS if (v := run.model.get(k)) is not None}
    how |= {"depth": depth} if (depth := run.model.get("depth")) else {}
    how |= {"resize_patch": True} if given["resize_patch"] else {}
    return {**how, **{key: json.loads(json.dumps(given[key])) for key in ("grid", "mean", "std")}}


def _plain(kwargs):
    """Options read from JSON, where tuples became lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}


def method(adapter: Adapter) -> methods.Method:
    """The `methods.Method` of an adapter."""
    return methods.get(adapter.card["method"], **_plain(adapter.card["method_kwargs"]))


def model(adapter: Adapter) -> Any:
    """The flax model that an adapter's card describes."""
    return _model(adapter.card)


def backbone(
    adapter: Any, weights: str | None = None, cache_dir: str | None = None, fetch: bool = False
) -> Backbone:
    """The `Backbone` of an adapter (or of its file), by the name in its card or from a file.

    Args:
      adapter: an `Adapter` or its file.
      weights: name, path or address of the backbone; None is what the card says.
      cache_dir: folder of downloaded weights.
      fetch: whether what the card names may be downloaded, over https and with the card's SHA-256.
        A card may come from anybody: without this, what is not on this machine is named, not fetched.

    Raises UserError if the weights are not those it was trained on, or not there.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read(adapter)
    run, how = adapter.run, _how(adapter.card)
    try:
        if weights:
            path, sha256 = names.fetch(weights, cache_dir)
        else:
            path, sha256 = _named_by_card(adapter.card, cache_dir, fetch)
    except UserError as e:
        raise UserError(f"{e} (the adapter's backbone; --weights names another place of it)") from e
    if how["subtree"] and path.endswith(".npz"):
        path = f"{path}:{how['subtree']}"
    how["subtree"] = _subtree(path)
    model = models.build(run.model.variant, 1, **run_model.architecture(run))
    _check_backbone(adapter.card, sha256, how, path)
    return Backbone(run_model.load_weights(run, path, model), sha256, how)


def add_flags(parser: Any) -> None:
    """Adds the flags of a command that say where a backbone is, see `backbone`."""
    parser.add_argument("--weights", help="the backbone, if it is not where it was")
    parser.add_argument("--cache_dir", help="of downloaded weights; default ~/.cache/rlrr_jax")
    text = "downloads the backbone that the adapter names, if it is not on this machine"
    parser.add_argument("--fetch", action="store_true", help=text)
    text = "code that an adapter needs, such as mygain:method; read it before"
    parser.add_argument("--import", metavar="PATH", action=_Allow, help=text)


class _Allow(argparse.Action):
    """Lets the path of a flag be imported, before anything is read that names it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        lookup.allow(values)


def given(args: Any) -> dict[str, Any]:
    """The arguments of `backbone` that the flags of `add_flags` gave."""
    return {key: getattr(args, key) for key in ("weights", "cache_dir", "fetch")}


def _named_by_card(card: dict, cache_dir: str | None, fetch: bool) -> tuple[str, str]:
    """Path and SHA-256 of the weights that a card names, see `names.fetch`."""
    name, wanted = card["config"]["pretrained"]["name"], str(card["backbone_sha256"])
    where = names.address(names.split_subtree(name)[0])
    remote = "://" in where and not where.startswith("https://")
    with contextlib.suppress(hub.NotFetched):  # where the run had it: nothing is written there
        if cache_dir is None and (theirs := card["config"]["pretrained"].get("cache_dir")):
            return names.fetch(name, str(theirs), wanted, fetch=False)
    try:
        return names.fetch(name, cache_dir, wanted, fetch and not remote)
    except hub.NotFetched as e:
        way = "copy it to this machine" if remote else "add --fetch to download it from there"
        raise UserError(
            f"the adapter's card names {where} (SHA-256 {wanted[:12]}...), which is not on this "
            f"machine: {way}"
        ) from e


def _check_backbone(card, sha256, how, what):
    wanted = str(card["backbone_sha256"])
    if wanted != sha256:
        raise UserError(
            f"{what} (SHA-256 {sha256[:12]}...) is not the backbone of this adapter of {card['task']}, "
            f"which was trained on {card['backbone']} (SHA-256 {wanted[:12]}...): give that file"
        )
    mine = _how(card)
    for key in {**how, **mine}:
        if how.get(key) != mine.get(key):
            raise UserError(
                f"{what} was read with {key}={how.get(key)}, this adapter of {card['task']} was "
                f"trained on one with {key}={mine.get(key)}: read it for that adapter"
            )


def images(adapter: Adapter, split: str) -> tuple[Any, np.ndarray]:
    """Images uint8 [N, h, w, 3] and labels [N] of a split, as the run of an adapter had them.

    Raises UserError if they are not where they were, or others by now.
    """
    run = adapter.run
    found, wanted = run_images.locate(run), adapter.card.get("dataset")
    if wanted != found.dataset:
        raise UserError(
            f"the images of {run.task} were {wanted}, and are {found.dataset} now: put back what the "
            f"run had, or train again"
        )
    pixels, cache = run_images.pixels(run), run.data.cache_dir
    cache = cache if store.is_ours(cache) else None  # a card opens no folder for writing
    return store.load_split(run_images.task_of(run), split, pixels, found, cache)


def fits(adapter: Adapter, on: Backbone) -> bool:
    """Whether a `Backbone` is an adapter's."""
    return adapter.card["backbone_sha256"] == on.sha256 and _how(adapter.card) == on.how


def load(
    adapter: Any,
    on: Backbone | None = None,
    weights: str | None = None,
    cache_dir: str | None = None,
    fetch: bool = False,
) -> Tuned:
    """Puts an adapter (or its file) on its backbone: a `Tuned` model.

    Args:
      on: a `Backbone` that is there already; None reads it.
      weights, cache_dir, fetch: see `backbone`.

    Raises UserError if the backbone is another one, or for a bad file (see `read`).
    """
    adapter = adapter if isinstance(adapter, Adapter) else read(adapter)
    on = on or backbone(adapter, weights, cache_dir, fetch)
    _check_backbone(adapter.card, on.sha256, on.how, "this backbone")
    return Tuned(_model(adapter.card), merged(adapter, on.frozen), adapter.card)


def merged(adapter: Adapter, frozen: Any) -> Any:
    """The plain tree that an adapter makes of its backbone's frozen one."""
    return jax.jit(functools.partial(methods.merge, method(adapter)))(frozen, adapter.trainable)


def combine(
    adapters: list[Adapter], weights: list[float] | None = None, way: str = "scales", head: int = 0
) -> Adapter:
    """One adapter from several of RLRR on the same backbone (Dong et al., 2024, supplement H).

    Args:
      adapters: `Adapter`s of method `rlrr`, with the same options.
      weights: a weight of each; None shares 1 equally. LayerNorms and the patch embedding, which have
        no product, get `1 + sum_i w_i (scale_i - 1)`, and every shift `sum_i w_i shift_i`.
      way: "scales" multiplies the sums, `(sum_i w_i in_i) (sum_i w_i out_i)`; "products" sums the
        products, `sum_i w_i in_i out_i`, an adapter of as many times the rank. The paper prints the
        second without weights, which is `weights=[1, 1, ...]` but for shifts.
      head: number of the adapter whose head and classes are taken.

    Returns:
      An `Adapter`.

    Raises UserError if they do not fit together.
    """
    weights = [1 / max(len(adapters), 1)] * len(adapters) if weights is None else list(weights)
    options = _check_combine(adapters, weights, way)
    if not -len(adapters) <= head < len(adapters):
        raise UserError(f"there is no adapter {head} of {len(adapters)} to take the head of")
    first = adapters[0].card
    rank = options["rank"] * (len(adapters) if way == "products" else 1)
    trees = [_flat(a.trainable) for a in adapters]
    of_head = lambda key: key.startswith(("head/", "loss/"))
    out = {key: value for key, value in trees[head].items() if of_head(key)}
    for key in (key for key in trees[0] if not of_head(key)):
        parts, name = [tree[key] for tree in trees], key.rsplit("/", 1)[-1]
        if name == "scale":
            out[key] = 1 + sum(w * (x - 1) for w, x in zip(weights, parts))
        elif way == "products" and name in ("scale_in", "scale_out"):
            factors = weights if name == "scale_in" else [1] * len(parts)
            out[key] = _beside(name, [w * x for w, x in zip(factors, parts)], options["rank"])
        else:
            out[key] = sum(w * x for w, x in zip(weights, parts))
    taken = adapters[head].card
    config = {**taken["config"], "method_kwargs": {**first["method_kwargs"], "rank": rank}}
    made = [[w, a.card["task"], a.card["accuracy"]] for w, a in zip(weights, adapters)]
    card = {**taken, "method_kwargs": config["method_kwargs"], "config": config}
    card |= {"combined": {"way": way, "of": made}, "accuracy": {}}
    out = {key: np.asarray(value, np.float32) for key, value in out.items()}
    return Adapter(_tree(out), card)


def _check_combine(adapters, weights, way):
    """UserError unless adapters combine; returns the options that they share."""
    if way not in ("scales", "products"):
        raise UserError(f"adapters are combined by way='scales' or 'products', not {way!r}")
    if len(weights) != len(adapters):
        raise UserError(f"{len(adapters)} adapters need as many weights, not {len(weights)}")
    if not adapters or not np.isfinite(weights).all():
        raise UserError(f"at least one adapter is combined, with finite weights, not {weights}")
    first = adapters[0].card
    same = lambda card: {k: card[k] for k in ("backbone_sha256", "method_kwargs", "gelu")} | _how(card)
    for other in (a.card for a in adapters):
        if other["method"] != "rlrr":
            raise UserError(f"only adapters of rlrr are combined, not of {other['method']}")
        for key, value in same(first).items():
            if same(other)[key] != value:
                text = f"({value}, {same(other)[key]})"
                raise UserError(f"adapters with another {key} {text} do not combine")
    options = {**methods.options("rlrr"), **_plain(first["method_kwargs"])}
    if options["sides"] != "both":
        raise UserError(
            f"adapters of rlrr with sides={options['sides']} do not combine: they have no product"
        )
    return options


def _beside(name, parts, rank):
    """Scales as those of one adapter of higher rank: [L, in..., r] or [L, r, out...]."""
    axis = -1 if name == "scale_in" else 1
    return np.stack(parts, axis) if rank == 1 else np.concatenate(parts, axis)
