"""GLoRA in static form: kernel and bias rescaled, shifted and prompted (Chavan et al., 2023).

arXiv 2306.07967, https://github.com/Arnav0400/ViT-Slim. Its authors draw the forms of A to E in every
step and search them afterwards; here they are options, the same in every layer. The default is what
PACE (Ni et al., NeurIPS 2024) trains, `LoRA_mul + VPT_add`. With `a="low", c="none", d="none",
e="vector"` it is RLRR on Dense layers, with `b="low"` alone LoRA, with `c="low"` alone VPT-add.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base

FORMULA = "W' = W + W * A + B, b' = b + b * D + E + C W; each a product of rank r, vector, scalar or 0"
DEFAULTS = dict(lr=1e-3, weight_decay=1e-3, drop_path=0.1)  # PACE's most frequent; not tuned here
FORMS = {
    "a": ("low", "vector", "scalar", "none"),
    "b": ("low", "vector", "scalar", "none"),
    "c": ("low", "vector", "none"),
    "d": ("vector", "scalar", "none"),
    "e": ("vector", "scalar", "none"),
}


def method(
    a: str = "low",
    b: str = "none",
    c: str = "low",
    d: str = "vector",
    e: str = "none",
    rank: int = 4,
    targets: str = "+".join(base.DENSE),
) -> base.Method:
    """GLoRA as a `Method`; all parts start at zero.

    Args:
      a: form of A, a factor of the kernel: "low" (of rank r), "vector" (outputs), "scalar" or "none".
      b: form of B, which is added to the kernel.
      c: form of C, inputs whose output is added to the bias: "low", "vector" or "none".
      d: form of D, a factor of the bias: "vector", "scalar" or "none".
      e: form of E, which is added to the bias.
      rank: r of the products. Query, key and value have their own, where PACE shares one.
      targets: Dense layers, joined by "+"; those that a model has not are passed over.

    Raises UserError for other values.
    """
    forms = dict(a=a, b=b, c=c, d=d, e=e)
    _check(forms)
    base.positive("option rank", rank)
    names = base.names_in(targets, base.DENSE, "target of method 'glora'")

    def init(key, frozen):
        out = {}
        for i, (name, site) in enumerate(base.dense(frozen, names).items()):
            keys = jax.random.split(jax.random.fold_in(key, i), len(forms))
            size = (site.depth, site.inputs, site.outputs)
            mine = {p: form if site.bias or p in "ab" else "none" for p, form in forms.items()}
            parts = {p: _part(k, p, form, size, rank) for k, (p, form) in zip(keys, mine.items())}
            out[name] = {p: value for p, value in parts.items() if value is not None}
        return out

    def merge(frozen, adapter):
        def change(name, kernel, bias):
            part = {p: _value(adapter[name].get(p)) for p in forms}
            if bias is not None:
                bias = bias + bias * part["d"] + part["e"] + _through(part["c"], kernel)
            return kernel + kernel * _of_kernel(part["a"]) + _of_kernel(part["b"]), bias

        return base.change_dense(frozen, names, change)

    return base.Method(init, merge, base.decay_of("down", "up"), DEFAULTS)


def _check(forms: dict[str, str]) -> None:
    """UserError for a form that a part cannot have."""
    for name, form in forms.items():
        if form not in FORMS[name]:
            raise UserError(f"unknown {name} {form!r} of method 'glora': use {', '.join(FORMS[name])}")


def _part(key: jax.Array, part: str, form: str, size: tuple, rank: int) -> Any:
    """A part of one Dense of every block, zero; None if it has none."""
    depth, inputs, outputs = size
    if form == "none":
        return None
    if form == "scalar":
        return jnp.zeros((depth, 1))
    if form == "vector":
        return jnp.zeros((depth, inputs if part == "c" else outputs))
    if part == "c":  # inputs by one
        up = base.uniform(key, (depth, rank, 1), math.sqrt(6 / (rank + 1)))
        return {"down": jnp.zeros((depth, inputs, rank)), "up": up}
    down = base.uniform(key, (depth, inputs, rank), math.sqrt(6 / (inputs + rank)))  # Xavier
    return {"down": down, "up": jnp.zeros((depth, rank, outputs))}


def _value(part: Any) -> Any:
    """[L, in, out] or [L, in, 1] of a product, [L, n] of a vector, [L, 1] of a scalar, 0 of none."""
    if part is None:
        return 0.0
    return base.dot(part["down"], part["up"]) if isinstance(part, dict) else part


def _through(prompt: Any, kernel: jax.Array) -> Any:
    """What kernels [L, in, out] make of a prompt, [L, out]; 0 of none."""
    if not jnp.ndim(prompt):
        return prompt
    return base.dot(prompt.reshape(len(kernel), 1, -1), kernel)[:, 0]


def _of_kernel(value: Any) -> Any:
    """A value of `_value` that broadcasts against kernels [L, in, out]."""
    return value[:, None] if jnp.ndim(value) == 2 else value
