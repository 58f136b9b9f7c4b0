"""FGVC: `--config configs/fgvc.py:cub`, `fgvc.py:all`, `fgvc.py:augmented,cub,method=lora`.

Without `augmented`, the authors' plain recipe: 50 epochs and 10 at the smallest learning rate, squares
of 224 pixels from images of 256, flips. With it, that of their starred rows (train_fgvc_aug.py): 110
epochs, restarts after 10 and 30, mixup, CutMix, smoothed labels, and a running average of the trained
values, which is tested. It goes over some 5,000 steps: small datasets need as many.

Official training and test images, tested after each epoch (protocol "official"); other learning rates
and methods choose on validation images with `--config.protocol=vtab`. Other tasks take the augmented
recipe, too: `fgvc.py:augmented,cifar`.
"""

from rlrr_jax.configs import vtab
from rlrr_jax.projects.fgvc.data import NAMES


def get_config(arg=None):
    """The configuration; `arg` is what `vtab.get_config` takes, `augmented` among it or not."""
    items = (arg or "").split(",")
    config = vtab.get_config(",".join(item for item in items if item not in ("augmented", "all")))
    config.task = config.task or "+".join(NAMES)
    if "augmented" in items:
        config.epochs = 110
        config.schedule, config.restarts = "restarts", (10, 2)
        config.mixup, config.cutmix, config.label_smoothing = 0.8, 1.0, 0.1
        config.average = 0.9998
    return config
