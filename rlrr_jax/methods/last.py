"""Partial fine-tuning: only the last blocks are trained ("Partial-k" of Jia et al., ECCV 2022)."""

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods.base import Method, decay_of, positive, replaced, stack, subtree

FORMULA = "W' = anything in the last k blocks, W before"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k
_NORM = ("Transformer", "encoder_norm")
_AFTER_POOLING = ("fc_norm",)  # the final one of MAE's fine-tuning


def method(blocks: int = 1) -> Method:
    """The last `blocks` blocks and, as in VPT's code, the final LayerNorm, as a `Method`."""
    positive("option blocks", blocks)
    return Method(
        lambda key, frozen: _init(frozen, blocks),
        lambda frozen, adapter: _merge(frozen, adapter, blocks),
        decay_of("kernel"),
        DEFAULTS,
        untouched=lambda depth: depth - blocks,
    )


def _init(frozen, k):
    blocks = subtree(frozen, stack(frozen))
    depth = len(blocks["LayerNorm_0"]["scale"])
    if k > depth:
        raise UserError(f"option blocks={k} is more than the {depth} blocks of the model")
    return {
        "last": jax.tree.map(lambda x: jnp.array(x[-k:]), blocks),
        _norm(frozen)[-1]: jax.tree.map(jnp.array, subtree(frozen, _norm(frozen))),
    }


def _norm(frozen):
    """Where a model's final LayerNorm is."""
    return _AFTER_POOLING if _AFTER_POOLING[0] in frozen else _NORM


def _merge(frozen, adapter, k):
    join = lambda first, last: jnp.concatenate([first[:-k], last])
    path = stack(frozen)
    blocks = jax.tree.map(join, subtree(frozen, path), adapter["last"])
    norm = _norm(frozen)
    return replaced(replaced(frozen, path, blocks), norm, adapter[norm[-1]])
