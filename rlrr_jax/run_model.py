"""The model and the weights of a run: what a card says of them, and how they are built and read."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rlrr_jax import blockwise, checks, losses, methods, models, sides
from rlrr_jax.errors import UserError
from rlrr_jax.models import matmul, vit
from rlrr_jax.run_images import size_of, task_of
from rlrr_jax.sides import Size
from rlrr_jax.weights import preprocessing, reader, vit_layouts


def architecture(run: ConfigDict) -> dict[str, Any]:
    """Attributes in which a run's model differs from its variant, see `follow`."""
    keys = ("num_heads", "norm_eps", *vit.PARTS, *vit.CHOSEN)
    said = {key: run.model.get(key) for key in keys}
    said["block"] = said["block"] or methods.get(run.method).DEFAULTS.get("block")
    if "mean" in models.attributes(run.model.variant):  # which does not fold them
        said |= {key: run.pretrained[key] and tuple(run.pretrained[key]) for key in ("mean", "std")}
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    return {key: plain(value) for key, value in said.items() if value is not None}


def build_model(run: ConfigDict) -> Any:
    """The flax model of a run."""
    known = models.attributes(run.model.variant)
    how = dict(drop_path_mode=run.drop_path_mode, remat=bool(run.model.remat))
    return models.build(
        run.model.variant,
        task_of(run).classes,
        **architecture(run),
        **{key: value for key, value in how.items() if key in known},
        gelu=run.model.gelu,  # None until `follow`, where only shapes matter
        attention=None if run.model.attention == "xla" else run.model.attention,  # "xla" is anyone's
        unroll=run.model.unroll,
        dtype=jax.numpy.dtype(run.dtype),
    )


def load_weights(run: ConfigDict, path: str, model: Any, note: Any = None) -> dict:
    """The frozen tree of a run.

    Args:
      run: the configuration.
      path: where its weights are.
      model: the flax model to fill.
      note: function called with a sentence about what was passed over.
    """
    given = run.pretrained
    resize, whole = given.resize or "linear", None
    if run.model.depth is not None:
        whole = models.sizes(run.model.variant)["depth"]
    how = reader.How(given.grid, given.mean, given.std, resize, given.resize_patch, whole)
    return reader.load(path, model=model, image_size=size_of(run), how=how, note=note)


def check_contracts(run: ConfigDict) -> tuple[str, ...]:
    """Checks a run's method and loss on its model, as far as that is known: again after `follow`.

    Returns the names of the values that the loss returns. Raises UserError, see `methods.check` and
    `losses.check_contract`.
    """
    sizes = {key: value for key, value in architecture(run).items() if key not in ("mean", "std")}
    build = lambda classes: models.build(run.model.variant, classes, **sizes)
    options = [json.dumps(x.to_dict(), sort_keys=True) for x in (run.method_kwargs, run.loss_kwargs)]
    method = _Chosen(run.method, methods.find(run.method), options[0])
    loss, size, task = losses.find(run.loss), size_of(run), task_of(run)
    _check_method(method, build(2), size)
    if blockwise.asked(run):
        blockwise.check(_method(method), loss, models.shapes(build(2), size))
    ours = loss.function is losses.cross_entropy  # which does alike for any number of classes
    classes, kind = (2, "class") if ours else (task.classes, task.kind)
    return _check_loss(_Chosen(run.loss, loss, options[1]), method, build(classes), size, kind)


class _Chosen(NamedTuple):
    """A method or a loss with its options, in JSON; one that was edited in a notebook is another."""

    name: str
    function: Any
    options: str

    @property
    def given(self) -> dict:
        options = json.loads(self.options).items()
        return {key: tuple(x) if isinstance(x, list) else x for key, x in options}


def _method(chosen: _Chosen) -> methods.Method:
    return methods.get(chosen.name, **chosen.given)


@functools.lru_cache(256)
def _check_method(method: _Chosen, model: Any, size: Size) -> None:
    methods.check(method.name, _method(method), models.shapes(model, size))


@functools.lru_cache(256)
def _check_loss(loss: _Chosen, method: _Chosen, model: Any, size: Size, kind: str) -> tuple:
    net = model, _method(method), models.shapes(model, size)
    return losses.check_contract(loss.name, loss.given, net, sides.pair(size), kind)


def follow(run: ConfigDict, path: str) -> list[str]:
    """Fills in what a run takes from the card of its weights at a path; notes where it differs."""
    name, given, model = run.pretrained.name, run.pretrained, run.model
    how = dict(variant=model.variant, ignore=given.ignore_json, resized=given.resize_patch)
    card = preprocessing.read(path, name, needed=given.mean is None, **how)
    notes = [f"note: {text}" for text in card.notes]
    if card.by_name and given.mean is None:
        notes.append(
            f"note: pixels are normalised as the name {pathlib.PurePath(name).name} says, by means "
            f"{card.mean} and deviations {card.std} (config.pretrained.mean, config.pretrained.std)"
        )
    plain = models.build(model.variant, 1)
    several = models.family(model.variant) == "vit"  # kinds of one shape; others have one of each
    ours = plain.num_heads if models.is_vit(model.variant) else None
    if ours and model.num_heads is None and card.num_heads is None and not preprocessing.of_jax(path):
        notes.append(
            f"note: nothing says how many attention heads {name} has, and shapes do not show it: "
            f"{ours} are taken, as in {'ViT-' * several}{model.variant} (config.model.num_heads)"
        )
    _check_activation(run, card, several)
    if several and card.gelu is None and card.norm_eps is None and model.norm_eps is None:
        notes.append(
            f"note: nothing says the epsilon of the LayerNorms of {name}: {plain.norm_eps:g} is taken "
            f"(config.model.norm_eps)"
        )
    if models.family(model.variant) == "swinv2" and card.gelu is None:
        notes.append(f"note: nothing says the windows of {name}: those of {model.variant} are taken")
    jax_of_others = not ours and preprocessing.of_jax(path)  # BiT's: the card is that of ViTs
    eps = None if jax_of_others or not hasattr(plain, "norm_eps") else card.norm_eps
    for node, key, value, default in (
        *([(model, "gelu", card.gelu, "exact")] if hasattr(plain, "gelu") else []),
        (model, "num_heads", ours and card.num_heads, ours),
        (model, "norm_eps", eps, getattr(plain, "norm_eps", None)),
        (given, "mean", card.mean, None),
        (given, "std", card.std, None),
        (given, "resize", card.resize, None),
        *_size_said(run, card.image_size),
    ):
        checks.fill(node, key, default if value is None else value)
        where = {id(model): "model.", id(given): "pretrained."}.get(id(node), "")
        mine = tuple(node[key]) if isinstance(value, tuple) else node[key]
        if value is not None and mine != value:
            notes.append(f"note: {name} has {value} ({card.source}), config.{where}{key} is {mine}")
    checks.heads(model.variant, model.num_heads)
    width = models.sizes(model.variant)["width"] // model.num_heads if ours else 0
    if model.attention == "cudnn" and not matmul.takes_heads_of(width):
        notes.append(f"note: cuDNN's attention takes no heads of {width} values: XLA's is taken")
        model.attention = "xla"
    return notes + _follow_parts(run, card, path)


def _check_activation(run: ConfigDict, card: preprocessing.Card, several: bool) -> None:
    """UserError where nothing says a model's activation, or it is one that its family does not have."""
    name, variant = run.pretrained.name, run.model.variant
    swin = models.family(variant) in ("swin", "swinv2")
    if swin and card.gelu not in (None, "exact"):
        raise UserError(
            f"{name} has the {card.gelu} GELU ({card.source}), which {variant} has not: take another"
        )
    if several and card.gelu is None and run.model.gelu is None:
        raise UserError(
            f"nothing says which GELU {name} has, and its arrays do not show it: put its config.json "
            f"beside it, or set config.model.gelu (exact, tanh or quick)"
        )


def _size_said(run: ConfigDict, size: Any) -> list[tuple]:
    """What a card's image size fills in: the run's, and where it is not square the file's grid."""
    if not isinstance(size, tuple):
        return [(run, "image_size", size, None)]
    placed = models.embeds_positions(run.model.variant)
    patch = placed and models.sizes(run.model.variant)["patch_size"]
    grid = [(run.pretrained, "grid", tuple(side // patch for side in size), None)] if patch else []
    return [(run, "image_size", size[0], None), *grid]


def _follow_parts(run: ConfigDict, card: preprocessing.Card, path: str) -> list[str]:
    """Fills in what a ViT has besides, or instead of, a class token; returns notes that name it."""
    name, model = run.pretrained.name, run.model
    if not models.is_vit(model.variant):
        note = f"note: {name} pools by {card.pooling} ({card.source}), {model.variant} by avg"
        return [note] if card.pooling not in (None, "avg") else []
    if card.pooling not in (None, "", *checks.CHOICES["model.pool"]):
        raise UserError(
            f"{name} pools by {card.pooling} ({card.source}), which is none of "
            f"{', '.join(checks.CHOICES['model.pool'])}: take another"
        )
    plain = models.build(model.variant, 1)
    arrays = reader.array_shapes(path) if models.family(model.variant) == "vit" else {}
    said = vit_layouts.parts(arrays)  # of others the variant says it
    if card.pooling in checks.CHOICES["model.pool"]:
        said.setdefault("pool", card.pooling)
    said = {key: value for key, value in said.items() if value != getattr(plain, key)}
    notes = [f"note: {name} has {', '.join(f'{k}={v}' for k, v in said.items())}"] if said else []
    for key, value in said.items():
        checks.fill(model, key, value)
        if model[key] != value:
            notes.append(f"note: config.model.{key} is {model[key]}")
    if model.class_token is False and "class_token" not in said:
        raise UserError(f"{name} has a class token: leave config.model.class_token out")
    if model.pool == "both" and not model.dist_token:
        raise UserError(f"{name} has no distillation token: leave config.model.pool out")
    if model.class_token is False and (model.pool or "token") in ("token", "both"):
        raise UserError(f"{name} has no class token: leave config.model.pool out, or set it to avg")
    return notes
