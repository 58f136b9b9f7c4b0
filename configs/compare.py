"""Methods side by side: `--config configs/compare.py`, `compare.py:cifar,method=rlrr+lora`.

Each method chooses its learning rate on the 200 validation images, among multiples of its own, and
beyond them where the best lies at an end; weight decay and drop path stay its own. Then it trains on
all 1,000 images with three seeds and is tested once. The test images choose nothing. Without a task,
the bundled `hearts`.
"""

from rlrr_jax import methods
from rlrr_jax.configs import vtab


def get_config(arg=None):
    """The configuration; `arg` is what `vtab.get_config` takes; without a method, all of them."""
    config = vtab.get_config(arg)
    config.task = config.task or "hearts"
    config.method = config.method or "+".join(methods.METHODS)
    config.protocol = "vtab"
    config.grid.times_own_lr = True
    config.grid.lr = (0.3, 1.0, 3.0)
    config.grid.extend = True
    config.grid.weight_decay = config.grid.drop_path = ()
    config.seeds = (0, 1, 2)
    return config
