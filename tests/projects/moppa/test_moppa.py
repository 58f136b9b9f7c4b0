import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_vit import SMALL
from trees import images, random_tree

from rlrr_jax import adapters, export, job, losses, methods, models, step
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.projects.moppa import block
from rlrr_jax.projects.moppa import losses as lib
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.runtime import mesh as mesh_lib

MODEL = vit.ViT(**SMALL, block=block.Block)


@pytest.fixture(scope="module")
def frozen():
    return random_tree(MODEL, 48)


@pytest.mark.slow
def test_it_keeps_its_contract_and_starts_near_the_identity(frozen):
    method = methods.get("moppa")
    methods.check("moppa", method, frozen)
    trained = methods.start(method, jax.random.key(0), frozen)
    assert methods.trainable_count(trained) == 3 * (4 * 32 + 3)
    merged = methods.merge(method, frozen, {**trained, "head": frozen["head"]})
    assert merged["Transformer"]["encoderblock"].pop("physics").keys() == {"k", "t", "c", "f", "route"}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), merged, frozen))
    merged = methods.merge(method, frozen, {**trained, "head": frozen["head"]})
    apply = jax.jit(MODEL.apply)
    ours, theirs = (apply({"params": tree}, images()) for tree in (merged, frozen))
    difference = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
    assert 1e-4 < difference < 0.3


def test_the_penalty_keeps_shares_alike():
    penalty = lambda route: 2 * float(lib.divergence({"route": jnp.array(route)}))
    assert penalty([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]) == pytest.approx(0, abs=1e-6)
    shares = np.exp([0.0, 1.0, 3.0]) / np.exp([0.0, 1.0, 3.0]).sum()
    wanted = 2 * (shares * np.log(shares * 3)).sum()
    assert penalty([[0.0, 1.0, 3.0]]) == pytest.approx(wanted, rel=1e-5)
    assert penalty([[0.0, 0.0, 99.0]]) == pytest.approx(2 * np.log(3), rel=1e-5)  # one takes all


@pytest.mark.slow
def test_the_penalty_counts_once_on_any_number_of_devices(frozen):
    rng = np.random.default_rng(0)
    data = {"images": rng.integers(0, 256, (6, 48, 48, 3), np.uint8)}
    data["labels"] = (np.arange(6) % 3).astype(np.int32)
    hyper = dict(lr=jnp.array([1e-2] * 4), weight_decay=jnp.array(0.0), drop_path=jnp.array(0.0))
    hyper |= dict(noise_key=jax.random.key(1), order_key=jax.random.key(2), flip=jnp.array(False))
    hyper = jax.tree.map(lambda x: x[None], Hyper(**hyper))
    shown = {}
    for devices, balance in ((1, 0.0), (1, 5.0), (2, 5.0)):
        method = methods.get("moppa")
        begin = method.init
        tilted = lambda key, frozen: {**begin(key, frozen), "route": jnp.tile(jnp.arange(3.0), (3, 1))}
        method = method._replace(init=tilted)
        recipe = Recipe(
            MODEL, method, 6, 6, 48, drop_path=False, loss=losses.get("moppa", {"balance": balance})
        )
        mesh = mesh_lib.make_mesh(jax.devices()[:devices], 1, 6)
        state = step.map_start(recipe, mesh)(jax.random.split(jax.random.key(0), 1), frozen)
        train = step.map_train_steps(recipe, mesh)
        _, metrics = train(frozen, data, *state, hyper, (0, 0, 1))
        shown[devices, balance] = float(np.asarray(metrics["loss"])[0, 0])
    penalty = 5 * float(lib.divergence({"route": jnp.tile(jnp.arange(3.0), (3, 1))}))
    assert shown[1, 5.0] - shown[1, 0.0] == pytest.approx(penalty, rel=1e-4)
    assert shown[2, 5.0] == pytest.approx(shown[1, 5.0], rel=1e-5)


def test_what_it_costs_is_what_the_transforms_take(frozen):
    recipe = Recipe(MODEL, methods.get("moppa"), batch_size=6, num_images=6, image_size=48)
    found = job.overhead(recipe, frozen)
    tokens, w, m = 37, 32, 64
    block = 2 * tokens * (4 * w * w + 2 * w * m) + 4 * tokens * tokens * w
    transforms = 4 * 36 * (6 + 6) * w  # there and back, along rows and columns
    assert found == pytest.approx(transforms / block, rel=0.6)
    assert job.overhead(recipe._replace(method=methods.get("ssf")), frozen) == 0


def test_other_networks_and_formats_refuse_it(tuned_runs, tmp_path):
    for variant, message in (("swin_t_2", "blocks of one width"), ("resnet18", "blocks of one width")):
        shapes = models.shapes(models.build(variant, 2), 64)
        with pytest.raises(UserError, match=message):
            methods.check("moppa", methods.get("moppa"), shapes)
    adapter = adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")
    config = {**adapter.card["config"], "method": "moppa", "method_kwargs": {}}
    other = adapter._replace(card={**adapter.card, "config": config})
    with pytest.raises(
        UserError,
        match="the blocks of this model are moppa, for which timm has no place: use adapter or hub",
    ):
        export.export(other, "timm", tmp_path / "x.safetensors")
