"""HiRA: each kernel is multiplied by one plus a product of low rank (Huang et al., ICLR 2025).

It is RLRR of that rank without shifts, and norms left alone, from another start. The change of a kernel
itself has a high rank.
"""

from rlrr_jax.methods import base
from rlrr_jax.methods.lora import factors, product

FORMULA = "W' = W + W * (A B)"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, drop_path=0.0)  # not tuned on VTAB-1k


def method(rank: int = 32, targets: str = "+".join(base.DENSE)) -> base.Method:
    """HiRA as a `Method`; it starts at the identity, and has no dropout, which could not be folded.

    Args:
      rank: r of A [in, r] and B [r, out]; 32 is its authors'.
      targets: Dense layers, joined by "+"; those that a model has not are passed over.

    Raises UserError for other values.
    """
    base.positive("option rank", rank)
    names = base.names_in(targets, base.DENSE, "target of method 'hira'")

    def merge(frozen, adapter):
        change = lambda name, kernel, bias: (kernel + kernel * product(adapter[name]), bias)
        return base.change_dense(frozen, names, change)

    init = lambda key, frozen: factors(key, frozen, names, rank)
    return base.Method(init, merge, base.decay_of("down", "up"), DEFAULTS)
