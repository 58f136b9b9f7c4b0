"""Merging block by block gives the numbers of merging the whole tree, on one device and on four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax._src.ad_checkpoint import saved_residuals  # which JAX prints alone
from marks import quick
from models.test_vit import SMALL
from test_step import CLASSES, DATA, hyper
from trees import folded, images, moved, random_tree, started

from rlrr_jax import blockwise, evaluate, losses, methods, models, step
from rlrr_jax import config as config_lib
from rlrr_jax import metrics as metrics_lib
from rlrr_jax import run as run_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.models import vit
from rlrr_jax.recipe import Recipe
from rlrr_jax.run import Limits
from rlrr_jax.runtime import mesh as mesh_lib

MODEL = vit.ViT(**{**SMALL, "depth": 3})
FROZEN = jax.tree.map(np.asarray, random_tree(MODEL, 16))
REFUSED = {"last": "merge does not treat blocks alike"}  # which changes some blocks alone


def recipe(name="rlrr", options=(), method=None, **kwargs):
    method = method or methods.get(name, **dict(options))
    block = method.DEFAULTS.get("block")
    model = MODEL if block is None else MODEL.clone(block=block)
    return Recipe(model, method, 6, 22, 16, **{"drop_path": True, **kwargs})


def trained(recipe, limits, devices=1, trials=1, steps=3):
    """State, losses and evaluation after some steps, as a job does it."""
    made, frozen = blockwise.applied(recipe, FROZEN, limits)
    mesh = jax.make_mesh(
        (1, devices),
        ("trial", "data"),
        (jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )
    frozen = mesh_lib.put(mesh, None, frozen)
    keys = mesh_lib.put_trials(mesh, [jax.random.key(i) for i in range(trials)])
    hypers = mesh_lib.put_trials(mesh, [hyper(i, lr=3e-2) for i in range(trials)])
    state, metrics = step.map_start(made, mesh)(keys, frozen)
    data = mesh_lib.put(mesh, jax.sharding.PartitionSpec(), DATA)
    state, metrics = step.map_train_steps(made, mesh)(
        frozen, data, state, metrics, hypers, (jnp.int32(0), jnp.int32(0), jnp.int32(steps))
    )
    params = step.map_merge(made.method, mesh)(frozen, state["trainable"])
    program = evaluate.map_eval_step(made.model, 16, made.precision, mesh)
    logits = evaluate.evaluate(program, params, DATA["images"], 8, mesh)
    each = [metrics_lib.of_classes(x, DATA["labels"]) for x in logits]
    found = {key: [x[key] for x in each] for key in ("acc", "loss")}
    return frozen, jax.device_get((state["trainable"], metrics["loss"][:, :steps], found)), params


def rounded():
    """`FROZEN` with blocks that were bfloat16."""
    transformer = dict(FROZEN["Transformer"])
    transformer["encoderblock"] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(np.float32), transformer["encoderblock"]
    )
    return {**FROZEN, "Transformer": transformer}


def same(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def same_state(a, b):
    """Without shifts of keys, whose gradient is zero but for rounding, of which Adam takes the sign."""
    flat = [flatten_dict(x) for x in (a, b)]
    keep = lambda path: not ("key" in path and path[-1] == "shift")
    same(*({k: v for k, v in x.items() if keep(k)} for x in flat), rtol=1e-3, atol=1e-4)


@functools.cache
def ordinary(name="rlrr", trials=1):
    return trained(recipe(name), Limits(), trials=trials)[1]


def test_nothing_asked_changes_nothing():
    plain = recipe()
    found, tree = blockwise.applied(plain, FROZEN, Limits(frozen_dtype="float32"))
    assert found is plain and tree is FROZEN


@pytest.mark.parametrize("name", quick(methods.METHODS, "rlrr", "vera", "last"))
def test_every_method_gives_the_gradient_of_the_whole_tree_or_is_refused(name):
    whole = recipe(name)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            blockwise.applied(whole, FROZEN, Limits(shard_weights=True))
        return
    made, tree = blockwise.applied(whole, FROZEN, Limits(shard_weights=True))
    noisy, pixels = moved(started(whole.method, FROZEN), 0.02), images(4, 16)

    def logits(recipe, frozen, trainable):
        params = methods.merge(recipe.method, frozen, trainable)
        with jax.default_matmul_precision("highest"):
            return recipe.model.apply(
                {"params": params}, pixels, 0.3, jax.random.split(jax.random.key(3), 4)
            )

    value = lambda recipe, frozen: jax.jit(
        jax.value_and_grad(lambda t: (logits(recipe, frozen, t) ** 2).mean())
    )(noisy)
    (loss, grads), (one_loss, one_grads) = value(whole, FROZEN), value(made, tree)
    assert loss > 1e-4
    same(one_loss, loss, rtol=1e-5)
    size = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    same(one_grads, grads, rtol=1e-3, atol=1e-5 * size)
    same(started(made.method, tree), started(whole.method, FROZEN), rtol=1e-6)


@pytest.mark.parametrize("name", ["fact", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_gradient_keeps_no_merged_block(name):
    """Of arrays of all blocks with the size of a kernel, only the frozen ones; of any method."""
    made, tree = blockwise.applied(recipe(name), FROZEN, Limits(frozen_dtype="bfloat16"))
    start = started(recipe(name).method, FROZEN)

    def loss(trainable):
        params = methods.merge(made.method, tree, trainable)
        return (made.model.apply({"params": params}, jnp.ones((1, 16, 16, 3))) ** 2).mean()

    kept = [a for a, why in saved_residuals(loss, start) if "argument" not in why]
    kernels = [a for a in kept if a.shape[:1] == (3,) and a.size >= 3 * 32 * 32]
    assert kernels and {a.dtype for a in kernels} == {jnp.dtype("bfloat16")}
    assert tree["embedding"]["kernel"].dtype == jnp.float32
    params = folded(recipe(name).method, rounded(), start)
    wanted = (MODEL.apply({"params": params}, jnp.ones((1, 16, 16, 3))) ** 2).mean()
    np.testing.assert_allclose(loss(start), wanted, rtol=1e-5)


@pytest.mark.slow
def test_one_block_is_merged_like_many():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "MODEL", MODEL.clone(depth=1))
        patch.setitem(globals(), "FROZEN", jax.tree.map(np.asarray, random_tree(MODEL, 16)))
        (_, found, _), (_, whole, _) = (
            trained(recipe(), limits, steps=2) for limits in (Limits(shard_weights=True), Limits())
        )
    same(found[1], whole[1], rtol=1e-5)


@pytest.mark.slow
def test_shares_are_over_all_devices_of_several_trials():
    config = vtab.get_config("digits,method=rlrr")
    config.seeds, config.model.depth = (0, 1, 2, 3), 2
    for shares, shape in ((False, (4, 1)), (True, (1, 4))):
        config.shard_weights = shares
        runs = [run_lib.of(run) for run in config_lib.resolve(config)]
        assert tuple(run_lib.mesh_of(runs, jax.devices()[:4]).shape.values()) == shape
        assert runs[0].limits.recompute == (True if shares else None)


def test_four_devices_with_a_share_each_train_and_evaluate_as_one_with_all():
    frozen, found, params = trained(recipe(), Limits(shard_weights=True), devices=4)
    state, losses, result = ordinary()
    same(found[1], losses, rtol=1e-5)
    same_state(found[0], state)
    assert found[2]["acc"] == result["acc"]
    same(found[2]["loss"], result["loss"], rtol=1e-5)
    for tree, first in ((frozen, 3), (params, 1)):
        kernel = tree["Transformer"]["encoderblock"]["sharded"]["MlpBlock_0"]["Dense_0"]["kernel"]
        assert kernel.shape[0] == first
        assert {s.data.size * 4 for s in kernel.addressable_shards} == {kernel.size}
        embedding = tree["embedding"]["kernel"]
        assert {s.data.size for s in embedding.addressable_shards} == {embedding.size}


@pytest.mark.slow
def test_trials_share_the_weights():
    _, found, _ = trained(recipe(), Limits(shard_weights=True), devices=2, trials=2)
    state, losses, result = ordinary(trials=2)
    same(found[1], losses, rtol=1e-5)
    same_state(found[0], state)
    assert found[2]["acc"] == result["acc"]


@pytest.mark.slow
def test_bfloat16_is_that_of_the_frozen_weights_alone():
    frozen, found, _ = trained(recipe(), Limits(frozen_dtype="bfloat16"))
    blocks = frozen["Transformer"]["encoderblock"]["whole"]
    assert {str(x.dtype) for x in jax.tree.leaves(blocks)} == {"bfloat16"}
    assert frozen["embedding"]["kernel"].dtype == jnp.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "FROZEN", rounded())
        _, whole, _ = trained(recipe(), Limits())
    same(found[1], whole[1], rtol=1e-5)
    same_state(found[0], whole[0])
    assert np.abs(found[1] - ordinary()[1]).max() > 1e-6  # not those of float32


def test_a_merge_that_mixes_blocks_is_refused():
    plain = methods.get("rlrr")

    def merge(frozen, adapter):
        return base.change_dense(
            plain.merge(frozen, adapter),
            ("query",),
            lambda name, k, b: (k - k.mean(0, keepdims=True), b),
        )

    with pytest.raises(UserError) as e:
        blockwise.applied(
            recipe(method=plain._replace(merge=merge)), FROZEN, Limits(shard_weights=True)
        )
    assert str(e.value) == (
        "config.frozen_dtype and shard_weights merge a block at a time, and this method's merge does "
        "not treat blocks alike: leave them out"
    )


def test_a_merge_that_counts_blocks_is_refused():
    plain = methods.get("rlrr")

    def merge(frozen, adapter):
        change = lambda name, k, b: (k * jnp.linspace(1.0, 2.0, len(k))[:, None, None], b)
        return base.change_dense(plain.merge(frozen, adapter), ("query",), change)

    with pytest.raises(UserError, match="does not treat blocks alike"):
        blockwise.applied(
            recipe(method=plain._replace(merge=merge)), FROZEN, Limits(shard_weights=True)
        )


def test_methods_losses_and_models_that_do_not_fit_are_refused():
    gps = methods.get("gps")
    with pytest.raises(UserError, match="this method looks at the training images: leave them out"):
        blockwise.applied(recipe(method=gps), FROZEN, Limits(shard_weights=True))
    pace = losses.get("pace", (), ("consistency",))
    with pytest.raises(UserError, match="this loss may look at the whole tree: leave them out"):
        blockwise.applied(recipe(loss=pace), FROZEN, Limits(shard_weights=True))
    swin = models.build("swin_t", CLASSES)
    with pytest.raises(UserError, match="it needs blocks of one width, as a ViT has: leave them out"):
        shapes = models.shapes(swin, 224)
        blockwise.applied(recipe()._replace(model=swin), shapes, Limits(frozen_dtype="bfloat16"))


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("method", "gps", "this method looks at the training images"),
        ("method", "last", "this method's merge does not treat blocks alike"),
        ("loss", "pace", "this loss may look at the whole tree"),
        ("model.variant", "swin_t", "it needs blocks of one width, as a ViT has"),
    ],
)
def test_a_configuration_is_refused_before_any_work(key, value, why):
    config = vtab.get_config(f"cifar,method={value if key == 'method' else 'rlrr'}")
    config.pretrained.name = "any.npz"
    config.shard_weights = True
    if key != "method":
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=why):
        config_lib.resolve(config)
