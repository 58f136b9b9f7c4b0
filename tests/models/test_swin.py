"""The Swin Transformer: sizes, windows, drop path and counts; its numbers are in test_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import quick

from rlrr_jax import methods, models
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base, sites
from rlrr_jax.models import swin

TINY = swin.Swin(8, (2, 2), (1, 2), 4, 4, num_classes=3)  # 32 pixels: grids of 8 and 4
APPLY = jax.jit(lambda params, images, *noise: TINY.apply({"params": params}, images, *noise))


@pytest.fixture(scope="module")
def params():
    """The tiny model's tree, random everywhere."""
    random = np.random.default_rng(0)
    noise = lambda x: jnp.array(random.normal(0, 0.3, x.shape), jnp.float32)
    return jax.tree.map(noise, models.shapes(TINY, 32))


def images(number=2, size=32):
    return jax.random.uniform(jax.random.key(2), (number, size, size, 3), minval=-1.0)


# Numbers of parameters without a head: timm 1.0.31, `swin_*_patch4_window7_224` and `window12_384`.
COUNTS = {
    "swin_t": 27_519_354,
    "swin_s": 48_837_258,
    "swin_b": 86_743_224,
    "swin_l": 194_995_476,
    "swin_b_12": 86_878_584,
}


@pytest.mark.parametrize("variant", quick(COUNTS, "swin_t", "swin_b_12"))
def test_variants_have_the_public_number_of_parameters(variant):
    size = 384 if variant.endswith("12") else 224
    tree = models.shapes(models.build(variant, 1), size)
    count = sum(x.size for name in tree if name != "head" for x in jax.tree.leaves(tree[name]))
    biases = sum(tree[f"stage_{s}"]["merge"]["reduction"]["bias"].size for s in range(3))
    assert count - biases == COUNTS[variant]


def test_rlrr_trains_as_many_values_as_the_paper_says():
    tree = models.shapes(models.build("swin_b", 1), 224)
    adapter = methods.check("rlrr", methods.get("rlrr"), tree)
    assert methods.trainable_count({"adapter": adapter}) == 358_144
    mean_head = 1025 * 940 / 19  # VTAB-1k's 19 tasks have 940 classes
    assert round(358_144 + mean_head) == 408_855  # the paper's 0.41 M


def test_merging_takes_four_neighbours_in_the_order_of_the_authors():
    x = jnp.arange(16).reshape(1, 4, 4, 1)
    ours = swin.merged_patches(x)
    # torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]])
    parts = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    np.testing.assert_array_equal(ours, jnp.concatenate(parts, -1))
    natural = x.reshape(1, 2, 2, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2, 2, 4)
    assert (ours != natural).any()  # rows slow, the trap


def test_windows_come_back():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    cut = swin.windows(x, 3)
    assert cut.shape == (2, 4, 9, 5)
    np.testing.assert_array_equal(cut[1, 1], x[1, :3, 3:].reshape(9, 5))
    np.testing.assert_array_equal(swin.unwindowed(cut, 6, 3), x)


def test_mask_parts_what_is_no_neighbour():
    grid, window, shift = 8, 4, 2
    mask = swin.shift_mask(grid, window, shift)
    place = np.stack(np.mgrid[:grid, :grid], -1)
    rolled = np.asarray(swin.windows(jnp.roll(place, (-shift, -shift), (0, 1))[None], window))[0]
    for number, tokens in enumerate(rolled):
        apart = np.abs(tokens[:, None] - tokens[None]).max(-1) >= window  # rolled in from afar
        np.testing.assert_array_equal(mask[number] != 0, apart)
    assert set(np.unique(mask)) == {-100, 0}


def test_relative_index_is_that_of_the_authors():
    index = swin.relative_index(3)
    for p, q in ((0, 0), (0, 8), (8, 0), (1, 3)):
        (y, x), (v, u) = divmod(p, 3), divmod(q, 3)
        assert index[p, q] == (y - v + 2) * 5 + (x - u + 2)


@pytest.mark.parametrize(
    ("variant", "size", "near"),
    [("swin_b", 256, 224), ("swin_t_4", 60, 64), ("swin_b_12", 224, 384), ("swin_t", 32, 224)],
)
def test_a_size_that_windows_do_not_fill_is_refused_with_the_nearest(variant, size, near):
    with pytest.raises(UserError, match=f"image size {size} does not fill.*set config.image_size to"):
        models.check_size(models.build(variant, 1), size)
    models.check_size(models.build(variant, 1), near)


@pytest.mark.parametrize("name", ["swin", "swin_x", "swin_b_0", "swin_b_", "Swin_b"])
def test_unknown_variants_name_the_nearest(name):
    with pytest.raises(UserError, match="unknown model variant .* 'swin_"):
        models.build(name, 1)


def test_options_that_swin_has_not_are_refused():
    with pytest.raises(UserError, match="config.model.attention is of no use for swin_t"):
        models.build("swin_t", 1, attention="cudnn")
    with pytest.raises(UserError, match="config.model.pool is of no use for resnet18"):
        models.build("resnet18", 1, pool="avg")


@pytest.mark.slow
def test_scan_and_remat_change_nothing(params):
    def gradient(model):
        loss = lambda p: jnp.square(model.apply({"params": p}, images())).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    jax.tree.map(close, gradient(TINY.clone(unroll=2, remat=True)), gradient(TINY))


@pytest.mark.parametrize("mode", ["sample", pytest.param("element", marks=pytest.mark.slow)])
def test_drop_path_is_per_image_and_the_mean_stays(params, mode):
    model = TINY.clone(drop_path_mode=mode)
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    keys = jax.random.split(jax.random.key(3), 2)
    both, turned = apply(images(), 0.5, keys), apply(images()[::-1], 0.5, keys[::-1])
    np.testing.assert_allclose(both, turned[::-1], atol=1e-5)  # noise goes with the image
    plain = APPLY(params, images())
    assert jnp.abs(both - plain).max() > 1e-3
    np.testing.assert_allclose(apply(images(), 0.0, keys), plain, atol=1e-5)


def test_blocks_are_numbered_through_the_network():
    numbers = sites.block_numbers(models.shapes(TINY.clone(depths=(2, 4)), 32))
    assert {".".join(k[::2]): v for k, v in numbers.items()} == {
        "stage_0.plain": [0],
        "stage_0.shifted": [1],
        "stage_1.plain": [2, 4],
        "stage_1.shifted": [3, 5],
    }


ONE_WIDTH = ("last", "fact", "arc", "repadapter")


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - set(ONE_WIDTH)))
def test_the_contract_holds(params, name):
    adapter = methods.check(name, methods.get(name), params)
    assert (name in ("linear", "knn")) == (methods.trainable_count({"adapter": adapter}) == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - set(ONE_WIDTH)))
def test_every_method_works_and_most_start_at_the_identity(params, name):
    options = {"vera": dict(rank=4)}.get(name, {})
    if name == "rlrr":
        options = dict(init="identity")
    method = methods.get(name, **options)
    adapter = jax.jit(method.init)(jax.random.key(0), params)
    merged = jax.jit(method.merge)(params, adapter)
    if name != "ssf":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), merged, params)
    grads = jax.grad(lambda a: jnp.square(APPLY(method.merge(params, a), images())).sum())
    moved = [float(jnp.abs(x).max()) for x in jax.tree.leaves(grads(adapter))]
    assert not adapter or max(moved) > 0


@pytest.mark.parametrize("name", ONE_WIDTH)
def test_methods_of_one_width_say_so(params, name):
    with pytest.raises(UserError, match=f"method '{name}' does not fit .* blocks of one width"):
        methods.check(name, methods.get(name), params)
    with pytest.raises(UserError, match="needs blocks of one width"):
        methods.check("rlrr", methods.get("rlrr", layers=1), params)


def test_lora_of_a_fused_kernel_changes_query_and_value_alone(params):
    method = methods.get("lora", rank=2)
    adapter = jax.jit(method.init)(jax.random.key(0), params)
    adapter = jax.tree.map(lambda x: np.asarray(x) + 0.1, adapter)
    merged = jax.tree.map(np.asarray, jax.jit(method.merge)(params, adapter))
    for name, site in base.dense(params).items():
        before, after = (base.weights(tree, site)[0] for tree in (params, merged))
        node = adapter.get(name)
        wanted = before + (0 if node is None else node["down"] @ node["up"])
        np.testing.assert_allclose(after, wanted, atol=1e-5, err_msg=name)
        assert (node is not None) == (name.rpartition(".")[2] in ("query", "value"))
