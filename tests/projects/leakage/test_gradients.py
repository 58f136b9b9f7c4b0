import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlrr_jax import methods, models
from rlrr_jax.projects.leakage import gradients, inversion
from rlrr_jax.projects.leakage.gradients import Client

CLASSES = 5


@pytest.fixture(scope="module")
def frozen():
    model = models.build("bundled", CLASSES)
    images = jnp.zeros((1, 16, 16, 3))
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), images)["params"])


def client(frozen, name="rlrr", head=0.3, **kwargs):
    model, method = models.build("bundled", CLASSES), methods.get(name, **kwargs)
    trainable = methods.start(method, jax.random.key(1), frozen)
    shape = trainable["head"]["kernel"].shape
    trainable["head"] = {
        "kernel": head * jax.random.normal(jax.random.key(2), shape),
        "bias": head * jax.random.normal(jax.random.key(3), shape[1:]),
    }
    return Client(model, method, frozen, trainable)


def pictures(number, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (number, 16, 16, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, number).astype(np.int32)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_merged_model(frozen):
    c, (images, labels) = client(frozen), pictures(3)

    def loss(trainable):
        params = methods.merge(c.method, frozen, trainable)
        logs = jax.nn.log_softmax(c.model.apply({"params": params}, images))
        return -logs[jnp.arange(3), labels].mean()

    with jax.default_matmul_precision("highest"):
        wanted = jax.grad(loss)(c.trainable)
    found = gradients.gradient(c, images, labels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), found, wanted)


@pytest.mark.slow
def test_label_and_features_are_exact(frozen):
    c, (images, labels) = client(frozen), pictures(6)
    params = methods.merge(c.method, frozen, c.trainable)
    for image, y in zip(images, labels):
        shared = gradients.gradient(c, image[None], y[None])["head"]
        assert gradients.label(shared) == y
        # The second formulation: what the head gets, found by heads of one row each.
        eye = {"kernel": jnp.eye(96), "bias": jnp.zeros(96)}
        true = models.build("bundled", 96).apply({"params": {**params, "head": eye}}, image[None])[0]
        np.testing.assert_allclose(gradients.feature(shared), true, atol=2e-4 * np.abs(true).max())


@pytest.mark.slow
def test_a_zero_head_gives_no_other_gradient(frozen):
    c, (images, labels) = client(frozen, head=0.0), pictures(2)
    shared = gradients.gradient(c, images, labels)
    assert not gradients.flat(shared["adapter"]).any() and gradients.flat(shared["head"]).any()


@pytest.mark.parametrize(
    "name, kwargs",
    [("linear", {}), *(pytest.param(x, {}, marks=pytest.mark.slow) for x in ("rlrr", "bitfit"))],
)
def test_a_single_image_is_found_by_its_gradient(frozen, name, kwargs):
    c, (images, labels) = client(frozen, name, **kwargs), pictures(12)
    probes = [gradients.gradient(c, images[i][None], labels[i][None]) for i in (4, 7)]
    seen = []
    found = gradients.similarities(c, probes, images, labels, seen.append)
    assert found.shape == (3, 12, 2) and sum(seen) == 12
    parts = [found[1], found[2]] + ([found[0]] if name != "linear" else [])
    for part in parts:
        for j, i in enumerate((4, 7)):
            assert part[i, j] == pytest.approx(1, abs=1e-5)
            assert gradients.ranks(part[:, j], [i]) == [1]
    if name == "linear":
        assert not found[0].any()  # it has no adapter
    # By hand, for a candidate that is none of the probes.
    other = gradients.gradient(c, images[2][None], labels[2][None])
    a, b = (np.asarray(gradients.flat(tree), np.float64) for tree in (other, probes[0]))
    assert found[2, 2, 0] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)


def test_ranks():
    cosines = np.array([0.9, 0.5, 0.8, 0.5, 0.1])
    assert list(gradients.ranks(cosines, [2])) == [2]
    assert list(gradients.ranks(cosines, [0, 2])) == [1, 1]  # they do not stand in each other's way
    assert list(gradients.ranks(cosines, [1])) == [3.5]  # behind two, and beside one that is equal
    assert list(gradients.ranks(np.zeros(5), [3])) == [3]
    assert gradients.scores(np.array([1, 1, 4, 2])) == {"top1": 0.5, "mrr": 0.6875}


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (24, 24, 3))
    assert inversion.psnr(a, a + 0.2) == pytest.approx(10 * np.log10(4 / 0.04))
    assert inversion.ssim(a, a) == pytest.approx(1)
    b = np.clip(a + 0.5 * rng.standard_normal(a.shape), -1, 1)
    # The second formulation: windows one by one.
    x = np.arange(-5, 6)
    weights = np.exp(-(x**2) / 4.5)
    window = np.outer(weights, weights) / weights.sum() ** 2
    found = []
    for i in range(14):
        for j in range(14):
            for colour in range(3):
                p, q = (v[i : i + 11, j : j + 11, colour] / 2 for v in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                upper = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                found.append(upper / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert inversion.ssim(a, b) == pytest.approx(np.mean(found), abs=1e-6)


def test_baselines():
    others = np.stack([np.full((4, 4, 3), x) for x in (-1.0, 0.2, 0.5)])
    found = inversion.baselines(np.full((4, 4, 3), 0.3), others)
    assert found["nearest image"][0, 0, 0] == 0.2
    assert found["mean image"][0, 0, 0] == pytest.approx(-0.1)


@pytest.mark.slow
def test_an_inversion_falls_and_is_the_written_out_attack(frozen):
    c, (images, labels) = client(frozen, "full"), pictures(1, seed=3)
    shared = gradients.gradient(c, images, labels)
    attack = inversion.Attack(steps=8, lr=0.05, variation=0.01)
    key = jax.random.key(0)
    found, loss = inversion.invert(c, attack, shared, labels[0], key, (16, 16, 3))
    assert found.shape == (16, 16, 3) and float(jnp.abs(found).max()) <= 1
    # Written out: Adam on signs, step sizes by hand.
    image = jnp.clip(jax.random.normal(jax.random.split(key, 1)[0], (16, 16, 3)), -1, 1)
    objective = jax.jit(
        jax.value_and_grad(lambda x: inversion.objective(c, attack, shared, x, labels[0]))
    )
    first = objective(image)[0]
    state = optax.scale_by_adam().init(image)
    for i in range(8):
        updates, state = optax.scale_by_adam().update(jnp.sign(objective(image)[1]), state)
        lr = 0.05 * 0.1 ** sum(i >= end for end in (3, 5, 7))
        image = jnp.clip(image - lr * updates, -1, 1)
    assert float(loss) < 0.97 * float(first)
    np.testing.assert_allclose(loss, objective(image)[0], rtol=1e-3)


@pytest.mark.slow
def test_the_gradient_of_the_head_can_be_withheld(frozen):
    c, (images, labels) = client(frozen, "bitfit"), pictures(1)
    shared = gradients.gradient(c, images, labels)
    withheld = inversion.Attack(head=False, variation=0.0)
    garbled = {**shared, "head": jax.tree.map(jnp.zeros_like, shared["head"])}
    loss = lambda attack, tree: float(inversion.objective(c, attack, tree, images[0], labels[0]))
    assert loss(withheld, garbled) == pytest.approx(0, abs=1e-5)
    assert loss(inversion.Attack(variation=0.0), garbled) > 0.01
