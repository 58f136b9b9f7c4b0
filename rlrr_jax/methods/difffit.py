"""DiffFit: biases, LayerNorms and a factor of each residual branch (Xie et al., ICCV 2023).

arXiv 2304.06648. The factor multiplies what attention or the MLP adds, so it folds into `out` or
`Dense_1`. The paper does not say whether it is one number or one for each channel: one number here,
the plainest reading.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.methods import base

FORMULA = "LayerNorms and biases anything; out and Dense_1: W' = g W, b' = g b"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k
BRANCHES = ("out", "Dense_1")  # the last layers of attention and MLP


def method() -> base.Method:
    """DiffFit as a `Method`."""
    return base.Method(init, merge, base.decay_of(), DEFAULTS)


def init(key: jax.Array, frozen: Any) -> dict:
    """Copies of all biases and of the scales of LayerNorms, `copies`, and factors [L], `gamma`."""
    del key
    ours = lambda path: path[-1] in ("bias", "scale") and path[0] != "head"
    copies = {path: jnp.array(x) for path, x in flatten_dict(frozen).items() if ours(path)}
    depths = {name: site.depth for name, site in base.dense(frozen, BRANCHES).items()}
    return {
        "copies": unflatten_dict(copies),
        "gamma": {name: jnp.ones(depth) for name, depth in depths.items()},
    }


def merge(frozen: Any, adapter: Any) -> Any:
    """The frozen tree with the trained biases and LayerNorms, and its branches rescaled."""
    tree = unflatten_dict({**flatten_dict(frozen), **flatten_dict(adapter["copies"])})

    def change(name, kernel, bias):
        gamma = adapter["gamma"][name]
        return kernel * gamma[:, None, None], bias * gamma[:, None]

    return base.change_dense(tree, BRANCHES, change)
