import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_vit import SMALL, images, random_tree

from rlrr_jax.errors import UserError
from rlrr_jax.models import exits, vit

MODEL = vit.ViT(**SMALL, exits=(1, 2))


def shallow(model, tree, number):
    """A ViT of the first blocks alone, whose last norm and head are those of an exit."""
    own = jax.tree.map(lambda x: x[number], tree["head"]["exits"])
    norm = {"scale": 1 + own["scale"], "bias": own["shift"]}
    depth = model.exits[number]
    blocks = jax.tree.map(lambda x: x[:depth], tree["Transformer"]["encoderblock"])
    place = {"Transformer": {"encoderblock": blocks, "encoder_norm": norm}}
    if model.pool == "avg":  # normalised after pooling
        place = {"Transformer": {"encoderblock": blocks}, "fc_norm": norm}
    head = {"kernel": own["kernel"], "bias": own["bias"]}
    alone = model.clone(depth=depth, exits=(), fc_norm=model.pool == "avg")
    return alone, {**tree, **place, "head": head}


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        pytest.param(dict(unroll=3), marks=pytest.mark.slow),
        dict(pool="avg", registers=2),
    ],
    ids=str,
)
def test_an_exit_is_a_shallower_network(options):
    model = MODEL.clone(**options)
    tree, x = random_tree(model, 48), images()
    logits, features = jax.jit(lambda tree: exits.apply(model, tree, x))(tree)
    assert logits.shape == (len(x), 3, 7) and features.shape == (len(x), 2, 32)
    for number in range(2):
        alone, own = shallow(model, tree, number)
        wanted = jax.jit(alone.apply)({"params": own}, x)
        np.testing.assert_allclose(logits[:, number], wanted, rtol=1e-5, atol=1e-5)
    plain = {**tree, "head": {name: tree["head"][name] for name in ("kernel", "bias")}}
    whole = jax.jit(model.clone(exits=()).apply)({"params": plain}, x)
    np.testing.assert_allclose(logits[:, -1], whole, rtol=1e-5, atol=1e-5)


def test_a_tree_for_each_exit_is_one_tree_where_they_are_equal():
    """With drop path, whose rates are those of the whole depth."""
    tree, x = random_tree(MODEL, 48), images()
    keys = jax.random.split(jax.random.key(0), len(x))
    inputs = x, 0.5, keys
    together = jax.jit(lambda tree: exits.apply(MODEL, tree, *inputs))(tree)
    each = jax.jit(lambda tree: exits.apply_each(MODEL, [tree] * 3, *inputs))(tree)
    for ours, theirs in zip(each, together):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    other = jax.tree.map(lambda x: x + 0.1, tree)
    mixed = jax.jit(lambda a, b: exits.apply_each(MODEL, [a, b, a], *inputs)[0])(tree, other)
    same = np.isclose(mixed, each[0], rtol=1e-5, atol=1e-5).all((0, 2))
    assert same.tolist() == [True, False, True]


def test_exits_are_zero_at_first_and_their_head_is_as_any():
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))["params"]
    assert params["head"]["exits"]["kernel"].shape == (2, 32, 7)
    assert all((x == 0).all() for x in jax.tree.leaves(exits.empty(2, 32, 7)))
    without = jax.eval_shape(MODEL.clone(exits=()).init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))
    assert params["head"].keys() - without["params"]["head"].keys() == {"exits"}


def test_other_pooling_is_refused():
    with pytest.raises(UserError, match="needs config.model.pool=token or avg, and this ViT has map"):
        exits.seen(MODEL.clone(pool="map"))
