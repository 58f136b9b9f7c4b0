import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import DATA, FROZEN, recipe
from test_step import hyper as hyper_of

from rlrr_jax import config as config_lib
from rlrr_jax import lookup, optim, step
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.projects.leakage import defences
from rlrr_jax.runtime import mesh as mesh_lib


def test_values_by_hand():
    tree = {"a": jnp.arange(-50.0, 50).reshape(10, 10), "b": jnp.array([1000.0])}
    pruned = defences.prune(None, tree, 0.9)
    values = np.asarray(defences.flat(tree))
    kept = np.sort(np.abs(values))[-10:]
    assert sorted(np.abs(x) for x in np.asarray(defences.flat(pruned)) if x) == list(kept)
    noisy = defences.clip_and_noise(jax.random.key(0), tree, 1.0, 0.0)
    np.testing.assert_allclose(defences.flat(noisy), values / np.linalg.norm(values), rtol=1e-5)
    small = {"a": jnp.full(10_000, 1e-5)}
    noisy = defences.flat(defences.clip_and_noise(jax.random.key(0), small, 1.0, 2.0))
    assert np.linalg.norm(noisy - 1e-5) == pytest.approx(2, rel=0.03)


def moved(defence, devices):
    """What two steps of plain gradient descent change, of each leaf."""
    transformation = defence and lookup.find("gradients", defence)
    sgd = optim.Optimizer("momentum", "float32", gradients=transformation)
    r = recipe(optimizer=sgd, drop_path=False)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices], 1)
    state, metrics = step.map_start(r, mesh)(jax.random.split(jax.random.key(0), 1), FROZEN)
    before = jax.tree.map(np.asarray, state["trainable"])
    hyper = jax.tree.map(lambda x: x[None], hyper_of(weight_decay=0.0, flip=False))
    after, _ = step.map_train_steps(r, mesh)(FROZEN, DATA, state, metrics, hyper, (0, 0, 2))
    return jax.tree.map(lambda a, b: np.asarray(a) - b, after["trainable"], before)


@pytest.mark.slow
def test_training_uses_what_a_defence_leaves():
    """Of two steps of SGD at most two percent of the values have moved, and all with noise."""
    plain, pruned = moved(None, 1), moved("prune99", 1)
    count = lambda tree: sum(int((x != 0).sum()) for x in jax.tree.leaves(tree))
    number = sum(x.size for x in jax.tree.leaves(plain))
    assert 0 < count(pruned) <= 0.021 * number < count(plain)
    noisy = moved("noise1", 1)
    assert count(noisy) > 0.99 * number
    # Noise of norm 1 in the first step, and in the second with the first's momentum: sqrt(1 + 1.9^2).
    length = float(jnp.linalg.norm(defences.flat(jax.tree.map(jnp.asarray, noisy)))) / 1e-2
    assert length == pytest.approx(np.hypot(1, 1.9) * np.sqrt(2), rel=0.35)
    same = moved("noise1", 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), noisy, same)


def test_an_unknown_defence_is_said_with_the_nearest():
    config = vtab.get_config("hearts")
    config.gradients = "prune9"
    with pytest.raises(UserError, match="'prune9': did you mean 'prune9"):
        config_lib.resolve(config)


@pytest.mark.parametrize("name", defences.DEFENCES)
def test_what_is_not_trained_stays_zero(name):
    adapter = {"a": jnp.arange(1.0, 201), "fixed": {"index": jnp.zeros(500)}}
    found = defences.defend(
        defences.DEFENCES[name], jax.random.key(0), {"adapter": adapter, "head": {"b": jnp.ones(3)}}
    )
    assert (found["adapter"]["fixed"]["index"] == 0).all()
    kept = int((defences.flat(found) != 0).sum())
    assert kept == {"prune90": 21, "prune99": 3}.get(name, 203)  # of 203 values, not of 703
