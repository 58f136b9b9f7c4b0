"""Trained adapters: read, checked, put on their backbone, combined.

    backbone = adapters.backbone("runs/x/hearts/rlrr/seed0/adapter.safetensors")
    hearts = adapters.load("runs/x/hearts/rlrr/seed0/adapter.safetensors", backbone)
    digits = adapters.load("runs/x/digits/rlrr/seed0/adapter.safetensors", backbone)
    logits = hearts.logits(images)  # uint8 [B, h, w, 3]

An adapter is a trained tree with a card: what it belongs to and what it was trained on.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax import cards, evaluate, files, hub, lookup, methods, models, run_images, run_model
from rlrr_jax.cards import Adapter
from rlrr_jax.data import cache, resize, store
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.weights import names, reader


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
        how = cards.pixels(self.card), self.card["config"]["precision"]
        return _logits(self.model, *how)(self.params, images)

    def every(
        self, images: Any, size: int, done: Callable[[int], Any] = lambda number: None
    ) -> np.ndarray:
        """Logits [N, classes] of many images, in batches of one shape.

        Args:
          images: uint8 [N, h, w, 3], of which slices are read.
          size: number of images in a batch.
          done: function called after each batch with its number of images.
        """
        found, size = [], min(size, len(images))
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            found.append(np.asarray(self.logits(evaluate.pad(batch, size)))[: len(batch)])
            done(len(batch))
        return np.concatenate(found)


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
    flat = {k: np.asarray(v, order="C") for k, v in flattened(adapter.trainable).items()}
    metadata = {"rlrr_jax": json.dumps(adapter.card, sort_keys=True)}
    files.write(path, safetensors.numpy.save(flat, metadata=metadata))


def flattened(trained: Any) -> dict[str, Any]:
    """A trained tree by the names of files: head, and what a loss trained, beside the method's."""
    rest = {name: node for name, node in trained.items() if name != "adapter"}
    return flatten_dict({**trained["adapter"], **rest}, sep="/")


def unflattened(flat: dict[str, Any]) -> dict[str, Any]:
    """The trained tree that `flattened` took apart."""
    tree = unflatten_dict(flat, sep="/")
    rest = {name: tree.pop(name) for name in ("head", "loss") if name in tree}
    return {**rest, "adapter": tree}


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
            card = cards.parsed(path, file.metadata() or {})
            slices = {key: file.get_slice(key) for key in file.keys()}
            kind = lambda x: {"F32": "float32"}.get(x.get_dtype(), x.get_dtype())
            found = {key: (tuple(x.get_shape()), kind(x)) for key, x in slices.items()}
            trains = any(key.startswith("loss/") for key in found)
            tree = cards.trained_shapes(path, card, trains)
            wanted = {k: (v.shape, str(v.dtype)) for k, v in flattened(tree).items()}
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
    return Adapter(unflattened(flat), card)


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
    run, how = adapter.run, cards.how(adapter.card)
    path, sha256 = located(adapter, weights, cache_dir, fetch)
    if how["subtree"] and path.endswith(".npz"):
        path = f"{path}:{how['subtree']}"
    how["subtree"] = cards.subtree(path)
    model = models.build(run.model.variant, 1, **run_model.architecture(run))
    _check_backbone(adapter.card, sha256, how, path)
    return Backbone(run_model.load_weights(run, path, model), sha256, how)


def located(
    adapter: Adapter, weights: str | None = None, cache_dir: str | None = None, fetch: bool = False
) -> tuple[str, str]:
    """Path and SHA-256 of an adapter's backbone; arguments and errors are those of `backbone`."""
    try:
        if weights:
            return names.fetch(weights, cache_dir)
        return _named_by_card(adapter.card, cache_dir, fetch)
    except UserError as e:
        raise UserError(f"{e} (the adapter's backbone; --weights names another place of it)") from e


def add_flags(parser: Any) -> None:
    """Adds the flags of a command that say where a backbone is, see `backbone`."""
    parser.add_argument("--weights", help="the backbone, if it is not where it was")
    parser.add_argument("--cache_dir", help="of downloaded weights; default ~/.cache/rlrr_jax")
    text = "downloads the backbone that the adapter names, if it is not on this machine"
    parser.add_argument("--fetch", action="store_true", help=text)
    text = "code that an adapter needs, such as mygain:method; read it before. Or images, hf:user/name"
    parser.add_argument("--import", metavar="PATH", type=lookup.allow, help=text)


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
    mine = cards.how(card)
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
    pixels, folder = run_images.pixels(run), run.data.cache_dir
    folder = folder if cache.is_ours(folder) else None  # a card opens no folder for writing
    return store.load_split(run_images.task_of(run), split, pixels, found, folder)


def fits(adapter: Adapter, on: Backbone) -> bool:
    """Whether a `Backbone` is an adapter's."""
    return adapter.card["backbone_sha256"] == on.sha256 and cards.how(adapter.card) == on.how


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
    return Tuned(cards.model_of(adapter.card), merged(adapter, on.frozen), adapter.card)


def merged(adapter: Adapter, frozen: Any) -> Any:
    """The plain tree that an adapter makes of its backbone's frozen one."""
    return jax.jit(functools.partial(methods.merge, cards.method(adapter)))(frozen, adapter.trainable)


def predict_mixed(given: dict[str, Any], images: np.ndarray, names: Any, **options: Any) -> list:
    """Shares of each image of a batch [B], by the adapter that it names, see `mixed.predict`."""
    from rlrr_jax import mixed  # which loads adapters by this module

    return mixed.predict(given, images, names, **options)
