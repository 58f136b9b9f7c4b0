"""Nearest neighbours: nothing is trained, the most alike training images vote.

DINO's protocol (Caron et al., ICCV 2021; facebookresearch/dino, eval_knn.py): cosine similarity s of
what the head gets, votes exp(s / 0.07) of the k most alike. k is chosen on the images set aside, which
vote at the end, too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlrr_jax.errors import UserError
from rlrr_jax.methods import linear
from rlrr_jax.methods.base import Method, Untrained, decay_of
from rlrr_jax.methods.base import number as check_number

FORMULA = "share of a class = sum of exp(s_i / temperature) over its images among the k most alike"
DEFAULTS = dict(lr=1e-2, weight_decay=0.0, drop_path=0.0)  # which nothing uses
KS = (1, 5, 10, 20, 50, 100, 200)  # of which k is chosen
QUERIES = 256  # images that are compared at once


def method(k: int = 0, temperature: float = 0.07) -> Method:
    """k nearest neighbours as a `Method`.

    Args:
      k: number of neighbours; 0 is chosen from `KS` on images set aside.
      temperature: by which similarities are divided.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise UserError(f"k={k} must be a whole number, 0 to choose it on images set aside")
    check_number("temperature", temperature)
    if temperature <= 0:
        raise UserError(f"temperature={temperature} must be greater than 0")
    untrained = Untrained(
        functools.partial(choose, k=k, temperature=temperature),
        functools.partial(answer, temperature=temperature),
    )
    whole = lambda depth: depth + 1
    return Method(linear.init, linear.merge, decay_of(), DEFAULTS, untouched=whole, untrained=untrained)


def choose(bank: tuple, held_out: tuple, judge: Callable, k: int, temperature: float) -> dict:
    """The number of neighbours, see `Untrained`: the smallest of `KS` with the best score, or `k`."""
    if k:
        return {"k": k}
    tried = [n for n in KS if n <= len(bank[0])]
    found = neighbours(bank[0], held_out[0], tried[-1])
    scores = {n: judge(votes(*found, bank[1], n, temperature)) for n in tried}
    return {"k": max(tried, key=lambda n: (scores[n] is not None, scores[n] or 0.0, -n))}


def answer(bank: tuple, features: Any, k: int, temperature: float, same: bool = False) -> np.ndarray:
    """Mean targets [n, C] of features [n, D] by `k` neighbours, see `Untrained`."""
    return votes(*neighbours(bank[0], features, k, same), bank[1], k, temperature)


def neighbours(bank: Any, features: Any, k: int, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and numbers [n, k] of the images of a bank that are most alike, in order."""
    unit = lambda x: (
        np.float32(x) / np.maximum(np.linalg.norm(np.float32(x), axis=-1, keepdims=True), 1e-12)
    )
    bank, features, k = jnp.asarray(unit(bank)), unit(features), min(k, len(bank) - same)

    @jax.jit
    def nearest(bank: jax.Array, some: jax.Array, rows: jax.Array) -> tuple:
        alike = jnp.matmul(some, bank.T, precision="highest")
        own = rows[:, None] == jnp.arange(len(bank))[None]
        return tuple(jax.lax.top_k(jnp.where(own, -jnp.inf, alike), k))

    out = []
    for start in range(0, len(features), QUERIES):
        some = features[start : start + QUERIES]
        rows = start + np.arange(len(some)) if same else np.full(len(some), -1)
        pad = QUERIES - len(some)
        filled = nearest(bank, np.pad(some, ((0, pad), (0, 0))), np.pad(rows, (0, pad)))
        out.append([np.asarray(x)[: len(some)] for x in filled])
    alike, which = (np.concatenate(parts) for parts in zip(*out))
    return alike, which


def votes(alike: Any, which: Any, targets: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Weighted mean targets [n, C] of the first k neighbours."""
    weights = np.exp((np.float64(alike[:, :k]) - alike[:, :1]) / temperature)
    weights /= weights.sum(1, keepdims=True)
    out = np.zeros((len(which), targets.shape[1]))
    for j in range(weights.shape[1]):  # not [n, k, C] at once
        out += weights[:, j, None] * targets[which[:, j]]
    return out
