"""GPS: the entries of each kernel with the largest gradients, and biases (Zhang et al., CVPR 2024).

arXiv 2312.10136. Before training, the gradient of the supervised contrastive loss (`sensitivity.py`) is
summed over the training images; of each output of every Dense and of the patch embedding, the weights
with its largest magnitudes are trained, as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.methods.sites import Site
from rlrr_jax.projects.gps import sensitivity

FORMULA = "W'[i, o] anything for the k inputs i of each output o with the largest gradient, b' anything"
DEFAULTS = dict(lr=2e-3, weight_decay=0.0, drop_path=0.0)  # most frequent of its authors' on VTAB-1k


def method(entries: int = 1) -> base.Method:
    """GPS as a `Method`.

    Args:
      entries: k, number of trained entries of each output.

    Raises UserError for other values.
    """
    base.positive("option entries", entries)

    def init(key, frozen, training=None):
        del key
        if training is None:
            first = lambda site: jnp.broadcast_to(jnp.arange(entries), _shape(site, entries))
            return _adapter(frozen, {site.path: first(site) for site in layers(frozen, entries)})
        return _chosen(frozen, training.once(sensitivity.gradient))

    @jax.jit
    def _chosen(frozen, grads):
        largest = lambda site: jax.lax.top_k(columns(jnp.abs(kernel(grads, site)), site), entries)[1]
        return _adapter(frozen, {site.path: largest(site) for site in layers(frozen, entries)})

    def merge(frozen, adapter):
        tree = frozen
        for site in layers(frozen, entries):
            of = lambda kind, site=site: base.subtree(adapter[kind], site.path)
            rows = jax.lax.stop_gradient(of(base.FIXED)).astype(jnp.int32)
            old = kernel(frozen, site)
            new = jnp.put_along_axis(columns(old, site), rows, of("values"), -1, inplace=False)
            bias = {"bias": of("biases")} if site.bias else {}
            new = {"kernel": new.swapaxes(-1, -2).reshape(old.shape), **bias}
            tree = base.replaced(tree, site.path, new)
        return tree

    return base.Method(init, merge, base.decay_of(), DEFAULTS)


def layers(frozen: Any, entries: int) -> list[Site]:
    """Every layer with a kernel; UserError if one has too few inputs."""
    found = [site for site in base.sites(frozen) if not site.role.endswith("norm")]
    if (least := min(site.inputs for site in found)) < entries:
        raise UserError(f"option entries={entries} is more than the {least} inputs of a layer")
    return found


def _shape(site: Site, entries: int) -> tuple:
    lead = () if site.depth is None else (site.depth,)
    return (*lead, site.outputs, entries)


def kernel(tree: Any, site: Site) -> jax.Array:
    """The kernel of a layer."""
    return base.subtree(tree, site.path)["kernel"]


def columns(weights: jax.Array, site: Site) -> jax.Array:
    """A kernel as [..., out, in]."""
    lead = () if site.depth is None else (site.depth,)
    return weights.reshape(*lead, site.inputs, site.outputs).swapaxes(-1, -2)


def _adapter(frozen: Any, rows: dict[tuple, jax.Array]) -> dict:
    """The frozen values of these entries, their inputs, and copies of the biases beside them."""
    out: dict = {"biases": {}, "values": {}, base.FIXED: {}}
    for site in base.sites(frozen):
        if (which := rows.get(site.path)) is not None:
            path, old = site.path, columns(kernel(frozen, site), site)
            if site.bias:
                out["biases"][path] = jnp.array(base.subtree(frozen, path)["bias"])
            out["values"][path] = jnp.take_along_axis(old, which, -1)
            out[base.FIXED][path] = which.astype(jnp.float32)  # whole numbers, exact
    return {kind: unflatten_dict(leaves) for kind, leaves in out.items()}
