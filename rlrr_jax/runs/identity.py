"""What makes two runs the same work, and what rows of results are grouped by."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from rlrr_jax import lookup, losses, methods, models
from rlrr_jax.checks import GRID, SEARCH
from rlrr_jax.data import crops
from rlrr_jax.data.task import Task
from rlrr_jax.models import vit
from rlrr_jax.weights import names, preprocessing

# What may differ between two starts of the same run: where and how, not what. All other keys, those
# that a fork adds, too, are part of a run's identity.
PLACES = (
    "num_devices",
    "checkpoint_seconds",
    "log",
    "eval_batch_size",
    "accumulate",
    "shard_weights",
    "model.unroll",
    "model.remat",
    "trial",
    "options",
    "data.dir",
    "data.cache_dir",
    "data.device_gb",
    "pretrained.cache_dir",
    "own.path",  # the images themselves are in the name of the dataset
    "machine",  # where it was last started, see `train`
    "searching",  # evaluated after the last epoch alone
    "val_acc",  # of the setting that "vtab" chose: a result
    "val_tried",  # of all that it tried
    "tried",  # which values those were
    "head_classes",  # of a head that tasks of one start share, see `heads`
)
# Keys that came later, and were None before.
_NONE_BEFORE = (
    *("average", "class_weights", "keep", "patience", "temperature"),
    *("restarts", "gradients", "warmup_epochs", "image_width"),
)


def recipe(task: Task, method_name: str) -> dict[str, Any]:
    """What a task and a method bring where the configuration says nothing."""
    own = {k: v for k, v in methods.get(method_name).DEFAULTS.items() if k not in ("loss", "block")}
    recipe = dict(epochs=task.epochs, schedule=task.schedule, flip=task.flip)
    return {**recipe, **task.extra, **own, **task.recipes.get(method_name, {})}


def together(run: Any) -> str:
    """What runs that are trained together have in common: all but seed and hyper-parameters.

    With random crops, which all trials share, the seed, too.
    """
    plain = run.to_dict()
    for key in (
        "trial",
        "recipe",
        "val_acc",
        "val_tried",
        "tried",
        *GRID,
        *(() if crops.by_host(run.crop) else ("seed",)),
    ):
        plain.pop(key, None)
    plain["loss_kwargs"] = losses.fixed(plain.get("loss_kwargs") or {})
    return json.dumps(plain, sort_keys=True)


def described(run: Any, provenance: dict | None = None) -> dict[str, Any]:
    """A run's configuration without `PLACES`, and the provenance of weights and data, plain values.

    What is as it was before a key existed is left out, so that runs of before it stay the same work.
    """
    plain = {**run.to_dict(), **(provenance or {})}
    if not (plain.get("own") or {}).get("path"):
        plain.pop("own", None)  # a task of ours
    for place in PLACES:
        *parents, last = place.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    model, given, data = (plain.get(key) or {} for key in ("model", "pretrained", "data"))
    variant = model.get("variant")
    code_of = variant is None or lookup.is_path(variant)  # which a row must not import
    heads = None if code_of else models.sizes(str(variant)).get("num_heads")
    new: tuple = (
        *((given, key, preprocessing.HALF) for key in ("mean", "std")),
        *((given, key, False) for key in ("resize_patch", "ignore_json")),
        (given, "resize", "linear"),
        (model, "num_heads", heads),
        (model, "norm_eps", 1e-6),
        *((model, key, None) for key in (*vit.PARTS, *vit.CHOSEN)),
        (data, "upright", False),
        *((plain.get("grid") or {}, key, 0) for key in SEARCH),
        *((plain.get("grid") or {}, key, ()) for key in tuple(plain.get("grid") or ())),
        (plain, "loss", "cross_entropy"),
        (plain, "loss_kwargs", {}),
        (plain, "frozen_dtype", "float32"),
        (plain, "eval_every", 1),
        *((plain, key, 0.0) for key in ("mixup", "cutmix", "label_smoothing")),
        *((plain, key, None) for key in _NONE_BEFORE),
    )
    for node, key, before in new:
        value = tuple(node[key]) if isinstance(node.get(key), list) else node.get(key)
        if value is None or value == before:
            node.pop(key, None)
    if name := given.get("name"):
        given["name"] = names.canonical(name)
    if crops.by_host(plain.get("crop")):
        plain["crops"] = "by seed"  # in the first version they were the same for all seeds
    return json.loads(json.dumps(plain))


def identity(run: Any) -> dict[str, Any]:
    """A run's configuration without paths and devices, as plain values; equal for the same work."""
    plain = described(run)
    plain.get("grid", {}).pop("times_own_lr", None)  # its lr has the products
    plain.pop("recipe", None)  # its values are there
    return plain


def fingerprint(runs: Iterable[Any], provenance: dict | None = None) -> str:
    """Eight hex digits that name the work of these runs, and of the weights and dataset they used."""
    return _digest([[identity(run) for run in runs], provenance or {}])


@functools.cache
def code() -> str:
    """Eight hex digits that name the code that trains: our package, and the version of JAX."""
    root = pathlib.Path(__file__).parents[1]
    paths = sorted(path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "configs")
    each = [(path.relative_to(root).as_posix(), path.read_bytes().hex()) for path in paths]
    return _digest([each, jax.__version__])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def setting(values: dict) -> dict[str, Any]:
    """What the seeds of one line share: `described` without the seed and what was searched."""
    grid = values.get("grid") or {}
    leave = ("seed", "recipe", *(GRID if grid else ()))  # chosen from it
    leave += ("loss_kwargs",) if {*grid} - {*GRID, *SEARCH} else ()
    return {key: value for key, value in values.items() if key not in leave}


def across_tasks(values: dict) -> dict[str, Any]:
    """What the tasks of one line of a suite's table share: a `setting` without the task.

    Values that came from the recipe of a task and method are left out, since every task has its own.
    """
    keys = values["recipe"]
    values = json.loads(json.dumps(setting(values)))
    grid = values.get("grid") or {}
    keys = [*keys, "task", "dataset"]
    keys += ["epochs"] if values.get("total_steps") else []  # which make them
    keys += ["grid.lr"] if grid.get("times_own_lr") else []
    for key in keys:
        node = grid if key.startswith("grid.") else values
        node.pop(key.removeprefix("grid."), None)
    return values


def digests(values: dict) -> dict[str, str]:
    """`{"setting", "line"}`: what rows of results are grouped by, for one task and across tasks."""
    return {"setting": _digest(setting(values)), "line": _digest(across_tasks(values))}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`["lr=0.01 (now 0.02)", ...]` for two nested dicts."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}={a} (now {b})")
    return out
