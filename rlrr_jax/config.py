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

from rlrr_jax import cards, checks, methods, pretrained
from rlrr_jax.checks import GRID
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.models import vit

# The bundled model, see bundled/make.py.
BUNDLED_MODEL = dict(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=8)
DEFAULT_GRID = {
    "lr": (1e-3, 3e-3, 1e-2),
    "weight_decay": (5e-5, 5e-2),
    "drop_path": (0.0, 0.1, 0.3),
    "times_own_lr": False,
}
# What may differ between two starts of the same run: where and how, not what. All other keys, those
# that a fork adds, too, are part of a run's identity.
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
    "machine",  # where it was last started, see `train`
    "val_acc",  # of the setting that "vtab" chose: a result
)


def resolve(config):
    """The runs a configuration asks for, as fully specified ConfigDicts: tasks x methods x trials.

    Raises UserError for any unknown name or impossible value.
    """
    checks.check(config)
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
    kind = sources.pixels(run.task, found)
    if found.kind == "folder" and run.data.variant not in (None, kind):
        raise UserError(
            f"the images in {found.path} are not {run.data.variant} but {kind}: leave out "
            f"config.data.variant, or take them from tfds"
        )
    run.data.source = found.kind
    _fill(run.data, "variant", kind)
    return found


def follow(run, path):
    """Fills in what a run takes from its weights' `cards.Card`; returns notes where it differs."""
    name, given, model = run.pretrained.name, run.pretrained, run.model
    card = cards.read(path, name, needed=given.mean is None, variant=model.variant)
    notes = [f"note: {text}" for text in card.notes]
    ours = model_sizes(model.variant)["num_heads"]
    if model.num_heads is None and card.num_heads is None and not cards.of_jax(path):
        notes.append(
            f"note: nothing says how many attention heads {name} has, and shapes do not show it: "
            f"{ours} are taken, as in ViT-{model.variant} (config.model.num_heads)"
        )
    for node, key, value, default in (
        (model, "gelu", card.gelu, "exact"),
        (model, "num_heads", card.num_heads, ours),
        (model, "norm_eps", card.norm_eps, 1e-6),
        (given, "mean", card.mean, None),
        (given, "std", card.std, None),
        (given, "resize", card.resize, None),
        (run, "image_size", card.image_size, None),
    ):
        _fill(node, key, default if value is None else value)
        where = {id(model): "model.", id(given): "pretrained."}.get(id(node), "")
        mine = tuple(node[key]) if isinstance(value, tuple) else node[key]
        if value is not None and mine != value:
            notes.append(f"note: {name} has {value} ({card.source}), config.{where}{key} is {mine}")
    if card.pooling not in (None, "token"):
        notes.append(f"note: {name} pools by {card.pooling} ({card.source}), not by class token")
    checks.heads(model_sizes(model.variant)["width"], model.num_heads)
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
            checks.hyper("config.trials", change)
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
    """What runs that are trained together have in common: all but seed and hyper-parameters.

    With random crops, which all trials share, the seed, too.
    """
    plain = run.to_dict()
    for key in ("trial", "recipe", "val_acc", *GRID, *(() if run.crop else ("seed",))):
        plain.pop(key, None)
    return json.dumps(plain, sort_keys=True)


def described(run, marks=None):
    """A run's configuration without `PLACES`, and the marks of its weights and data, plain values.

    What is as it was before a key existed is left out, so that older runs stay the same work.
    """
    plain = {**run.to_dict(), **(marks or {})}
    for place in PLACES:
        *parents, last = place.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    model, given, data = (plain.get(key) or {} for key in ("model", "pretrained", "data"))
    heads = model_sizes(model["variant"])["num_heads"] if model.get("variant") else None
    for node, key, before in (
        (given, "mean", cards.HALF),
        (given, "std", cards.HALF),
        (given, "resize", "linear"),
        (model, "num_heads", heads),
        (model, "norm_eps", 1e-6),
        (data, "upright", False),
        (plain.get("grid") or {}, "times_own_lr", False),
    ):
        value = tuple(node[key]) if isinstance(node.get(key), list) else node.get(key)
        if value is None or value == before:
            node.pop(key, None)
    if name := given.get("name"):
        given["name"] = pretrained.canonical(name)
    if plain.get("crop"):
        plain["crops"] = "by seed"  # in the first version they were the same for all seeds
    return json.loads(json.dumps(plain))


def identity(run):
    """A run's configuration without paths and devices, as plain values; equal for the same work."""
    plain = described(run)
    plain.get("grid", {}).pop("times_own_lr", None)  # its lr has the products
    plain.pop("recipe", None)  # its values are there
    return plain


def fingerprint(runs, marks=None):
    """Eight hex digits that name the work of these runs, and of the weights and dataset they used."""
    return _digest([[identity(run) for run in runs], marks or {}])


def _digest(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def setting(values):
    """What the seeds of one line share: `described` without the seed and what was searched."""
    leave = ("seed", "recipe", *(GRID if values.get("grid") else ()))  # chosen from it
    return {key: value for key, value in values.items() if key not in leave}


def across_tasks(values):
    """What the tasks of one line of a suite's table share: a `setting` without the task.

    Values that came from the recipe of a task and method are left out, since every task has its own.
    """
    recipe = values.get("recipe")
    if recipe is None:  # of an older run: what is equal
        own = _recipe(values["task"], values["method"])
        recipe = [key for key in own if values.get(key) == own[key]]
        recipe += [f"grid.{key}" for key in own if (values.get("grid") or {}).get(key) == [own[key]]]
    values = json.loads(json.dumps(setting(values)))
    grid = values.get("grid") or {}
    recipe = [*recipe, "task", "dataset"]
    recipe += ["epochs"] if values.get("total_steps") else []  # which make them
    recipe += ["grid.lr"] if grid.get("times_own_lr") else []
    for key in recipe:
        node = grid if key.startswith("grid.") else values
        node.pop(key.removeprefix("grid."), None)
    return values


def digests(values):
    """`{"setting", "line"}`: what rows of results are grouped by, for one task and across tasks."""
    return {"setting": _digest(setting(values)), "line": _digest(across_tasks(values))}


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


def architecture(run):
    """Arguments of `vit.ViT` for a run: its variant's, and what its weights said (see `follow`)."""
    said = {key: run.model.get(key) for key in ("num_heads", "norm_eps")}  # None in older runs
    return model_sizes(run.model.variant) | {key: value for key, value in said.items() if value}


def default_unroll(variant):
    """Blocks in each step of the scan over depth: on CPUs all, faster and with less memory."""
    return model_sizes(variant)["depth"] if jax.default_backend() == "cpu" else 1


def pixels(run):
    """The `store.Pixels` of a run."""
    return store.Pixels(
        size=run.image_size,
        variant=run.data.variant,
        shorter=run.crop_from if run.crop else None,
        upright=run.data.get("upright", False),
    )


def build_model(run):
    """The `vit.ViT` of a run."""
    return vit.ViT(
        **architecture(run),
        num_classes=tasks.get(run.task).classes,
        gelu=run.model.gelu or "tanh",  # None until `follow`, where only shapes matter
        attention=run.model.attention,
        drop_path_mode=run.drop_path_mode,
        unroll=run.model.unroll,
        remat=bool(run.model.remat),
        dtype=jax.numpy.dtype(run.dtype),
    )


def load_weights(run, path, model, note=None):
    """The frozen tree of a run whose weights are at a path; `note` is told what was passed over."""
    given = run.pretrained
    how = pretrained.How(given.grid, given.mean, given.std, given.get("resize") or "linear")
    return pretrained.load(path, model=model, image_size=run.image_size, how=how, note=note)


def _names(text):
    return list(dict.fromkeys(name for name in re.split(r"[+,]", text or "") if name))


def _method_kwargs(chosen, kwargs, config):
    """Options for each method; each option must be known to one of them."""
    out, kwargs = {}, {k: _literal(v) for k, v in kwargs.items()}
    for method in chosen:
        methods.get(method)
        known = methods.options(method)
        out[method] = {k: v for k, v in kwargs.items() if k in known}
        methods.get(method, **out[method])
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
            methods.get(method)
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
    recipe = _recipe(task_name, method_name)
    run.recipe = ()  # keys that come from it
    if run.protocol == "vtab":
        _fill_grid(run, {key: recipe.pop(key) for key in GRID})  # which are chosen later
    else:
        del run.grid
    _set_epochs(run)
    for key, value in recipe.items():
        if run[key] is None:
            run[key], run.recipe = value, (*run.recipe, key)
    _check_schedule(run)
    _fill(run.model, "variant", "bundled" if bundled else "B/16")
    if run.pretrained.name is None:
        run.pretrained.name = _default_weights(run.model.variant)
    if cards.of_jax(run.pretrained.name):  # others say it when they are there: `follow`
        _fill(run.model, "gelu", cards.JAX.gelu)
    _fill(run, "image_size", 32 if run.model.variant == "bundled" else 224)
    checks.heads(model_sizes(run.model.variant)["width"], run.model.num_heads)
    if run.crop and (run.crop_from or 0) < run.image_size:
        raise UserError(
            f"config.crop={run.crop} needs config.crop_from of at least the image size {run.image_size}"
        )
    _fill(run, "dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16")
    _fill(run, "precision", "highest" if run.dtype == "float32" else "default")
    _fill(run.model, "unroll", default_unroll(run.model.variant))
    pretrained.check_size(run.image_size, build_model(run).patch_size)
    methods.check(method_name, method, _shapes(run.model.variant))
    return run


def _recipe(task_name, method_name):
    """What a task and a method bring where the configuration says nothing."""
    task, own = tasks.get(task_name), methods.METHODS[method_name].DEFAULTS
    recipe = dict(epochs=task.epochs, schedule=task.schedule, flip=task.flip)
    return {**recipe, **own, **task.recipes.get(method_name, {})}


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
    grid = run.grid.to_dict()
    if grid["times_own_lr"]:
        grid["times_own_lr"] = grid["lr"]
        grid["lr"] = tuple(float(f"{own['lr'] * times:.3g}") for times in grid["lr"])
    for key in GRID:
        if run[key] is not None:
            grid[key] = (run[key],)
        elif not grid[key]:
            grid[key], run.recipe = (own[key],), (*run.recipe, f"grid.{key}")
    run.grid = ConfigDict(grid)


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
