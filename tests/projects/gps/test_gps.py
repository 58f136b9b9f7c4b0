"""The contrastive loss against loops, its gradient in batches, and GPS in a run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from methods import test_methods as contract
from models.test_vit import SMALL
from trees import random_tree, zero_head

from rlrr_jax import methods, models, suite
from rlrr_jax.configs import vtab
from rlrr_jax.models import vit
from rlrr_jax.projects.gps import sensitivity

MODEL = vit.ViT(**SMALL)
RNG = np.random.default_rng(0)


def in_loops(features, labels, mask):
    """Khosla et al. (2020), equation 2, image by image."""
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    each = []
    for i in np.flatnonzero(mask):
        others = [a for a in np.flatnonzero(mask) if a != i]
        same = [p for p in others if labels[p] == labels[i]]
        if same:
            total = sum(np.exp(z[i] @ z[a] / 0.07) for a in others)
            each.append(-np.mean([np.log(np.exp(z[i] @ z[p] / 0.07) / total) for p in same]))
    return np.mean(each)


def test_the_loss_is_that_of_the_paper():
    features = RNG.normal(size=(7, 5))
    labels, mask = np.array([0, 1, 0, 2, 1, 0, 0]), np.array([1, 1, 1, 1, 1, 1, 0])
    ours = sensitivity.contrastive(*map(jnp.asarray, (features, labels, mask.astype(float))))
    np.testing.assert_allclose(ours, in_loops(features, labels, mask), rtol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_the_sum_over_batches():
    frozen = random_tree(MODEL, 16)
    images = RNG.integers(0, 256, (10, 16, 16, 3), np.uint8)
    labels, mask = RNG.integers(0, 2, 10).astype(np.int32), np.ones(12, np.float32)
    mask[10:] = 0
    pad = lambda x: np.concatenate([x, np.zeros((2, *x.shape[1:]), x.dtype)])
    rows = [slice(i, i + 4) for i in (0, 4, 8)]
    batches = [(pad(images)[r], pad(labels)[r], mask[r]) for r in rows]
    training = methods.Training(MODEL, frozen, (16, None), "highest", lambda: iter(batches))
    ours = training.once(sensitivity.gradient)
    assert training.once(sensitivity.gradient) is ours

    def loss(params, images, labels):
        views = np.concatenate([images, images[:, :, ::-1]]) / np.float32(127.5) - 1
        _, kept = MODEL.apply({"params": params}, views, mutable=["intermediates"])
        token = kept["intermediates"]["encoded"][0][:, 0]
        n = 2 * len(labels)
        return sensitivity.contrastive(token, jnp.tile(jnp.asarray(labels), 2), jnp.ones(n))

    with jax.default_matmul_precision("highest"):
        parts = [jax.grad(loss)(frozen, images[r], labels[r]) for r in rows]
    expected = jax.tree.map(lambda *x: sum(x), *parts)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.slow
def test_a_run_of_gps_trains_what_it_chose(tmp_path):
    config = vtab.get_config("digits,method=gps")
    config.update(epochs=1, protocol="fast", num_devices=1, seeds=(0, 1))
    rows, problems = suite.run(config, tmp_path)
    assert not problems and min(row["test_acc_final"] for row in rows) > 0.5
    chosen = [
        safetensors.numpy.load_file(tmp_path / f"digits/gps/seed{seed}/adapter.safetensors")
        for seed in (0, 1)
    ]
    fixed = [{k: x for k, x in tree.items() if "fixed" in k} for tree in chosen]
    assert fixed[0].keys() == fixed[1].keys() and len(fixed[0]) == 7
    for name, x in fixed[0].items():
        np.testing.assert_array_equal(x, fixed[1][name])  # it goes by the images, not by the seed
        assert len(np.unique(x)) > 3
    moved = [
        (a != b).mean() for (k, a), b in zip(chosen[0].items(), chosen[1].values()) if "values" in k
    ]
    assert min(moved) > 0.5 and list(itertools.chain(moved))


def test_gps_takes_the_entries_with_the_largest_gradients():
    frozen = random_tree(MODEL, 16)
    method = methods.get("gps", entries=2)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), frozen)
    training = methods.Training(None, None, (), "", None)
    training.once = lambda *_: grads
    adapter = method.init(jax.random.key(0), frozen, training=training)
    shapes = jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(method.init, jax.random.key(0), frozen)
    )
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), adapter)
    same = jax.jit(method.merge)(frozen, adapter)
    jax.tree.map(np.testing.assert_array_equal, same, frozen)
    of = lambda tree: tree["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]
    sizes = np.abs(np.asarray(of(grads)["kernel"]))
    for block in range(3):
        for o in range(64):
            largest = set(np.argsort(sizes[block, :, o])[-2:].tolist())
            assert set(np.asarray(of(adapter["fixed"])[block, o]).astype(int).tolist()) == largest
    with pytest.raises(ValueError, match="option entries=40 is more than the 32 inputs of a layer"):
        methods.get("gps", entries=40).init(jax.random.key(0), frozen)


@pytest.fixture(scope="module")
def frozen():
    return zero_head(random_tree(contract.MODEL, 48))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(entries=3)], ids=str)
def test_merging_is_its_definition(options, frozen):
    contract.test_merged_equals_the_methods_own_definition("gps", options, frozen)


def test_it_keeps_the_contract_of_every_method(frozen):
    """The tests of tests/methods, with this one."""
    contract.test_merging_gives_a_plain_tree_under_jit_vmap_and_eval_shape("gps", frozen)
    contract.test_start("gps", frozen)
    contract.test_only_its_own_leaves_change("gps", frozen)
    contract.test_counts("gps")
    contract.test_decay("gps", frozen)
    resnet = models.build("resnet18", 2)
    methods.check("gps", methods.get("gps"), models.shapes(resnet, 32))


@pytest.mark.slow
def test_it_trains_in_the_common_step(frozen):
    contract.test_trains_in_the_common_step("gps", frozen)
