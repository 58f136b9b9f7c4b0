"""Heads that are padded, and what tasks share because of that."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from named import register
from test_step import DATA, FROZEN, METHOD, MODEL, NUMBER, SIZE, frozen_tree, hyper
from test_suite import config

from rlrr_jax import adapters, files, heads, job, losses, mixing, optim, step, suite
from rlrr_jax import config as config_lib
from rlrr_jax.data import resize
from rlrr_jax.recipe import Recipe
from rlrr_jax.runtime import mesh as mesh_lib
from rlrr_jax.runtime.stop import Stop, Stopped


def wide_tree(classes):
    """The frozen tree with a head of so many classes."""
    width = len(FROZEN["head"]["bias"]), len(FROZEN["head"]["kernel"])
    empty = {"kernel": jnp.zeros((width[1], classes)), "bias": jnp.zeros(classes)}
    return {**frozen_tree(), "head": empty}


def train(classes, mix, devices):
    """Two epochs with a head of so many classes, of which the model's are there."""
    sgd = optim.Optimizer("adamw", "float32", grad_clip=1.0, average=0.9)
    model = MODEL.clone(num_classes=classes)
    r = Recipe(model, METHOD, 6, NUMBER, SIZE, optimizer=sgd, mixing=mix)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices], 1)
    state, metrics = step.map_start(r, mesh)(jax.random.split(jax.random.key(0), 1), wide_tree(classes))
    for name in ("trainable", "average"):
        state[name] = heads.hide(state[name], MODEL.num_classes)
    losses, steps = [], step.map_train_steps(r, mesh)
    own = jax.tree.map(lambda x: x[None], hyper(epochs=8))
    for epoch in range(2):
        state, metrics = steps(wide_tree(classes), DATA, state, metrics, own, (epoch, 0, 4))
        losses.append(np.asarray(metrics["loss"][0]))
    mine = jax.tree.map(lambda x: np.asarray(x)[0], step.tuned(state))
    return np.concatenate(losses), mine


@pytest.mark.parametrize(
    "mix, devices",
    [
        (mixing.Mixing(), 1),
        pytest.param(mixing.Mixing(mixup=0.8, cutmix=1.0), 4, marks=pytest.mark.slow),
    ],
)
def test_classes_that_are_not_there_change_nothing(mix, devices):
    """Weight decay, clipping by the norm and a running average among it."""
    plain, wanted = train(MODEL.num_classes, mix, devices)
    padded, found = train(512, mix, devices)
    assert np.ptp(plain) > 0.1
    np.testing.assert_allclose(padded, plain, rtol=2e-5)
    beyond = found["head"]["kernel"][:, MODEL.num_classes :]
    assert not beyond.any() and (found["head"]["bias"][MODEL.num_classes :] < 0.99 * heads.NEVER).all()
    cut = heads.cut(found, MODEL.num_classes)
    assert jax.tree.map(np.shape, cut) == jax.tree.map(np.shape, wanted)
    cut, wanted = (flatten_dict(tree, sep="/") for tree in (cut, wanted))
    for name, x in cut.items():
        if not name.endswith("key/shift"):  # has no gradient but rounding, which AdamW makes large
            np.testing.assert_allclose(x, wanted[name], rtol=0, atol=1e-4, err_msg=name)


def test_tasks_of_one_start_share_a_size_where_only_cross_entropy_sees_it(monkeypatch):
    sizes = lambda runs: [run.get("head_classes") for run in runs]
    runs = config_lib.resolve(config("cifar,dtd", seeds=(0,)))
    heads.share(runs)
    assert sizes(runs) == [100, 100]
    runs = config_lib.resolve(config("cifar", seeds=(0, 1)))
    heads.share(runs)
    assert sizes(runs) == [None, None]
    register(monkeypatch, "loss", "mine", lambda net, batch: losses.cross_entropy(net, batch))
    register(monkeypatch, "gradients", "mine", lambda key: optax.identity())
    for key, value in dict(loss="mine", label_smoothing=0.1, gradients="mine").items():
        runs = config_lib.resolve(config("cifar,dtd", seeds=(0,), **{key: value}))
        heads.share(runs)
        assert sizes(runs) == [None, None], key


@pytest.fixture
def compiled():
    """Names of compiled programs, as they are."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_tasks_with_other_classes_share_their_programs(tmp_path, compiled):
    """The second of the bundled tasks compiles no step, and has the adapter and row of its own task."""
    job.forget()  # other tests may have compiled them
    both = config("hearts,digits,method=rlrr", epochs=1, drop_path=0.0)
    both.model.depth = 2
    suite.run(both, tmp_path)
    steps = [name for name in compiled if "train_steps" in name]
    evaluations = [name for name in compiled if "eval_step" in name]
    assert len(steps) == len(evaluations) == 1
    for task, classes in (("hearts", 16), ("digits", 10)):
        folder = next((tmp_path / task).glob("*/seed0"))
        adapter = adapters.read(folder / "adapter.safetensors")
        assert adapter.trainable["head"]["bias"].shape == (classes,)
        row = files.read_json(folder / "result.json")
        assert row["head_params"] == 97 * classes and "head_classes" not in row
        assert np.abs(adapter.trainable["head"]["bias"]).max() < 10


@pytest.mark.slow
def test_a_run_that_was_begun_keeps_its_size(tmp_path):
    """Whether the other task is named again, or not: its checkpoint has that head."""

    class Soon(Stop):
        looks = 0

        def __call__(self):
            self.looks += 1
            return self.looks > 3

    both = config("hearts,digits,method=lora", epochs=2, checkpoint_seconds=0.0)
    with pytest.raises(Stopped):
        suite.run(both, tmp_path, Soon())
    saved = files.read_json(tmp_path / "hearts/lora/seed0/config.json")
    assert saved["head_classes"] == 16
    rows, problems = suite.run(config("hearts,method=lora", epochs=2), tmp_path)
    assert not problems and rows[0]["head_params"] == 97 * 16


def test_images_are_enlarged_once_to_the_same_bits():
    images = np.random.default_rng(0).integers(0, 256, (70, 20, 24, 3), np.uint8)  # not a multiple
    wanted = resize.bicubic(jnp.asarray(images), (32, 40))
    np.testing.assert_array_equal(resize.enlarge_all(images, (32, 40)), wanted)
    np.testing.assert_array_equal(resize.enlarge(images, (32, 40)), wanted)
    np.testing.assert_array_equal(resize.enlarge(images, (20, 24)), images)


@pytest.mark.slow
def test_edited_code_counts_once_programs_are_forgotten(tmp_path, monkeypatch):
    """A replaced defence is another program; what a program calls counts after `forget`."""
    loss = lambda name: suite.run(
        config("digits,method=linear", epochs=1, gradients="mine", protocol="tune"), tmp_path / name
    )[0][0]["train_loss"]
    register(monkeypatch, "gradients", "mine", lambda key: optax.identity())
    first = loss("first")
    zero = optax.stateless(lambda tree, _: jax.tree.map(jnp.zeros_like, tree))
    register(monkeypatch, "gradients", "mine", lambda key: zero)
    assert loss("no gradient") == pytest.approx(np.log(10), rel=1e-4) != pytest.approx(first, rel=1e-2)
    monkeypatch.setattr(losses, "cross_entropies", lambda logits, batch: 0 * logits[:, 0])
    job.forget()
    assert loss("no loss") == 0
    job.forget()
