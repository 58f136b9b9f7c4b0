"""What holds for every method, and what names are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models.test_vit import SMALL, random_tree

from rlrr_jax import methods
from rlrr_jax.models import vit


@pytest.fixture(scope="module")
def frozen():
    tree = random_tree(vit.ViT(**SMALL), 48)
    return {**tree, "head": jax.tree.map(jnp.zeros_like, tree["head"])}


@pytest.mark.parametrize("name", methods.METHODS)
def test_merge_gives_a_plain_vit_tree_and_init_traces(name, frozen):
    method = methods.get(name)
    trainable = method.init(jax.random.key(0), frozen)
    shapes = jax.eval_shape(method.init, jax.random.key(0), frozen)
    assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(lambda x: x.shape, shapes)
    merged = method.merge(frozen, trainable)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, frozen)
    assert all((x == 0).all() for x in jax.tree.leaves(merged["head"]))
    assert method.DEFAULTS.keys() == {"lr", "weight_decay", "drop_path"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_head_kernel_decays_and_its_bias_does_not(name, frozen):
    method = methods.get(name)
    decay = method.decay(method.init(jax.random.key(0), frozen))
    assert decay["head"] == {"kernel": True, "bias": False}


def test_linear_trains_the_head_alone(frozen):
    trainable = methods.get("linear").init(jax.random.key(0), frozen)
    assert flatten_dict(trainable).keys() == {("head", "kernel"), ("head", "bias")}
    merged = methods.get("linear").merge(frozen, {"head": jax.tree.map(jnp.ones_like, frozen["head"])})
    assert (merged["head"]["bias"] == 1).all()
    np.testing.assert_array_equal(merged["cls"], frozen["cls"])


def test_full_trains_everything_and_decays_kernels_only(frozen):
    method = methods.get("full")
    trainable = method.init(jax.random.key(0), frozen)
    assert jax.tree.structure(trainable) == jax.tree.structure(frozen)
    jax.tree.map(np.testing.assert_array_equal, trainable, frozen)
    decayed = {k[-1] for k, v in flatten_dict(method.decay(trainable)).items() if v}
    assert decayed == {"kernel"}


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'rlr': did you mean 'rlrr'"):
        methods.get("rlr")
    with pytest.raises(ValueError, match="unknown option of method 'rlrr' 'inti': did you mean 'init'"):
        methods.get("rlrr", inti="paper")
    with pytest.raises(ValueError, match="use paper, damped or identity"):
        methods.get("rlrr", init="zero")
