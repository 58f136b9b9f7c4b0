"""big_vision's fine-tuning recipe: `--config configs/transfer.py:cifar100_full`.

SGD with momentum 0.9, its state in bfloat16, gradients clipped to norm 1, batch 512, warm-up and cosine
by steps, no weight decay, crops of 384 pixels and flips. Of whole datasets (`cifar10_full`,
`cifar100_full`, `pets_full`, `flowers_full`) or a VTAB-1k task. `method=full`, the default, is
big_vision's baseline with its learning rate of 0.01; `transfer.py:pets_full,method=rlrr` is the
comparison. Other methods than `full` choose theirs on validation images (`config.grid.lr`).

big_vision's best learning rates and crops on validation images (AugReg B/32): CIFAR-10 0.003, CIFAR-100
0.01, both resmall; Pets and Flowers 0.003, inception. Differences: the last batch of an epoch is short
here, where big_vision's batches go on into the next epoch.
"""

from rlrr_jax.configs import vtab
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError

# Steps and warm-up steps. VTAB-1k tasks are of the size of Flowers.
BUDGETS = {"cifar10_full": (10_000, 500), "cifar100_full": (10_000, 500)}
SMALL = (500, 100)


def get_config(arg=None):
    """The configuration; `arg` is what `vtab.get_config` takes, with tasks of one budget."""
    config = vtab.get_config(arg)
    config.task = config.task or "flowers_full"
    names = tasks.expand(config.task.replace(",", "+").split("+"))
    budgets = {BUDGETS.get(name, SMALL) for name in names}
    if len(budgets) > 1:
        raise UserError(f"{config.task} have different numbers of steps: start them one by one")
    config.method = config.method or "full"
    config.protocol = "fast" if config.method == "full" else "vtab"
    if config.protocol == "fast":
        config.lr = 0.01
    config.grid.lr = (0.003, 0.01, 0.03, 0.1, 0.3)
    ((config.total_steps, config.warmup_steps),) = budgets
    config.schedule = "bigvision"
    config.batch_size = 512
    config.optimizer, config.grad_clip = "momentum", 1.0
    config.weight_decay = config.drop_path = 0.0
    config.flip = True
    config.crop, config.crop_from = "resmall", 448
    config.image_size = 384
    if all(name in tasks.BUNDLED for name in names):  # images of 32 pixels
        config.crop_from, config.image_size = 36, 32
    return config
