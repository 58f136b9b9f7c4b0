"""Your own images: `--config configs/own.py:/data/birds`, `own.py:/data/birds,method=linear+rlrr`.

    /data/birds/train/<class>/*, val/, test/      splits as they are
    /data/birds/<class>/*                         a fifth of each class is tested on
    /data/birds.csv                               columns path,label[,split]; or lines "path label"
    hf:/data/birds, hf:user/birds                 a dataset of Hugging Face, on this disk or the Hub
    tfds:food101                                  a prepared tfds dataset, its own splits

The rest is as in `vtab.py`. A run is tested once, after the last epoch (protocol "fast"). Photographs
are turned as their EXIF says. `--config.own.shots=16` keeps 16 training images of each class.
"""

from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError


def get_config(arg=None):
    """The configuration; `arg` is where the images are, then what `vtab.get_config` takes."""
    location, _, rest = (arg or "").partition(",")
    if location.partition("=")[0].isidentifier() and "=" in location:
        location, rest = "", arg
    for word in filter(None, rest.split(",") + [location] * ("=" in location)):
        if not word.partition("=")[0].isidentifier() or "=" not in word:
            raise UserError(
                f"{word!r} is no option, such as method=linear+rlrr or task=NAME: correct it, or give "
                f"a folder whose name has a comma or = by --config.own.path=FOLDER"
            )
    config = vtab.get_config(rest)
    config.own.path = location
    config.data.upright = True
    return config
