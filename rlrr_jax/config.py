"""From a configuration to fully specified runs; all names and values are checked before any work."""

import ast
import functools
import hashlib
import itertools
import json
import math
import re

import jax
from ml_collections import ConfigDict

from rlrr_jax import cards, methods, optim, pretrained
from rlrr_jax.data import crops, sources, store, tasks
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.models import vit

# The bundled model, see bundled/make.py.
BUNDLED_MODEL = dict(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=8)
PROTOCOLS = ("official", "fast", "vtab", "tune")
GRID = ("lr", "weight_decay", "drop_path")  # what the protocol "vtab" chooses
DEFAULT_GRID = {
    "lr": (1e-3, 3e-3, 1e-2),
    "weight_decay": (5e-5, 5e-2),
    "drop_path": (0.0, 0.1, 0.3),
    "times_own_lr": False,
}
# What may differ between two starts of the same run: where and how, not what.
PLACES = (
    "num_devices",
    "checkpoint_seconds",
    "eval_batch_size",
    "model.unroll",
    "model.remat",
    "trial",
    "options",
    "data.dir",
    "data.cache_dir",
    "pretrained.cache_dir",
)


def resolve(config):
    """The runs a configuration asks for, as fully specified ConfigDicts: tasks x methods x trials.

    Raises UserError for any unknown name or impossible value.
    """
    _check_common(config)
    names = tasks.expand(_names(config.task)) or list(tasks.BUNDLED)
    bundled = all(name in tasks.BUNDLED for name in names)
    suite = len([name for name in names if name in tasks.VTAB]) > 1
    chosen = _names(config.method) or (["linear", "rlrr", "full"] if bundled else ["rlrr"])
    searched = config.protocol == "vtab" or config.lr is not None
    if not searched and config.grid.to_dict() != DEFAULT_GRID:
        raise UserError("config.grid is only searched by config.protocol=vtab: add that")
    variants = _variants(config, chosen)
    seeds = config.seeds or ((0, 1, 2) if suite else (0,))
    return [
        _resolve_one(config, task, variant, changes, suite)
        for task in names
        for variant in variants
        for changes in _changes(config, seeds)
    ]


def locate(run):
    """Fills in where a run's data comes from and what its pixels are; returns the `sources.Found`.

    Raises UserError if the data is not there, or its pixels are not those asked for.
    """
    found = sources.find(run.task, run.data.dir, run.data.source)
    pixels = sources.pixels(run.task, found)
    if found.kind == "folder" and run.data.variant not in (None, pixels):
        raise UserError(
            f"the images in {found.path} are not {run.data.variant} but {pixels}: leave out "
            f"config.data.variant, or take them from tfds"
        )
    run.data.source = found.kind
    _fill(run.data, "variant", pixels)
    return found


def follow(run, path):
    """Fills in what a run takes from its weights' `cards.Card`; returns notes where it differs."""
    name, given, model = run.pretrained.name, run.pretrained, run.model
    card = cards.read(path, name, needed=given.mean is None)
    if card is None:
        _fill(model, "gelu", "exact")
        return []
    _fill(model, "gelu", card.gelu)
    _fill(given, "mean", card.mean)
    _fill(given, "std", card.std)
    notes = []
    for key, mine, its in (
        ("model.gelu", model.gelu, card.gelu),
        ("pretrained.mean", tuple(given.mean), card.mean),
        ("pretrained.std", tuple(given.std), card.std),
        ("image_size", run.image_size, card.image_size),
    ):
        if its is not None and mine != its:
            notes.append(f"note: {name} has {its} (says {card.source}), config.{key} is {mine}")
    if card.pooling not in (None, "token"):
        notes.append(f"note: {name} pools by {card.pooling} (says {card.source}), not by class token")
    return notes


def _changes(config, seeds):
    """What each trial of `config.trials` changes, with its seed: `[{"seed": 0, "lr": 0.01}, ...]`."""
    if config.trials and config.protocol == "vtab":
        raise UserError("config.protocol=vtab makes its own trials: leave out config.trials")
    out = []
    for trial in config.trials or ({},):
        if not isinstance(trial, dict):
            raise UserError(f"config.trials={config.trials} must be a list, such as ({{'lr': 0.01}},)")
        for key in trial:
            if key not in ("seed", *GRID):
                raise unknown("key of config.trials", key, ("seed", *GRID))
        several = {key: v if isinstance(v, tuple | list) else (v,) for key, v in trial.items()}
        for values in itertools.product(*several.values()):
            change = dict(zip(several, values))
            _check_hyper("config.trials", change)
            out += [{"seed": seed, **change} for seed in (seeds if "seed" not in change else (0,))]
    names = [(trial_name(change), change["seed"]) for change in out]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"config.trials={config.trials} must be different trials")
    return out


def trial_name(change):
    """`"lr0.01-drop_path0.1"` for what a trial changes besides the seed; None for nothing."""
    return "-".join(f"{key}{change[key]:g}" for key in GRID if key in change) or None


def trials(run):
    """The runs that the protocol "vtab" chooses from: the grid on 800 and 200 images, of seed 0."""
    given = {key: tuple(run.grid[key]) for key in GRID}
    out = []
    for values in itertools.product(*given.values()):
        change = dict(zip(given, values))
        trial = ConfigDict(run.to_dict())
        trial.update(protocol="tune", seed=0, trial=trial_name(change), **change)
        del trial.grid
        _set_epochs(trial)
        out.append(trial)
    return out


def together(run):
    """What runs that are trained together have in common: all but seed and hyper-parameters."""
    plain = run.to_dict()
    for key in ("seed", "trial", "val_acc", *GRID):
        plain.pop(key, None)
    return json.dumps(plain, sort_keys=True)


def identity(run):
    """A run's configuration without paths and devices, as plain values; equal for the same work."""
    plain = run.to_dict()
    for place in PLACES:
        *parents, last = place.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    given = plain.get("pretrained", {})
    for key in ("mean", "std"):  # of the public JAX weights, which always was so
        if given.get(key) is None or tuple(given[key]) == cards.HALF:
            given.pop(key, None)
    if name := given.get("name"):
        plain["pretrained"]["name"] = pretrained.canonical(name)
    return json.loads(json.dumps(plain))


def fingerprint(runs, marks=None):
    """Eight hex digits that name the work of these runs, and of the weights and dataset they used."""
    text = json.dumps([[identity(run) for run in runs], marks or {}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(old, new, prefix=""):
    """`["lr=0.01 (now 0.02)", ...]` for two nested dicts."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}={a} (now {b})")
    return out


def model_sizes(variant):
    """Arguments of `vit.ViT` for a `config.model.variant`."""
    return BUNDLED_MODEL if variant == "bundled" else vit.parse_variant(variant)


def default_unroll(variant):
    """Blocks in each step of the scan over depth: on CPUs all, faster and with less memory."""
    return model_sizes(variant)["depth"] if jax.default_backend() == "cpu" else 1


def shorter(run):
    """Pixels of the shorter side of an image before a square is cut out of it, or None."""
    return run.crop_from if run.crop else None


def build_model(run):
    """The `vit.ViT` of a run."""
    return vit.ViT(
        **model_sizes(run.model.variant),
        num_classes=tasks.get(run.task).classes,
        gelu=run.model.gelu or "tanh",  # None until `follow`, where only shapes matter
        attention=run.model.attention,
        drop_path_mode=run.drop_path_mode,
        unroll=run.model.unroll,
        remat=bool(run.model.remat),
        dtype=jax.numpy.dtype(run.dtype),
    )


def load_weights(run, path, model):
    """The frozen tree of a run whose weights are at a path."""
    given = run.pretrained
    return pretrained.load(
        path, model=model, image_size=run.image_size, grid=given.grid, mean=given.mean, std=given.std
    )


def _names(text):
    return list(dict.fromkeys(name for name in re.split(r"[+,]", text or "") if name))


def _method_kwargs(chosen, kwargs, config):
    """Options for each method; each option must be known to one of them."""
    out, kwargs = {}, {k: _literal(v) for k, v in kwargs.items()}
    for method in chosen:
        _as_user_error(methods.get, method)
        known = methods.options(method)
        out[method] = {k: v for k, v in kwargs.items() if k in known}
        _as_user_error(methods.get, method, **out[method])
    for key in kwargs:
        if not any(key in options for options in out.values()):
            if key in config:
                raise UserError(f"{key} is no option of a method: write --config.{key}={kwargs[key]}")
            every = {option for method in chosen for option in methods.options(method)}
            raise unknown(f"option of method {'+'.join(chosen)}", key, every | {"task", "method"})
    return out


def _variants(config, chosen):
    """`[(method, options, name)]` of each method, or of each of `config.variants`."""
    if not config.variants:
        kwargs = _method_kwargs(chosen, config.method_kwargs.to_dict(), config)
        return [(method, kwargs[method], None) for method in chosen]
    if not all(isinstance(variant, dict) for variant in config.variants):
        shown = "({'rank': 2},)"
        raise UserError(f"config.variants={config.variants} must be a list, such as {shown}")
    out = []
    shared = config.method_kwargs.to_dict()
    _method_kwargs([*chosen, *(v["method"] for v in config.variants if "method" in v)], shared, config)
    for variant in config.variants:
        own = {k: v for k, v in variant.items() if k != "method"}
        name = "-".join(f"{k}{v}" for k, v in own.items()) or None
        for method in [variant["method"]] if "method" in variant else chosen:
            _as_user_error(methods.get, method)
            known = {k: v for k, v in shared.items() if k in methods.options(method)}
            out.append((method, _method_kwargs([method], {**known, **own}, config)[method], name))
    if len({(method, name) for method, _, name in out}) < len(out):
        raise UserError(f"config.variants={config.variants} must be different variants")
    return out


def _literal(text):
    """`"4"` -> 4, `"(1, 2)"` -> (1, 2); other strings stay."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _resolve_one(config, task_name, variant, changes, suite):
    run = ConfigDict(config.to_dict())
    del run.seeds, run.trials, run.variants
    method_name, kwargs, options = variant
    task, method = tasks.get(task_name), methods.get(method_name, **kwargs)
    run.update(task=task_name, method=method_name, trial=trial_name(changes), **changes)
    run.method_kwargs, run.options = ConfigDict(kwargs), options
    bundled = task.group == "bundled"
    _fill(run, "protocol", "fast" if bundled or suite else "official")
    recipe = dict(epochs=task.epochs, schedule=task.schedule, flip=task.flip)
    recipe = {**recipe, **method.DEFAULTS, **task.recipes.get(method_name, {})}
    if run.protocol == "vtab":
        _fill_grid(run, {key: recipe.pop(key) for key in GRID})  # which are chosen later
    else:
        del run.grid
    _set_epochs(run)
    for key, value in recipe.items():
        _fill(run, key, value)
    _check_schedule(run)
    _fill(run.model, "variant", "bundled" if bundled else "B/16")
    _fill(run.pretrained, "name", _default_weights(run.model.variant))
    if cards.of_jax(run.pretrained.name):  # others say it when they are there: `follow`
        _fill(run.model, "gelu", cards.JAX.gelu)
    _fill(run, "image_size", 32 if run.model.variant == "bundled" else 224)
    if run.crop and (run.crop_from or 0) < run.image_size:
        raise UserError(
            f"config.crop={run.crop} needs config.crop_from of at least the image size {run.image_size}"
        )
    _fill(run, "dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16")
    _fill(run, "precision", "highest" if run.dtype == "float32" else "default")
    _fill(run.model, "unroll", default_unroll(run.model.variant))
    pretrained.check_size(run.image_size, build_model(run).patch_size)
    _as_user_error(jax.eval_shape, method.init, jax.random.key(0), _shapes(run.model.variant))
    return run


def _set_epochs(run):
    """Epochs that `config.total_steps` takes; the last may be cut short."""
    if run.total_steps:
        if run.epochs is not None and run.protocol != "tune":
            raise UserError("config.epochs and config.total_steps exclude each other: set one")
        task = tasks.get(run.task)
        number = task.number(task.parts[0 if run.protocol == "tune" else 2])
        run.epochs = math.ceil(run.total_steps / math.ceil(number / run.batch_size))


def _check_schedule(run):
    if run.schedule == "bigvision" and not run.total_steps:
        raise UserError("config.schedule=bigvision needs config.total_steps: set it")
    if run.warmup_steps is not None and run.schedule != "bigvision":
        raise UserError("config.warmup_steps is only used by config.schedule=bigvision: leave it out")


def _fill_grid(run, own):
    """Makes the values to choose from those of this method and task, whose own are `own`."""
    grid = run.grid
    if grid.times_own_lr:
        grid.lr = tuple(float(f"{own['lr'] * times:.3g}") for times in grid.lr)
    for key in GRID:
        grid[key] = (run[key],) if run[key] is not None else tuple(grid[key]) or (own[key],)
    del grid.times_own_lr


@functools.cache
def _shapes(variant):
    """Shapes of the weights of a ViT with two classes."""
    model = vit.ViT(**model_sizes(variant), num_classes=2)
    image = jax.ShapeDtypeStruct((1, model.patch_size, model.patch_size, 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def _fill(node, key, value):
    if node[key] is None:
        node[key] = value


def _default_weights(variant):
    if variant == "bundled":
        return "bundled"
    name = pretrained.default_name(variant)
    if name is None:
        raise UserError(
            f"no public weights are known for {variant}: set config.pretrained.name to a .npz or "
            f".safetensors file, or to hf:timm/<name>"
        )
    return name


def _as_user_error(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except ValueError as e:
        raise UserError(str(e)) from e


def _check_common(config):
    """Checks every value that does not depend on task or method."""
    for key in ("model", "pretrained", "data", "grid", "method_kwargs"):
        if not isinstance(config[key], ConfigDict):
            raise UserError(f"config.{key}={config[key]} must be a group of values: leave it as it is")
    for key in ("batch_size", "eval_batch_size", "checkpoint_seconds", "optimizer", "drop_path_mode"):
        if config[key] is None:
            raise UserError(f"config.{key} must have a value: leave it as it is, or set one")
    if config.model.variant not in (None, "bundled"):
        _as_user_error(vit.parse_variant, config.model.variant)
    if config.schedule is not None:
        _as_user_error(optim.learning_rates, config.schedule, 1.0, 1)
    choices = {
        "protocol": PROTOCOLS,
        "optimizer": ("adamw", "momentum"),
        "momentum_dtype": ("bfloat16", "float32"),
        "crop": crops.KINDS,
        "data.source": sources.KINDS,
        "data.variant": store.VARIANTS,
        "drop_path_mode": ("element", "sample"),
        "model.gelu": ("tanh", "exact"),
        "model.attention": ("xla", "cudnn"),
        "dtype": ("float32", "bfloat16"),
        "precision": ("highest", "high", "default", "tensorfloat32", "float32", "bfloat16"),
    }
    for key, allowed in choices.items():
        value = _at(config, key)
        if value is not None and value not in allowed:
            raise unknown(f"value of config.{key}", value, allowed)
    numbers = ("epochs", "total_steps", "batch_size", "eval_batch_size", "image_size", "model.unroll")
    for key in (*numbers, "num_devices", "grad_clip", "crop_from"):
        value = _at(config, key)
        if value is not None and value <= 0:
            raise UserError(f"config.{key}={value} must be greater than 0")
    _check_hyper("config", {key: config[key] for key in GRID if config[key] is not None})
    if not 0 <= config.checkpoint_seconds < math.inf:
        raise UserError(
            f"config.checkpoint_seconds={config.checkpoint_seconds} must be finite and not negative"
        )
    seeds = (0,) if config.seeds is None else config.seeds
    if not seeds or len(set(seeds)) < len(seeds) or not all(_whole(s) and s < 2**63 for s in seeds):
        raise UserError(f"config.seeds={seeds} must be different whole numbers, such as (0,1,2)")
    for key in GRID:
        for value in config.grid[key]:
            _check_hyper("config.grid", {key: value})
    grid = config.pretrained.grid
    if grid is not None and (len(grid) != 2 or not all(_whole(n) and n > 0 for n in grid)):
        raise UserError(f"config.pretrained.grid={grid} must be two whole numbers, such as (14,14)")
    _check_pixels(config.pretrained.mean, config.pretrained.std)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        wanted = jax.config.jax_platforms
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={wanted}: unset it, or install cuda13 or tpu"
        ) from e
    if config.model.attention == "cudnn" and (
        jax.default_backend() != "gpu" or config.dtype == "float32"
    ):
        raise UserError("config.model.attention=cudnn needs a GPU and bfloat16: leave it at xla")
    if jax.process_count() > 1 and config.num_devices not in (None, jax.device_count()):
        raise UserError("config.num_devices is for one process: leave it out, or start fewer")
    if (config.num_devices or 1) > jax.device_count():
        raise UserError(
            f"config.num_devices={config.num_devices}, but this machine has {jax.device_count()} "
            f"{jax.default_backend()} device(s)"
        )
    if config.pretrained.name is not None:
        pretrained.address(pretrained.split_subtree(config.pretrained.name)[0])


def _check_pixels(mean, std):
    if (mean is None) != (std is None):
        raise UserError("config.pretrained.mean and config.pretrained.std go together: set both")
    if mean is not None:
        try:
            cards.check("exact", mean, std)
        except ValueError as e:
            raise UserError(f"config.pretrained: {e} (of red, green and blue): set them so") from e


def _check_hyper(where, values):
    """UserError unless a seed, learning rate, weight decay or drop-path rate is possible."""
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "seed" and not (_whole(value) and value < 2**63):
            raise UserError(f"{where}.seed={value} must be a whole number")
        if key == "lr" and not (number and 0 < value < math.inf):
            raise UserError(f"{where}.lr={value} must be greater than 0 and finite")
        if key == "weight_decay" and not (number and 0 <= value < math.inf):
            raise UserError(f"{where}.weight_decay={value} must be finite and not negative")
        if key == "drop_path" and not (number and 0 <= value < 1):
            raise UserError(f"{where}.drop_path={value} must be at least 0 and less than 1")


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _at(config, key):
    for part in key.split("."):
        config = config[part]
    return config
