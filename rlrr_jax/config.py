"""From a configuration to fully specified runs; all names and values are checked before any work."""

import ast
import copy
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rlrr_jax import answers, backend, checks, lookup, losses, methods, metrics, models
from rlrr_jax.checks import GRID
from rlrr_jax.data import own, tasks
from rlrr_jax.errors import UserError, unknown
from rlrr_jax.run_images import size_of, splits, task_of
from rlrr_jax.run_model import build_model, check_contracts
from rlrr_jax.runs.identity import PLACES, recipe, together
from rlrr_jax.weights import names, preprocessing

DEFAULT_GRID = {
    "lr": (1e-3, 3e-3, 1e-2),
    "weight_decay": (5e-5, 5e-2),
    "drop_path": (0.0, 0.1, 0.3),
    "times_own_lr": False,
    "extend": False,
    "folds": 0,
}
SEVERAL = "({'lr': (1e-3, 3e-3)}, {'method': 'lora', 'rank': 4})"  # an example of config.runs
NAMELESS = (
    "name your images: --config configs/own.py:FOLDER, a list of files, hf:FOLDER or tfds:NAME, or "
    "by --config.own.path"
)


def loss_options(name: str | None = None) -> tuple[ConfigDict, ConfigDict]:
    """A key for each option of each loss, without values, and the grid of a search.

    Args:
      name: a loss by its path, whose options are there, too.
    """
    lookup.allow(name)
    known = [*lookup.names("loss"), *([name] if name and lookup.is_path(name) else [])]
    defaults = {k: v for loss in known for k, v in losses.options(loss).items()}
    searched = {k: () for k, default in defaults.items() if isinstance(default, float)}
    keys = {key: placeholder(type(default)) for key, default in defaults.items()}
    return ConfigDict(keys), ConfigDict(DEFAULT_GRID | searched)


# Tasks x methods x overrides x seeds ----------------------------------------------------------


def resolve(config: ConfigDict) -> list[ConfigDict]:
    """The runs a configuration asks for, fully specified: tasks x methods x `config.runs` x seeds.

    Raises UserError for any unknown name or impossible value.
    """
    _allow(config)
    checks.check(config)
    task_names, chosen = _asked(config)
    suite = len([name for name in task_names if name in tasks.VTAB]) > 1
    seeds = config.seeds or ((0, 1, 2) if suite else (0,))
    settings = _settings(config, _overrides(config, chosen), seeds, suite)
    runs = [_resolve_one(task, *setting) for task in task_names for setting in settings]
    _check_grid(config, runs)
    order = list(dict.fromkeys(map(together, runs)))
    return sorted(runs, key=lambda run: order.index(together(run)))


def groups(config: ConfigDict) -> int:
    """How many pairs of a task and a method with its options there are; asks for no device."""
    _allow(config)
    task_names, chosen = _asked(config)
    each = {(name, str(change["own"])) for name, _, change in _overrides(config, chosen)}
    return len(task_names) * len(each)


def _allow(config: ConfigDict) -> None:
    """Lets the files that a configuration names be imported."""
    typed = config.loss, config.gradients, config.model.block, config.model.variant, config.own.path
    lookup.allow(*typed, *_names(config.task), *_names(config.method))


def _asked(config: ConfigDict) -> tuple[list[str], list[str]]:
    """Names of tasks and of methods."""
    if config.own.path == "":
        raise UserError(NAMELESS)
    if config.own.path is None:
        task_names = tasks.expand(_names(config.task)) or list(tasks.BUNDLED)
    else:
        task_names = [config.task or own.name(config.own.path)]
    bundled = all(name in tasks.BUNDLED for name in task_names)
    return task_names, _names(config.method) or (["linear", "rlrr", "full"] if bundled else ["rlrr"])


def _check_grid(config: ConfigDict, runs: list[ConfigDict]) -> None:
    """UserError for a grid that no run searches."""
    fixed = [key for key in GRID if config[key] is not None]
    fixed += ["times_own_lr"] if config.lr is not None else []
    nothing = {**dict.fromkeys(checks.searched(config), ()), **DEFAULT_GRID}
    given = [k for k, default in nothing.items() if config.grid[k] != default and k not in fixed]
    if given and not any(run.protocol == "vtab" for run in runs):
        raise UserError("config.grid is only searched by config.protocol=vtab: add that")
    for key in checks.searched(config):
        if not config.grid[key] or any(run.grid[key] for run in runs if run.protocol == "vtab"):
            continue
        if config.loss_kwargs[key] is not None:
            raise UserError(
                f"config.loss_kwargs.{key} and config.grid.{key} are both set: leave one out"
            )
        several = ", ".join(dict.fromkeys(run.loss for run in runs))
        raise UserError(f"config.grid.{key} is of no use for config.loss={several}: leave it out")


def _names(text: str | None) -> list[str]:
    return list(dict.fromkeys(name for name in re.split(r"[+,]", text or "") if name))


def literal(text: Any) -> Any:
    """`"4"` -> 4, `"(1, 2)"` -> (1, 2); other strings stay."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _overrides(config: ConfigDict, chosen: list[str]) -> list[tuple[str, dict, dict]]:
    """Methods with their options and changed keys: an item for each combination in `config.runs`."""
    shared = {key: literal(value) for key, value in config.method_kwargs.items()}
    entries = ({},) if config.runs is None else config.runs
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"config.runs={config.runs} must be a list, such as {SEVERAL}, with a comma behind a "
            f"single entry"
        )
    named = [entry["method"] for entry in entries if "method" in entry]
    several = [m for value in named for m in (value if isinstance(value, tuple) else (value,))]
    lookup.allow(*several)
    for key in shared:
        _option(config, [*chosen, *several], key, shared[key])
    out = []
    for entry in entries:
        for values in itertools.product(*(_values(config, k, v) for k, v in entry.items())):
            change = dict(zip(entry, values))
            method = change.pop("method", None)
            for name in [method] if method else chosen:
                mine = {k: v for k, v in change.items() if not _is_key(config, k)}
                for key, value in mine.items():
                    _option(config, [name], key, value)
                known = {k: v for k, v in shared.items() if k in methods.options(name)}
                rest = {k: v for k, v in change.items() if k not in mine}
                out.append((name, known | mine, {"own": mine, **rest}))
    return out


def _values(config: ConfigDict, key: str, value: Any) -> tuple:
    """The values of a key of `config.runs`: a tuple is several, of a key that takes tuples a value."""
    if not isinstance(value, tuple | list):
        return (value,)
    if not value:
        raise UserError(f"config.runs={config.runs} must have values for {key}, such as {SEVERAL}")
    takes_tuples = checks.has(config, key) and checks.kind(config, key) is tuple
    return tuple(value) if not takes_tuples or isinstance(value[0], tuple | list) else (value,)


def _is_key(config: ConfigDict, key: str) -> bool:
    """Whether a key of `config.runs` is one of the configuration; UserError if it makes no run."""
    if key in ("seed", "method"):
        return True
    fixed = ("task", "own", "seeds", "runs", "grid", "method_kwargs")
    if key.partition(".")[0] in fixed or key in PLACES:
        raise UserError(f"config.runs cannot change {key}: set config.{key} for all runs")
    return checks.has(config, key)


def _option(config: ConfigDict, chosen: list[str], key: str, value: Any) -> None:
    """UserError unless one of the methods has an option."""
    for name in chosen:
        methods.get(name)
    every = {option for name in chosen for option in methods.options(name)}
    if key in every:
        return
    if checks.has(config, key):
        raise UserError(f"{key} is no option of a method: write --config.{key}={value}")
    known = {*every, "task", "method"} | {k for k in config if config.runs and k not in every}
    raise unknown(f"option of method {'+'.join(dict.fromkeys(chosen))}", key, known)


def _settings(
    config: ConfigDict, overrides: list, seeds: Iterable[int], suite: bool
) -> list[tuple[ConfigDict, str, dict, int]]:
    """A configuration, method, its options and a seed for each run of a task."""
    out, seen = [], set()
    for method, options, change in overrides:
        given = change.pop("own")
        changed = _changed(config, {k: v for k, v in change.items() if k != "seed"})
        if changed.protocol is None and suite:
            changed.protocol = "fast"
        changed.options = "-".join(f"{k}{_plain(v)}" for k, v in given.items()) or None
        changed.trial = trial_name({k: v for k, v in change.items() if k != "seed"})
        methods.get(method, **options)
        for seed in (change["seed"],) if "seed" in change else seeds:
            checks.hyper("config.runs", {"seed": seed})
            name = (method, changed.options, changed.trial, seed)
            if name in seen:
                raise UserError(f"config.runs={config.runs} must be different runs")
            seen.add(name)
            out.append((changed, method, options, seed))
    return out


def _changed(config: ConfigDict, change: dict[str, Any]) -> ConfigDict:
    """A copy of the configuration with other values, checked."""
    out = copy.deepcopy(config)  # which keeps the types of keys that are None
    lookup.allow(*change.values())
    for key, value in change.items():
        node, last = checks.group(out, key)
        try:
            node[last] = value
        except TypeError as e:
            raise UserError(f"config.runs: {key}={value!r} has the wrong type ({e})") from e
    with out.unlocked():
        out.options = out.trial = None
    if change:
        checks.check(out)
    return out


def _plain(value: Any) -> str:
    """A value in the name of a folder."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def trial_name(change: dict[str, Any]) -> str | None:
    """`"lr0.01-drop_path0.1"` for the keys that a run changes; None for nothing."""
    order = [key for key in GRID if key in change] + [key for key in change if key not in GRID]
    return "-".join(f"{key.rpartition('.')[2]}{_plain(change[key])}" for key in order) or None


# One run --------------------------------------------------------------------------------------


def _resolve_one(
    task_name: str, config: ConfigDict, method_name: str, options: dict, seed: int
) -> ConfigDict:
    run = ConfigDict(config.to_dict())
    del run.seeds, run.runs
    method = methods.get(method_name, **options)
    run.update(task=task_name, method=method_name, seed=seed)
    for kind, text in (("task", task_name), ("method", method_name)):
        if not re.fullmatch(r"(?!\.)[\w .,+-]{1,100}", text.replace(":", ".")):  # it names folders
            raise UserError(
                f"the {kind} {text!r} must have a name of at most 100 letters, digits, _, -, + and "
                f"dots inside: rename it"
            )
    if run.own.path is not None:
        run.own.path = own.absolute(run.own.path)
    run.method_kwargs = ConfigDict(options)
    given = {key: value for key, value in run.loss_kwargs.items() if value is not None}
    checks.fill(run, "loss", method.DEFAULTS.get("loss", metrics.KINDS[task_of(run).kind].loss))
    checks.fill(run.model, "block", method.DEFAULTS.get("block"))
    run.loss_kwargs = ConfigDict(losses.check(run.loss, given))
    for key in checks.searched(run):
        if key in given or key not in run.loss_kwargs:
            run.grid[key] = ()
    bundled = task_of(run).group == "bundled"
    checks.fill(run, "protocol", "fast" if bundled or run.own.path else "official")
    part = task_of(run).parts[1]
    folds = run.protocol == "vtab" and _folds(run)
    if run.protocol in ("vtab", "tune") and not folds and not task_of(run).number(part):
        raise UserError(
            f"config.protocol={run.protocol} needs images to choose on: raise config.own.val"
        )
    answers.check(run, task_of(run))
    if splits(run)[1] != "test" and not task_of(run).number(part):
        raise UserError(f"{run.task} has no images to choose on: raise config.own.val")
    _fill_recipe(run)
    checks.fill(run.model, "variant", "bundled" if bundled else "B/16")
    if run.pretrained.name is None:
        run.pretrained.name = _default_weights(run.model.variant)
    checks.family(run)
    checks.depth(run)
    # Others than the JAX weights say their GELU when they are there: `follow`.
    if "gelu" in models.attributes(run.model.variant) and preprocessing.of_jax(run.pretrained.name):
        checks.fill(run.model, "gelu", preprocessing.JAX.gelu)
    checks.fill(run, "image_size", models.default_size(run.model.variant))
    checks.heads(run.model.variant, run.model.num_heads)
    if run.crop and run.image_width is not None:
        raise UserError(f"config.crop={run.crop} cuts squares: leave config.image_width out")
    if run.crop and (run.crop_from or 0) < run.image_size:
        raise UserError(
            f"config.crop={run.crop} needs config.crop_from of at least the image size {run.image_size}"
        )
    checks.fill(run, "dtype", "float32" if backend.platform() == "cpu" else "bfloat16")
    checks.fill(run, "precision", "highest" if run.dtype == "float32" else "default")
    default = "element" if models.is_vit(run.model.variant) else "sample"  # as their authors
    checks.fill(run, "drop_path_mode", default)
    checks.fill(run.model, "unroll", models.default_unroll(run.model.variant))
    checks.fill(run.model, "attention", models.default_attention(run.model.variant, run.dtype))
    models.check_size(build_model(run), size_of(run))
    check_contracts(run)
    chosen = run.method, run.loss, run.task, run.gradients, run.model.block, run.model.variant
    if code := lookup.code(chosen):
        run.code = code
    return run


def _folds(run: ConfigDict) -> int:
    """In how many parts a search puts the training images; UserError for more than there are."""
    if run.grid.folds > (number := task_of(run).number(splits(run)[0])):
        raise UserError(
            f"config.grid.folds={run.grid.folds} is more than the {number} images of {run.task}: "
            f"lower it"
        )
    return run.grid.folds


def _fill_recipe(run: ConfigDict) -> None:
    """Fills in what the task and the method bring; the keys that come from them are `run.recipe`."""
    mine = recipe(task_of(run), run.method)
    run.recipe = ()
    if run.protocol == "vtab":
        _fill_grid(run, {key: mine.pop(key) for key in GRID})  # which are chosen later
    else:
        del run.grid
    set_epochs(run)
    for key, value in mine.items():
        if run[key] is None:
            run[key], run.recipe = value, (*run.recipe, key)
    official, warmup = run.schedule == "official", run.warmup_epochs
    if warmup and official and 2 * warmup >= run.epochs:
        raise UserError(
            f"config.warmup_epochs={warmup}, and as many at the end, leave nothing of {run.epochs} "
            f"epochs: lower it, or set config.schedule=cosine"
        )
    if warmup and not official and "warmup_epochs" not in run.recipe:
        raise UserError("config.warmup_epochs is only used by config.schedule=official: leave it out")
    if run.restarts is not None and run.schedule != "restarts" and "restarts" not in run.recipe:
        raise UserError("config.restarts is only used by config.schedule=restarts: leave it out")
    if run.schedule == "bigvision" and not run.total_steps:
        raise UserError("config.schedule=bigvision needs config.total_steps: set it")
    if run.warmup_steps is not None and run.schedule != "bigvision":
        raise UserError("config.warmup_steps is only used by config.schedule=bigvision: leave it out")


def set_epochs(run: ConfigDict) -> None:
    """Epochs that `config.total_steps` takes; the last may be cut short."""
    if run.total_steps:
        if run.epochs is not None and run.protocol != "tune":
            raise UserError("config.epochs and config.total_steps exclude each other: set one")
        task = task_of(run)
        number = task.number(splits(run)[0])
        run.epochs = math.ceil(run.total_steps / math.ceil(number / run.batch_size))


def _fill_grid(run: ConfigDict, mine: dict[str, float]) -> None:
    """Makes the values to choose from those of this method and task, `mine`."""
    grid = run.grid.to_dict()
    grid["times_own_lr"] = grid["times_own_lr"] and run.lr is None
    if grid["times_own_lr"]:
        grid["times_own_lr"] = grid["lr"]
        grid["lr"] = tuple(float(f"{mine['lr'] * times:.3g}") for times in grid["lr"])
    chooses = methods.get(run.method).untrained is not None  # by itself
    for key in GRID:
        if run[key] is not None:
            grid[key] = (run[key],)
        elif not grid[key] or chooses:
            grid[key], run.recipe = (mine[key],), (*run.recipe, f"grid.{key}")
    run.grid = ConfigDict(grid)


def _default_weights(variant: str) -> str:
    if variant == "bundled":
        return "bundled"
    name = names.default_name(variant)
    if name is None:
        hub = "" if lookup.is_path(variant) else ", or to hf:timm/<name>"
        raise UserError(
            f"no public weights are known for {variant}: set config.pretrained.name to a .npz or "
            f".safetensors file{hub}"
        )
    return name
