"""Rows of results as runs write them, without training."""

import functools

from ml_collections import ConfigDict

from rlrr_jax import config as config_lib
from rlrr_jax.configs import vtab
from rlrr_jax.runs import identity

MARKS = {"backbone_sha256": "ab" * 32, "dataset": "d"}
GROUPS = {
    "variant": "data",
    "source": "data",
    "gelu": "model",
    "mean": "pretrained",
    "std": "pretrained",
}


@functools.cache
def resolved(task, method):
    config = vtab.get_config(f"{task},method={method}")
    config.seeds, config.protocol = (0,), "fast"
    config.data.update(source="tfds", variant="original")
    (run,) = config_lib.resolve(config)
    return run


def row(task, seed=0, method="rlrr", **changes):
    """A row of a run with other keys than the recipe's; keys of results go into the row alone."""
    run = ConfigDict(resolved(task, method).to_dict())
    sha256 = changes.get("backbone_sha256", MARKS["backbone_sha256"])
    run.seed = seed
    for key, value in changes.items():
        if key == "backbone":
            run.pretrained.name = value
        elif key == "method_kwargs":
            run.method_kwargs = ConfigDict(value)
        elif key in GROUPS:
            run[GROUPS[key]][key] = value
        elif key in run:
            run[key], run.recipe = value, tuple(name for name in run.recipe if name != key)
    if run.protocol == "vtab":
        grid = {"lr": (1e-3, 1.0), "weight_decay": (0.0,), "drop_path": (0.0,), "times_own_lr": False}
        run.grid = ConfigDict(grid)
    values = identity.described(run, {**MARKS, "backbone_sha256": sha256})
    plain = {k: v for k, v in run.to_dict().items() if not isinstance(v, dict)}
    return {
        **plain,
        **dict(source=run.data.source, variant=run.data.variant, backbone=run.pretrained.name),
        **dict(gelu=run.model.gelu, method_kwargs=run.method_kwargs.to_dict(), trial=None, **MARKS),
        **dict(trainable_params=288_768, head_params=1_552, val_acc=None, test_acc_best=None),
        **dict(test_acc_final=0.5, train_loss=0.1, num_test=10, wall_seconds=1.0, best_epoch=None),
        **dict(images_per_second=1.0, device="1 x cpu", identity=f"{task}{seed}{values}"),
        **changes,
        **identity.digests(values),
        "config": values,
    }
