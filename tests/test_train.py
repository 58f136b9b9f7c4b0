"""Whole runs: killed and started again, refused, finished; and what the results say."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import jax
import numpy as np
import pictures
import pytest
import safetensors.numpy
from flags import xla_flags
from flax.traverse_util import unflatten_dict
from marks import quick
from squeeze import squeeze

from rlrr_jax import config as config_lib
from rlrr_jax import evaluate, files, job, methods, models, run_model, suite
from rlrr_jax import run as run_lib
from rlrr_jax.configs import vtab
from rlrr_jax.data import store
from rlrr_jax.data.resize import normalize
from rlrr_jax.errors import UserError
from rlrr_jax.recipe import Recipe
from rlrr_jax.results import rows
from rlrr_jax.weights import names, reader

ROOT = pathlib.Path(__file__).parents[1]
KEYS = {
    *("class_weights", "keep", "patience", "temperature", "score", "metrics", "kept_epoch"),
    *("epochs_trained", "largest_class", "class_ratio"),
    *("identity", "task", "method", "method_kwargs", "init", "seed", "lr", "weight_decay", "drop_path"),
    *(
        "drop_path_mode",
        "epochs",
        "eval_every",
        "frozen_dtype",
        "gradients",
        "batch_size",
        "protocol",
        "source",
        "variant",
        "backbone",
    ),
    *("backbone_sha256", "image_size", "image_width", "gelu", "dtype", "precision", "trainable_params"),
    *(
        "optimizer",
        "loss",
        "momentum_dtype",
        "grad_clip",
        "total_steps",
        "warmup_steps",
        "crop",
        "crop_from",
        "loss_kwargs",
        "mixup",
        "cutmix",
        "label_smoothing",
        "average",
        "restarts",
        "warmup_epochs",
        "val_tried",
        "tried",
    ),
    *("options", "grid", "model", "attention", "resize", "config", "setting", "line", "cores"),
    *("head_params", "train_loss", "val_acc", "test_acc_final", "test_acc_best", "best_epoch"),
    *(
        "schedule",
        "flip",
        "dataset",
        "trial",
        "trained_together",
        "num_test",
        "num_val",
        "wall_seconds",
        "images_per_second",
        "device",
        "versions",
    ),
}


def small_config(arg="digits,method=rlrr", depth=2, **changes):
    config = vtab.get_config(arg)
    config.model.depth = depth  # fewer blocks compile faster
    with config.unlocked():
        config.update({"epochs": 2, "num_devices": 1, **changes})
    return config


def run(config, workdir):
    """The rows of a configuration of which nothing fails."""
    rows, problems = suite.run(config, workdir)
    assert not problems
    return rows


def words(workdir):
    command = ["rlrr_jax.main", "--config=configs/vtab.py:digits,method=rlrr"]
    command += ["--config.epochs=4", "--config.protocol=official", "--config.checkpoint_seconds=0"]
    command += ["--config.drop_path=0.1", "--config.flip", "--config.model.depth=2"]
    return [*command, f"--workdir={workdir}"]


def wait_for(what, process, seconds=120):
    for _ in range(seconds * 50):
        if what():
            return
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def accuracies_and_losses(workdir):
    (row,) = json.loads((workdir / "results.json").read_text())
    times = {"wall_seconds", "images_per_second"}
    rows = files.read_rows(workdir / "digits/rlrr/seed0/metrics.jsonl")
    return (
        {k: v for k, v in row.items() if k not in times},
        [{k: v for k, v in r.items() if k != "seconds"} for r in rows],
        (workdir / "digits/rlrr/seed0/adapter.safetensors").read_bytes(),
    )


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """SIGKILL in the middle of the first epoch, then after two; every bit is as without."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    how = dict(cwd=ROOT, env={**os.environ, "XLA_FLAGS": xla_flags()}, stdout=subprocess.DEVNULL)
    reference = subprocess.Popen([sys.executable, "-m", *words(whole)], **how)  # no fork
    folder = broken / "digits/rlrr/seed0"
    checkpoint = lambda: (folder / "checkpoints/1/_CHECKPOINT_METADATA").exists()
    rows = lambda: len(files.read_rows(folder / "metrics.jsonl")) >= 2
    for what in (checkpoint, rows):
        process = forked.start(words(broken))
        wait_for(what, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "result.json").exists()
    last = forked.start(words(broken))
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert "goes on at epoch" in err + out
    assert reference.wait(300) == 0
    assert accuracies_and_losses(broken) == accuracies_and_losses(whole)
    pictures.look(whole / "digits/rlrr/seed0/curves.png", (1080, 420), colours=1)

    again = forked.start(words(broken))  # and a finished run only says so
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "finished before" in out and "| digits | rlrr" in squeeze(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    rows = run(small_config(protocol="official", depth=None), workdir)
    return workdir, rows


def test_row_of_results(finished):
    workdir, (row,) = finished
    assert row.keys() == KEYS
    assert json.loads((workdir / "results.json").read_text()) == [row]
    assert row["trainable_params"] == 18_240 and row["head_params"] == 970
    assert row["num_test"] == 797 and row["source"] == "bundled" and row["init"] == "paper"
    assert 0.9 < row["test_acc_final"] <= row["test_acc_best"] <= 1 and row["val_acc"] is None
    assert row["backbone_sha256"] == names.fetch("bundled")[1]
    text = (workdir / "results.md").read_text()
    assert f"{100 * row['test_acc_final']:.2f} %" in text and "18,240" in text


def test_official_protocol_skips_the_test_after_the_first_epoch(finished):
    rows = files.read_rows(finished[0] / "digits/rlrr/seed0/metrics.jsonl")
    assert ["test_acc" in row for row in rows] == [False, True]


def test_saved_adapter_merges_into_the_reported_accuracy(finished):
    """The file alone, with the public functions, gives the number in the table."""
    workdir, (row,) = finished
    path = workdir / "digits/rlrr/seed0/adapter.safetensors"
    tree = unflatten_dict(safetensors.numpy.load_file(path), sep="/")
    trained = {"head": tree.pop("head"), "adapter": tree}
    model = run_model.build_model(config_lib.resolve(small_config(depth=None))[0])
    frozen = reader.load("bundled", model=model, image_size=32)
    params = methods.merge(methods.get("rlrr"), frozen, trained)
    images, labels = store.load_split("digits", "test", 32)
    logits = jax.jit(model.apply)({"params": params}, normalize(images, 32))
    assert float((logits.argmax(-1) == labels).mean()) == pytest.approx(
        row["test_acc_final"], abs=0.002
    )


def test_checkpoint_holds_no_frozen_weight(finished):
    """18,240 + 970 values, three times (the tree and Adam's two moments), in up to two checkpoints."""
    folder = finished[0] / "digits/rlrr/seed0/checkpoints"
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    one = 4 * 3 * (18_240 + 970)
    assert one < size < 4 * one < 4 * 691_488


def test_other_configuration_in_the_same_workdir_is_refused(finished):
    with pytest.raises(UserError, match=r"holds a run with epochs=2 \(now 3\): choose another"):
        run(small_config(protocol="official", depth=None, epochs=3), finished[0])


def test_a_model_is_traced_once_for_all_checks_of_its_shapes(monkeypatch):
    """When its weights say of it what was known before, nothing is checked again."""
    checked, check = [], methods.check
    monkeypatch.setattr(methods, "check", lambda *a: checked.append(a[0]) or check(*a))
    (config,) = config_lib.resolve(small_config(depth=1))
    assert checked == ["rlrr"]
    traced = models.cached_shapes.cache_info().misses
    run_model.follow(config, names.fetch("bundled")[0])
    run_model.check_contracts(config)
    assert config.model.num_heads == 3  # which the file says
    assert (checked, models.cached_shapes.cache_info().misses) == (["rlrr"], traced)
    config.model.pool = "avg"
    run_model.check_contracts(config)
    assert checked == ["rlrr", "rlrr"]


@pytest.mark.slow
def test_tune_protocol_never_looks_at_the_test_set(tmp_path, monkeypatch):
    seen = []
    load_split = store.load_split
    monkeypatch.setattr(
        store, "load_split", lambda n, split, *a: seen.append(split) or load_split(n, split, *a)
    )
    (row,) = run(small_config(protocol="tune"), tmp_path)
    assert seen == ["train800", "val200"]
    assert 0.8 < row["val_acc"] <= 1
    assert row["test_acc_final"] is None and row["num_test"] is None


def test_several_seeds_are_several_rows(tmp_path):
    rows = run(small_config("digits,method=linear", seeds=(0, 3), epochs=1), tmp_path)
    assert [row["seed"] for row in rows] == [0, 3]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


def test_a_source_with_other_numbers_than_its_task_is_named():
    (config,) = config_lib.resolve(small_config())
    few = lambda split, crop=None: (np.zeros((3, 32, 32, 3), np.uint8), np.zeros(3, np.int32))
    with pytest.raises(
        UserError, match=r"has 3 images in \w+, and its task says \d+: correct its sizes"
    ):
        job.build([run_lib.of(config)], None, few)


def test_same_seed_gives_the_same_bits(tmp_path):
    a, b = (run(small_config("digits,method=linear", epochs=1), tmp_path / n)[0] for n in "ab")
    assert a["train_loss"] == b["train_loss"] and a["test_acc_final"] == b["test_acc_final"]


@pytest.mark.slow
@pytest.mark.parametrize("task", quick(["digits", "hearts"], "digits"))
def test_linear_reaches_an_l2_logistic_probe(task, tmp_path):
    """scikit-learn on the same features, its C chosen on val200."""
    from sklearn.linear_model import LogisticRegression

    config = small_config(f"{task},method=linear", epochs=None, depth=None)
    model = run_model.build_model(config_lib.resolve(config)[0])
    frozen = reader.load("bundled", model=model, image_size=32)

    @jax.jit
    def features(images):
        out = model.apply({"params": frozen}, normalize(images, 32), mutable=["intermediates"])[1]
        return out["intermediates"]["encoded"][0][:, 0]

    parts = {}
    for split in ("train800", "val200", "train800val200", "test"):
        images, labels = store.load_split(task, split, 32)
        parts[split] = np.asarray(features(images)), labels
    fit = lambda c, split: LogisticRegression(C=c, max_iter=3000).fit(*parts[split])
    c = max((0.1, 1, 10), key=lambda c: fit(c, "train800").score(*parts["val200"]))
    probe = fit(c, "train800val200").score(*parts["test"])
    (row,) = run(config, tmp_path)
    assert row["test_acc_final"] > probe - 0.01


@pytest.mark.slow
def test_four_devices_give_the_losses_of_one(tmp_path):
    rows = [
        run(
            small_config("digits,method=rlrr", epochs=1, drop_path=0.2, num_devices=n),
            tmp_path / str(n),
        )[0]
        for n in (1, 4)
    ]
    assert rows[1]["device"].startswith("4 x ")
    assert rows[0]["identity"] == rows[1]["identity"]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], abs=0.01)


@pytest.mark.slow
def test_frozen_weights_are_bit_identical_after_a_run(tmp_path, monkeypatch):
    jobs, build = [], job.build
    monkeypatch.setattr(job, "build", lambda *a: jobs.append(build(*a)) or jobs[-1])
    run(small_config(epochs=1, depth=None), tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(jobs[0].frozen),
        reader.load("bundled", model=jobs[0].recipe.model, image_size=32),
    )


def test_mean_of_an_epoch_counts_images_not_steps():
    recipe = Recipe(None, None, batch_size=6, num_images=22, image_size=32)
    metrics = {"loss": np.array([[1.0, 2.0, 3.0, 7.0]]), "acc": np.array([[6.0, 3.0, 0.0, 4.0]])}
    means = rows.means(recipe, metrics, 0)
    assert means["train_loss"] == pytest.approx((6 + 12 + 18 + 28) / 22)
    assert means["train_acc"] == pytest.approx(13 / 22)
    assert rows.means(recipe, metrics, 0, 2)["train_loss"] == pytest.approx(1.5)


def test_two_subtrees_of_one_file_are_two_runs(tmp_path):
    with np.load(names.BUNDLED) as file:
        flat = {k.removeprefix("params/"): file[k] for k in file.files}
    np.savez(tmp_path / "two.npz", **{f"{p}/{k}": v for p in "ab" for k, v in flat.items()})
    configs = [small_config("digits,method=linear", epochs=1) for _ in "ab"]
    for config, part in zip(configs, "ab"):
        config.pretrained.name = f"{tmp_path}/two.npz:{part}"
    run(configs[0], tmp_path / "w")
    with pytest.raises(UserError, match="pretrained.name=two.npz:a .now two.npz:b"):
        run(configs[1], tmp_path / "w")


def spoil(path, data=b"{"):
    path.write_bytes(data)


def test_damaged_files_of_a_workdir_are_named(tmp_path):
    config = small_config("digits,method=linear", epochs=1)
    folder = tmp_path / "digits/linear/seed0"
    for name in ("config.json", "result.json"):
        run(config, tmp_path)
        spoil(folder / name)
        with pytest.raises(UserError, match=f"{name} is damaged .*delete .*seed0 to start"):
            run(config, tmp_path)
        for path in folder.glob("*.json"):
            path.unlink()


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    config = small_config(epochs=2, checkpoint_seconds=0.0)
    (whole,) = run(config, tmp_path)
    folder = tmp_path / "digits/rlrr/seed0"
    (folder / "result.json").unlink()
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    for path in newest.rglob("*"):
        if path.is_file():
            spoil(path, b"")
    (again,) = run(config, tmp_path)
    assert again["test_acc_final"] == whole["test_acc_final"]
    assert again["train_loss"] == whole["train_loss"]
    assert again["wall_seconds"] > 0 and again["images_per_second"] > 0


def test_a_folder_in_use_is_refused(tmp_path):
    folder = tmp_path / "digits/linear/seed0"
    folder.mkdir(parents=True)
    with files.lock(folder), pytest.raises(UserError, match="another process is training in"):
        run(small_config("digits,method=linear", epochs=1), tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_a_check_is_a_collective_once_in_some_seconds(several, monkeypatch):
    """100 batches, the first of which compiles: one process looks each time, several do not."""
    now, looks = [0.0], []
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(evaluate.distributed, "several", lambda: several)
    monkeypatch.setattr(evaluate.distributed, "broadcast", lambda value: value)
    seen = []
    done = evaluate.looking(lambda: looks.append(now[0]), SimpleNamespace(update=seen.append))
    for i in range(100):
        now[0] += 10 if i == 0 else 0.125
        done(256)
    assert sum(seen) == 25_600 and len(looks) == (5 if several else 100)
    assert all(b - a <= evaluate.CHECK_SECONDS + 0.2 for a, b in itertools.pairwise(looks[1:]))


def test_evaluation_shows_a_bar(tmp_path, monkeypatch):
    bars = []

    class Bar(evaluate.tqdm):
        def __init__(self, **options):
            bars.append((options, []))
            super().__init__(**options)

        def update(self, n=1):
            bars[-1][1].append(n)
            return super().update(n)

    monkeypatch.setattr(evaluate, "tqdm", Bar)
    run(small_config("digits,method=linear", epochs=1), tmp_path)
    (options, seen) = bars[-1]
    assert options["desc"] == "evaluating epoch 1" and options["unit"] == "img"
    assert options["total"] == 797 == sum(seen) and len(seen) == 4
