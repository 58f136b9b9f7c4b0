"""The training step of one device and one trial, and how it is mapped over a mesh.

Shapes: T trials, N training images, S steps an epoch, B images a batch, b = ceil(B / devices) on
each device of the axis "data". Noise is keyed by the index in the global batch, so the result does
not depend on the number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import batch as batch_lib
from rlrr_jax import losses, methods, optim
from rlrr_jax.methods import Method
from rlrr_jax.recipe import Batch, Hyper, Recipe
from rlrr_jax.runtime.mesh import over_trials, specs

Tree = Any  # a pytree of arrays


# One device, one trial ------------------------------------------------------------------------


def init_state(recipe: Recipe, key: jax.Array, frozen: Tree) -> Tree:
    """What training changes, from the key of the first values: `{"trainable", "opt_state"}`.

    With an average `"average"`, and with a loss that remembers `"remembered"` [N, classes], too.
    """
    trainable = losses.start(losses.of(recipe), recipe.method, key, frozen)
    tx = optim.build(recipe.optimizer, recipe.method, trainable, 0.0, 0.0, key)
    state = {"trainable": trainable, "opt_state": tx.init(trainable)}
    if recipe.optimizer.average is not None:
        state["average"] = trainable
    if "remember" in losses.of(recipe).values:
        state["remembered"] = jnp.zeros((recipe.num_images, frozen["head"]["bias"].size))
    return state


def tuned(state: Tree) -> Tree:
    """The trained tree that is evaluated and saved: the running average, where there is one."""
    return state.get("average", state["trainable"])


def init_metrics(recipe: Recipe) -> dict[str, jax.Array]:
    """Values of each step of an epoch [S]: the mean loss, and sums of what else the loss returns."""
    names = sorted({*losses.of(recipe).values} - {"remember"})
    return {name: jnp.zeros(recipe.steps) for name in ("loss", *names)}


def loss_and_grad(
    recipe: Recipe, frozen: Tree, trainable: Tree, batch: Batch, hyper: Hyper
) -> tuple[dict[str, jax.Array], Tree, dict[str, jax.Array]]:
    """Metrics of the global batch (see `init_metrics`) and the gradient, equal on all devices.

    Third, what the loss returned as "remember" of this device's images, if it did.
    """
    count = jax.lax.psum(batch.mask.sum(), "data")

    def loss_fn(trainable: Tree, batch: Batch) -> tuple[jax.Array, tuple]:
        key = None
        if recipe.method.drop is not None:
            key = jax.random.fold_in(hyper.noise_key, batch.step)
            key = jax.random.fold_in(key, 2**31 - 2)  # of the batch; images have smaller numbers
        params = methods.merge(recipe.method, frozen, trainable, key)

        trees = frozen, params, trainable
        net = losses.Net(recipe.model, recipe.method, *trees, hyper.drop_path, recipe.drop_path)
        each, values = losses.of(recipe)(net, batch, **hyper.loss)
        kept = {name: values.pop(name) for name in ("remember",) if name in values}
        sums = {name: (v * batch.mask).sum() for name, v in values.items()}
        total = (each * batch.mask).sum()
        return total / count, (sums, kept)

    part = lambda batch: jax.value_and_grad(loss_fn, has_aux=True)(trainable, batch)
    with jax.default_matmul_precision(recipe.precision):
        result: Any = accumulated(part, batch, recipe.accumulate)
    (loss, (sums, kept)), grads = result
    # Sums over shards of the global mean: a shard without real images adds nothing.
    metrics, grads = jax.lax.psum(({"loss": loss, **sums}, grads), "data")
    return metrics, grads, kept


def accumulated(part: Callable, batch: Batch, number: int) -> tuple:
    """The sum of what a function of a batch returns over so many parts of it, one after another.

    Args:
      part: function `batch -> (loss, (sums, kept)), grads`; what is `kept` is put together again.
      batch: the batch, of as many images as `number` divides.
      number: number of parts.
    """
    if number == 1:
        return part(batch)
    cut = lambda x: x.reshape(number, -1, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, number)
    parts = jax.tree.map(cut, batch)

    def body(total: Tree, batch: Batch) -> tuple:
        (loss, (sums, kept)), grads = part(batch)
        return jax.tree.map(jnp.add, total, (loss, sums, grads)), kept

    (loss, (sums, _)), grads = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, sums, grads))
    result: Any = jax.lax.scan(body, zeros, parts)
    (loss, sums, grads), kept = result
    return (loss, (sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept))), grads


def train_step(
    recipe: Recipe, frozen: Tree, data: Tree, order: jax.Array, state: Tree, hyper: Hyper, now: tuple
) -> tuple[Tree, dict[str, jax.Array]]:
    """One optimiser step.

    Args:
      order: indices of the images of this epoch, in order [N].
      now: epoch and step.

    Returns:
      The new state, and the metrics of the step (see `init_metrics`).
    """
    epoch, step = now
    batch = batch_lib.take(recipe, data, order, state, hyper, now)
    trainable = state["trainable"]
    metrics, grads, kept = loss_and_grad(recipe, frozen, trainable, batch, hyper)
    finite = jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(grads)]).all()
    metrics["loss"] = jnp.where(finite, metrics["loss"], jnp.nan)  # seen in the step where it comes
    lr = hyper.lr[epoch * recipe.steps + step]
    key = jax.random.fold_in(hyper.noise_key, batch.step)
    key = jax.random.fold_in(key, 2**31 - 3)  # of the batch; images have smaller numbers
    tx = optim.build(recipe.optimizer, recipe.method, trainable, lr, hyper.weight_decay, key)
    updates, opt_state = tx.update(grads, state["opt_state"], trainable)
    new = {"trainable": optax.apply_updates(trainable, updates), "opt_state": opt_state}
    if recipe.optimizer.average is not None:
        share = 1 - recipe.optimizer.average
        new["average"] = optax.incremental_update(new["trainable"], state["average"], share)
    if kept:
        new["remembered"] = remember(state["remembered"], kept["remember"], batch)
    return new, metrics


def remember(table: jax.Array, values: jax.Array, batch: Batch) -> jax.Array:
    """The table [N, classes] with what a loss returned of a batch's images, from all devices."""
    rows = jnp.where(batch.mask > 0, batch.numbers, len(table))
    rows, values = jax.lax.all_gather((rows, values), "data", tiled=True)
    return table.at[rows].set(values, mode="drop")


def train_steps(
    recipe: Recipe, frozen: Tree, data: Tree, state: Tree, metrics: Tree, hyper: Hyper, chunk: tuple
) -> tuple[Tree, Tree]:
    """A chunk of steps, with traced bounds; a whole epoch is one dispatch.

    Args:
      data: `images` [N, h, w, 3] uint8 and `labels` [N], the whole training set; or of those steps
        alone, in order, with their `numbers` and `first`, how many come before them in the epoch.
      metrics: values of the steps of this epoch so far, see `init_metrics`.
      hyper: the `Hyper`.
      chunk: epoch, first step, and the step to stop before.

    Returns:
      The new state and metrics.
    """
    epoch, start, stop = chunk
    if "first" in data:
        order = jnp.arange(recipe.num_images) - data["first"]
    else:
        key = jax.random.fold_in(hyper.order_key, epoch)
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

    def mapped(frozen: Tree, *rest: Tree) -> tuple[Tree, Tree]:
        return jax.shard_map(
            trials,
            mesh=mesh,
            in_specs=(specs(frozen, mesh), P(), P("trial"), P("trial"), P("trial"), P()),
            out_specs=P("trial"),
            check_vma=False,  # we write the collectives; else JAX adds its own and gradients double
        )(frozen, *rest)

    return jax.jit(functools.wraps(train_steps)(mapped), donate_argnums=(2, 3))


@functools.lru_cache(64)
def map_start(recipe: Recipe, mesh: Mesh) -> Callable:
    """State and metrics before training, jitted: `(keys [T], frozen) -> state, metrics`."""

    def start(key: jax.Array, frozen: Tree) -> tuple[Tree, Tree]:
        return init_state(recipe, key, frozen), init_metrics(recipe)

    return jax.jit(jax.vmap(start, (0, None)), out_shardings=NamedSharding(mesh, P("trial")))


@functools.lru_cache(64)
def map_merge(method: Method, mesh: Mesh) -> Callable:
    """`methods.merge` for trials, jitted: `(frozen, trainable [T, ...]) -> params [T, ...]`."""
    merge = jax.vmap(functools.partial(methods.merge, method), in_axes=(None, 0))

    def placed(frozen: Tree, trainable: Tree) -> Tree:
        params = merge(frozen, trainable)
        lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(params, mesh, "trial"))
        return jax.lax.with_sharding_constraint(params, lies)

    return jax.jit(placed)
