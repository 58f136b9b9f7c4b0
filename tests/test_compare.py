"""The configurations beside vtab.py, and the recipe for a method of one's own in the README."""

import pathlib
import re

import numpy as np
import pictures
import pytest
from rows import row as make
from squeeze import squeeze

from rlrr_jax import config as config_lib
from rlrr_jax import files, methods, report, suite, train
from rlrr_jax.configs import ablations, compare, transfer
from rlrr_jax.data import decoding, sources, store, tasks
from rlrr_jax.results import tables
from rlrr_jax.runs import search
from rlrr_jax.runs.forecast import cost
from rlrr_jax.runs.workdir import method_folder

ROOT = pathlib.Path(__file__).parents[1]


def run(config, workdir):
    rows, problems = suite.run(config, workdir)
    assert not problems
    return rows


def changed(config, **changes):
    with config.unlocked():
        config.update({"num_devices": 1, **changes})
    return config


# compare.py -----------------------------------------------------------------------------------


def test_compare_gives_every_method_the_same_number_of_candidates():
    runs = config_lib.resolve(compare.get_config("kitti"))
    assert {r.method for r in runs} == set(methods.METHODS) and len(runs) == 3 * len(methods.METHODS)
    for r in runs:
        if r.method == "knn":  # which trains nothing
            assert len(r.grid.lr) == 1
            continue
        assert r.protocol == "vtab" and len(r.grid.lr) == 3 and r.grid.extend
        recipe = tasks.get("kitti").recipes.get(r.method, {})
        own = {**methods.get(r.method).DEFAULTS, **recipe}
        assert r.grid.lr == pytest.approx([own["lr"] * x for x in (0.3, 1, 3)])
        assert (r.grid.weight_decay, r.grid.drop_path) == ((own["weight_decay"],), (own["drop_path"],))
    trials = search.settings(runs[0])
    assert [t.lr for t in trials] == list(runs[0].grid.lr)
    assert {(t.weight_decay, t.drop_path, t.protocol) for t in trials} == {(5e-2, 0.3, "tune")}


@pytest.mark.slow
def test_compare_prints_one_table_and_one_picture(tmp_path):
    config = changed(compare.get_config("digits,method=linear+bitfit"), epochs=1, seeds=(0, 1))
    grids = {r.method: set(r.grid.lr) for r in config_lib.resolve(config)}
    with pictures.drawn():
        rows = run(config, tmp_path)
    assert len(rows) == 4
    text = report.show(rows)
    lines = [squeeze(line) for line in text.splitlines() if line.startswith("| digits")]
    assert len(lines) == 2
    assert re.search(r"\| digits \| linear \| vtab \| \d\d\.\d\d ± \d\.\d\d % \|", lines[0])
    assert re.search(r"\| \d\d\.\d\d to \d\d\.\d\d % \|", lines[0])  # of what was tried
    assert "lr chosen from" in text
    for row, line in zip(rows[::2], lines):
        folder = tmp_path / "digits" / row["method"] / "search"
        tried = [files.read_json(p) for p in folder.glob("seed0-*/result.json")]
        rates = sorted(t["lr"] for t in tried)
        assert grids[row["method"]] <= set(rates)
        assert "| " + " ".join(f"{rate:g}" for rate in rates) + " |" in line
        assert {t["num_test"] for t in tried} == {None}
        best = max(tried, key=lambda t: (t["val_acc"], -t["lr"]))
        assert rates[0] < best["lr"] < rates[-1]  # the search goes on until it is none of the ends
        assert (row["lr"], row["val_acc"]) == (best["lr"], best["val_acc"])
    pictures.look(tmp_path / "comparison.png", colours=2)
    assert "Each run:" in (tmp_path / "results.md").read_text()


def test_seeds_are_folded_with_their_deviation():
    made = dict(method="rlrr", lr=0.1, epochs=3, wall_seconds=2.0)
    row = make("digits", **made)
    (line,) = tables.table([row, make("digits", 1, **made, test_acc_final=0.7)]).splitlines()[2:]
    assert "60.00 ± 14.14 %" in line and "4 s" in line
    pixels = dict(mean=(0.0,) * 3, std=(0.5,) * 3)
    for changes in ({"epochs": 4}, {"lr": 0.2}, {"method_kwargs": {"rank": 2}}, pixels):
        other = make("digits", 1, **{**made, **changes})
        assert len(tables.table([row, other]).splitlines()) == 4, changes


# ablations.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "number"),
    [
        ("table6", 6),
        ("table11", 3),
        pytest.param("table10", 5, marks=pytest.mark.slow),
        pytest.param("rank", 4, marks=pytest.mark.slow),
    ],
)
def test_ablations_resolve_on_any_task(table, number):
    for task in ("hearts", "cifar"):
        runs = config_lib.resolve(ablations.get_config(f"{table},{task}"))
        assert len(runs) == number == len({method_folder(r) for r in runs})
        assert {r.task for r in runs} == {task}


@pytest.mark.slow
def test_figure2_goes_by_the_depth():
    for arg, depth in (("figure2", 6), ("figure2,cifar", 12)):
        runs = config_lib.resolve(ablations.get_config(arg))
        assert len(runs) == 4 * depth
        assert max(r.method_kwargs["layers"] for r in runs) == depth


@pytest.mark.slow
def test_ablation_rows_and_folders(tmp_path):
    config = ablations.get_config("table11,digits")
    rows = run(changed(config, epochs=1), tmp_path)
    folders = {path.name for path in (tmp_path / "digits").iterdir()}
    assert folders == {"rlrr-with_weightFalse", "rlrr-with_weightTrue", "lora-rank16"}
    text = report.show(rows)
    assert "rlrr with_weight=False" in text and "lora rank=16" in text
    assert len({row["identity"] for row in rows}) == 3
    assert run(config, tmp_path) == rows


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="ablations.py:TABLE,TASK with one of the tables table6"):
        ablations.get_config("table7")


# transfer.py ----------------------------------------------------------------------------------


def test_transfer_is_big_visions_recipe():
    (r,) = config_lib.resolve(transfer.get_config("cifar100_full"))
    assert (r.method, r.lr, r.batch_size, r.optimizer, r.grad_clip) == (
        "full",
        0.01,
        512,
        "momentum",
        1,
    )
    assert (r.momentum_dtype, r.weight_decay, r.drop_path, r.grad_clip) == ("bfloat16", 0, 0, 1)
    assert (r.total_steps, r.warmup_steps, r.schedule) == (10_000, 500, "bigvision")
    assert (r.crop, r.crop_from, r.image_size, r.flip) == ("resmall", 448, 384, True)
    assert r.epochs == 105  # of 96 steps: 49,000 images
    (pets,) = config_lib.resolve(transfer.get_config("pets_full"))
    assert (pets.total_steps, pets.warmup_steps, pets.epochs) == (500, 100, 72)
    assert cost(pets).steps == 500
    (vtab_task,) = config_lib.resolve(transfer.get_config("dtd"))
    assert (vtab_task.total_steps, vtab_task.epochs) == (500, 250)
    (rlrr,) = config_lib.resolve(transfer.get_config("pets_full,method=rlrr"))
    assert rlrr.protocol == "vtab" and len(search.settings(rlrr)) == 5
    with pytest.raises(ValueError, match="different numbers of steps"):
        transfer.get_config("cifar10_full,pets_full")


def test_full_splits_are_big_visions():
    sizes = {name: dict(tasks.get(name).sizes) for name in tasks.FULL}
    assert sizes["cifar10_full"] == {"train": 49_000, "val": 1_000}
    assert sizes["pets_full"] == {"train": 3_312, "val": 368}
    assert sizes["flowers_full"] == {"train": 918, "val": 102}
    assert tasks.expand(["full"]) == list(tasks.FULL)
    assert tasks.get("cifar10_full").splits["val"] == "train[49000:]"


@pytest.mark.slow
def test_transfer_trains_on_crops_and_stops_at_its_last_step(tmp_path):
    config = changed(transfer.get_config("digits"), total_steps=7, warmup_steps=2, batch_size=200)
    (row,) = run(config, tmp_path / "whole")
    history = files.read_rows(tmp_path / "whole/digits/full/seed0/metrics.jsonl")
    assert (row["epochs"], row["total_steps"], len(history)) == (2, 7, 2)
    assert history[0]["lr"] > history[1]["lr"] > 0
    assert row["test_acc_final"] > 0.15
    assert (row["optimizer"], row["crop"], row["crop_from"]) == ("momentum", "resmall", 36)


@pytest.mark.slow
def test_crops_reach_the_step(tmp_path, monkeypatch):
    """Every epoch trains on its own crops, a resumed one on the same; the test images are central."""
    seen = []

    def look(job, train_steps, data, until, progress, saver, bar):
        seen.append(np.asarray(data["images"]))
        progress.clock.add(len(seen[-1]), 1.0)

    monkeypatch.setattr(train, "train_part", look)
    config = changed(transfer.get_config("digits"), total_steps=4)
    run(config, tmp_path)
    found, pixels = sources.find("digits"), decoding.Pixels(32, shorter=36)
    crops, labels = store.load_crops("digits", "train800val200", pixels, ("resmall", 0), found)
    assert len(seen) == 2 and len(labels) == 1000
    for epoch in (0, 1):
        np.testing.assert_array_equal(seen[epoch], crops.take(epoch, range(1000)))
    images, _ = store.load_split("digits", "test", pixels, found=found)
    ((original, _),) = sources.open_split("digits", "test", found).read(0, 1)
    np.testing.assert_array_equal(images[0], decoding.decode(original, pixels))
