"""Heads after chosen blocks of a ViT, whose answer needs no later block.

They are what the loss `exits` trains beside the head: `scale` and `shift` [E, D] of a
LayerNorm, `kernel` [E, D, C] and `bias` [E, C]. All are zero at first; the scale is what is added to 1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError
from rlrr_jax.models import vit


def seen(model: Any) -> tuple[int, int | None]:
    """Which tokens an exit of a ViT averages, from and to: those that its own head gets.

    Raises UserError for a model that is no ViT, and for one whose head gets something else.
    """
    if not isinstance(model, vit.ViT):
        raise UserError("only ViTs have exits: take another loss")
    if model.pool not in ("token", "avg"):
        raise UserError(
            f"exits need config.model.pool=token or avg, and this ViT has {model.pool}: take another "
            f"loss"
        )
    return (0, 1) if model.pool == "token" else (sum(model.tokens().values()), None)


def pooled(x: jax.Array, which: tuple) -> jax.Array:
    """The mean [B, D] of tokens [B, T, D], see `seen`."""
    return x[:, slice(*which)].mean(1)


def logits(tree: Any, x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Logits [..., E, C] and normalised features [..., E, D] of what exits get.

    Args:
      tree: values of all exits; of one exit without the leading axis, as `x` then.
      x: pooled tokens [..., E, D].
      eps: epsilon of the LayerNorm.
    """
    features = jax.nn.standardize(x, epsilon=eps)
    ours = lambda leaf: jnp.broadcast_to(leaf, features.shape)  # no rank is raised silently
    features = features * (1 + ours(tree["scale"])) + ours(tree["shift"])
    out = jnp.einsum("...d,...dc->...c", features, tree["kernel"])
    return out + jnp.broadcast_to(tree["bias"], out.shape), features


def empty(number: int, width: int, classes: int) -> dict[str, jax.Array]:
    """Exits before training."""
    shapes = dict(scale=(width,), shift=(width,), kernel=(width, classes), bias=(classes,))
    return {name: jnp.zeros((number, *shape)) for name, shape in shapes.items()}


def check(at: tuple, depth: int) -> None:
    """UserError unless exits are numbers of blocks of a ViT of this depth, in order."""
    if not at:
        raise UserError("exits need config.loss_kwargs.at, numbers of blocks such as (3,6,9): set it")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < depth for n in at)
    if not whole or sorted(set(at)) != list(at):
        raise UserError(
            f"config.loss_kwargs.at={at} must be numbers of blocks from 1 to {depth - 1}, in order"
        )


def apply(model: Any, params: Any, heads: Any, at: tuple, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Logits [B, E + 1, C] of the exits and, last, of the whole; features [B, E, D] of the exits.

    Args:
      model: a ViT.
      params: its tree.
      heads: the exits' own values.
      at: numbers of blocks after which they are.
      *inputs: images, and what the model takes beside them.
    """
    last, found = model.apply({"params": params}, *inputs, mutable=["blocks"])
    every = found["blocks"]["Transformer"]["encoderblock"]["tokens"][0]  # [L, B, T, D]
    high, which = jnp.promote_types(model.dtype, jnp.float32), seen(model)
    early = jnp.stack([pooled(every[number - 1], which) for number in at], 1).astype(high)
    answers, features = logits(heads, early, model.norm_eps)
    return jnp.concatenate([answers, last[:, None]], 1), features


def apply_each(model: Any, trees: list, heads: Any, at: tuple, *inputs: Any) -> tuple:
    """As `apply`, of a network for each exit: the first blocks of each of E + 1 trees."""
    answers, features = [], []
    for i, (number, tree) in enumerate(zip(at, trees)):
        first, own = vit.part(model, tree, slice(number))
        tokens = first.apply({"params": own}, *inputs)
        mine, found = of_one(model, heads, i, tokens)
        answers.append(mine)
        features.append(found)
    whole = model.apply({"params": trees[-1]}, *inputs)
    return jnp.stack([*answers, whole], 1), jnp.stack(features, 1)


def of_one(model: Any, heads: Any, number: int, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B, C] and features [B, D] of an exit.

    Args:
      model: the whole ViT.
      heads: values of all exits.
      number: which exit.
      tokens: [B, T, D] after its blocks.
    """
    own = jax.tree.map(lambda x: x[number], heads)
    high = jnp.promote_types(model.dtype, jnp.float32)
    return logits(own, pooled(tokens, seen(model)).astype(high), model.norm_eps)
