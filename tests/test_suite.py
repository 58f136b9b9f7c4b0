"""Suites of tasks: killed and resumed, broken in part, chosen by val200, counted beforehand."""

import json
import pathlib
import re
import shutil
import signal
import time
from types import SimpleNamespace

import forked
import pictures
import pytest
import vtab_data
from ml_collections import ConfigDict

from rlrr_jax import checks, files, report, suite
from rlrr_jax import config as config_lib
from rlrr_jax.configs import vtab
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError
from rlrr_jax.runs import group, search
from rlrr_jax.runs.forecast import Forecast, cost, duration
from rlrr_jax.runs.workdir import Work
from rlrr_jax.weights import reader

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("kitti", "dtd", "eurosat")
SPLITS = {"train": 800, "validation": 200}
TIMES = {"wall_seconds", "images_per_second"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """One task in each format, of the real sizes with tiny images."""
    root = tmp_path_factory.mktemp("vtab")
    vtab_data.write(root, tasks.get("kitti"), {**SPLITS, "test": 711}, "array_record")
    vtab_data.write(root, tasks.get("dtd"), {**SPLITS, "test": 1880}, "tfrecord")
    vtab_data.write_folder(root, "eurosat", {"train800val200": 1000, "test": 5400})
    return root


def arguments(data_dir, workdir, cache):
    return [
        *(f"--config=configs/vtab.py:{','.join(NAMES)},method=linear", "--config.seeds=(0,1)"),
        *("--config.model.variant=bundled", "--config.model.depth=1", "--config.epochs=2"),
        "--config.checkpoint_seconds=0",
        *(f"--config.data.dir={data_dir}", f"--config.data.cache_dir={cache}", f"--workdir={workdir}"),
    ]


def start(*args):
    return forked.start(["rlrr_jax.main", *args])


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted suite, and its cache of images."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(*arguments(data_dir, folder / "run", folder / "cache"))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return folder, out


def report_of(workdir):
    """All of a report but times."""
    rows = json.loads((workdir / "results.json").read_text())
    return (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        (workdir / "summary.csv").read_bytes(),
        (workdir / "summary.json").read_bytes(),
        (workdir / "results.md").read_text().split("\n\n")[0],
    )


def test_a_suite_ends_with_its_table(whole):
    folder, out = whole
    assert "6 run(s): 384 steps on 12,000 training images, 6 evaluation(s) of 15,982 images" in out
    assert "decoded images to write: 0.03 GB" in out
    assert re.search(r"about \d+ (s|min) left, linear trains [\d,]+ images/s", out)
    table = out.split("images/s")[-1]
    assert re.search(r"protocol +pixels +dtd +eurosa +kitti +params", table)
    assert "linear" in table and "± over 2 seeds" in table and "RLRR (ViT-B/16)" in table
    assert "natur." not in table and "flat " not in table.split("\n\n")[1]  # no group is complete
    assert "source folder (vtab-1k/eurosat, jpeg75 pixels)" in out
    assert "source tfds (kitti:3.3.0, original pixels)" in out
    rows = json.loads((folder / "run/results.json").read_text())
    assert len(rows) == 6 and {row["protocol"] for row in rows} == {"fast"}
    assert {row["task"]: row["num_test"] for row in rows} == {
        "kitti": 711,
        "dtd": 1880,
        "eurosat": 5400,
    }
    pictures.look(folder / "run/summary.png", colours=4)


@pytest.mark.slow
def test_a_killed_suite_resumes_without_repeating_and_reports_the_same(whole, data_dir, tmp_path):
    folder, _ = whole
    command = arguments(data_dir, tmp_path / "run", folder / "cache")
    process = start(*command)
    half = tmp_path / "run/dtd/linear/seed0/metrics.jsonl"
    for _ in range(60 * 50):
        if half.exists():
            break
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/kitti/linear/seed*/result.json")}
    assert len(done) == 2 and not (tmp_path / "run/eurosat/linear/seed0/result.json").exists()
    process = start(*command)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("finished before") >= 2 and "decoded images to write" not in out
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert report_of(tmp_path / "run") == report_of(folder / "run")

    for path in (tmp_path / "run").glob("*.*"):
        path.unlink()
    again = forked.run(["rlrr_jax.report", tmp_path / "run"])
    assert again.returncode == 0 and "RLRR (ViT-B/16)" in again.stdout, again.stderr
    assert report_of(tmp_path / "run") == report_of(folder / "run")

    for name in NAMES[:2]:  # a workdir in two parts
        shutil.copytree(tmp_path / "run" / name, tmp_path / "other" / name)
        shutil.rmtree(tmp_path / "run" / name)
    both = [tmp_path / "run", tmp_path / "other", "--out", tmp_path / "both"]
    merged = forked.run(["rlrr_jax.report", *both])
    assert merged.returncode == 0, merged.stderr
    assert report_of(tmp_path / "both")[1:] == report_of(folder / "run")[1:]


@pytest.mark.slow
def test_a_broken_task_is_reported_and_the_others_finish(whole, data_dir, tmp_path):
    folder, _ = whole
    broken = tmp_path / "data"
    shutil.copytree(data_dir, broken)
    (broken / "vtab-1k/eurosat/images/train800val200/000123.jpg").write_bytes(b"")
    next(broken.glob("dtd/*/*test.tfrecord-00001*")).unlink()
    command = arguments(broken, tmp_path / "run", tmp_path / "cache")
    process = start(*command)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in err and err.count("error: ") == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "error: 4 of 6 runs did not finish (dtd, eurosat): fix what is reported above"
    )
    above = out.split("not finished:\n")[1]
    assert "dtd linear seed 0, dtd linear seed 1: " in above and "kitti" not in above
    assert "train800val200.txt:124: images/train800val200/000123.jpg is damaged" in above
    assert out.count(": failed: ") == 2 and "dtd linear seed 0: failed: " in out
    rows = json.loads((tmp_path / "run/results.json").read_text())
    whole_rows = json.loads((folder / "run/results.json").read_text())
    accuracy = lambda rows: {r["seed"]: r["test_acc_final"] for r in rows if r["task"] == "kitti"}
    assert accuracy(rows) == accuracy(whole_rows) and len(rows) == 2
    assert "not finished: eurosat linear seed1: " in (tmp_path / "run/results.md").read_text()

    shutil.rmtree(broken)
    shutil.copytree(data_dir, broken)  # mended
    process = start(*command)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "not finished" not in (tmp_path / "run/results.md").read_text()
    assert report_of(tmp_path / "run")[3] == report_of(folder / "run")[3]


def test_nothing_to_run_is_one_sentence(tmp_path):
    process = start(*arguments(tmp_path, tmp_path / "run", tmp_path))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "error: no task can run; kitti linear seed 0, kitti linear seed 1: there is no"
    )


# In one process -------------------------------------------------------------------------------


def config(arg, **changes):
    config = vtab.get_config(arg)
    config.model.depth = 2
    with config.unlocked():
        config.update({"epochs": 1, "num_devices": 1, **changes})
    return config


def test_vtab_chooses_on_val200_and_tests_once(tmp_path):
    grid = ConfigDict({"lr": (1e-4, 0.03), "weight_decay": (0.0, 0.1), "drop_path": (0.0,)})
    settings = config("digits,method=linear", protocol="vtab", grid=grid, seeds=(1, 2))
    rows, problems = suite.run(settings, tmp_path)
    search = tmp_path / "digits/linear/search"
    tuned = [files.read_json(p) for p in search.glob("*/result.json")]
    assert len(tuned) == 4 and not problems
    assert {t["seed"] for t in tuned} == {0} and {t["protocol"] for t in tuned} == {"tune"}
    assert all(t["test_acc_final"] is None for t in tuned)
    best = max(t["val_acc"] for t in tuned)
    ties = sorted((t["lr"], t["weight_decay"]) for t in tuned if t["val_acc"] == best)
    for seed, row in zip((1, 2), rows):
        assert (row["lr"], row["weight_decay"]) == ties[0] and row["lr"] == 0.03
        assert (row["seed"], row["protocol"], row["val_acc"]) == (seed, "vtab", best)
        history = files.read_rows(tmp_path / f"digits/linear/seed{seed}/metrics.jsonl")
        assert ["test_acc" in h for h in history] == [True] and row["num_test"] == 797
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert suite.run(settings, tmp_path)[0] == rows
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_vtab_with_a_given_value_resumes(tmp_path):
    grid = ConfigDict({"lr": (1.0,), "weight_decay": (0.0, 0.1), "drop_path": (0.0,)})
    settings = config("digits,method=linear", protocol="vtab", grid=grid, lr=0.03)
    assert suite.run(settings, tmp_path)[0] == suite.run(settings, tmp_path)[0]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    settings.grid.weight_decay = (0.5,)
    with pytest.raises(UserError, match="holds a run with grid.weight_decay="):
        suite.run(settings, tmp_path)  # and before the new search
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")} == before


@pytest.mark.slow
def test_a_search_with_every_value_given_is_started_again(tmp_path, capsys):
    """ "Not chosen yet" was guessed from None, of which there is none here."""
    changes = dict(lr=0.03, weight_decay=0.0, drop_path=0.0, epochs=4, eval_every=1)
    settings = config("digits,method=linear", protocol="vtab", **changes)
    rows, problems = suite.run(settings, tmp_path)
    assert not problems and suite.run(settings, tmp_path)[0] == rows
    (tmp_path / "digits/linear/seed0/result.json").unlink()
    assert [r["test_acc_final"] for r in suite.run(settings, tmp_path)[0]] == [
        rows[0]["test_acc_final"]
    ]
    (trial,) = files.below(tmp_path / "digits/linear/search", "*", "metrics.jsonl")
    assert ["val_acc" in row for row in files.read_rows(trial)] == [False] * 3 + [True]  # which is read


def test_a_workdir_is_no_pattern(tmp_path, capsys):
    """exp[1] matches exp1, whose results are not its own."""
    for name, lr in (("exp1", 1e-4), ("exp[1]", 0.03), ("exp?", 1e-3)):
        rows, _ = suite.run(config("digits,method=linear", lr=lr), tmp_path / name)
        assert [row["lr"] for row in rows] == [lr]
        assert [row["lr"] for row in json.loads((tmp_path / name / "results.json").read_text())] == [lr]


def test_what_did_not_fit_goes_from_the_devices(tmp_path, monkeypatch):
    """The failed job is gone while its parts train in smaller groups."""
    import gc
    import weakref

    from rlrr_jax import job as job_lib
    from rlrr_jax import train as train_lib
    from rlrr_jax.runtime.memory import TooLarge

    class Probe:
        """Stands for what a job has on the devices."""

    seen, alive = [], []

    def build(runs, *rest):
        alive.append([ref() is not None for ref in seen])
        probe = Probe()
        seen.append(weakref.ref(probe))
        return SimpleNamespace(runs=runs, probe=probe)

    def train(built, outputs, stop, on_epoch):
        if len(built.runs) > 1:
            raise TooLarge(1)

    monkeypatch.setattr(job_lib, "build", build)
    monkeypatch.setattr(train_lib, "train", train)
    monkeypatch.setattr(group, "_outputs", lambda *_: None)
    monkeypatch.setattr(group, "_data_of", lambda *_: None)
    monkeypatch.setattr(group, "_group_folder", lambda works: works[0].folder)
    monkeypatch.setattr(group, "_remove", lambda folder: None)
    (run,) = config_lib.resolve(config("digits,method=linear"))
    works = [Work(run, tmp_path / f"seed{i}", None, f"digits linear seed {i}") for i in range(3)]
    forecast = SimpleNamespace(title=lambda *works: "x", on_epoch=print)
    load = group.Loaders({}, lambda run, model: None, None, {})
    gc.disable()
    group.train_group(works, load, forecast, suite.Stop())
    gc.enable()
    assert alive == [[], [False], [False, False], [False, False, False]]


def test_finished_runs_need_no_data_and_are_not_forecast(data_dir, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(data_dir / "kitti", copy / "kitti")
    settings = config("kitti,method=linear", seeds=(0, 1), model={"variant": "bundled"})
    settings.data.dir, settings.data.cache_dir = str(copy), str(tmp_path / "cache")
    rows, _ = suite.run(settings, tmp_path / "run")
    shutil.rmtree(copy)
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert suite.run(settings, tmp_path / "run") == (rows, {})
    out = capsys.readouterr().out
    assert "0 run(s): 0 steps on 0 training images" in out and "; 2 finished before" in out
    assert "decoded images to write" not in out
    with settings.unlocked():
        settings.data.variant = "jpeg75"
    with pytest.raises(UserError, match="holds a run with data.variant=original .now jpeg75"):
        suite.run(settings, tmp_path / "run")


@pytest.mark.slow
def test_a_suite_that_tunes_shows_its_runs(data_dir, tmp_path):
    settings = config("kitti,dtd,method=linear", protocol="tune", seeds=(0,), epochs=1)
    settings.model.variant, settings.data.dir = "bundled", str(data_dir)
    settings.data.cache_dir = str(tmp_path / "cache")
    rows, _ = suite.run(settings, tmp_path / "run")
    assert report.show(rows).count(" % (val)") == 2


def test_ties_go_to_the_smaller_learning_rate(tmp_path):
    row = lambda lr, wd, dp: {"lr": lr, "weight_decay": wd, "drop_path": dp, "train_loss": 1.0}
    run = config_lib.resolve(config("digits,method=linear", protocol="vtab"))[0]
    work = Work(run, tmp_path / "seed0", None, "x")

    def chosen(val_acc):
        def train_all(works):
            values = [row(*(w.run[k] for k in checks.GRID)) for w in works]
            return [{**v, "val_acc": val_acc(v)} for v in values]

        return search.choose([work], train_all)[0].run

    tied = chosen(lambda row: 0.5)
    assert (tied.lr, tied.weight_decay, tied.drop_path) == (1e-3, 5e-5, 0.0)
    assert len(search.trials(work)) == 18
    assert chosen(lambda row: row["lr"]).lr == 1e-2


def test_a_search_never_chooses_what_diverged(tmp_path):
    grid = {"lr": (1e-3, 1e-2), "weight_decay": (0.0,), "drop_path": (0.0,)}
    run = config_lib.resolve(config("digits,method=linear", protocol="vtab", grid=grid))[0]
    work = Work(run, tmp_path / "seed0", None, "x")

    def choose(losses):
        keys = ("lr", "weight_decay", "drop_path")
        rows = lambda works: [
            {**{k: w.run[k] for k in keys}, "val_acc": 0.7 - 10 * w.run.lr, "train_loss": loss}
            for w, loss in zip(works, losses)
        ]
        return search.choose([work], rows)[0].run.lr

    assert choose((1.0, 1.0)) == 1e-3 and choose((None, 1.0)) == 1e-2
    with pytest.raises(UserError, match="is finite at no setting of config.grid: put smaller"):
        choose((None, None))


def test_a_given_value_is_not_searched():
    run = config_lib.resolve(config("digits,method=rlrr", protocol="vtab", lr=0.5))[0]
    trials = search.settings(run)
    assert len(trials) == 6 and {t.lr for t in trials} == {0.5}


def test_what_a_suite_costs(capsys):
    runs = config_lib.resolve(config("task=all", epochs=None))
    assert len(runs) == 19 * 3 and {r.protocol for r in runs} == {"fast"}
    nowhere = pathlib.Path("/nowhere")
    works = [Work(r, nowhere, None, f"{r.task} {r.seed}") for r in runs]
    Forecast(works)
    tests = 3 * sum(t.num_test for t in tasks.VTAB.values())
    assert f"57 run(s): {57 * 110 * 32:,} steps on {57 * 110_000:,} training images, 57" in (
        out := capsys.readouterr().out
    )
    assert f"of {tests:,} images in all" in out
    (official,) = config_lib.resolve(config("kitti", epochs=None))
    assert cost(official) == (110 * 32, 110_000, 109, 109 * 711)
    assert cost(official, 1) == (32, 1000, 0, 0)
    (one,) = config_lib.resolve(config("kitti", epochs=1))
    assert cost(one).evaluations == 1
    (tenth,) = config_lib.resolve(config("kitti", epochs=25, eval_every=10))
    assert cost(tenth).evaluations == 3  # epochs 10, 20, and the last
    capsys.readouterr()
    Forecast([Work(official, nowhere, None, "a")])
    assert "of the work" not in capsys.readouterr().out  # 711 images
    (flowers,) = config_lib.resolve(config("flowers", epochs=None))
    Forecast([Work(flowers, nowhere, None, "b")])
    assert "testing after every epoch is about 67% of the work: --config.eval_every=10" in (
        capsys.readouterr().out
    )
    (vtab_run,) = config_lib.resolve(config("kitti", epochs=None, protocol="vtab"))
    forecast = Forecast([Work(vtab_run, pathlib.Path("w"), None, "x")])
    assert len(forecast.left) == 19
    assert sum(c.images for _, c in forecast.left.values()) == 18 * 88_000 + 110_000


def test_the_time_left_goes_by_the_speed_of_each_method(capsys):
    runs = config_lib.resolve(config("digits,method=linear+rlrr", epochs=10))
    works = [Work(r, pathlib.Path("/nowhere"), None, r.method) for r in runs]
    forecast = Forecast(works)
    clock = SimpleNamespace(images=1000, seconds=1.0)
    forecast.on_epoch([works[0]], clock, 1)  # 9,000 + 10,000 images and two tests are left
    assert f"about {19 + 2 * 797 / 3000:.0f} s left, linear trains 1,000" in capsys.readouterr().out
    forecast.on_epoch([works[0]], clock, 2)
    assert capsys.readouterr().out == ""
    forecast.finished(works[0])
    clock.seconds = 10.0
    forecast.on_epoch([works[1]], clock, 4)
    assert f"about {60 + 797 / 300:.0f} s left, rlrr trains 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (98, "98 s"), (600, "10 min"), (11520, "3 h 12 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_results_of_one_run_that_differ_are_not_merged(tmp_path):
    settings = config("digits,method=linear")
    for name in "ab":
        suite.run(settings, tmp_path / name)
    path = tmp_path / "b/digits/linear/seed0/result.json"
    assert len(report.collect(tmp_path / "a", tmp_path / "b", out=tmp_path / "c")) == 1
    files.write_json(path, {**files.read_json(path), "test_acc_final": 0.1})
    with pytest.raises(UserError, match="are results of the same run that differ"):
        report.collect(tmp_path / "a", tmp_path / "b", out=tmp_path / "c")


def test_weights_are_read_once_a_start(tmp_path, monkeypatch):
    reads, load = [], reader.load
    monkeypatch.setattr(reader, "load", lambda *a, **k: reads.append(a) or load(*a, **k))
    rows, _ = suite.run(config("digits,hearts,method=linear"), tmp_path)
    assert len(rows) == 2 and len(reads) == 1


@pytest.mark.slow
def test_settings_that_train_together_choose_for_themselves(tmp_path):
    """Fixed learning rates of `config.runs` stay those of their runs."""
    config = vtab.get_config("hearts,method=linear")
    config.update_from_flattened_dict({"protocol": "vtab", "epochs": 1, "weight_decay": 0.0})
    config.runs, config.grid.drop_path = ({"lr": (0.01, 0.1)},), (0.0,)
    rows, problems = suite.run(config, tmp_path)
    assert not problems and sorted(row["lr"] for row in rows) == [0.01, 0.1]
    assert len(list((tmp_path / "hearts/linear/search").glob("*/result.json"))) == 2
