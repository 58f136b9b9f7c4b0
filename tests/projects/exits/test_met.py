import jax
import jax.numpy as jnp
import numpy as np
import pytest
from projects.exits.test_exit_heads import AT, MODEL, random_heads
from trees import folded, images, moved, random_tree, started

from rlrr_jax import losses, methods
from rlrr_jax.errors import UserError
from rlrr_jax.projects.exits import heads, met


@pytest.fixture(scope="module")
def frozen():
    return random_tree(MODEL, 48)


def tuned(frozen, seed=1):
    """A trained tree without a zero in it."""
    method = methods.get("met", exits=2, bottleneck=5)
    return method, moved(started(method, frozen), 0.3, seed)


def test_it_keeps_its_contract_and_starts_as_the_backbone(frozen):
    method = methods.get("met", exits=2, bottleneck=5)
    methods.check("met", method, frozen)
    trained = started(method, frozen)
    # Two projections; for three ends, three blocks and two places a diagonal and a shift.
    assert methods.trainable_count(trained) == 2 * 32 * 5 + 3 * 3 * 2 * (5 + 32)
    merged = jax.jit(method.merge)(frozen, trained["adapter"])
    assert jax.tree.all(jax.tree.map(np.allclose, merged, frozen))


def test_each_exit_has_its_own_adapters_before_attention_and_mlp(frozen):
    method, trained = tuned(frozen)
    trees = met.trees(frozen, trained)
    assert len(trees) == 3
    merged = folded(method, frozen, trained)
    assert jax.tree.all(jax.tree.map(np.allclose, trees[-1], merged))
    x = jax.random.normal(jax.random.key(3), (6, 32))
    adapter, block = trained["adapter"], "encoderblock"
    for number, tree in enumerate(trees):
        for place, path in (
            ("attention", ("MultiHeadDotProductAttention_0", "query")),
            ("mlp", ("MlpBlock_0", "Dense_0")),
        ):
            ours, theirs = (t["Transformer"][block][path[0]][path[1]] for t in (tree, frozen))
            for layer in range(3):
                node = {key: adapter[place][key][number, layer] for key in ("scale", "shift")}
                moved = x + (x @ adapter["down"] * node["scale"][None]) @ adapter["up"]
                moved = moved + node["shift"][None]
                dense = lambda x, w, layer=layer: (
                    jnp.tensordot(x, w["kernel"][layer], 1) + w["bias"][layer][None]
                )
                np.testing.assert_allclose(dense(x, ours), dense(moved, theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_exit_trains_its_own_first_blocks(frozen):
    _, trained = tuned(frozen)

    def loss(trained, number):
        trees = met.trees(frozen, trained)
        return (heads.apply_each(MODEL, trees, random_heads(), AT, images())[0][:, number] ** 2).sum()

    for number, depth in ((0, 1), (2, 3)):
        grads = jax.jit(jax.grad(loss), static_argnums=1)(trained, number)["adapter"]
        moved = np.abs(grads["mlp"]["scale"]).max(-1) > 0  # [ends, blocks]
        assert moved[number].tolist() == [layer < depth for layer in range(3)]
        assert not np.delete(moved, number, 0).any() and np.abs(grads["up"]).max() > 0


def test_exits_of_loss_and_method_are_as_many(frozen):
    net = MODEL, methods.get("met"), frozen
    options = losses.check("exits", {"at": AT})
    with pytest.raises(UserError, match="at has 2 exits, and option exits of method met is 3: give as"):
        losses.check_contract("exits", options, net, (48, 48))
