import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_vit import SMALL
from trees import images, random_tree

from rlrr_jax import losses, methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.projects.exits import heads

MODEL, AT = vit.ViT(**SMALL), (1, 2)


def random_heads(seed=0):
    """Heads of two exits without a zero."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
    return jax.tree.map(draw, heads.empty(2, 32, 7))


def shallow(model, tree, own, number):
    """A ViT of the first blocks alone, whose last norm and head are those of an exit."""
    own = jax.tree.map(lambda x: x[number], own)
    norm = {"scale": 1 + own["scale"], "bias": own["shift"]}
    depth = AT[number]
    blocks = jax.tree.map(lambda x: x[:depth], tree["Transformer"]["encoderblock"])
    place = {"Transformer": {"encoderblock": blocks, "encoder_norm": norm}}
    if model.pool == "avg":  # normalised after pooling
        place = {"Transformer": {"encoderblock": blocks}, "fc_norm": norm}
    head = {"kernel": own["kernel"], "bias": own["bias"]}
    alone = model.clone(depth=depth, fc_norm=model.pool == "avg")
    return alone, {**tree, **place, "head": head}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(), pytest.param(dict(unroll=3), marks=pytest.mark.slow), dict(pool="avg", registers=2)],
    ids=str,
)
def test_an_exit_is_a_shallower_network(options):
    model = MODEL.clone(**options)
    tree, own, x = random_tree(model, 48), random_heads(), images()
    logits, features = jax.jit(lambda tree: heads.apply(model, tree, own, AT, x))(tree)
    assert logits.shape == (len(x), 3, 7) and features.shape == (len(x), 2, 32)
    for number in range(2):
        alone, cut = shallow(model, tree, own, number)
        wanted = jax.jit(alone.apply)({"params": cut}, x)
        np.testing.assert_allclose(logits[:, number], wanted, rtol=1e-5, atol=1e-5)
    whole = jax.jit(model.apply)({"params": tree}, x)
    np.testing.assert_allclose(logits[:, -1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_tree_for_each_exit_is_one_tree_where_they_are_equal():
    """With drop path, whose rates are those of the whole depth."""
    tree, own, x = random_tree(MODEL, 48), random_heads(), images()
    keys = jax.random.split(jax.random.key(0), len(x))
    inputs = x, 0.5, keys
    together = jax.jit(lambda tree: heads.apply(MODEL, tree, own, AT, *inputs))(tree)
    each = jax.jit(lambda tree: heads.apply_each(MODEL, [tree] * 3, own, AT, *inputs))(tree)
    for ours, theirs in zip(each, together):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    other = jax.tree.map(lambda x: x + 0.1, tree)
    mixed = jax.jit(lambda a, b: heads.apply_each(MODEL, [a, b, a], own, AT, *inputs)[0])(tree, other)
    same = np.isclose(mixed, each[0], rtol=1e-5, atol=1e-5).all((0, 2))
    assert same.tolist() == [True, False, True]


def test_exits_are_zero_at_first_and_their_kernels_decay():
    loss, method = losses.get("exits", {"at": AT}), methods.get("linear")
    trained = losses.start(loss, method, jax.random.key(0), random_tree(MODEL, 48))
    assert trained["loss"]["kernel"].shape == (2, 32, 7)
    assert all((x == 0).all() for x in jax.tree.leaves(trained["loss"]))
    decay = methods.decay(method, trained)["loss"]
    assert decay == {"scale": False, "shift": False, "kernel": True, "bias": False}


def test_other_models_are_refused():
    with pytest.raises(UserError, match="need config.model.pool=token or avg, and this ViT has map"):
        heads.seen(MODEL.clone(pool="map"))
    with pytest.raises(UserError, match="only ViTs have exits: take another loss"):
        heads.seen(models.build("swin_t", 2))
