"""A model whose Dense layers add the change of their weights apart, times noise (PACE).

PACE (Ni, Zhang and Koniusz, NeurIPS 2024, https://github.com/MaxwellYaoNi/PACE) trains with
`x W0 + b0 + Z * (x dW + db)` instead of `x W + b` in each Dense of the blocks and in the head, where W0
is the pretrained kernel, dW what the adapter changed of it, and Z normal noise around 1 for each image
and output. Neither models nor methods know of it: calls of Dense layers are intercepted.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from rlrr_jax.methods.sites import STACK, block_numbers, stack_of

PLAIN = ("embedding", "patch_embed")  # a convolution in PACE's code, which it leaves alone


class Noise(NamedTuple):
    """Noise of a forward pass.

    Attributes:
      keys: a key for each image [b].
      sigma: standard deviation in the second block; it falls to that of the head, `sigma / L`. The
        first block has none. May be traced.
    """

    keys: jax.Array
    sigma: Any


def apply(model: Any, frozen: Any, params: Any, noise: Noise, *inputs: Any) -> jax.Array:
    """The model's logits with noise on what was changed.

    Args:
      model: a flax model.
      frozen: its tree before the change.
      params: its tree after the change, merged.
      noise: the `Noise`; with a sigma of 0 the logits are those of `params`, up to rounding.
      *inputs: what the model takes.
    """
    base, change = split(frozen, params)
    variables = {"params": base, "change": change, "noise": multipliers(change, noise)}
    with nn.intercept_methods(_dense):
        return model.apply(variables, *inputs)


def split(frozen: Any, params: Any) -> tuple[dict, dict]:
    """The tree to apply, frozen in its Dense layers, and what was changed there: kernels and biases."""
    base, change = {}, {}
    for name, node in params.items():
        if name in PLAIN or not isinstance(node, dict) or name not in frozen:
            base[name] = node
        elif "kernel" in node:
            base[name] = frozen[name]
            change[name] = jax.tree.map(jnp.subtract, node, frozen[name])
        else:
            base[name], changed = split(frozen[name], node)
            change |= {name: changed} if changed else {}
    return base, change


def multipliers(change: Any, noise: Noise) -> Any:
    """Z of each Dense: [L, b, outputs...] of those in blocks, [b, outputs] of the head and others.

    What lies between stages of a network, as the merging of patches, has the noise of the head.
    """
    numbers = block_numbers(change)
    depth = sum(map(len, numbers.values()))
    levels = sigmas(depth, noise.sigma)
    flat = jax.tree_util.tree_leaves_with_path(change, is_leaf=lambda x: "kernel" in x)
    out: dict = {}
    for i, (path, node) in enumerate(flat):
        names = tuple(key.key for key in path)
        keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(noise.keys)
        if STACK in names:
            blocks = jnp.array(numbers[stack_of(names)])
            # Of a Dense without a bias, such as DINOv3's key, the outputs are heads.
            shape = node["bias"].shape[1:] if "bias" in node else node["kernel"].shape[2:]
            one = lambda level, block, shape=shape: _draw(keys, level, block, shape)
            z = jax.vmap(one)(levels[blocks], blocks)
        else:
            outputs = node["bias"] if "bias" in node else node["kernel"][0]  # CLIP's projection
            z = _draw(keys, levels[-1], depth, outputs.shape)
        out[(*names, "z")] = z
    return unflatten_dict(out)


def sigmas(depth: int, sigma: Any) -> jax.Array:
    """Standard deviations of each block and of the head [L + 1]: none in the first, then falling."""
    falling = sigma * jnp.arange(depth, 0, -1) / depth
    return jnp.concatenate([jnp.zeros(1), falling])


def _draw(keys: jax.Array, sigma: Any, block: Any, shape: tuple) -> jax.Array:
    one = lambda key: jax.random.normal(jax.random.fold_in(key, block), shape)
    return 1 + sigma * jax.vmap(one)(keys)


def _dense(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Adds the noisy change to what a Dense layer gives, where there is one."""
    y = call(*args, **kwargs)
    module = context.module
    if context.method_name != "__call__" or not module.has_variable("change", "kernel"):
        return y
    change: Any = {
        name: module.get_variable("change", name)
        for name in ("kernel", "bias")
        if module.has_variable("change", name)
    }
    changed = module.clone(parent=None, name=None).apply({"params": change}, *args, **kwargs)
    z: Any = module.get_variable("noise", "z").astype(y.dtype)
    return y + z.reshape(len(z), *(1,) * (y.ndim - z.ndim), *z.shape[1:]) * changed
