"""The loss of exits against NumPy, and in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from projects.pace.test_pace import IMAGES, LABELS, MODEL, NUMBER, SIZE, batch_of, frozen_tree
from test_step import stack

from rlrr_jax import losses, methods, step
from rlrr_jax.projects.exits import losses as lib
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib


def test_exits_are_what_numpy_computes(monkeypatch):
    rng = np.random.default_rng(0)
    logits, features = rng.normal(size=(6, 3, 5)), rng.normal(size=(6, 2, 4))
    labels, mask = np.array([0, 1, 0, 0, 1, 2]), np.array([1, 1, 1, 1, 1, 0.0])
    batch = batch_of(IMAGES[:6], jnp.asarray(labels), mask=jnp.asarray(mask, jnp.float32))
    given = jnp.asarray(logits), jnp.asarray(features)
    monkeypatch.setattr(lib, "answers", lambda *_: given)
    one = lambda batch: lib.exits(None, batch, (), 0.5, 2.0, 3.0)
    run = jax.jit(jax.vmap(one, axis_name="data"))
    each, values = run(jax.tree.map(lambda x: x[None], batch))
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(5):
        entropy = [-log[i, place, labels[i]] for place in range(3)]
        last = np.exp(log[i, 2])
        divergence = [(last * (log[i, 2] - log[i, place])).sum() for place in range(2)]
        alike = [j for j in range(5) if labels[j] == labels[i] and j != i]  # image 5 is padding
        distance = np.mean([((features[i] - features[j]) ** 2).mean() for j in alike])
        wanted = entropy[2] + 0.5 * np.mean(entropy[:2]) + 2 * np.mean(divergence) + 3 * distance
        assert float(each[0, i]) == pytest.approx(wanted, rel=1e-5)
        assert float(values["distance"][0, i]) == pytest.approx(distance, rel=1e-5)
        assert values["acc"][0, i] == (logits[i, 2].argmax() == labels[i])
        early = (logits[i, :2].argmax(-1) == labels[i]).mean()
        assert float(values["early_acc"][0, i]) == pytest.approx(early)


def test_exits_are_the_same_on_four_devices(monkeypatch):
    """Images of a label lie on several; loss and gradient, as the step sums them."""
    rng = np.random.default_rng(0)
    given = jnp.asarray(rng.normal(size=(8, 3, 5))), jnp.asarray(rng.normal(size=(8, 2, 4)))
    batch = batch_of(jnp.zeros((8, 1)), jnp.asarray([0, 1, 0, 2, 1, 0, 2, 2]), step=jnp.zeros(8))

    def total(given, devices):
        def one(given, batch):
            monkeypatch.setattr(lib, "answers", lambda *_: given)
            return lib.exits(None, batch)[0]

        cut = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (given, batch))
        return jax.vmap(one, axis_name="data")(*cut).sum()

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    (a, ga), (b, gb) = (run(given, devices) for devices in (1, 4))
    assert float(a) == pytest.approx(float(b), rel=1e-6) and np.abs(ga[1]).max() > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ga, gb)


def test_the_last_exit_learns_nothing_from_the_others(monkeypatch):
    """Distillation goes one way."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)))

    def loss(logits, distill):
        monkeypatch.setattr(lib, "answers", lambda *_: (logits, jnp.zeros((4, 2, 3))))
        one = lambda batch: lib.exits(None, batch, (), 0.0, distill, 0.0)[0]
        batch = batch_of(IMAGES[:4], LABELS[:4])
        return jax.vmap(one, axis_name="data")(jax.tree.map(lambda x: x[None], batch)).sum()

    run = jax.jit(jax.grad(loss))
    without, grads = (run(logits, distill) for distill in (0.0, 1.0))
    np.testing.assert_allclose(grads[:, 2], without[:, 2], rtol=1e-6)
    assert np.abs(grads[:, :2]).max() > 0.01 and np.abs(without[:, :2]).max() == 0


def train(devices, options):
    given = {**losses.options("exits"), "at": (1,), **options}
    net = MODEL, methods.get("lora"), frozen_tree()
    recipe = Recipe(
        *net[:2],
        batch_size=6,
        num_images=NUMBER,
        image_size=SIZE,
        loss=losses.get(
            "exits", losses.fixed(given), losses.check_contract("exits", given, net, (SIZE, SIZE))
        ),
    )
    mesh = mesh_lib.make_mesh(jax.devices()[:devices], 1, 6)
    put = lambda spec, tree: mesh_lib.put(mesh, spec, tree)
    keys = jax.random.split(jax.random.key(7), 3)
    hyper = {"lr": jnp.full(8, 1e-2), "weight_decay": jnp.float32(0), "drop_path": jnp.float32(0.2)}
    hyper |= {"noise_key": keys[0], "order_key": keys[1], "flip": jnp.array(True)}
    hyper["loss"] = {k: jnp.float32(v) for k, v in given.items() if isinstance(v, float)}
    frozen = put(P(), frozen_tree())
    state, metrics = step.map_start(recipe, mesh)(mesh_lib.put_trials(mesh, [keys[2]]), frozen)
    images = jnp.round((IMAGES + 1) * 127.5).astype(jnp.uint8)
    data = put(P(), {"images": images, "labels": LABELS})
    now = [put(P(), jnp.int32(i)) for i in (0, 0, recipe.steps)]
    run = step.map_train_steps(recipe, mesh)
    state, metrics = run(
        frozen, data, state, metrics, put(P("trial"), stack(Hyper(**hyper))), tuple(now)
    )
    return jax.tree.map(np.asarray, (state["trainable"], metrics))


@pytest.mark.slow
def test_one_device_equals_four_and_heads_are_trained():
    (one, ours), (_, theirs) = train(1, {}), train(4, {})
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-4)
    assert min(np.abs(x).max() for x in jax.tree.leaves(one["loss"])) > 1e-3
