"""Seeds together: their weights' mean, and their answers', by hand."""

import json

import numpy as np
import pytest
from scipy import special

from rlrr_jax import adapters, files, suite
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.projects.soups import __main__ as soups


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soups")
    config = vtab.get_config("digits,method=linear")
    config.model.depth, config.epochs, config.num_devices = 2, 1, 1
    config.seeds = (0, 1, 2)
    rows, problems = suite.run(config, folder)
    assert not problems and len(rows) == 3
    return folder


def test_means_of_weights_and_of_answers_by_hand(workdir):
    (found,) = soups.lines([workdir], mirror=True)
    files_of = [workdir / f"digits/linear/seed{i}/adapter.safetensors" for i in range(3)]
    given = [adapters.read(path) for path in files_of]
    images, labels = adapters.images(given[0], "test")
    views = [images[:], images[:][:, :, ::-1]]
    logits = np.array([[adapters.load(a).logits(x) for x in views] for a in given])
    shares = special.softmax(logits.astype(np.float64), -1)  # [seed, view, image, class]
    right = lambda shares: float((shares.argmax(-1) == labels).mean())
    assert found.alone == pytest.approx([right(x) for x in shares[:, 0]])
    assert found.alone == [
        files.read_json(p.parent / "result.json")["test_acc_final"] for p in files_of
    ]
    assert found.answers == pytest.approx(right(shares[:, 0].mean(0)), abs=0.002)
    # Only heads differ, and they are linear: the mean of weights has the mean of logits.
    assert found.weights == pytest.approx(right(logits[:, 0].mean(0)), abs=0.002)
    alone, weights, together = found.mirrored
    assert alone == pytest.approx([right(x.mean(0)) for x in shares], abs=0.002)
    mixed = special.softmax(logits.astype(np.float64).mean(0), -1).mean(0)
    assert weights == pytest.approx(right(mixed), abs=0.002)
    assert together == pytest.approx(right(shares.mean((0, 1))), abs=0.002)
    assert found.seeds == [0, 1, 2] and (found.task, found.label) == ("digits", "linear depth=2")
    assert len({found.weights, weights}) == 2  # mirrored digits are other digits


def test_the_command_writes_what_it_prints(workdir, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soups", str(workdir)])
    soups.main()
    said = capsys.readouterr().out
    (saved,) = json.loads((workdir / "soups.json").read_text())
    assert f"{100 * saved['weights']:.2f} %" in said and "The mean of weights gains" in said
    assert (workdir / "soups.md").read_text() in said.replace("\n\nThe mean of weights", "\nThe mean")
    assert saved["mirrored"] is None and "mirrored" not in said.partition("Test scores")[0]


def test_one_seed_is_no_soup(workdir, tmp_path):
    run = workdir / "digits/linear/seed0"
    alone = tmp_path / "digits/linear/seed0"
    alone.mkdir(parents=True)
    for name in ("result.json", "adapter.safetensors", "config.json"):
        (alone / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="differ in their seeds alone: train some with --config.seeds="):
        soups.lines([tmp_path], mirror=False)


@pytest.mark.parametrize(
    ("kind", "shares", "labels", "score"),
    [
        ("class", [[0.9, 0.1], [0.4, 0.6]], [0, 0], 0.5),
        ("labels", [[1.0, 0.2], [0.0, 0.7]], [[1.0, 0.0], [0.0, 1.0]], 1.0),
        ("value", [[1e9], [1e9 + 2]], [1e9, 1e9 + 2], 1.0),
    ],
)
def test_scores_of_other_kinds(kind, shares, labels, score):
    assert soups._score(kind, np.array(labels), np.array(shares)) == score


def test_an_adapter_that_has_gone(workdir, tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"digits/linear/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_bytes(
            (workdir / f"digits/linear/seed{seed}/result.json").read_bytes()
        )
    with pytest.raises(UserError, match="there is no adapter of digits linear seed 0 below"):
        soups.lines([tmp_path], mirror=False)
