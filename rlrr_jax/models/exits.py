"""Heads after chosen blocks of a ViT, whose answer needs no later block.

In a tree they lie in the head, at `head/exits`: `scale` and `shift` [E, D] of a LayerNorm, `kernel`
[E, D, C] and `bias` [E, C]. All are zero at first; the scale is what is added to 1.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlrr_jax.errors import UserError


def seen(model: Any) -> tuple[int, int | None]:
    """Which tokens an exit of a ViT averages, from and to: those that its own head gets.

    Raises UserError for a ViT whose head gets something else.
    """
    if model.pool not in ("token", "avg"):
        raise UserError(
            f"config.model.exits needs config.model.pool=token or avg, and this ViT has {model.pool}: "
            f"leave config.model.exits out"
        )
    return (0, 1) if model.pool == "token" else (sum(model.tokens().values()), None)


def pooled(x: jax.Array, which: tuple) -> jax.Array:
    """The mean [B, D] of tokens [B, T, D], see `seen`."""
    return x[:, slice(*which)].mean(1)


def chosen(early: jax.Array | None, numbers: tuple, dtype: Any) -> jax.Array | None:
    """What the exits get [B, E, D], of what all blocks gave [L, B, D]; None if that is None."""
    if early is None:
        return None
    return jnp.stack([early[number - 1] for number in numbers], 1).astype(dtype)


def logits(tree: Any, x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Logits [..., E, C] and normalised features [..., E, D] of what exits get.

    Args:
      tree: `head/exits`; of one exit without the leading axis, as `x` then.
      x: pooled tokens [..., E, D].
      eps: epsilon of the LayerNorm.
    """
    features = jax.nn.standardize(x, epsilon=eps)
    ours = lambda leaf: jnp.broadcast_to(leaf, features.shape)  # no rank is raised silently
    features = features * (1 + ours(tree["scale"])) + ours(tree["shift"])
    out = jnp.einsum("...d,...dc->...c", features, tree["kernel"])
    return out + jnp.broadcast_to(tree["bias"], out.shape), features


class Head(nn.Module):
    """A zero-initialised head, and those of exits.

    Attributes:
      num_classes: C.
      exits: E.
      width: D, of what the exits get.
      eps: epsilon of their LayerNorm.

    Logits and features of the exits go into the collection "exits" where it is asked for.
    """

    num_classes: int
    exits: int
    width: int
    eps: float

    @nn.compact
    def __call__(self, x, early=None):
        number = self.num_classes
        zeros = lambda name, *shape: self.param(name, nn.initializers.zeros, shape)
        kernel, bias = zeros("kernel", x.shape[-1], number), zeros("bias", number)
        tree = self.param("exits", lambda key: empty(self.exits, self.width, number))
        if early is not None:
            found = dict(zip(("logits", "features"), logits(tree, early, self.eps)))
            for name, value in found.items():
                self.sow("exits", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        y = x @ kernel.astype(x.dtype)
        return y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


def empty(number: int, width: int, classes: int) -> dict[str, jax.Array]:
    """Exits before training."""
    shapes = dict(scale=(width,), shift=(width,), kernel=(width, classes), bias=(classes,))
    return {name: jnp.zeros((number, *shape)) for name, shape in shapes.items()}


def apply(model: Any, params: Any, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Logits [B, E + 1, C] of the exits and, last, of the whole; features [B, E, D] of the exits.

    Args:
      model: a ViT with exits.
      params: its tree.
      *inputs: images, and what the model takes beside them.
    """
    last, found = model.apply({"params": params}, *inputs, mutable=["exits"])
    early = found["exits"]["head"]
    return jnp.concatenate([early["logits"], last[:, None]], 1), early["features"]


def apply_each(model: Any, trees: list, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    """As `apply`, of a network for each exit: the first blocks of each of E + 1 trees."""
    answers, features = [], []
    for i, (number, tree) in enumerate(zip(model.exits, trees)):
        first, own = part(model, tree, 0, number)
        tokens = first.apply({"params": own}, *inputs)
        mine, found = at(model, tree, i, tokens)
        answers.append(mine)
        features.append(found)
    whole = model.clone(exits=()).apply({"params": trees[-1]}, *inputs)
    return jnp.stack([*answers, whole], 1), jnp.stack(features, 1)


def part(model: Any, tree: Any, first: int, until: int | None) -> tuple[Any, Any]:
    """The model and tree of a ViT's blocks after the first so many, until a number; None: to logits."""
    blocks = jax.tree.map(lambda x: x[first:until], tree["Transformer"]["encoderblock"])
    own = {**tree, "Transformer": {**tree["Transformer"], "encoderblock": blocks}}
    return model.clone(first=first, until=until, exits=()), own


def at(model: Any, tree: Any, number: int, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B, C] and features [B, D] of an exit.

    Args:
      model: the whole ViT.
      tree: its tree.
      number: which exit.
      tokens: [B, T, D] after its blocks.
    """
    own = jax.tree.map(lambda x: x[number], tree["head"]["exits"])
    high = jnp.promote_types(model.dtype, jnp.float32)
    return logits(own, pooled(tokens, seen(model)).astype(high), model.norm_eps)
