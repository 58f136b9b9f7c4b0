"""Entries shared out between layers: which they are, by loops; and that merging is a plain replacement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_vit import SMALL
from trees import random_tree

from rlrr_jax import methods, models, suite
from rlrr_jax.configs import vtab
from rlrr_jax.methods import base
from rlrr_jax.models import vit
from rlrr_jax.projects.gps import layers
from rlrr_jax.projects.gps import method as gps

FROZEN = random_tree(vit.ViT(**SMALL), 16)


def test_layers_get_their_share_of_the_largest_gradients():
    rng = np.random.default_rng(0)
    sizes = [rng.random((2, 4, 5)), 3 * rng.random((1, 3, 6))]
    found = layers.chosen(sizes, 20)
    assert len(set(found.tolist())) == 20
    each = [sizes[0][0], sizes[0][1], sizes[1][0]]
    largest = sorted((x for layer in each for x in layer.ravel()), reverse=True)[:20]
    start = 0
    for layer in each:
        mine = [i - start for i in found if start <= i < start + layer.size]
        start += layer.size
        number = sum((layer >= min(largest)).ravel())
        assert len(mine) == number
        rows = [
            sorted(i % layer.shape[1] for i in mine if i // layer.shape[1] == o)
            for o in range(len(layer))
        ]
        least, rest = divmod(number, len(layer))
        assert sorted(map(len, rows)) == [least] * (len(layer) - rest) + [least + 1] * rest
        for o, row in enumerate(rows):  # the largest of each output
            assert row == sorted(np.argsort(-layer[o])[: len(row)].tolist())
        following = [np.sort(layer[o])[::-1][least] for o in range(len(layer))]
        more = {o for o, row in enumerate(rows) if len(row) > least}
        assert more == set(np.argsort(following)[::-1][:rest].tolist())


def test_entries_are_trained_as_they_are_in_the_layers_that_need_them():
    method = methods.get("gps_layers", entries=2)
    methods.check("gps_layers", method, FROZEN)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), FROZEN)
    site = base.dense(FROZEN)["Dense_0"]
    grads = base.replaced(
        grads, site.path, jax.tree.map(lambda x: 2 * x, base.subtree(grads, site.path))
    )
    training = methods.Training(None, None, (), "", None)
    training.once = lambda *_: grads
    adapter = method.init(jax.random.key(0), FROZEN, training=training)
    before = jax.eval_shape(method.init, jax.random.key(0), FROZEN)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, adapter)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(method.merge)(FROZEN, adapter), FROZEN)
    others = jax.eval_shape(methods.get("gps", entries=2).init, jax.random.key(0), FROZEN)
    assert adapter["values"].size == sum(x.size for x in jax.tree.leaves(others["values"]))
    moved = {**adapter, "values": adapter["values"] + 1}
    after = jax.jit(method.merge)(FROZEN, moved)
    number = {}
    for s in gps.layers(FROZEN, 2):
        change = np.asarray(gps.kernel(after, s) - gps.kernel(FROZEN, s))
        assert set(np.unique(change.round(3))) <= {0.0, 1.0}
        number[s.path[-1]] = (change > 0.5).sum() / s.outputs / (s.depth or 1)
    assert number["Dense_0"] > 3 and 0 < number["Dense_1"] < 1.5  # of large and of small gradients
    total = lambda a: gps.kernel(method.merge(FROZEN, a), site).sum()
    grad = jax.jit(jax.grad(total, allow_int=True))(adapter)
    assert (grad["fixed"]["first"] == 0).all() and set(np.unique(grad["values"])) == {0.0, 1.0}
    methods.check("gps_layers", method, models.shapes(models.build("resnet18", 2), 32))


@pytest.mark.slow
def test_it_learns(tmp_path):
    config = vtab.get_config("digits,method=gps_layers")
    config.epochs, config.num_devices = 4, 1
    rows, problems = suite.run(config, tmp_path)
    assert not problems and rows[0]["test_acc_final"] > 0.85
