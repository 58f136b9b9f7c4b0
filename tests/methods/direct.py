"""Each method by its own definition, beside the frozen weights: nothing is merged.

`DIRECT[name](frozen, trainable, **options)` gives the `around` of `reference.forward`. x is [B, T, in].
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from reference import plain

from rlrr_jax.methods import vera as vera_lib

ATTENTION = ("query", "key", "value", "out")


def mirrored(tree, site, block):
    """The node beside a weight in a tree like the ViT's, of one block; None if there is none."""
    if site == "embedding":
        return tree.get(site)
    node = tree.get("Transformer", {})
    if site == "encoder_norm":
        return node.get(site)
    node = node.get("encoderblock", {})
    if site in ATTENTION:
        node = node.get("MultiHeadDotProductAttention_0", {})
    if site.startswith("Dense"):
        node = node.get("MlpBlock_0", {})
    node = node.get(site)
    return node and jax.tree.map(lambda x: x[block], node)


def linear(frozen, t):
    return plain


def full(frozen, t):
    return lambda site, block, x, p: plain(site, block, x, mirrored(t, site, block))


def replacing(frozen, t):
    """bitfit and norm: some leaves are others."""
    return lambda site, block, x, p: plain(site, block, x, {**p, **(mirrored(t, site, block) or {})})


def last(frozen, t, blocks=1):
    depth = len(frozen["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"])

    def around(site, block, x, p):
        if site == "encoder_norm":
            p = t["encoder_norm"]
        if block is not None and block >= depth - blocks:
            tree = {"Transformer": {"encoderblock": t["last"]}}
            p = mirrored(tree, site, block - depth + blocks)
        return plain(site, block, x, p)

    return around


def ssf(frozen, t):
    def around(site, block, x, p):
        node = mirrored(t, site, block)
        return plain(site, block, x, p) * node["scale"].reshape(-1) + node["shift"].reshape(-1)

    return around


def rlrr(frozen, t, rank=1, with_weight=True, sides="both", residual=True, **_):
    """Row-vector form of the paper: inputs rescaled before the product, outputs after it."""

    def around(site, block, x, p):
        inside = block is None or block < len(jax.tree.leaves(t["Transformer"]["encoderblock"])[0])
        node = mirrored(t, site, block) if inside else None
        y = plain(site, block, x, p)
        if node is None:
            return y
        if "scale" in node:
            return y * node["scale"] + node["shift"]
        bias = p["bias"].reshape(-1)
        kernel = p["kernel"].reshape(-1, bias.size)
        left = node["scale_in"].reshape(-1, rank) if sides != "right" else jnp.ones((len(kernel), 1))
        right = node["scale_out"].reshape(rank, -1) if sides != "left" else jnp.ones((1, bias.size))
        if with_weight:
            change = sum(((x * left[:, r]) @ kernel) * right[r] for r in range(rank))
        else:
            change = (x @ left) @ right
        y = change + (y if residual else bias)
        return y + node["shift"].reshape(-1) if "shift" in node else y

    return around


def lora(frozen, t, rank=8, alpha=None, targets="query+value"):
    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site not in targets.split("+"):
            return y
        down, up = t[site]["down"][block], t[site]["up"][block]
        return y + (x @ down) @ up * ((alpha or rank) / rank)

    return around


def dora(frozen, t, rank=8, alpha=None, targets="query+value"):
    def around(site, block, x, p):
        if site not in targets.split("+"):
            return plain(site, block, x, p)
        bias = p["bias"].reshape(-1)
        down, up = t[site]["down"][block], t[site]["up"][block]
        direction = p["kernel"].reshape(-1, bias.size) + down @ up * ((alpha or rank) / rank)
        norm = jax.lax.stop_gradient(jnp.sqrt((direction**2).sum(0)))
        return (x @ direction) / norm * t[site]["magnitude"][block] + bias

    return around


def vera(frozen, t, rank=256, targets="query+value", projection_seed=0):
    sizes = {"Dense_0": (32, 64), "Dense_1": (64, 32)}  # of test_vit.SMALL
    names = targets.split("+")
    most = [max(sizes.get(name, (32, 32))[i] for name in names) for i in (0, 1)]
    down, up = vera_lib.projections(projection_seed, *most, rank)

    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site not in names:
            return y
        node, inputs, outputs = t[site], x.shape[-1], y.shape[-1]
        hidden = (x @ down[:inputs]) * node["d"][block]
        return y + (hidden @ up[:, :outputs]) * node["b"][block]

    return around


def fact(frozen, t, kind="tt", rank=16, scale=1.0):
    node = t["fact"]
    core = node["c"] if kind == "tt" else jnp.einsum("ljt,trs->ljrs", node["p"], node["g"])
    change = scale * jnp.einsum("dr,ljrs,se->ljde", node["u"], core, node["v"])
    first = {"query": 0, "key": 1, "value": 2, "out": 3, "Dense_0": 4, "Dense_1": 6}  # of SMALL

    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site not in first:
            return y
        one, two = change[block, first[site]], change[block, (first[site] + 1) % 8]
        if site == "Dense_0":
            return y + jnp.concatenate([x @ one, x @ two], -1)
        if site == "Dense_1":
            return y + x[..., :32] @ one + x[..., 32:] @ two
        return y + x @ one

    return around


def before(adapter):
    """Adapters between a LayerNorm and what follows: `adapter(place, block, x) -> x`."""

    def around(site, block, x, p):
        if site in ("query", "key", "value"):
            x = adapter("attention", block, x)
        if site == "Dense_0":
            x = adapter("mlp", block, x)
        return plain(site, block, x, p)

    return around


def arc(frozen, t, bottleneck=50, where="attention+mlp"):
    def adapter(place, block, x):
        if place not in where.split("+"):
            return x
        node = t[place]
        return x + ((x @ node["down"]) * node["scale"][block]) @ node["down"].T + node["shift"][block]

    return before(adapter)


def repadapter(frozen, t, hidden=8, groups=2, scale=1.0, where="attention+mlp"):
    def adapter(place, block, x):
        if place not in where.split("+"):
            return x
        node = jax.tree.map(lambda v: v[block], t[place])
        middle = jnp.split(x @ node["down"] + node["down_bias"], groups, -1)
        outputs = jnp.concatenate([part @ node["up"][g] for g, part in enumerate(middle)], -1)
        return x + scale * (outputs + node["up_bias"])

    return before(adapter)


def apla(frozen, t, columns=None, column_seed=0):
    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site != "out":
            return y
        new = x @ t["out"]["kernel"][block] + t["out"]["bias"][block]
        if columns is None:
            return new
        key = jax.random.split(jax.random.key(column_seed), 3)[block]
        order = jax.random.permutation(key, y.shape[-1])
        position = jnp.argsort(order)  # of each output in the draw
        return jnp.where(position < columns, new[..., jnp.minimum(position, columns - 1)], y)

    return around


def hta(frozen, t, rank=1, targets="query+key+value+out"):
    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site not in targets.split("+"):
            return y
        node = jax.tree.map(lambda v: v[block], t[site])
        eye = jnp.eye(x.shape[-1])
        left, right = (eye - jnp.outer(node[k], node[k]) for k in ("u", "v"))
        y = y + ((x @ left) * node["d"]) @ right
        return y + (x @ node["down"]) @ node["up"] if rank else y

    return around


def glora(frozen, t, a="low", b="none", c="low", d="vector", e="none", rank=4, targets=None):
    """x goes through the frozen kernel, rescaled before and after, beside products and prompts."""

    def around(site, block, x, p):
        if site not in (targets.split("+") if targets else t):
            return plain(site, block, x, p)
        node = jax.tree.map(lambda leaf: leaf[block], t[site])
        bias = p["bias"].reshape(-1)
        kernel = p["kernel"].reshape(-1, bias.size)
        y = x @ kernel
        if a == "low":
            down, up = node["a"]["down"], node["a"]["up"]
            y = y + sum(((x * down[:, r]) @ kernel) * up[r] for r in range(rank))
        elif a != "none":
            y = y + (x @ kernel) * node["a"]
        if b == "low":
            y = y + (x @ node["b"]["down"]) @ node["b"]["up"]
        elif b != "none":
            y = y + x.sum(-1, keepdims=True) * node["b"]
        if c == "low":
            y = y + (node["c"]["down"] @ node["c"]["up"])[:, 0] @ kernel
        elif c == "vector":
            y = y + node["c"] @ kernel
        y = y + bias * (1 + node.get("d", 0.0))
        return y + node.get("e", 0.0)

    return around


def difffit(frozen, t):
    def around(site, block, x, p):
        y = plain(site, block, x, {**p, **(mirrored(t["copies"], site, block) or {})})
        return y * t["gamma"][site][block] if site in t["gamma"] else y

    return around


def oft(frozen, t, block=8, targets=None):
    """Inputs are turned back, block by block; with the inverse written out."""
    side = block

    def around(site, block, x, p):
        if site not in t:
            return plain(site, block, x, p)
        bias, parts = p["bias"].reshape(-1), []
        for i, values in enumerate(t[site][block]):
            q = jnp.zeros((side, side), values.dtype).at[jnp.triu_indices(side, 1)].set(values)
            q = q - q.T
            turn = (jnp.eye(side) + q) @ jnp.linalg.inv(jnp.eye(side) - q)
            parts.append(x[..., i * side : (i + 1) * side] @ turn)
        return jnp.concatenate(parts, -1) @ p["kernel"].reshape(-1, bias.size) + bias

    return around


def gps(frozen, t, entries=1):
    """Single entries of the kernel are others, one after another."""

    def around(site, block, x, p):
        if "kernel" not in p:
            return plain(site, block, x, p)
        (name,) = [path for path in flatten_dict(t["values"]) if path[-1] == site]
        of = lambda tree: flatten_dict(tree)[name]
        pick = lambda tree: of(tree) if block is None else of(tree)[block]
        rows, values = jax.lax.stop_gradient(pick(t["fixed"])), pick(t["values"])
        kernel = p["kernel"].reshape(-1, len(rows))
        for o in range(len(rows)):
            for k in range(entries):
                kernel = kernel.at[rows[o, k].astype(int), o].set(values[o, k])
        p = {"kernel": kernel.reshape(p["kernel"].shape), "bias": pick(t["biases"])}
        return plain(site, block, x, p)

    return around


def pissa(frozen, t, rank=8, targets="query+value"):
    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site not in targets.split("+"):
            return y
        now = (x @ t[site]["down"][block]) @ t[site]["up"][block]
        first = t["fixed"][site]
        first = jax.lax.stop_gradient((first["first_down"][block], first["first_up"][block]))
        return y + now - (x @ first[0]) @ first[1]

    return around


def hira(frozen, t, rank=32, targets="query+key+value+out+Dense_0+Dense_1"):
    """Inputs and outputs rescaled rank by rank, as `rlrr` of that rank."""

    def around(site, block, x, p):
        y = plain(site, block, x, p)
        if site not in targets.split("+"):
            return y
        down, up = t[site]["down"][block], t[site]["up"][block]
        kernel = p["kernel"].reshape(len(down), -1)
        return y + sum(((x * down[:, r]) @ kernel) * up[r] for r in range(rank))

    return around


DIRECT = {
    **dict(rlrr=rlrr, linear=linear, full=full, bitfit=replacing, norm=replacing, last=last),
    **dict(ssf=ssf, lora=lora, dora=dora, vera=vera, fact=fact, arc=arc, repadapter=repadapter),
    **dict(apla=apla, hta=hta, glora=glora, difffit=difffit, oft=oft, pissa=pissa, hira=hira),
    "gps": gps,
    "knn": linear,  # its weights are the backbone's; its answers are tested in test_answers.py
}
