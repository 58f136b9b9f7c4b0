"""RLRR: residual-based low-rank rescaling (Dong et al., CVPR 2024).

Every Dense of every block gets `kernel + kernel * scale_in * scale_out` and `bias + shift`; every
LayerNorm and the patch embedding get their output scaled and shifted, which folds into their weights.
"""

import itertools
import math

import jax
import jax.numpy as jnp

from rlrr_jax.methods.base import Method

# The values the authors use most; each task of theirs brings its own.
DEFAULTS = dict(lr=3e-3, weight_decay=5e-5, drop_path=0.1)


def method(init="paper"):
    """RLRR as a `Method`.

    Args:
      init: "paper", the authors' start, which is not the identity; "damped", the same with
        `scale_in` times 0.1; "identity", where merging changes nothing.

    Raises ValueError for another `init`.
    """
    if init not in ("paper", "damped", "identity"):
        raise ValueError(f"unknown init {init!r} of method 'rlrr': use paper, damped or identity")
    return Method(lambda key, frozen: _init(key, frozen, init), merge, decay, DEFAULTS)


def _init(key, frozen, start):
    def adapter(key, path, node):
        """The trainable node beside one Dense, LayerNorm or patch embedding."""
        kernel, shape = node.get("kernel"), node["bias"].shape
        keys = jax.random.split(key)
        if kernel is None or path == ("embedding",):
            if start == "identity":
                return {"scale": jnp.ones(shape), "shift": jnp.zeros(shape)}
            noise = 0.02 * jax.random.normal(keys[0], (2, *shape))
            return {"scale": 1 + noise[0], "shift": noise[1]}
        inputs = kernel.shape[: kernel.ndim - len(shape) + 1]  # [L, in], all but the output axes
        # The authors' Kaiming-uniform start: fan-in is the kernel's, and 1 for `scale_out`.
        bound = math.sqrt(6 / math.prod(inputs[1:])) * {"paper": 1, "damped": 0.1, "identity": 0}[start]
        return {
            "scale_in": jax.random.uniform(keys[0], inputs, minval=-1, maxval=1) * bound,
            "scale_out": jax.random.uniform(keys[1], shape, minval=-1, maxval=1) * math.sqrt(6),
            "shift": jnp.zeros(shape),
        }

    counter = itertools.count()

    def walk(node, path):
        if path == ("head",):
            return {
                "kernel": jnp.zeros(node["kernel"].shape),
                "bias": jnp.zeros(node["bias"].shape),
            }
        if "bias" in node:
            return adapter(jax.random.fold_in(key, next(counter)), path, node)
        children = {k: walk(v, (*path, k)) for k, v in sorted(node.items()) if isinstance(v, dict)}
        return {k: v for k, v in children.items() if v}

    return walk(frozen, ())


def merge(frozen, trainable):
    """Folds the scales and shifts into the frozen weights: a plain ViT tree."""
    if "kernel" in trainable:  # the head
        return trainable
    if "shift" not in trainable:
        return {k: merge(v, trainable[k]) if k in trainable else v for k, v in frozen.items()}
    shift = trainable["shift"]
    if "scale_in" in trainable:
        kernel = frozen["kernel"]
        flat = (
            trainable[k].reshape(len(kernel), -1) for k in ("scale_in", "scale_out")
        )  # [L, in], ...
        # An einsum, because its gradients are matrix-vector products: under `vmap` XLA's CPU code for
        # the sums of a broadcast product is ten times slower. "highest" keeps it in float32 everywhere.
        scale = jnp.einsum("li,lo->lio", *flat, precision="highest").reshape(kernel.shape)
        return {"kernel": kernel + kernel * scale, "bias": frozen["bias"] + shift}
    scale = trainable["scale"]
    name = "kernel" if "kernel" in frozen else "scale"
    return {name: frozen[name] * scale, "bias": frozen["bias"] * scale + shift}


def decay(trainable):
    """The authors' rule: their names with neither `bias` nor `norm` in them.

    That is `scale_in`, `scale_out`, the patch scale and shift, and the head kernel.
    """

    def rule(path, _):
        names = [p.key for p in path]
        return names[0] == "embedding" or names[-1] in ("scale_in", "scale_out", "kernel")

    return jax.tree_util.tree_map_with_path(rule, trainable)
