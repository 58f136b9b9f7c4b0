"""Linear probe: only the head is trained."""

from rlrr_jax.methods.base import Method, decay_of, zero_head

FORMULA = "W' = W"
DEFAULTS = dict(lr=1e-2, weight_decay=5e-5, drop_path=0.0)  # not tuned on VTAB-1k


def method():
    """The linear probe as a `Method`."""
    return Method(init, merge, decay_of("kernel"), DEFAULTS)


def init(key, frozen):
    """The head, zero."""
    del key
    return {"head": zero_head(frozen)}


def merge(frozen, trainable):
    """The frozen tree with the trained head."""
    return {**frozen, **trainable}
