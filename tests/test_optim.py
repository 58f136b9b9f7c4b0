"""big_vision's recipe against NumPy; the authors' schedule is in test_golden.py."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rlrr_jax import methods, optim

LINEAR = methods.get("linear")


def test_bigvision_learning_rates():
    """Warm-up from 0, which the cosine does not count; fractions as big_vision defines them."""
    ours = optim.learning_rates("bigvision", 0.01, 25, 2, total_steps=50, warmup=10)
    theirs = []
    for step in range(50):
        progress = np.clip((step - 10) / (50 - 10), 0.0, 1.0)
        theirs.append(0.01 * 0.5 * (1.0 + np.cos(np.pi * progress)) * np.minimum(1.0, step / 10))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)
    assert ours[0] == 0 and max(ours) == 0.01 == ours[10]


def test_schedules_by_epoch_repeat_in_each_step():
    for schedule in ("official", "cosine"):
        each = optim.learning_rates(schedule, 1.0, 22)
        np.testing.assert_array_equal(optim.learning_rates(schedule, 1.0, 22, 3), np.repeat(each, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_clipped_momentum_for_50_steps(dtype):
    """Clip by the norm of all, add what is kept of the stored momentum, store the sum in `dtype`."""
    rng = np.random.default_rng(0)
    params = {"adapter": {}, "head": {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.4, params) for _ in range(50)]
    lrs = optim.learning_rates("bigvision", 0.01, 50, total_steps=50, warmup=10)
    tx = lambda lr: optim.build(
        optim.Optimizer("momentum", dtype, grad_clip=1.0), LINEAR, params, lr, 0.0
    )

    ours, state = jax.tree.map(jnp.asarray, params), tx(0.0).init(params)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    theirs = [x.astype(np.float64) for x in jax.tree.leaves(params)]
    momentum = [np.zeros(x.shape, stored) for x in theirs]
    clipped = 0
    for grad, lr in zip(grads, lrs):
        grad32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad)
        updates, state = tx(lr).update(grad32, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        flat = jax.tree.leaves(grad)
        norm = math.sqrt(sum((g**2).sum() for g in flat))
        clipped += norm > 1
        for i, g in enumerate(flat):
            kept = stored.type(0.9) * momentum[i]  # the product is rounded, too
            total = kept.astype(np.float64) + g * min(1.0, 1.0 / norm)
            momentum[i] = total.astype(np.float32).astype(stored)
            theirs[i] = theirs[i] - lr * total
    assert 5 < clipped
    for a, b in zip(jax.tree.leaves(ours), theirs):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    kept = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {x.dtype for x in kept} == {stored}


def test_momentum_decays_what_the_method_decays():
    params = {"adapter": {}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    tx = optim.build(optim.Optimizer("momentum"), LINEAR, params, 0.1, 0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.05)
    np.testing.assert_allclose(updates["head"]["bias"], 0)


def test_clipping_leaves_adamw_as_it_is_below_the_norm():
    params = {"adapter": {}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    small = jax.tree.map(lambda x: 0.01 * x, params)
    outs = []
    for clip in (None, 1.0):
        tx = optim.build(optim.Optimizer(grad_clip=clip), LINEAR, params, 0.1, 0.5)
        outs.append(tx.update(small, tx.init(params), params)[0])
    jax.tree.map(np.testing.assert_array_equal, *outs)
