import jax
import jax.numpy as jnp
import numpy as np
import pytest
from projects.exits.test_exit_heads import AT, MODEL, random_heads
from trees import random_tree

from rlrr_jax import adapters, models
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.projects.exits import choose, heads, leave

RUN = {
    "image_size": 48,
    "image_width": None,
    "crop": None,
    "crop_from": None,
    "precision": "highest",
    "dtype": "float32",
}
CARD = {"config": RUN, "method": "rlrr"}
IMAGES = np.random.default_rng(0).integers(0, 256, (21, 48, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def tuned():
    return leave.Exits(MODEL, AT, random_heads(), [random_tree(MODEL, 48)], CARD)


@pytest.fixture(scope="module")
def wanted(tuned):
    """Probabilities of all exits, from the network in one piece."""
    apply = jax.jit(lambda params, x: heads.apply(MODEL, params, tuned.heads, AT, x)[0])
    logits = apply(tuned.trees[0], jnp.asarray(IMAGES) / 127.5 - 1)
    return np.asarray(jax.nn.softmax(logits))


def counted(parts):
    """The same stages, which note how many images pass each."""
    passed = [0] * len(parts)

    def count(i, stage):
        def run(params, x):
            passed[i] += len(x)
            return stage.run(params, x)

        return stage._replace(run=run)

    return [count(i, stage) for i, stage in enumerate(parts)], passed


def test_all_exits_in_parts_are_those_of_the_network(tuned, wanted):
    found = leave.every(leave.stages(tuned), IMAGES, 8)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantile", [0, 0.5, 0.8, 1])
def test_images_leave_where_they_are_sure_and_the_rest_is_skipped(tuned, wanted, quantile):
    threshold = float(np.quantile(wanted[:, :2].max(-1), quantile)) + (1 if quantile == 1 else -1e-6)
    parts, passed = counted(leave.stages(tuned))
    found, left = leave.classify(parts, IMAGES, threshold, 4)
    places = choose.leaves(wanted, threshold)
    np.testing.assert_array_equal(left, places)
    np.testing.assert_allclose(found, wanted[np.arange(21), places], rtol=1e-4, atol=1e-6)
    reached = [int((places >= i).sum()) for i in range(3)]
    batches = [4 * -(-n // 4) for n in reached]  # the last one is padded
    assert passed == batches and (quantile == 1 or passed[2] < 21)


@pytest.mark.slow
def test_a_tree_for_each_exit_begins_again(tuned):
    """Each with its own answer: those of three trees."""
    own = tuned._replace(trees=[random_tree(MODEL, 48, seed) for seed in (1, 2, 3)])
    apply = jax.jit(lambda trees, x: heads.apply_each(MODEL, trees, own.heads, AT, x)[0])
    logits = apply(own.trees, jnp.asarray(IMAGES) / 127.5 - 1)
    wanted = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(leave.every(leave.stages(own), IMAGES, 21), wanted, rtol=1e-4, atol=1e-6)
    _, left = leave.classify(leave.stages(own), IMAGES, 0.9, 8)
    np.testing.assert_array_equal(left, choose.leaves(wanted, 0.9))


def test_what_is_told_is_what_left(tuned, wanted):
    threshold = float(np.median(wanted[:, 0].max(-1)))
    leaver = leave.Leaver(tuned, threshold, 8)
    leaver(IMAGES[:10]), leaver(IMAGES[10:])
    places = choose.leaves(wanted, threshold)
    counts = [int((places == i).sum()) for i in range(3)]
    assert leaver.counts.tolist() == counts
    assert leaver.told().startswith(
        f"left {counts[0]} at block 1, {counts[1]} at block 2, {counts[2]} at the end; "
    )


@pytest.mark.parametrize("variant, size", [("Ti/16", 64), ("B/16", 224)])
def test_flops_are_what_xla_counts(variant, size):
    model = models.build(variant, 10)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    def count(until):
        zeros = jax.tree.map(lambda x: np.broadcast_to(0.0, x.shape), params)
        part, cut = vit.part(model, zeros, slice(until))
        part = part.clone(unroll=12)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), cut)
        apply = jax.jit(lambda params, image: part.apply({"params": params}, image))
        return apply.lower(shapes, image).cost_analysis()["flops"]

    # XLA counts norms, softmax and GELU, too: a few percent. Its last block has the class token alone.
    ours = leave.flops(model, (4, 8), size)
    for number, until in enumerate((4, 8)):
        assert 0 < count(until) / ours[number] - 1 < 0.08
    assert leave.flops(model, (4, 8), size, own=True)[1] == pytest.approx(ours[:2].sum(), rel=1e-3)
    assert ours[2] / leave.flops(model, (), size)[0] == pytest.approx(1, abs=1e-3)


def test_what_has_no_exits_is_said(tuned_runs):
    adapter = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    with pytest.raises(UserError, match="trained without early exits: train one with"):
        leave.load(adapter, None)
