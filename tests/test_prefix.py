"""What training does not change is computed once, and nothing else differs."""

import json

import jax
import numpy as np
import pytest
from marks import quick
from named import register
from trees import random_tree

from rlrr_jax import adapters, losses, methods, models, prefix, suite
from rlrr_jax.configs import vtab
from rlrr_jax.data.resize import normalize
from rlrr_jax.recipe import Recipe
from rlrr_jax.runtime import mesh as mesh_lib


def config(arg, **changes):
    config = vtab.get_config(arg)
    config.epochs, config.batch_size, config.model.depth = 2, 64, 3
    config.update(changes)
    return config


def train(folder, arg, **changes):
    """The rows of some runs, and the lines of `metrics.jsonl` and the adapter of the first."""
    rows, problems = suite.run(config(arg, **changes), folder)
    assert not problems
    (first, *_) = sorted(folder.glob("*/*/seed0"))
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    return rows, lines, adapters.read(first / "adapter.safetensors").trainable


def without(monkeypatch):
    monkeypatch.setattr(prefix, "blocks", lambda recipe, run: 0)


CASES = {
    "linear, flipped": ("hearts,method=linear", dict(flip=True)),
    "the last two blocks": ("hearts,method=last,blocks=2", {}),
    "two seeds at once": ("hearts,method=linear", dict(seeds=(0, 1))),
}


@pytest.mark.parametrize("what", quick(CASES, "the last two blocks"))
def test_the_same_losses_and_the_same_adapter(what, tmp_path, monkeypatch, capsys):
    arg, changes = CASES[what]
    rows, lines, tree = train(tmp_path / "once", arg, **changes)
    without(monkeypatch)
    others, wanted, other = train(tmp_path / "always", arg, **changes)
    assert len(rows) == len(others) and len(lines) == 2
    for a, b in zip(lines, wanted):
        assert a.keys() == b.keys()
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)
    for a, b in zip(rows, others):
        assert a["test_acc_final"] == b["test_acc_final"] and a["identity"] == b["identity"]
        assert a["trainable_params"] == b["trainable_params"]
    assert adapters.flattened(tree).keys() == adapters.flattened(other).keys()
    for name, x in adapters.flattened(tree).items():
        if name.endswith("key/bias"):  # has no gradient but rounding, which Adam makes large
            continue
        np.testing.assert_allclose(
            x, adapters.flattened(other)[name], rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_the_second_view_is_flipped():
    """Of images that are flipped, what the head gets of both, against the whole model."""
    model = models.build("bundled", 4, depth=1)
    frozen = random_tree(model, 32)
    recipe = Recipe(model, methods.get("linear"), 4, 6, 32)
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    mesh = mesh_lib.make_mesh(jax.devices(), 1, 4)
    features = jax.jit(lambda tree, x: models.head_inputs(model, tree, normalize(x, 32)))
    found = prefix.outputs(recipe, frozen, prefix.HEAD, images, mesh, True, "")
    for view, shown in enumerate((images, images[:, :, ::-1])):
        wanted = features(frozen, shown)
        np.testing.assert_allclose(found[:, view], wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-2


def passed(monkeypatch):
    """Numbers of images that pass a prefix, as a list that grows."""
    seen, outputs = [], prefix.outputs
    monkeypatch.setattr(prefix, "outputs", lambda *a: seen.append(len(a[3])) or outputs(*a))
    return seen


@pytest.mark.slow
def test_a_search_passes_each_image_once_for_all_trials(tmp_path, monkeypatch):
    seen = passed(monkeypatch)
    grid = dict(lr=(0.001, 0.01, 0.1), weight_decay=(0.0, 0.1), drop_path=(0.0,))
    job = config("hearts,method=linear", protocol="vtab", seeds=(0, 1))
    job.grid.update(grid)
    rows, problems = suite.run(job, tmp_path)
    assert not problems and len(rows) == 2
    assert len(seen) == 4 and sum(seen[:2]) == seen[2]  # tuning, validation; both, and the test images


@pytest.mark.parametrize(
    "changes",
    quick(
        [dict(drop_path=0.1), dict(mixup=0.8), dict(loss="of_a_fork"), dict(method="rlrr")],
        dict(drop_path=0.1),
    ),
    ids=str,
)
def test_nothing_is_computed_once_where_noise_or_training_reaches(changes, tmp_path, monkeypatch):
    register(monkeypatch, "loss", "of_a_fork", lambda *args: losses.cross_entropy(*args))
    seen = passed(monkeypatch)
    arg = f"hearts,method={changes.pop('method', 'linear')}"
    suite.run(config(arg, epochs=1, **changes), tmp_path)
    assert seen == []


@pytest.mark.slow
def test_what_would_take_too_much_is_computed_each_time(tmp_path, monkeypatch, capsys):
    seen = passed(monkeypatch)
    monkeypatch.setattr(prefix, "MOST_FILE", 10**6)
    monkeypatch.setattr(prefix, "MOST_BYTES", 10**5)  # what lies in memory needs no disk
    suite.run(config("hearts,method=last", epochs=1), tmp_path)
    assert (
        seen == []
        and "more than the 0.0 GB for it, and is computed each time" in capsys.readouterr().out
    )


def test_many_outputs_lie_in_a_file(monkeypatch):
    monkeypatch.setattr(prefix, "MOST_BYTES", 100)
    room = prefix._room((5, 6), np.float32)
    assert isinstance(room, np.memmap)
    room[:] = 3
    assert room.sum() == 90 and not isinstance(prefix._room((5, 5), np.float32), np.memmap)
