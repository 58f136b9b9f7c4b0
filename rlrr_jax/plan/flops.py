"""FLOPs of matmuls and convolutions in a traced program, with its loops (not by `cost_analysis`)."""

import math
from typing import Any

import jax.extend.core


def flops(jaxpr: Any) -> float:
    """FLOPs of a device's share. A loop of unknown length, over steps, counts as one turn.

    Args:
      jaxpr: a `jax.core.Jaxpr`, such as `jitted.trace(*arguments).jaxpr.jaxpr`.
    """
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, shapes = equation.primitive.name, [x.aval.shape for x in equation.invars]
    out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * out * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        params = equation.params
        outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        spread = math.prod(params["lhs_dilation"])  # zeros between the pixels of a gradient
        return 2 * out * math.prod(shapes[1]) / outputs / spread / params["batch_group_count"]
    if name.startswith("dot_product_attention"):  # cuDNN's: 2 matmuls, 5 with their gradient
        batch, queries, heads, width = shapes[0]
        return (10 if "bwd" in name else 4) * batch * heads * queries * shapes[1][1] * width
    turns = equation.params.get("length", 1) if name == "scan" else 1
    inner = [flops(each) for x in equation.params.values() for each in _inner(x)]
    return turns * (max(inner, default=0) if name == "cond" else sum(inner))


def _inner(value: Any) -> list[Any]:
    """The programs in a parameter of an operation."""
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, jax.extend.core.Jaxpr):
        return [value]
    return [x for each in value for x in _inner(each)] if isinstance(value, tuple | list) else []
