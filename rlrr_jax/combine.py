"""One adapter of RLRR from several on the same backbone (Dong et al., 2024, supplement H)."""

import numpy as np

from rlrr_jax import adapters as adapters_lib
from rlrr_jax import cards, methods
from rlrr_jax.cards import Adapter
from rlrr_jax.errors import UserError


def combine(
    adapters: list[Adapter], weights: list[float] | None = None, way: str = "scales", head: int = 0
) -> Adapter:
    """One adapter from several of RLRR on the same backbone (Dong et al., 2024, supplement H).

    Args:
      adapters: `Adapter`s of method `rlrr`, with the same options.
      weights: a weight of each; None shares 1 equally. LayerNorms and the patch embedding, which have
        no product, get `1 + sum_i w_i (scale_i - 1)`, and every shift `sum_i w_i shift_i`.
      way: "scales" multiplies the sums, `(sum_i w_i in_i) (sum_i w_i out_i)`; "products" sums the
        products, `sum_i w_i in_i out_i`, an adapter of as many times the rank. The paper prints the
        second without weights, which is `weights=[1, 1, ...]` but for shifts.
      head: number of the adapter whose head and classes are taken.

    Returns:
      An `Adapter`.

    Raises UserError if they do not fit together.
    """
    weights = [1 / max(len(adapters), 1)] * len(adapters) if weights is None else list(weights)
    options = _check_combine(adapters, weights, way)
    if not -len(adapters) <= head < len(adapters):
        raise UserError(f"there is no adapter {head} of {len(adapters)} to take the head of")
    first = adapters[0].card
    rank = options["rank"] * (len(adapters) if way == "products" else 1)
    trees = [adapters_lib.flattened(a.trainable) for a in adapters]
    of_head = lambda key: key.startswith(("head/", "loss/"))
    out = {key: value for key, value in trees[head].items() if of_head(key)}
    for key in (key for key in trees[0] if not of_head(key)):
        parts, name = [tree[key] for tree in trees], key.rsplit("/", 1)[-1]
        if name == "scale":
            out[key] = 1 + sum(w * (x - 1) for w, x in zip(weights, parts))
        elif way == "products" and name in ("scale_in", "scale_out"):
            factors = weights if name == "scale_in" else [1] * len(parts)
            out[key] = _beside(name, [w * x for w, x in zip(factors, parts)], options["rank"])
        else:
            out[key] = sum(w * x for w, x in zip(weights, parts))
    taken = adapters[head].card
    config = {**taken["config"], "method_kwargs": {**first["method_kwargs"], "rank": rank}}
    made = [[w, a.card["task"], a.card["accuracy"]] for w, a in zip(weights, adapters)]
    card = {**taken, "method_kwargs": config["method_kwargs"], "config": config}
    card |= {"combined": {"way": way, "of": made}, "accuracy": {}}
    out = {key: np.asarray(value, np.float32) for key, value in out.items()}
    return Adapter(adapters_lib.unflattened(out), card)


def _check_combine(adapters, weights, way):
    """UserError unless adapters combine; returns the options that they share."""
    if way not in ("scales", "products"):
        raise UserError(f"adapters are combined by way='scales' or 'products', not {way!r}")
    if len(weights) != len(adapters):
        raise UserError(f"{len(adapters)} adapters need as many weights, not {len(weights)}")
    if not adapters or not np.isfinite(weights).all():
        raise UserError(f"at least one adapter is combined, with finite weights, not {weights}")
    first = adapters[0].card
    same = lambda card: (
        {k: card[k] for k in ("backbone_sha256", "method_kwargs", "gelu")} | cards.how(card)
    )
    for other in (a.card for a in adapters):
        if other["method"] != "rlrr":
            raise UserError(f"only adapters of rlrr are combined, not of {other['method']}")
        for key, value in same(first).items():
            if same(other)[key] != value:
                text = f"({value}, {same(other)[key]})"
                raise UserError(f"adapters with another {key} {text} do not combine")
    options = {**methods.options("rlrr"), **cards.plain(first["method_kwargs"])}
    if options["sides"] != "both":
        raise UserError(
            f"adapters of rlrr with sides={options['sides']} do not combine: they have no product"
        )
    return options


def _beside(name, parts, rank):
    """Scales as those of one adapter of higher rank: [L, in..., r] or [L, r, out...]."""
    axis = -1 if name == "scale_in" else 1
    return np.stack(parts, axis) if rank == 1 else np.concatenate(parts, axis)
