"""Mixup, CutMix, smoothed labels, a running average and restarts, step by step in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from marks import quick

from rlrr_jax import methods, mixing, optim, step
from rlrr_jax.mixing import Mixing
from rlrr_jax.optim import Optimizer
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib

SIDE, CLASSES, NUMBER, BATCH = 6, 4, 22, 6  # 4 steps an epoch, the last of 4 images
STEPS, EPOCHS = 30, 8
RNG = np.random.default_rng(0)
DATA = {
    "images": RNG.integers(0, 256, (NUMBER, SIDE, SIDE, 3), np.uint8),
    "labels": RNG.integers(0, CLASSES, NUMBER).astype(np.int32),
}
LR, DECAY, AVERAGE = 0.03, 0.1, 0.9


@dataclasses.dataclass(frozen=True)
class Regression:
    """A head on pixels."""

    num_classes = CLASSES

    def apply(self, variables, images, drop_path, keys):
        head = variables["params"]["head"]
        return images.reshape(len(images), -1) @ head["kernel"] + head["bias"][None]


def recipe(how, **options):
    options = {"optimizer": Optimizer(average=AVERAGE), "mixing": how, **options}
    return Recipe(Regression(), methods.get("linear"), BATCH, NUMBER, SIDE, **options)


def frozen_tree():
    return {"head": {"kernel": jnp.zeros((SIDE * SIDE * 3, CLASSES)), "bias": jnp.zeros(CLASSES)}}


def hyper(flip=False):
    noise, order = jax.random.split(jax.random.key(5))
    lrs = optim.learning_rates("restarts", LR, EPOCHS, 4, restarts=(2, 2))
    values = dict(lr=jnp.array(lrs), weight_decay=jnp.float32(DECAY), drop_path=jnp.float32(0))
    return Hyper(**values, flip=jnp.array(flip), noise_key=noise, order_key=order)


def train(r, devices=1, flip=False):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    put = functools.partial(mesh_lib.put, mesh)
    frozen = put(P(), frozen_tree())
    state, metrics = step.map_start(r, mesh)(mesh_lib.put_trials(mesh, [jax.random.key(0)]), frozen)
    steps, one = (
        step.map_train_steps(r, mesh),
        put(P("trial"), jax.tree.map(lambda x: x[None], hyper(flip))),
    )
    losses = []
    for epoch in range(EPOCHS):
        now = (epoch, 0, min(4, STEPS - 4 * epoch))
        now = tuple(put(P(), jnp.int32(i)) for i in now)
        state, metrics = steps(frozen, put(P(), DATA), state, metrics, one, now)
        losses += np.asarray(metrics["loss"][0])[: min(4, STEPS - 4 * epoch)].tolist()
    return jax.tree.map(lambda x: np.asarray(x[0]), state), losses


# The same in NumPy ----------------------------------------------------------------------------


def drawn(how, key):
    """Whether a batch is cut, its share, and the centre of its box."""
    which, weight, box = jax.random.split(key, 3)
    both = how.mixup and how.cutmix
    cut = bool(jax.random.bernoulli(which)) if both else bool(how.cutmix)
    alpha = how.cutmix if cut else how.mixup
    centre = [int(jax.random.randint(jax.random.fold_in(box, k), (), 0, SIDE)) for k in range(2)]
    return cut, float(jax.random.beta(weight, jnp.float32(alpha), jnp.float32(alpha))), centre


def mix_in_numpy(how, key, images):
    """Mixed images of a batch, pixel by pixel, and the weight of their own labels."""
    cut, share, (row, column) = drawn(how, key)
    if not cut:
        return share * images + (1 - share) * images[::-1], share
    side = int(np.sqrt(np.float32(1 - share)) * SIDE)
    out, replaced = images.copy(), 0
    for i in range(SIDE):
        for j in range(SIDE):
            if row - side // 2 <= i < row + side // 2 and column - side // 2 <= j < column + side // 2:
                out[:, i, j] = images[::-1][:, i, j]
                replaced += 1
    return out, 1 - replaced / SIDE**2


def restart(epoch):
    """Cosines of 2, 4, 8, ... epochs; the first epoch is there twice."""
    t, length = max(epoch - 1, 0), 2
    while t >= length:
        t, length = t - length, 2 * length
    return LR * (1 + np.cos(np.pi * t / length)) / 2


def train_in_numpy(how):
    h = hyper()
    weights = [np.zeros((SIDE * SIDE * 3, CLASSES)), np.zeros(CLASSES)]
    moments = [[np.zeros_like(w) for w in weights] for _ in range(2)]
    average, losses = [w.copy() for w in weights], []
    for number in range(STEPS):
        epoch, k = divmod(number, 4)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(h.order_key, epoch), NUMBER))
        rows = order[k * BATCH : (k + 1) * BATCH]
        images = DATA["images"][rows] / 127.5 - 1
        targets = np.eye(CLASSES)[DATA["labels"][rows]] * (1 - how.smoothing) + how.smoothing / CLASSES
        if how.images:
            key = jax.random.fold_in(h.noise_key, number)
            images, weight = mix_in_numpy(how, jax.random.fold_in(key, 2**31 - 1), images)
            targets = weight * targets + (1 - weight) * targets[::-1]
        x = images.reshape(len(rows), -1)
        logits = x @ weights[0] + weights[1]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-(targets * np.log(p)).sum(1).mean())
        error = (p - targets) / len(rows)
        for i, gradient in enumerate((x.T @ error, error.sum(0))):
            m, v = (moments[0][i], moments[1][i])
            m[:] = 0.9 * m + 0.1 * gradient
            v[:] = 0.999 * v + 0.001 * gradient**2
            update = m / (1 - 0.9 ** (number + 1)) / (np.sqrt(v / (1 - 0.999 ** (number + 1))) + 1e-8)
            decay = DECAY * weights[i] if i == 0 else 0  # of the kernel alone
            weights[i] = weights[i] - restart(epoch) * (update + decay)
            average[i] = AVERAGE * average[i] + (1 - AVERAGE) * weights[i]
    return weights, average, losses


ALL = Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1)


@pytest.mark.parametrize(
    "how",
    quick([ALL, Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(smoothing=0.1), Mixing()], ALL),
    ids=str,
)
def test_thirty_steps(how):
    state, losses = train(recipe(how), devices=4)
    weights, average, expected = train_in_numpy(how)
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    assert len(set(np.round(expected, 3))) > 20
    for name, ours in (("trainable", weights), ("average", average)):
        head = state[name]["head"]
        np.testing.assert_allclose(head["kernel"], ours[0], rtol=0, atol=2e-4)
        np.testing.assert_allclose(head["bias"], ours[1], rtol=0, atol=2e-4)
    assert step.tuned(state) is state["average"]


@pytest.mark.slow
def test_mixing_does_not_depend_on_the_number_of_devices():
    """Partners lie on other devices; images are flipped by their own key before they are mixed."""
    r = recipe(Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1))
    (one, a), (four, b) = (train(r, devices, flip=True) for devices in (1, 4))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(
        one["average"]["head"]["kernel"], four["average"]["head"]["kernel"], atol=1e-5
    )


def test_shares_are_those_of_a_beta_distribution():
    images = jnp.zeros((2, 64, 64, 3))
    draw = jax.jit(jax.vmap(lambda key: mixing.mix(Mixing(mixup=0.8), key, images, images)[1]))
    shares = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert abs(shares.mean() - 0.5) < 0.02 and abs(shares.var() - 1 / (4 * 2.6)) < 0.01
    both = jax.jit(
        jax.vmap(lambda key: mixing.mix(Mixing(0.8, 1.0), key, images, images + 1)[0][0, :, :, 0])
    )
    pixels = np.asarray(both(jax.random.split(jax.random.key(1), 2000)))
    cut = (np.isin(pixels, (0, 1))).all((1, 2)).mean()  # whole pixels of one image or the other
    assert 0.45 < cut < 0.55


def test_the_weight_of_a_cut_image_is_its_true_area():
    ones, zeros = jnp.ones((3, 8, 12, 3)), jnp.zeros((3, 8, 12, 3))
    draw = jax.jit(jax.vmap(lambda key: mixing.mix(Mixing(cutmix=1.0), key, ones, zeros)))
    images, weight = draw(jax.random.split(jax.random.key(0), 300))
    np.testing.assert_allclose(images.mean((1, 2, 3, 4)), weight, atol=1e-6)
    assert weight.min() < 0.5 and weight.max() == 1


def test_restarts_are_the_authors():
    """facts of their FGVC scripts: T_0 of 5 gives these factors."""
    factors = optim.learning_rates("restarts", 1.0, 7, restarts=(5, 1))
    np.testing.assert_allclose(factors, [1, 1, 0.905, 0.655, 0.345, 0.095, 1], atol=5e-4)
    default = optim.learning_rates("restarts", 1.0, 32)
    assert [i for i, x in enumerate(default) if x == 1] == [0, 1, 11, 31]  # after 10 and 20 epochs
