"""One device equals many, chunks equal whole epochs, trials equal single runs.

What is summed in another order is compared in float64, but for pixels, which are float32: 1e-7 at most.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from float64 import double, in_float64
from golden import Golden
from jax.sharding import PartitionSpec as P
from marks import quick
from models.test_vit import SMALL
from trees import random_tree, started

from rlrr_jax import batch as batch_lib
from rlrr_jax import evaluate, methods, metrics, models, optim, step
from rlrr_jax.models import vit
from rlrr_jax.recipe import Batch, Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib
from rlrr_jax.weights import reader

MODEL = vit.ViT(**{**SMALL, "depth": 2})
METHOD = methods.get("rlrr")
CLASSES = SMALL["num_classes"]
SIZE, NUMBER, BATCH = 16, 22, 6  # 4 steps an epoch, the last of 4 images
FROZEN = jax.tree.map(np.asarray, random_tree(MODEL, SIZE))
RNG = np.random.default_rng(0)
DATA = {
    "images": RNG.integers(0, 256, (NUMBER, SIZE, SIZE, 3), np.uint8),
    "labels": RNG.integers(0, SMALL["num_classes"], NUMBER).astype(np.int32),
}


def recipe(**kwargs):
    """In float64 where a test is."""
    model = MODEL.clone(dtype=jnp.zeros(()).dtype)
    return Recipe(model, METHOD, BATCH, NUMBER, SIZE, **{"drop_path": True, **kwargs})


def frozen_tree():
    return double(FROZEN) if jax.config.jax_enable_x64 else FROZEN


def hyper(seed=0, lr=1e-2, weight_decay=1e-2, drop_path=0.4, epochs=5, flip=True):
    noise, order = jax.random.split(jax.random.key(seed))
    return Hyper(
        lr=jnp.full(epochs, lr),
        weight_decay=jnp.asarray(weight_decay),
        drop_path=jnp.asarray(drop_path),
        flip=jnp.asarray(flip),
        noise_key=noise,
        order_key=order,
    )


def stack(*trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@functools.cache
def mapped_steps(devices, trials, x64=False):
    del x64  # another program
    r, mesh = recipe(), mesh_lib.make_mesh(jax.devices()[:devices], trials)
    return r, mesh, step.map_train_steps(r, mesh)


class Run:
    """The mapped step on some devices, with its arguments in place."""

    def __init__(self, devices, hypers=None):
        hypers = hypers or [hyper()]
        self.recipe, self.mesh, self.steps = mapped_steps(
            devices, len(hypers), jax.config.jax_enable_x64
        )
        frozen = frozen_tree()
        states = [step.init_state(self.recipe, jax.random.key(i), frozen) for i in range(len(hypers))]
        put = functools.partial(mesh_lib.put, self.mesh)
        self.frozen, self.data = put(P(), frozen), put(P(), DATA)
        self.hyper = put(P("trial"), stack(*hypers))
        self.state = put(P("trial"), stack(*states))
        self.metrics = put(P("trial"), stack(*[step.init_metrics(self.recipe)] * len(hypers)))

    def __call__(self, epoch, start, stop):
        scalars = [mesh_lib.put(self.mesh, P(), jnp.int32(i)) for i in (epoch, start, stop)]
        self.state, self.metrics = self.steps(
            self.frozen, self.data, self.state, self.metrics, self.hyper, tuple(scalars)
        )


def one_gradient(r, frozen, data, hyper, trainable, number):
    """Gradient and plain SGD step of batch `number` of epoch 1, on one device of the axis "data"."""
    order = jax.random.permutation(jax.random.fold_in(hyper.order_key, 1), r.num_images)
    batch = batch_lib.take(r, data, order, {}, hyper, (1, number))
    metrics, grads, _ = step.loss_and_grad(r, frozen, trainable, batch, hyper)
    return (
        metrics["loss"],
        metrics["acc"],
        grads,
        jax.tree.map(lambda x, g: x - 0.1 * g, trainable, grads),
    )


@pytest.fixture(scope="module")
def trainable():
    tree = started(METHOD, FROZEN)
    head = random_tree(MODEL, SIZE, seed=9)["head"]  # a zero head would hide most gradients
    return {**tree, "head": head}


@functools.cache
def mapped_gradient(devices, drop_path, x64, accumulate=1):
    del x64  # another program
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    mapped = jax.shard_map(
        functools.partial(one_gradient, recipe(drop_path=drop_path, accumulate=accumulate)),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(mapped)


def gradient_on(devices, trainable, number, flip, drop_path, accumulate=1):
    mapped = mapped_gradient(devices, drop_path, jax.config.jax_enable_x64, accumulate)
    return mapped(frozen_tree(), DATA, hyper(flip=flip), trainable, number)


@pytest.mark.parametrize("number", quick([0, 3], 3))  # 6 images, and 4
@pytest.mark.parametrize("noise", quick([False, True], True))
@in_float64
def test_gradient_and_sgd_step_are_those_of_one_device(number, noise, trainable):
    kwargs, trainable = dict(flip=noise, drop_path=noise), double(trainable)
    one = gradient_on(1, trainable, number, **kwargs)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one[2])) > 0.1
    for devices in (2, 4):  # with 4 devices the last has no real image
        many = gradient_on(devices, trainable, number, **kwargs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), one, many)
    pmapped = jax.pmap(
        functools.partial(one_gradient, recipe(drop_path=noise)),
        axis_name="data",
        in_axes=(None, None, None, None, 0),
    )(frozen_tree(), jax.tree.map(jnp.asarray, DATA), hyper(flip=noise), trainable, jnp.full(4, number))
    for shard in range(jax.device_count()):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b[shard], rtol=0, atol=1e-6), one, pmapped
        )


@pytest.mark.parametrize(
    ("devices", "parts", "number"),
    [
        (1, 2, 0),
        pytest.param(1, 4, 3, marks=pytest.mark.slow),
        pytest.param(2, 3, 3, marks=pytest.mark.slow),
    ],
)
@in_float64
def test_a_gradient_in_parts_is_that_of_the_whole(devices, parts, number, trainable):
    """Of a batch that they divide, of the last one, of 4 images, and on two devices."""
    kwargs, trainable = dict(flip=True, drop_path=True), double(trainable)
    whole = gradient_on(1, trainable, number, **kwargs)
    found = gradient_on(devices, trainable, number, **kwargs, accumulate=parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), whole, found)


def test_what_is_remembered_comes_back_whole_from_parts():
    """In the order of the images, with sums of all else."""
    batch = Batch(*[None] * 4, keys=None, slots=jnp.arange(6), numbers=None, step=jnp.int32(7))

    def part(batch):
        assert batch.step.shape == () and batch.slots.shape in ((2,), (6,))
        squares = (batch.slots**2).astype(jnp.float32)
        sums = {"acc": squares.sum()}
        return (squares.sum() + batch.step, (sums, {"remember": squares[:, None]})), {
            "a": squares.sum()
        }

    (loss, (sums, kept)), grads = jax.jit(lambda b: step.accumulated(part, b, 3))(batch)
    assert float(loss) == 55 + 3 * 7 and float(sums["acc"]) == float(grads["a"]) == 55
    np.testing.assert_array_equal(kept["remember"][:, 0], np.arange(6) ** 2)


@in_float64
def test_gradient_is_that_of_the_plain_mean(trainable):
    """Against a formulation without masks, sums and devices."""
    trainable, frozen = double(trainable), frozen_tree()
    r, h = recipe(drop_path=False), hyper(flip=False)
    order = jax.random.permutation(jax.random.fold_in(h.order_key, 1), NUMBER)

    @jax.jit
    @jax.value_and_grad
    def plain(trainable):
        images = jnp.asarray(DATA["images"])[order[18:22]].astype(jnp.float32) / 127.5 - 1
        logits = r.model.apply({"params": methods.merge(METHOD, frozen, trainable)}, images)
        labels = jnp.asarray(DATA["labels"])[order[18:22]]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    loss, grads = plain(trainable)
    ours = gradient_on(4, trainable, 3, flip=False, drop_path=False)
    np.testing.assert_allclose(ours[0], loss, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours[2], grads)


@pytest.mark.slow
def test_noise_matters(trainable):
    """The equality above would also hold for noise that is never applied."""
    losses = {
        (f, d): float(gradient_on(1, trainable, 0, flip=f, drop_path=d)[0])
        for f in (False, True)
        for d in (False, True)
    }
    assert len(set(losses.values())) == 4


@pytest.mark.slow
@in_float64
def test_twenty_steps_of_adamw_on_many_devices():
    losses, trained = {}, {}
    for devices in (1, 4):
        run, losses[devices] = Run(devices), []
        for epoch in range(5):
            run(epoch, 0, 4)
            losses[devices].extend(np.asarray(run.metrics["loss"][0]))
        trained[devices] = flatten_dict(jax.device_get(run.state["trainable"]), sep="/")
    assert len(losses[1]) == 20 and np.mean(losses[1][-4:]) < np.mean(losses[1][:4])
    np.testing.assert_allclose(losses[4], losses[1], rtol=0, atol=1e-5)
    for name, value in trained[1].items():
        if not name.endswith("key/shift"):  # rounding noise, which Adam turns into steps of lr
            np.testing.assert_allclose(trained[4][name], value, rtol=0, atol=1e-4, err_msg=name)


def test_chunks_change_no_bit_and_nothing_is_compiled_twice(caplog):
    mapped_steps.cache_clear()
    parts = Run(1)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for epoch in range(2):
            for start, stop in ((0, 1), (1, 3), (3, 4)):
                parts(epoch, start, stop)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert sum("train_steps" in text or "jit(trials)" in text for text in compiled) == 1, compiled
    whole = Run(1)
    for epoch in range(2):
        whole(epoch, 0, 4)
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    np.testing.assert_array_equal(whole.metrics["loss"], parts.metrics["loss"])


@pytest.mark.slow
@in_float64
def test_trials_equal_single_runs_whatever_the_mesh():
    hypers = [hyper(0), hyper(1, lr=3e-3, drop_path=0.1)]
    single = []
    for i, h in enumerate(hypers):
        run = Run(1, [h])
        run.state = mesh_lib.put(
            run.mesh, P("trial"), stack(step.init_state(run.recipe, jax.random.key(i), frozen_tree()))
        )
        run(0, 0, 4)
        single.append(np.asarray(run.metrics["loss"][0]))
    assert np.abs(single[0] - single[1]).max() > 1e-3
    for devices in (1, 4):
        run = Run(devices, hypers)
        assert run.mesh.shape["trial"] == min(devices, 2)
        run(0, 0, 4)
        np.testing.assert_allclose(run.metrics["loss"], single, rtol=0, atol=1e-6)


def test_frozen_weights_stay_and_are_in_no_state():
    run = Run(2)
    run(0, 0, 4)
    jax.tree.map(np.testing.assert_array_equal, run.frozen, FROZEN)
    adam = run.state["opt_state"][0]
    trainable = jax.tree.structure(run.state["trainable"])
    assert jax.tree.structure(adam.mu) == jax.tree.structure(adam.nu) == trainable
    numbers = sum(x.size for x in jax.tree.leaves(run.state))
    assert numbers <= 3 * sum(x.size for x in jax.tree.leaves(run.state["trainable"])) + 3


def test_the_frozen_tree_is_an_argument_of_the_program():
    """No weight is written into it as a constant."""
    run = Run(1)
    scalar = mesh_lib.put(run.mesh, P(), jnp.int32(0))
    args = (run.frozen, run.data, run.state, run.metrics, run.hyper, (scalar,) * 3)
    text = run.steps.lower(*args).as_text()
    constants = re.findall(r"dense<\"?([^>]*)>", text)
    assert constants and max(map(len, constants)) < 1000


def test_steps_use_their_own_learning_rate_and_order(tmp_path):
    """The ten golden steps of AdamW through `train_step`, a learning rate for each epoch."""
    golden = Golden("open_a", tmp_path)
    frozen = reader.load(golden.weights, model=golden.model, image_size=golden.image_size)
    number = len(golden.labels)
    r = Recipe(golden.model, METHOD, number, number, golden.image_size, drop_path=False)
    state = step.init_state(r, jax.random.key(0), frozen)
    state["trainable"] = golden.tree("init/", state["trainable"])
    data = {"images": jnp.asarray((golden.images + 1) * 127.5), "labels": jnp.asarray(golden.labels)}
    h = hyper(flip=False)._replace(
        lr=jnp.asarray(golden.data["lrs"], jnp.float32),
        weight_decay=jnp.float32(golden.data["weight_decay"]),
    )
    one = jax.shard_map(
        lambda state, epoch: step.train_step(r, frozen, data, jnp.arange(number), state, h, (epoch, 0)),
        mesh=mesh_lib.make_mesh(jax.devices()[:1]),
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    one = jax.jit(one)
    for epoch in range(10):
        state, metrics = one(state, jnp.int32(epoch))
        assert abs(float(metrics["loss"]) - golden.data["losses"][epoch]) < 1e-4
    ours, theirs = (
        flatten_dict(t, sep="/")
        for t in (state["trainable"], golden.tree("after_n/", state["trainable"]))
    )
    for name in ours:
        if not name.endswith("key/shift"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-4, err_msg=name)


def shard_batch(r, data, h, epoch, number):
    """Labels, images and mask of a batch on one device."""

    def take():
        order = jax.random.permutation(jax.random.fold_in(h.order_key, epoch), NUMBER)
        batch = batch_lib.take(r, data, order, {}, h, (epoch, number))
        return batch.images, batch.labels, batch.mask

    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    mapped = jax.shard_map(take, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False)
    return jax.jit(mapped)()


def test_flip_is_left_to_right_and_keyed():
    data = {**jax.tree.map(jnp.asarray, DATA), "labels": jnp.arange(NUMBER)}
    seen = set()
    for number in range(3):
        images, labels, _ = shard_batch(recipe(), data, hyper(), 0, number)
        for image, label in zip(np.asarray(images), np.asarray(labels)):
            plain = DATA["images"][label] / np.float32(127.5) - 1
            flipped = np.allclose(image, plain[:, ::-1], atol=1e-6)
            assert flipped or np.allclose(image, plain, atol=1e-6)
            seen.add(flipped)
    assert seen == {False, True}


def test_every_epoch_has_its_own_order():
    data = {**jax.tree.map(jnp.asarray, DATA), "labels": jnp.arange(NUMBER)}
    r = recipe()
    orders = [np.asarray(shard_batch(r, data, hyper(), epoch, 0)[1]) for epoch in (0, 1)]
    assert (orders[0] != orders[1]).any()


def test_an_epoch_shows_every_image_once():
    r, h = recipe(), hyper(flip=False)
    data = {"images": np.zeros_like(DATA["images"]), "labels": np.arange(NUMBER, dtype=np.int32)}
    data = jax.tree.map(jnp.asarray, data)
    mesh = mesh_lib.make_mesh(jax.devices()[:4])

    def labels(number):
        order = jax.random.permutation(jax.random.fold_in(h.order_key, 0), NUMBER)
        batch = batch_lib.take(r, data, order, {}, h, (0, number))
        return batch.labels, batch.mask

    mapped = jax.jit(
        jax.shard_map(labels, mesh=mesh, in_specs=P(), out_specs=P("data"), check_vma=False)
    )
    seen = [np.asarray(x)[np.asarray(m) == 1] for x, m in map(mapped, range(4))]
    assert [len(x) for x in seen] == [6, 6, 6, 4]
    assert sorted(np.concatenate(seen)) == list(range(NUMBER))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("size", quick([1, 5, 8, 64], 5))
def test_evaluation_counts_every_image_once(devices, size):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    tree = random_tree(MODEL, SIZE)
    params = mesh_lib.put_trials(mesh, [tree])
    eval_step = evaluate.map_eval_step(MODEL, SIZE, "highest", mesh)
    found = evaluate.evaluate(eval_step, params, DATA["images"], size, mesh)
    assert found.shape == (1, NUMBER, MODEL.num_classes)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(MODEL.apply)({"params": tree}, DATA["images"] / np.float32(127.5) - 1)
    np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-5)
    out = metrics.of_classes(found[0], DATA["labels"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, DATA["labels"])
    assert out["acc"] == (logits.argmax(-1) == DATA["labels"]).sum() / NUMBER
    np.testing.assert_allclose(out["loss"], losses.mean(), rtol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", quick([jnp.float32, jnp.bfloat16], jnp.bfloat16))
def test_the_step_lowers_for_machines_that_are_not_here(platform, dtype):
    model = models.build("B/16", 100, dtype=dtype)
    r = Recipe(model, METHOD, 32, 1000, 224)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    frozen = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    state = jax.eval_shape(functools.partial(step.init_state, r), jax.random.key(0), frozen)
    add = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), tree)
    data = {
        "images": jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((1000,), jnp.int32),
    }
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    mesh = mesh_lib.make_mesh(jax.devices(), trials=2)  # 2 x 2
    args = (frozen, data, add(state), add(jax.eval_shape(lambda: step.init_metrics(r))))
    args += (add(jax.eval_shape(hyper)), (scalar,) * 3)
    exported = jax.export.export(step.map_train_steps(r, mesh), platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    assert "all_reduce" in exported.mlir_module() or "all-reduce" in exported.mlir_module()


def test_learning_rate_schedules():
    cosine = optim.learning_rates("cosine", 1.0, 12)
    assert cosine[0] == 0.5 and max(cosine) > 0.99 and 0 < cosine[-1] < 0.01
    assert len(optim.learning_rates("official", 1.0, 3)) == 3
    with pytest.raises(ValueError, match="known are|use|did you mean"):
        optim.learning_rates("linear", 1.0, 3)


def test_weight_decay_pulls_only_what_it_should():
    """With zero gradients AdamW leaves a leaf alone or shrinks it by lr * weight_decay."""
    tree = started(METHOD, FROZEN)
    tree = jax.tree.map(lambda x: x + 1.0, tree)
    tx = optim.build(optim.Optimizer(), METHOD, tree, 0.1, 0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    decayed = flatten_dict(methods.decay(METHOD, tree))
    for name, update in flatten_dict(updates).items():
        expected = -0.05 * flatten_dict(tree)[name] if decayed[name] else 0 * update
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("trials", "devices", "groups"),
    [(3, 8, 4), (3, 16, 4), (18, 16, 8), (1, 8, 1), (5, 4, 2), (2, 2, 2), (7, 1, 1), (1, 1, 1)],
)
def test_the_mesh_has_the_split_of_least_work(trials, devices, groups):
    """At batch 32: on the busiest device each trial has its share of it and a fixed cost."""
    assert mesh_lib.trial_axis(devices, trials, 32) == groups
    work = {
        n: -(-trials // n) * (-(-32 * n // devices) + mesh_lib.TRIAL_COST)
        for n in range(1, devices + 1)
        if devices % n == 0
    }
    assert work[groups] == min(work.values())


@pytest.mark.slow
@in_float64
def test_trials_that_do_not_fill_the_mesh_train_as_if_alone():
    """Three trials on four devices: the last is trained twice, and left out of what is kept."""
    hypers = [hyper(0), hyper(1, lr=3e-3), hyper(2, drop_path=0.1)]
    run = Run(4, [*hypers, hypers[-1]])
    assert run.mesh.shape == {"trial": 4, "data": 1}
    run(0, 0, 4)
    alone = Run(1, hypers[2:])
    alone.state = mesh_lib.put(
        alone.mesh, P("trial"), stack(step.init_state(alone.recipe, jax.random.key(3), frozen_tree()))
    )
    alone(0, 0, 4)
    np.testing.assert_allclose(run.metrics["loss"][3], alone.metrics["loss"][0], rtol=0, atol=1e-6)
    kept = mesh_lib.without_spares(run.state, run.mesh, 3)
    assert {len(x) for x in jax.tree.leaves(kept)} == {3}
    kernels = [x for x in jax.tree.leaves(kept) if x.ndim > 1 and any(n % 4 == 0 for n in x.shape[1:])]
    assert kernels and not any(x.sharding.is_fully_replicated for x in kernels)
    again = mesh_lib.with_spares(kept, run.mesh, 4)
    for a, b in zip(*map(jax.tree.leaves, (again, run.state)), strict=True):
        np.testing.assert_array_equal(a[:3], b[:3])
        np.testing.assert_array_equal(a[3], b[2])
    assert (
        mesh_lib.without_spares(kept, run.mesh, 3) is kept
        and mesh_lib.with_spares(run.state, run.mesh, 4) is run.state
    )


@pytest.mark.parametrize("number", [1, 2, 4])
def test_turns_take_every_trial_once(number):
    mesh = jax.make_mesh((2, 2), ("trial", "data"), (jax.sharding.AxisType.Auto,) * 2)
    tree = mesh_lib.put(mesh, P("trial"), {"a": jnp.arange(8), "b": jnp.arange(16.0).reshape(8, 2)})
    seen = []
    for which, part in mesh_lib.turns(tree, mesh, number):
        np.testing.assert_array_equal(part["a"], which)
        np.testing.assert_array_equal(part["b"][:, 0], 2.0 * np.array(which))
        assert len(which) == 2 * number
        seen += which
    assert sorted(seen) == list(range(8))
