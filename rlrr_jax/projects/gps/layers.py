"""GPS whose entries are shared out between layers: more where more of the largest gradients are.

After TR-PTS (ICCV 2025), of which only the abstract and the idea were there: a layer gets its share of
all entries whose gradients are the largest of the whole network, and shares them out evenly between its
outputs. Gradients are those of GPS.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rlrr_jax.methods import base
from rlrr_jax.methods.sites import Site
from rlrr_jax.projects.gps import method as gps
from rlrr_jax.projects.gps import sensitivity

FORMULA = "W'[i, o] anything for the inputs i of each output o with the largest gradient, b' anything"
DEFAULTS = gps.DEFAULTS
_PLACES = 4096  # an index is two whole numbers that float32 has exactly


def method(entries: int = 1) -> base.Method:
    """GPS with as many entries for each output of a layer as the layer has large gradients.

    Args:
      entries: mean number of trained entries of an output.

    Raises UserError for other values.
    """
    base.positive("option entries", entries)

    def init(key, frozen, training=None):
        del key
        sites = gps.layers(frozen, entries)
        total = entries * sum(_blocks(site) * site.outputs for site in sites)
        which = jnp.arange(total)
        if training is not None:
            grads = training.once(sensitivity.gradient)
            which = jnp.asarray(chosen([np.asarray(x) for x in _sizes(grads, sites)], total))
        fixed = {"first": which // _PLACES, "second": which % _PLACES}
        return {
            "biases": unflatten_dict({s.path: jnp.array(_bias(frozen, s)) for s in sites if s.bias}),
            "values": _flat(frozen, sites)[which],
            base.FIXED: {name: x.astype(jnp.float32) for name, x in fixed.items()},
        }

    def merge(frozen, adapter):
        sites = gps.layers(frozen, entries)
        fixed = jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(jnp.int32), adapter[base.FIXED])
        which = fixed["first"] * _PLACES + fixed["second"]
        flat = _flat(frozen, sites).at[which].set(adapter["values"], unique_indices=True)
        tree, start = frozen, 0
        for site in sites:
            kernel = gps.kernel(frozen, site)
            columns = flat[start : start + kernel.size].reshape(gps.columns(kernel, site).shape)
            start += kernel.size
            new = {"kernel": columns.swapaxes(-1, -2).reshape(kernel.shape)}
            new |= {"bias": base.subtree(adapter["biases"], site.path)} if site.bias else {}
            tree = base.replaced(tree, site.path, new)
        return tree

    return base.Method(init, merge, base.decay_of(), DEFAULTS)


def chosen(sizes: list[np.ndarray], total: int) -> np.ndarray:
    """Indices of the trained entries, in all layers one after another.

    Args:
      sizes: of the gradient of each layer, [L, out, in] of L blocks.
      total: number of entries.
    """
    layers = [layer for stacked in sizes for layer in stacked]
    starts = np.cumsum([0, *(layer.size for layer in layers)])
    largest = np.argpartition(np.concatenate([x.ravel() for x in layers]), -total)[-total:]
    numbers = np.bincount(np.searchsorted(starts, largest, "right") - 1, minlength=len(layers))
    return np.concatenate(
        [start + _even(layer, number) for start, layer, number in zip(starts, layers, numbers)]
    )


def _even(sizes: np.ndarray, number: int) -> np.ndarray:
    """Indices of so many entries of a layer [out, in]: of each output alike, then of the largest."""
    outputs, inputs = sizes.shape
    order = np.argsort(-sizes, axis=1, kind="stable")
    each, rest = divmod(int(number), outputs)
    found = [(np.arange(outputs)[:, None] * inputs + order[:, :each]).ravel()]
    if rest:
        following = np.take_along_axis(sizes, order[:, each : each + 1], 1)[:, 0]
        more = np.argsort(-following, kind="stable")[:rest]
        found.append(more * inputs + order[more, each])
    return np.sort(np.concatenate(found))


def _blocks(site: Site) -> int:
    return 1 if site.depth is None else site.depth


def _bias(tree: Any, site: Site) -> jax.Array:
    return base.subtree(tree, site.path)["bias"]


def _sizes(tree: Any, sites: list[Site]) -> list[jax.Array]:
    """Sizes of a tree's kernels, [L, out, in]."""
    columns = [gps.columns(gps.kernel(tree, site), site) for site in sites]
    return [jnp.abs(x).reshape(-1, *x.shape[-2:]) for x in columns]


def _flat(tree: Any, sites: list[Site]) -> jax.Array:
    """All kernels of a tree, as [out, in] one after another."""
    return jnp.concatenate([gps.columns(gps.kernel(tree, site), site).ravel() for site in sites])
