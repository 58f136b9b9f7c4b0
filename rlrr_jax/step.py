"""The train and eval steps of one device and one trial, and how they are mapped over a mesh.

Shapes: T trials, N training images, S steps an epoch, B images a batch, b = ceil(B / devices) on
each device of the axis "data". Noise is keyed by the index in the global batch, so the result does
not depend on the number of devices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import distributed, methods, optim, resize
from rlrr_jax.methods import Method


class Recipe(NamedTuple):
    """All that is fixed while the step is traced.

    Attributes:
      model: the `vit.ViT`.
      method: the `methods.Method`.
      batch_size: B, over all devices.
      num_images: N.
      image_size: that the model takes; smaller images are enlarged.
      flip: whether training images are flipped left to right at random.
      precision: of matmuls, as `jax.default_matmul_precision` names it.
      drop_path: False leaves its noise out of the program; the rate itself is traced.
      optimizer: see `optim.build`.
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

    @property
    def steps(self):
        """S: steps an epoch; the last may be short."""
        return math.ceil(self.num_images / self.batch_size)

    def images_before(self, epoch, step):
        """Number of images seen before a step of an epoch."""
        return epoch * self.num_images + min(step * self.batch_size, self.num_images)


TRIAL_COST = 8  # of a trial on a device at each step, whatever its share of the batch, in images


def trial_axis(devices, trials, batch_size):
    """How many groups the devices are divided into, each for its share of the trials.

    The number with the least work for the busiest device: ceil(trials / groups) trials, each with its
    share of the batch and `TRIAL_COST` for merging and for small matmuls.

    Args:
      devices: number of devices.
      trials: number of trials.
      batch_size: images of a batch.
    """

    def work(groups):
        return -(-trials // groups) * (-(-batch_size * groups // devices) + TRIAL_COST)

    return min((n for n in range(1, devices + 1) if devices % n == 0), key=work)


def make_mesh(devices, trials=1, batch_size=32):
    """A mesh with axes ("trial", "data") for trials of a batch size, see `trial_axis`."""
    n = trial_axis(len(devices), trials, batch_size)
    return jax.make_mesh(
        (n, len(devices) // n), ("trial", "data"), (AxisType.Auto, AxisType.Auto), devices=devices
    )


def place(mesh, spec):
    """How arrays lie on the mesh."""
    return NamedSharding(mesh, spec)


def put(mesh, spec, tree):
    """Lays a tree, the same in every process, on the mesh.

    Every argument gets its final place before the first call, or the second call compiles again.
    """
    sharding = place(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def put_trials(mesh, trees):
    """The same for what each trial owns: stacks the trees along the leading trial axis."""
    return put(mesh, P("trial"), jax.tree.map(lambda *x: jnp.stack(x), *trees))


def normalize(images, size):
    """Images uint8 [B, h, w, 3] to float32 [B, size, size, 3] in [-1, 1]."""
    return resize.bicubic(images, size).astype(jnp.float32) / 127.5 - 1.0


# One device, one trial ------------------------------------------------------------------------


def init_state(recipe, key, frozen):
    """`{"trainable", "opt_state"}` before training. `frozen` is in neither."""
    trainable = methods.start(recipe.method, key, frozen)
    return {
        "trainable": trainable,
        "opt_state": optim.build(recipe.optimizer, recipe.method, trainable, 0.0, 0.0).init(trainable),
    }


def init_metrics(recipe):
    """Per-step sums of an epoch: loss and number of correct answers, [S] each."""
    return {"loss": jnp.zeros(recipe.steps), "correct": jnp.zeros(recipe.steps)}


def take_batch(recipe, data, order, hyper, epoch, step):
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


def loss_and_grad(recipe, frozen, trainable, batch, drop_path):
    """Mean loss over the global batch, number of correct answers, gradient; equal on all devices."""
    images, labels, mask, keys = batch
    keys = keys if recipe.drop_path else None
    count = jax.lax.psum(mask.sum(), "data")

    def loss_fn(trainable):
        params = methods.merge(recipe.method, frozen, trainable)
        logits = recipe.model.apply({"params": params}, images, drop_path, keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = (logits.argmax(-1) == labels) & jnp.isfinite(losses)  # of NaN, argmax is class 0
        correct = (right * mask).sum()
        return (losses * mask).sum() / count, correct

    with jax.default_matmul_precision(recipe.precision):
        (loss, correct), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    # Sums over shards of the global mean: a shard without real images adds nothing.
    return jax.lax.psum((loss, correct, grads), "data")


def train_step(recipe, frozen, data, order, state, hyper, epoch, step):
    """One optimiser step; returns the state, the mean loss and the number of correct answers."""
    batch = take_batch(recipe, data, order, hyper, epoch, step)
    trainable = state["trainable"]
    loss, correct, grads = loss_and_grad(recipe, frozen, trainable, batch, hyper["drop_path"])
    lr = hyper["lr"][epoch * recipe.steps + step]
    tx = optim.build(recipe.optimizer, recipe.method, trainable, lr, hyper["weight_decay"])
    updates, opt_state = tx.update(grads, state["opt_state"], trainable)
    state = {"trainable": optax.apply_updates(trainable, updates), "opt_state": opt_state}
    return state, loss, correct


def train_steps(recipe, frozen, data, state, metrics, hyper, epoch, start, stop):
    """Steps [start, stop) of an epoch, with traced bounds; a whole epoch is one dispatch.

    Args:
      data: `images` [N, h, w, 3] uint8 and `labels` [N], the whole training set.
      metrics: of this epoch so far, see `init_metrics`.
      hyper: `lr` [epochs * S], `weight_decay`, `drop_path`, `noise_key` and `order_key`.

    Returns:
      The new state and metrics.
    """
    order = jax.random.permutation(jax.random.fold_in(hyper["order_key"], epoch), recipe.num_images)

    def body(i, carry):
        state, metrics = carry
        state, loss, correct = train_step(recipe, frozen, data, order, state, hyper, epoch, i)
        metrics = {
            "loss": metrics["loss"].at[i].set(loss),
            "correct": metrics["correct"].at[i].set(correct),
        }
        return state, metrics

    return jax.lax.fori_loop(start, stop, body, (state, metrics))


def eval_step(model, image_size, precision, params, images, labels, mask):
    """Sums over the global batch: loss and number of correct answers, each image counted once."""
    with jax.default_matmul_precision(precision):
        logits = model.apply({"params": params}, normalize(images, image_size))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1) == labels) & jnp.isfinite(losses)
    return jax.lax.psum({"loss": (losses * mask).sum(), "correct": (correct * mask).sum()}, "data")


# Many devices, many trials --------------------------------------------------------------------


def over_trials(function, in_axes):
    """`jax.vmap`, but a single trial runs as it is: batched matmuls of one are slower on CPUs."""
    many = jax.vmap(function, in_axes=in_axes)

    @functools.wraps(function)
    def mapped(*args):
        owned = [x for x, axis in zip(args, in_axes) if axis == 0]
        if len(jax.tree.leaves(owned)[0]) > 1:
            return many(*args)
        first = lambda x, axis: x if axis is None else jax.tree.map(lambda leaf: leaf[0], x)
        out = function(*map(first, args, in_axes))
        return jax.tree.map(lambda x: x[None], out)

    return mapped


def map_train_steps(recipe, mesh):
    """`train_steps` for all trials on a mesh, jitted; state and metrics are donated.

    Arguments are those of `train_steps` without the recipe; state, metrics and hyper have a leading
    trial axis.
    """
    one = functools.wraps(train_steps)(functools.partial(train_steps, recipe))
    trials = over_trials(one, (None, None, 0, 0, 0, None, None, None))
    mapped = jax.shard_map(
        trials,
        mesh=mesh,
        in_specs=(P(), P(), P("trial"), P("trial"), P("trial"), P(), P(), P()),
        out_specs=P("trial"),
        check_vma=False,  # we write the collectives; else JAX adds its own and gradients double
    )
    return jax.jit(mapped, donate_argnums=(2, 3))


def map_start(recipe, mesh):
    """State and metrics before training, jitted: `(keys [T], frozen) -> state, metrics`."""

    def start(key, frozen):
        return init_state(recipe, key, frozen), init_metrics(recipe)

    return jax.jit(jax.vmap(start, (0, None)), out_shardings=place(mesh, P("trial")))


def abstract(function, mesh, *args):
    """Shapes of what a function mapped by trials would return, with their places on the mesh."""
    add = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(mesh, P("trial")))
    return jax.tree.map(add, jax.eval_shape(function, *args))


def kept(tree, mesh, number):
    """The first trials of a tree [T, ...] without those that only fill the mesh; the same if none do.

    On arrays or on shapes.
    """
    leaf = jax.tree.leaves(tree)[0]
    if len(leaf.shape) and leaf.shape[0] == number:
        return tree
    everywhere = place(mesh, P())  # so many may not divide the devices
    if isinstance(leaf, jax.ShapeDtypeStruct):
        cut = lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype, sharding=everywhere)
        return jax.tree.map(cut, tree)
    return _rows(everywhere, number)(tree)


def filled(tree, mesh, number):
    """What `kept` undid: as many trials [T, ...] as the mesh takes, the last one repeated."""
    if len(jax.tree.leaves(tree)[0]) == number:
        return tree
    return _rows(place(mesh, P("trial")), number)(tree)


@functools.lru_cache(8)
def _rows(sharding, number):
    """A function that gives so many trials of a tree, the last one again where it has fewer, jitted."""
    which = lambda x: jnp.minimum(jnp.arange(number), len(x) - 1)
    return jax.jit(lambda tree: jax.tree.map(lambda x: x[which(x)], tree), out_shardings=sharding)


def map_merge(method, mesh):
    """`methods.merge` for trials, jitted: `(frozen, trainable [T, ...]) -> params [T, ...]`."""
    merge = jax.vmap(functools.partial(methods.merge, method), in_axes=(None, 0))
    return jax.jit(merge, out_shardings=place(mesh, P("trial")))


def turns(tree, mesh, number):
    """Parts of a tree of trials [T, ...] for `number` trials on each device at once, in turn.

    Yields:
      Numbers of the trials, and their tree.
    """
    groups = mesh.shape["trial"]
    here = len(jax.tree.leaves(tree)[0]) // groups  # on each device, in order
    for start in range(0, here, number):
        which = [g * here + i for g in range(groups) for i in range(start, min(start + number, here))]
        if len(which) == groups * here:
            yield which, tree
        else:
            pick = jax.jit(
                lambda tree, which: jax.tree.map(lambda x: x[which], tree),
                out_shardings=place(mesh, P("trial")),
            )
            yield which, pick(tree, np.array(which))


@functools.lru_cache(8)
def map_eval_step(model, image_size, precision, mesh):
    """`eval_step` for all trials on a mesh, jitted: `(params [T, ...], images, labels, mask)`."""
    one = functools.partial(eval_step, model, image_size, precision)

    @functools.wraps(eval_step)
    def trials(params, *batch):  # one after another: a batch of one fills the device
        if len(params["cls"]) == 1:
            return over_trials(one, (0, None, None, None))(params, *batch)
        return jax.lax.map(lambda params: one(params, *batch), params)

    mapped = jax.shard_map(
        trials,
        mesh=mesh,
        in_specs=(P("trial"), P("data"), P("data"), P("data")),
        out_specs=P("trial"),
        check_vma=False,
    )
    return jax.jit(mapped)


def batches(images, labels, size, mesh):
    """Slices of a split on the mesh as (images, labels, mask), all of one shape.

    The last is padded, and so is each to a multiple of the devices; padding has mask 0. Each process
    reads what its devices need.
    """
    size = min(size, len(labels))
    slots = math.ceil(size / mesh.shape["data"]) * mesh.shape["data"]
    sharding = place(mesh, P("data"))
    for start in range(0, len(labels), size):
        count = min(size, len(labels) - start)

        def shard(array, dtype, index, start=start, count=count):
            low, high, _ = index[0].indices(slots)
            part = np.zeros((high - low, *array.shape[1:]), dtype)
            real = array[start + low : start + max(low, min(high, count))]
            part[: len(real)] = real
            return part

        arrays = (images, images.dtype), (labels, np.int32), (np.ones(len(labels)), np.float32)
        yield tuple(
            jax.make_array_from_callback(
                (slots, *array.shape[1:]), sharding, functools.partial(shard, array, dtype)
            )
            for array, dtype in arrays
        )


def evaluate(step, params, images, labels, size, mesh, done=lambda number: None):
    """Mean loss and accuracy [T] each of a split, streamed in batches of `size`.

    Args:
      step: see `map_eval_step`.
      params: trees of the trials [T, ...], on the mesh.
      images: uint8 [N, h, w, 3].
      labels: classes [N].
      size: images of a batch.
      done: called after each batch with its number of images; may raise to end this.
    """
    sums = []
    for i, batch in enumerate(batches(images, labels, size, mesh)):
        sums.append(step(params, *batch))
        jax.block_until_ready(sums[-3:-2])  # so that few batches are on the device
        done(min(size, len(labels) - i * size))
    sums = distributed.fetch(sums)
    return {
        "loss": np.sum([s["loss"] for s in sums], 0, np.float64) / len(labels),
        "accuracy": np.sum([s["correct"] for s in sums], 0, np.float64) / len(labels),
    }
