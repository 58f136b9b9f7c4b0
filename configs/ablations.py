"""The ablations of RLRR's paper, on any task: `--config configs/ablations.py:table6,kitti`.

    table6    one side or both, without and with the residual
    table10   starts of the scales (the paper names them; their values are ours, see methods/rlrr.py)
    table11   the product without and with the weight in it, and LoRA of rank 16
    figure2   MHA, FFN, LayerNorms or all, in the first k blocks: four runs for each block
    rank      higher ranks, which the paper tries on CNNs

The rest is as in `vtab.py`; without a task, the bundled `hearts`.
"""

from rlrr_jax import models
from rlrr_jax.configs import vtab
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError

TABLES = {
    "table6": tuple(
        {"sides": sides, "residual": residual}
        for residual in (False, True)
        for sides in ("left", "right", "both")
    ),
    "table10": tuple({"init": i} for i in ("normal", "zero", "constant", "uniform", "paper")),
    "table11": ({"with_weight": False}, {"with_weight": True}, {"method": "lora", "rank": 16}),
    "figure2": (),  # goes by the depth
    "rank": tuple({"rank": r} for r in (1, 2, 4, 8)),
}


def get_config(arg=None):
    """The configuration; `arg` is a table, and what `vtab.get_config` takes."""
    table, _, rest = (arg or "").partition(",")
    if table not in TABLES:
        raise UserError(
            f"write --config configs/ablations.py:TABLE,TASK with one of the tables {', '.join(TABLES)}"
        )
    config = vtab.get_config(rest)
    config.task = config.task or "hearts"
    config.method = config.method or "rlrr"
    config.runs = TABLES[table] or _figure2(config.task)
    return config


def _figure2(task):
    bundled = all(name in tasks.BUNDLED for name in task.replace(",", "+").split("+"))
    depth = models.BUNDLED["depth"] if bundled else 12  # of a ViT-B
    places = ("mha", "ffn", "norm", "mha+ffn+norm+patch")
    return tuple({"where": where, "layers": k + 1} for where in places for k in range(depth))
