"""Dense layers and attention, whose matmuls use the bfloat16 units of CPUs where that is asked for.

With `config.precision=bfloat16` the inputs of a float32 matmul are rounded to bfloat16 and their
products summed in float32, as TPUs do by default. XLA ignores that word on CPUs, so it is done here,
in the forms that XLA's library for CPUs (YNNPACK, with AMX or AVX512-BF16) takes. A CPU without such
units computes the same, no faster than in float32.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from rlrr_jax import backend
from rlrr_jax.errors import first_line


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Softmax attention, its softmax in float32 or higher.

    Args:
      query: queries [..., T, heads, Dh].
      key, value: of S tokens [..., S, heads, Dh].
      bias: what is added to the logits, as many axes as [..., heads, T, S]; None: nothing.

    Returns [..., T, heads, Dh] in the dtype of `query`.
    """
    query = query * query.shape[-1] ** -0.5
    # Heads first: with them between tokens and channels XLA's matmuls take twice as long on CPUs.
    q, k, v = (jnp.moveaxis(x, -2, -3) for x in (query, key, value))
    logits = _product(q, k, transposed=True)
    weights = jax.nn.softmax(logits if bias is None else logits + bias, -1).astype(query.dtype)
    return jnp.moveaxis(_product(weights, v), -3, -2).astype(query.dtype)


def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array, number: int) -> jax.Array:
    """cuDNN's attention, [B, T, heads, Dh] of as many queries, keys and values; it keeps no logits.

    Args:
      query, key, value: [B, T, heads, Dh] in bfloat16, T even.
      number: how many tokens are real; those behind are masked.
    """
    # Of the queries, so that trials have them, too: JAX's rule for `vmap` asks for that.
    real = number + (jnp.isnan(query[:, 0, 0, 0]) & False).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        *(query, key, value), query_seq_lengths=real, key_value_seq_lengths=real, implementation="cudnn"
    )


def takes_heads_of(width: int) -> bool:
    """Whether cuDNN's attention is for heads of a width, on every GPU that has it."""
    return width % 8 == 0 and width <= 128


@functools.cache
def fused_attention_works(width: int) -> bool:
    """Whether this GPU computes `fused_attention` of a head's width, and its gradient, as XLA does."""
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(2, 6, 2, width)), jnp.bfloat16) for _ in range(3)]

    def values(function: Any) -> Any:
        total = lambda *qkv: (function(*qkv)[:, :5].astype(jnp.float32) ** 2).sum()
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*qkv)

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key[:, :5], value[:, :5])

    try:
        ours = values(functools.partial(fused_attention, number=5))
        plain_values = [np.asarray(x, np.float32) for x in jax.tree.leaves(values(plain))]
        pairs = zip(jax.tree.leaves(ours), plain_values)
        if all(np.allclose(np.asarray(a, np.float32), b, 0.05, 0.05) for a, b in pairs):
            return True
        why = "its numbers are not XLA's"
    except Exception as e:  # no cuDNN, an old GPU, an old driver: each has its own error
        why = first_line(e)
    print(f"note: cuDNN's attention does not work here ({why}): XLA's is taken", flush=True)
    return False


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> Any:
    """`jax.lax.dot_general` as a Dense layer calls it: the last axes of `x`, the first of a kernel.

    Args:
      x: inputs [..., inputs...].
      kernel: weights [inputs..., outputs...].
      dimension_numbers: the axes that are summed over; no batch axes.
      precision: the layer's own, see `jax.lax.dot_general`.

    Returns [..., outputs...] in the dtype of `x`.
    """
    if not _narrow(x):
        return checkpoint_name(
            lax.dot_general(x, kernel, dimension_numbers, precision=precision), DENSE
        )
    number = len(dimension_numbers[0][0])
    inputs, before, outputs = math.prod(kernel.shape[:number]), x.shape[:-number], kernel.shape[number:]
    y = _product(x.reshape(-1, inputs), kernel.reshape(inputs, -1))
    return checkpoint_name(y.reshape(*before, *outputs).astype(x.dtype), DENSE)


DENSE = "dense"  # name of what Dense layers give, for policies of `jax.checkpoint`
Dense = functools.partial(nn.Dense, dot_general=dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dot_general)


class LayerNorm(nn.Module):
    """flax's, in whose gradient its input and two numbers of each token are kept."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Inputs [..., D] with a mean of 0 and a variance of 1, scaled and shifted."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        scale, bias = (value.reshape(*(1,) * (x.ndim - 1), -1) for value in (scale, bias))
        high = jnp.promote_types(self.dtype, jnp.float32)

        def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = x.astype(high)
            return x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)

        def normalised(x: jax.Array, mean: jax.Array, factor: jax.Array, *own: jax.Array) -> jax.Array:
            return ((x - mean) * (factor * own[0]) + own[1]).astype(self.dtype)

        mean, square = jax.checkpoint(moments)(x)
        factor = lax.rsqrt(jnp.maximum(0.0, square - jnp.square(mean)) + self.epsilon)
        return jax.checkpoint(normalised)(x, mean, factor, scale, bias)


def in_order(x: jax.Array) -> jax.Array:
    """The same, in memory as its axes say: on GPUs XLA would else put the images last, and copy."""
    if backend.platform() != "gpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """What `jax.checkpoint` keeps of Dense layers: what matmuls give, and kernels in their dtype."""
    return primitive.name in ("dot_general", "convert_element_type", "custom_vjp_call")


# Products of matrices [..., m, k], in float32 or higher -----------------------------------------


def _narrow(x: jax.Array) -> bool:
    """Whether the matmul of an array is one of bfloat16 on a CPU."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    asked = precision == "bfloat16" and x.dtype == jnp.float32
    return backend.platform() == "cpu" and (asked or x.dtype == jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """`a @ b`, or `a @ b^T`."""
    if _narrow(a):
        return _narrow_product(a, b, transposed)
    return _dot(a, b, transposed, jnp.promote_types(a.dtype, jnp.float32))


def _dot(a: jax.Array, b: jax.Array, transposed: bool, kind: Any = jnp.float32) -> jax.Array:
    """The product with sums in a dtype."""
    batch = tuple(range(a.ndim - 2))
    axes = (a.ndim - 1,), (b.ndim - (1 if transposed else 2),)
    return lax.dot_general(a, b, (axes, (batch, batch)), preferred_element_type=kind)


def _library(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """A product of bfloat16 that stays as it is: XLA would swap the factors where it is transposed.

    Its library takes no first factor transposed in place, and nothing else multiplies these.
    """
    return lax.optimization_barrier(_dot(a, b, transposed))


def _written_transposed(x: jax.Array) -> jax.Array:
    """A transpose that XLA writes in order, for a first factor."""
    return lax.optimization_barrier(jnp.swapaxes(x, -1, -2)[None])[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(a: jax.Array, b: jax.Array, transposed: bool) -> jax.Array:
    return _forward(a, b, transposed)[0]


def _forward(a: jax.Array, b: jax.Array, transposed: bool) -> tuple:
    kinds = jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype)  # the dtypes of the gradients
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _library(a, b, transposed), (a, b, kinds)


def _backward(transposed: bool, kept: tuple, g: jax.Array) -> tuple:
    a, b, kinds = kept
    g = g.astype(jnp.bfloat16)
    left, right = (g, a) if transposed else (a, g)  # g^T a, or a^T g
    grads = _library(g, b, not transposed), _library(_written_transposed(left), right)
    return tuple(grad.astype(kind.dtype) for grad, kind in zip(grads, kinds))


_narrow_product.defvjp(_forward, _backward)
