"""What the values of a configuration may be: checked before any work."""

import math
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from rlrr_jax import backend, lookup, losses, models, optim
from rlrr_jax.data import crops, decoding, sources
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.weights import names, positions, values

PROTOCOLS = ("official", "fast", "vtab", "tune")
GRID = ("lr", "weight_decay", "drop_path")  # what the protocol "vtab" chooses
SEARCH = ("times_own_lr", "extend", "folds")  # how it does
CHOICES = {
    "protocol": PROTOCOLS,
    "optimizer": ("adamw", "momentum"),
    "keep": ("best",),
    "temperature": ("fit",),
    "momentum_dtype": ("bfloat16", "float32"),
    "log": ("tensorboard", "wandb"),
    "crop": crops.KINDS,
    "data.source": sources.KINDS,
    "data.variant": decoding.VARIANTS,
    "drop_path_mode": ("element", "sample"),
    "pretrained.resize": positions.RESIZES,
    "model.gelu": ("tanh", "exact", "quick"),
    "model.pool": ("token", "avg", "map", "both"),
    "model.attention": ("xla", "cudnn"),
    "dtype": ("float32", "bfloat16"),
    "frozen_dtype": ("float32", "bfloat16"),
    "precision": ("highest", "high", "default", "tensorfloat32", "float32", "bfloat16"),
}
POSITIVE = (
    *("epochs", "total_steps", "batch_size", "eval_batch_size", "image_size", "image_width"),
    *("eval_every", "accumulate", "patience"),
    *("model.unroll", "model.depth"),
    *("model.num_heads", "model.norm_eps", "num_devices", "grad_clip", "crop_from", "own.shots"),
    *("data.device_gb", "warmup_epochs"),
)


GROUPS = ("model", "pretrained", "data", "own", "grid", "method_kwargs", "loss_kwargs")
NEEDED = (
    *("batch_size", "eval_batch_size", "eval_every", "checkpoint_seconds", "optimizer", "accumulate"),
    *("shard_weights", "mixup", "cutmix", "label_smoothing"),
)


def check(config: ConfigDict) -> None:
    """Checks every value that does not depend on task or method; UserError for the first wrong one."""
    for key in GROUPS:
        if not isinstance(config[key], ConfigDict):
            raise UserError(f"config.{key}={config[key]} must be a group of values: leave it as it is")
    for key in NEEDED:
        if config[key] is None:
            raise UserError(f"config.{key} must have a value: leave it as it is, or set one")
    for key, allowed in CHOICES.items():
        value = config[key]
        if value is not None and value not in allowed:
            raise unknown(f"value of config.{key}", value, allowed)
    for key in POSITIVE:
        value = config[key]
        if value is not None and not value > 0:  # NaN is not, either
            raise UserError(f"config.{key}={value} must be greater than 0")
    hyper("config", {key: config[key] for key in GRID if config[key] is not None})
    for key in GRID:
        for value in config.grid[key]:
            hyper("config.grid", {key: value})
    if config.loss is not None:
        losses.find(config.loss)
    if config.model.block is not None:
        lookup.find("block", config.model.block)
    if config.gradients is not None:
        made = lookup.find("gradients", config.gradients)(jax.random.key(0))
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(
                f"config.gradients={config.gradients} must make an optax transformation of a key, not "
                f"{type(made).__name__}"
            )
    for key in searched(config):
        for value in config.grid[key]:
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"config.grid.{key}={value} must be finite and not negative")
    for key in (*GRID, *searched(config)):
        if len(set(config.grid[key])) < len(config.grid[key]):
            raise UserError(f"config.grid.{key}={config.grid[key]} must be different values")
    if not _whole(config.grid.folds) or config.grid.folds == 1:
        raise UserError(
            f"config.grid.folds={config.grid.folds} must be a whole number from 2 on, or 0 for the "
            f"images that the task has for choosing"
        )
    _check_numbers(config)
    _check_pixels(config.pretrained.mean, config.pretrained.std)
    if config.model.variant is not None:
        models.sizes(config.model.variant)
    if config.schedule is not None:
        optim.learning_rates(config.schedule, 1.0, 1)
    if config.pretrained.name is not None:
        names.address(names.split_subtree(config.pretrained.name)[0])
    _check_machine(config)


def _check_numbers(config):
    seeds = (0,) if config.seeds is None else config.seeds
    if not seeds or not all(map(_seed, seeds)) or len(set(seeds)) < len(seeds):
        raise UserError(
            f"config.seeds={seeds} must be different whole numbers below 2^32, such as (0,1,2)"
        )
    hyper("config.own", {"seed": config.own.seed})
    for key in ("registers", "projection"):
        if (config.model[key] or 0) < 0:
            raise UserError(f"config.model.{key}={config.model[key]} must not be negative")
    for key in ("checkpoint_seconds", "mixup", "cutmix"):
        if not 0 <= config[key] < math.inf:
            raise UserError(f"config.{key}={config[key]} must be finite and not negative")
    for key in ("label_smoothing", "average"):
        if config[key] is not None and not 0 <= config[key] < 1:
            raise UserError(f"config.{key}={config[key]} must be at least 0 and less than 1")
    for key, example in (("restarts", "(10, 2)"), ("pretrained.grid", "(14,14)")):
        pair = config[key]
        if pair is not None and (len(pair) != 2 or not all(_whole(n) and n > 0 for n in pair)):
            raise UserError(f"config.{key}={pair} must be two whole numbers, such as {example}")
    for key in ("val", "test"):
        value = config.own[key]
        if value is None or not 0 <= value <= 0.9:
            raise UserError(f"config.own.{key}={value} must be a fraction from 0 to 0.9")
    noise = config.model.position_noise
    number = lambda x: isinstance(x, int | float) and math.isfinite(x)
    three = noise is None or (len(noise) == 3 and all(map(number, noise)))
    if not three or (noise and (noise[0] < 0 or min(noise[1:]) < 1)):
        raise UserError(
            f"config.model.position_noise={noise} must be a shift of at least 0 and two factors of at "
            f"least 1, such as (0,1,2)"
        )


def _check_machine(config):
    """UserError unless the devices asked for are there, and can do what is asked."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={wanted}: unset it, or install cuda13 or tpu"
        ) from e
    if config.model.attention == "cudnn" and (backend.platform() != "gpu" or config.dtype == "float32"):
        raise UserError("config.model.attention=cudnn needs a GPU and bfloat16: leave it out")
    if jax.process_count() > 1 and config.num_devices not in (None, jax.device_count()):
        raise UserError("config.num_devices is for one process: leave it out, or start fewer")
    if (config.num_devices or 1) > backend.number():
        raise UserError(
            f"config.num_devices={config.num_devices}, but this machine has {backend.number()} "
            f"{backend.platform()} device(s)"
        )


def _check_pixels(mean, std):
    if (mean is None) != (std is None):
        raise UserError("config.pretrained.mean and config.pretrained.std go together: set both")
    if mean is not None:
        try:
            values.check("exact", mean, std)
        except ValueError as e:
            raise UserError(f"config.pretrained: {e} (of red, green and blue): set them so") from e


def searched(config: Any) -> list[str]:
    """The keys of a configuration's grid that are options of losses."""
    return [key for key in config.grid if key not in (*GRID, *SEARCH)] if "grid" in config else []


def hyper(where: str, values: dict[str, Any]) -> None:
    """UserError unless a seed, learning rate, weight decay or drop-path rate is possible."""
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "seed" and not _seed(value):
            raise UserError(f"{where}.seed={value} must be a whole number below 2^32")
        if key == "lr" and not (number and 0 < value < math.inf):
            raise UserError(f"{where}.lr={value} must be greater than 0 and finite")
        if key == "weight_decay" and not (number and 0 <= value < math.inf):
            raise UserError(f"{where}.weight_decay={value} must be finite and not negative")
        if key == "drop_path" and not (number and 0 <= value < 1):
            raise UserError(f"{where}.drop_path={value} must be at least 0 and less than 1")


def _seed(value):
    """JAX's keys take 32 bits: larger seeds would be smaller ones under another name."""
    return _whole(value) and value < 2**32


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def group(config: Any, key: str) -> tuple[Any, str]:
    """The group of a dotted key, and its name there: `"model.gelu"` -> `(config.model, "gelu")`."""
    path, _, last = key.rpartition(".")
    return (config[path] if path else config), last


def fill(node: Any, key: str, value: Any) -> None:
    """Sets a key that is None."""
    if node[key] is None:
        node[key] = value


def kind(config: Any, key: str) -> type:
    """The type of the value of a dotted key."""
    node, last = group(config, key)
    return node.get_type(last)


def has(config: Any, key: str) -> bool:
    """Whether a dotted key is one of the configuration, and no group of keys."""
    try:
        return not isinstance(config[key], ConfigDict)
    except (KeyError, TypeError):  # a TypeError where a value has the name of a group
        return False


def family(run: ConfigDict) -> None:
    """UserError for a key that does nothing for models of the variant's family."""
    variant = run.model.variant
    unused = [] if models.is_vit(variant) else ["model.depth"]
    unused += [] if models.embeds_positions(variant) else ["pretrained.grid", "pretrained.resize"]
    unused += [] if models.family(variant) == "vit" else ["pretrained.resize_patch"]
    for key in unused:
        if run[key]:
            raise UserError(f"config.{key} is of no use for {variant}: leave it out")
    if run.model.block is not None and not models.is_vit(variant):
        raise UserError(
            f"the block {run.model.block} (config.model.block, or method {run.method}) is of ViTs: "
            f"take one, or another method for {variant}"
        )
    if variant.startswith("resnet") and run.model.norm_eps is not None:
        raise UserError(f"config.model.norm_eps is of no use for {variant}: leave it out")


def depth(run: ConfigDict) -> None:
    """UserError unless the number of blocks fits the model."""
    variant, number = run.model.variant, run.model.depth
    if number is not None and number >= (blocks := models.sizes(variant)["depth"]):
        raise UserError(
            f"config.model.depth={number} must be less than the {blocks} of {variant}: leave it out"
        )


def heads(variant: str, number: int | None) -> None:
    """UserError unless so many attention heads share the width of a variant; None passes."""
    if number and not models.is_vit(variant):
        raise UserError(f"config.model.num_heads is of no use for {variant}: leave it out")
    if number and (width := models.sizes(variant)["width"]) % number:
        raise UserError(
            f"config.model.num_heads={number} does not divide the model's width {width}: leave it out"
        )
    if number and models.family(variant) == "rope_vit" and (width // number) % 4:
        raise UserError(
            f"config.model.num_heads={number} makes heads of {width // number} values, which rows and "
            f"columns do not share: leave it out"
        )
