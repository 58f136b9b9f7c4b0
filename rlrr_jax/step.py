"""The training step of one device and one trial, and how it is mapped over a mesh.

Shapes: T trials, N training images, S steps an epoch, B images a batch, b = ceil(B / devices) on
each device of the axis "data". Noise is keyed by the index in the global batch, so the result does
not depend on the number of devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import losses, methods, optim
from rlrr_jax.data.resize import normalize
from rlrr_jax.methods import Method
from rlrr_jax.runtime.mesh import over_trials

Tree = Any  # a pytree of arrays


class Recipe(NamedTuple):
    """All that is fixed while the step is traced.

    Attributes:
      model: the flax model.
      method: the `methods.Method`.
      batch_size: B, over all devices.
      num_images: N.
      image_size: pixels that the model takes; smaller images are enlarged.
      flip: whether training images are flipped left to right at random.
      precision: precision of matmuls, as `jax.default_matmul_precision` names it.
      drop_path: whether its noise is in the program; the rate itself is traced.
      optimizer: how gradients become updates, see `optim.build`.
      loss: what is minimised, see `losses`.
    """

    model: Any
    method: Method
    batch_size: int
    num_images: int
    image_size: int
    flip: bool = False
    drop_path: bool = True
    precision: str = "highest"
    optimizer: optim.Optimizer = optim.Optimizer()
    loss: losses.Loss = losses.cross_entropy

    @property
    def steps(self) -> int:
        """S: steps an epoch; the last may be short."""
        return math.ceil(self.num_images / self.batch_size)

    def images_before(self, epoch: int, step: int) -> int:
        """Number of images seen before a step of an epoch."""
        return epoch * self.num_images + min(step * self.batch_size, self.num_images)


# One device, one trial ------------------------------------------------------------------------


def init_state(recipe: Recipe, key: jax.Array, frozen: Tree) -> Tree:
    """`{"trainable", "opt_state"}` before training. `frozen` is in neither."""
    trainable = methods.start(recipe.method, key, frozen)
    return {
        "trainable": trainable,
        "opt_state": optim.build(recipe.optimizer, recipe.method, trainable, 0.0, 0.0).init(trainable),
    }


def init_metrics(recipe: Recipe, classes: int) -> dict[str, jax.Array]:
    """Values of each step of an epoch [S]: the mean loss, and sums of what else the loss returns.

    Args:
      classes: number of classes of the logits.
    """
    names = ("loss", *losses.metrics(recipe.loss, classes))
    return {name: jnp.zeros(recipe.steps) for name in names}


def take_batch(
    recipe: Recipe, data: Tree, order: jax.Array, hyper: Tree, epoch: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """This device's share of a batch: images in [-1, 1], labels, mask and noise keys, [b] each.

    Slots beyond the batch or the data have mask 0.
    """
    local = math.ceil(recipe.batch_size / jax.lax.axis_size("data"))
    slot = jax.lax.axis_index("data") * local + jnp.arange(local)  # in the global batch
    index = step * recipe.batch_size + slot
    mask = (slot < recipe.batch_size) & (index < recipe.num_images)
    example = order[jnp.minimum(index, recipe.num_images - 1)]
    step_key = jax.random.fold_in(hyper["noise_key"], epoch * recipe.steps + step)
    keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(slot)
    images = normalize(data["images"][example], recipe.image_size)
    if recipe.flip:
        flips = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 0)))(keys)
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    return images, data["labels"][example], mask.astype(jnp.float32), keys


def loss_and_grad(
    recipe: Recipe, frozen: Tree, trainable: Tree, batch: tuple, drop_path: jax.Array
) -> tuple[dict[str, jax.Array], Tree]:
    """Metrics of the global batch (see `init_metrics`) and the gradient; equal on all devices."""
    images, labels, mask, keys = batch
    keys = keys if recipe.drop_path else None
    count = jax.lax.psum(mask.sum(), "data")

    def loss_fn(trainable: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = methods.merge(recipe.method, frozen, trainable)
        forward = lambda keys: recipe.model.apply({"params": params}, images, drop_path, keys)
        losses, values = recipe.loss(forward, labels, mask, keys)
        return (losses * mask).sum() / count, {name: (v * mask).sum() for name, v in values.items()}

    with jax.default_matmul_precision(recipe.precision):
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    # Sums over shards of the global mean: a shard without real images adds nothing.
    return jax.lax.psum(({"loss": loss, **sums}, grads), "data")


def train_step(
    recipe: Recipe, frozen: Tree, data: Tree, order: jax.Array, state: Tree, hyper: Tree, now: tuple
) -> tuple[Tree, dict[str, jax.Array]]:
    """One optimiser step.

    Args:
      order: indices of the images of this epoch, in order [N].
      now: epoch and step.

    Returns:
      The new state, and the metrics of the step (see `init_metrics`).
    """
    epoch, step = now
    batch = take_batch(recipe, data, order, hyper, epoch, step)
    trainable = state["trainable"]
    metrics, grads = loss_and_grad(recipe, frozen, trainable, batch, hyper["drop_path"])
    lr = hyper["lr"][epoch * recipe.steps + step]
    tx = optim.build(recipe.optimizer, recipe.method, trainable, lr, hyper["weight_decay"])
    updates, opt_state = tx.update(grads, state["opt_state"], trainable)
    state = {"trainable": optax.apply_updates(trainable, updates), "opt_state": opt_state}
    return state, metrics


def train_steps(
    recipe: Recipe, frozen: Tree, data: Tree, state: Tree, metrics: Tree, hyper: Tree, chunk: tuple
) -> tuple[Tree, Tree]:
    """A chunk of steps, with traced bounds; a whole epoch is one dispatch.

    Args:
      data: `images` [N, h, w, 3] uint8 and `labels` [N], the whole training set; or of those steps
        alone, in order, with `first`, the number of images before them in the epoch.
      metrics: values of the steps of this epoch so far, see `init_metrics`.
      hyper: `lr` [epochs * S], `weight_decay`, `drop_path`, `noise_key` and `order_key`.
      chunk: epoch, first step, and the step to stop before.

    Returns:
      The new state and metrics.
    """
    epoch, start, stop = chunk
    if "first" in data:
        order = jnp.arange(recipe.num_images) - data["first"]
    else:
        key = jax.random.fold_in(hyper["order_key"], epoch)
        order = jax.random.permutation(key, recipe.num_images)

    def body(i: jax.Array, carry: tuple) -> tuple:
        state, metrics = carry
        state, values = train_step(recipe, frozen, data, order, state, hyper, (epoch, i))
        return state, {name: metrics[name].at[i].set(values[name]) for name in metrics}

    return jax.lax.fori_loop(start, stop, body, (state, metrics))


# Many devices, many trials --------------------------------------------------------------------


def map_train_steps(recipe: Recipe, mesh: Mesh) -> Callable:
    """`train_steps` for all trials on a mesh, jitted; state and metrics are donated.

    Arguments are those of `train_steps` without the recipe; state, metrics and hyper have a leading
    trial axis.
    """
    one = functools.wraps(train_steps)(functools.partial(train_steps, recipe))
    trials = over_trials(one, (None, None, 0, 0, 0, None))
    mapped = jax.shard_map(
        trials,
        mesh=mesh,
        in_specs=(P(), P(), P("trial"), P("trial"), P("trial"), P()),
        out_specs=P("trial"),
        check_vma=False,  # we write the collectives; else JAX adds its own and gradients double
    )
    return jax.jit(mapped, donate_argnums=(2, 3))


def map_start(recipe: Recipe, mesh: Mesh) -> Callable:
    """State and metrics before training, jitted: `(keys [T], frozen) -> state, metrics`."""

    def start(key: jax.Array, frozen: Tree) -> tuple[Tree, Tree]:
        classes = frozen["head"]["bias"].size
        return init_state(recipe, key, frozen), init_metrics(recipe, classes)

    return jax.jit(jax.vmap(start, (0, None)), out_shardings=NamedSharding(mesh, P("trial")))


def map_merge(method: Method, mesh: Mesh) -> Callable:
    """`methods.merge` for trials, jitted: `(frozen, trainable [T, ...]) -> params [T, ...]`."""
    merge = jax.vmap(functools.partial(methods.merge, method), in_axes=(None, 0))
    return jax.jit(merge, out_shardings=NamedSharding(mesh, P("trial")))
