"""The search of the protocol "vtab": its ends, its folds, its ties."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlrr_jax import config as config_lib
from rlrr_jax import files, run_images, suite
from rlrr_jax.configs import vtab
from rlrr_jax.data import crops, folds, tasks
from rlrr_jax.errors import UserError
from rlrr_jax.results import tables
from rlrr_jax.runs import forecast, identity, loaders, search
from rlrr_jax.runs.workdir import Work


def resolved(arg="digits,method=linear", **grid):
    config = vtab.get_config(arg)
    config.protocol, config.epochs, config.num_devices, config.model.depth = "vtab", 1, 1, 2
    config.grid.weight_decay = config.grid.drop_path = ()
    config.grid.update(grid)
    return config


def chosen(tmp_path, judge, **grid):
    """What a search chooses, what it trained, and in which groups, where `judge(run)` is (acc, loss)."""
    (run,) = config_lib.resolve(resolved(**grid))
    groups = []

    def train_all(works):
        groups.append([w.run for w in works])
        found = [judge(w.run) for w in works]
        return [{"val_acc": a, "train_loss": a and 1.0, "metrics": {"loss": b}} for a, b in found]

    (work,) = search.choose([Work(run, tmp_path / "seed0", None, "x")], train_all)
    return work.run, groups


def near(best):
    """The nearer, in powers of ten, the better."""
    return lambda run: (1 - abs(np.log10(run.lr / best)) / 9, 1.0)


def lrs(groups):
    return [[run.lr for run in group] for group in groups]


@pytest.mark.parametrize(
    ("best", "beyond", "lr"),
    [
        (0.01, [], 0.01),
        (0.3, [[0.09], [0.27], [0.81]], 0.27),
        (3e-4, [[0.00111], [0.00037], [0.000123]], 0.00037),
        (1e9, [[0.09], [0.27], [0.81], [2.43], [7.29], [21.9]], 21.9),
    ],
)
def test_a_search_goes_on_beyond_the_ends_of_its_grid(best, beyond, lr, tmp_path, capsys):
    run, groups = chosen(tmp_path, near(best), lr=(0.00333, 0.01, 0.03), extend=True)
    assert lrs(groups) == [[0.00333, 0.01, 0.03], *beyond] and run.lr == lr
    tried = sorted({lr for group in lrs(groups) for lr in group})
    assert list(run.tried.lr) == tried and len(run.val_tried) == len(tried)
    said = capsys.readouterr().out
    assert said.count("lies at an end of what was tried") == len(beyond)
    if beyond:
        assert f"so lr={beyond[0][0]:g} is tried, too" in said
    row = {"lr": run.lr, "tried": run.tried.to_dict(), "grid": run.grid.to_dict()}
    assert tables.searched(row) == " ".join(f"{x:g}" for x in tried) + " (end)" * (best == 1e9)


def test_a_search_stays_in_a_grid_that_print_has_fixed(tmp_path):
    run, groups = chosen(tmp_path, near(1.0), lr=(0.003, 0.01, 0.03))
    assert lrs(groups) == [[0.003, 0.01, 0.03]] and run.lr == 0.03
    assert tables.searched({"lr": 0.03, "grid": run.grid.to_dict()}) == "0.003 0.01 0.03 (end)"


def test_what_diverges_is_an_end_that_was_tried(tmp_path):
    judge = lambda run: (None, None) if run.lr > 0.05 else near(1.0)(run)
    run, groups = chosen(tmp_path, judge, lr=(0.01, 0.03), extend=True)
    assert lrs(groups) == [[0.01, 0.03], [0.09]] and run.lr == 0.03 and run.tried.lr[-1] == 0.09
    assert tables.searched({"lr": 0.03, "tried": run.tried.to_dict()}) == "0.01 0.03 0.09"


def test_each_key_goes_on_by_its_own_ratio_and_no_rate_leaves_its_bounds(tmp_path):
    more = lambda run: (0.5 + run.drop_path / 10 + run.weight_decay, 1.0)
    grid = dict(lr=(0.01,), weight_decay=(0.0, 0.1), drop_path=(0.1, 0.3), extend=True)
    run, groups = chosen(tmp_path, more, **grid)
    # The next weight decay by the ratio of 0.1 to 0 is none; drop paths of 0.9 are tried, 2.7 is no rate.
    assert [[(r.weight_decay, r.drop_path) for r in group] for group in groups[1:]] == [[(0.1, 0.9)]]
    assert (run.weight_decay, run.drop_path) == (0.1, 0.9)


def test_ties_go_to_the_smaller_loss_and_then_to_the_smaller_rate(tmp_path):
    losses = {0.01: 0.5, 0.03: 0.4, 0.1: 0.4}
    run, _ = chosen(tmp_path, lambda run: (0.9, losses[run.lr]), lr=(0.01, 0.03, 0.1))
    assert run.lr == 0.03


def test_a_choice_over_folds_goes_by_their_mean(tmp_path):
    def judge(run):
        first = run.fold[1] == 0  # where the larger rate is much better; not so in the other two
        return (0.9 if first else 0.6, 1.0) if run.lr == 0.03 else (0.71, 1.0)

    run, groups = chosen(tmp_path, judge, lr=(0.01, 0.03), folds=3)
    assert [[(tuple(r.fold), r.lr) for r in group] for group in groups] == [
        [(("train800val200", i, 3), lr) for lr in (0.01, 0.03)] for i in range(3)
    ]
    assert run.lr == 0.01 and run.val_acc == pytest.approx(0.71)
    assert run.val_tried == pytest.approx((0.7, 0.71))
    assert "fold" not in run and groups[0][0].trial == "lr0.01-weight_decay0.0001-drop_path0-fold1of3"


def test_folds_share_out_each_class_and_each_image_once():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 21)
    held = []
    for i in range(5):
        train, val = (folds.parse(name) for name in folds.names("train+val", i, 5))
        assert str(val) == f"train+val, fold {i + 1}/5"
        mine, rest = folds.pick(val, labels), folds.pick(train, labels)
        assert (len(mine), len(rest)) == (val.size(101), train.size(101))
        assert sorted([*mine, *rest]) == list(range(101))
        for label, number in enumerate((50, 30, 21)):
            assert abs((labels[mine] == label).sum() - number / 5) < 1
        held += list(mine)
    assert sorted(held) == list(range(101))
    several = np.zeros((7, 3), np.float32)
    assert list(folds.pick(folds.parse("train, fold 2/3"), several)) == [1, 4]
    assert folds.parse("train800val200") is None
    assert tasks.get("cifar").number("train800val200, not fold 1/3") == 1000 - 334


def test_some_images_are_read_in_the_order_asked_for():
    images = np.arange(10 * 2 * 2 * 3, dtype=np.uint8).reshape(10, 2, 2, 3)
    some = folds.Picked(images, np.array([7, 1, 4]))
    assert some.shape == (3, 2, 2, 3) and len(some) == 3
    np.testing.assert_array_equal(some[:2], images[[7, 1]])
    np.testing.assert_array_equal(some[np.array([2, 0])], images[[4, 7]])
    every = crops.Crops(lambda i: images[i].repeat(4, 0).repeat(4, 1), 10, "inception", Pixels, 0)
    picked = every.picked(np.array([7, 1, 4]))
    assert picked.shape == (3, 2, 2, 3) and every.shape == (10, 2, 2, 3)
    assert set(picked[1:2].ravel()) <= set(images[1].ravel())


class Pixels:
    size, shorter = 2, None


def test_a_search_in_folds_trains_on_the_others_and_ends_on_all(tmp_path, capsys):
    config = resolved(lr=(0.003, 0.03), folds=2)
    rows, problems = suite.run(config, tmp_path)
    assert not problems and rows[0]["lr"] == 0.03
    found = [files.read_json(p) for p in sorted(tmp_path.glob("digits/linear/search/*/result.json"))]
    assert [(r["lr"], r["num_val"], tuple(r["config"]["fold"])) for r in found] == [
        *((lr, 500, ("train800val200", i, 2)) for lr in (0.003, 0.03) for i in (0, 1))
    ]
    means = [np.mean([r["val_acc"] for r in found if r["lr"] == lr]) for lr in (0.003, 0.03)]
    assert rows[0]["val_acc"] == pytest.approx(means[1]) and means[1] > means[0]
    assert rows[0]["val_tried"] == pytest.approx(sorted(means)) and rows[0]["num_test"] == 797
    said = capsys.readouterr().out
    assert "5 run(s): 96 steps on 3,000 training images" in said
    assert "digits: settings are chosen by their means over 2 folds of 1,000 images" in said
    assert suite.run(config, tmp_path)[0] == rows  # nothing is trained again


def test_a_search_beyond_its_grid_resumes_and_is_counted(tmp_path, capsys):
    config = resolved(lr=(0.0001, 0.001), extend=True)
    rows, problems = suite.run(config, tmp_path)
    said = capsys.readouterr().out
    assert not problems and "up to 6 times: that is not counted" in said
    assert "digits linear: the best, lr=0.001, lies at an end of what was tried, so lr=0.01 is" in said
    assert rows[0]["tried"]["lr"][:3] == [0.0001, 0.001, 0.01] and rows[0]["lr"] < max(
        rows[0]["tried"]["lr"]
    )
    assert suite.run(config, tmp_path)[0] == rows


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"folds": 1}, "config.grid.folds=1 must be a whole number from 2 on, or 0 for the images"),
        ({"folds": -2}, "config.grid.folds=-2 must be a whole number from 2 on"),
        ({"folds": 1001}, "config.grid.folds=1001 is more than the 1000 images of digits: lower it"),
    ],
)
def test_folds_that_cannot_be(grid, message):
    with pytest.raises(UserError, match=message):
        config_lib.resolve(resolved(**grid))


def test_a_forecast_counts_what_a_search_adds(tmp_path, capsys):
    (run,) = config_lib.resolve(resolved(lr=(0.01, 0.03)))
    work = Work(run, tmp_path / "seed0", None, "a run")
    told = forecast.Forecast([work])
    more = search.trials(work, [{"lr": 0.09, "weight_decay": 0.0, "drop_path": 0.0}])
    told.expect(more)
    assert told.title(*more) == "[4/4] digits linear seed0-lr0.09-weight_decay0-drop_path0"
    told.expect(more)
    assert len(told.number) == 4 and ConfigDict(more[0].run.to_dict()).searching


def test_what_an_earlier_start_chose_is_not_chosen_again(tmp_path):
    """Ties went to the smaller rate once: such a workdir goes on with what it has."""
    (run,) = config_lib.resolve(resolved(lr=(0.01, 0.03)))
    work = Work(run, tmp_path / "seed0", None, "x")
    saved = {**run.to_dict(), "lr": 0.01, "val_acc": 0.9, "val_tried": [0.9, 0.9]}
    work.folder.mkdir()
    files.write_json(work.folder / "config.json", saved)
    seed = run.copy_and_resolve_references()
    seed.seed = 1
    never = lambda works: pytest.fail("a search")
    first, second = search.choose([Work(seed, tmp_path / "seed1", None, "y"), work], never)
    for chosen in (first.run, second.run):
        assert (chosen.lr, chosen.val_acc, list(chosen.val_tried)) == (0.01, 0.9, [0.9, 0.9])


def test_a_setting_without_a_loss_wins_no_tie(tmp_path):
    losses = {0.01: None, 0.03: 0.4}
    run, _ = chosen(tmp_path, lambda run: (0.9, losses[run.lr]), lr=(0.01, 0.03))
    assert run.lr == 0.03


def test_what_rounds_to_a_tried_value_is_not_tried_again(tmp_path):
    run, groups = chosen(tmp_path, near(1.0), lr=(0.00999, 0.01), extend=True)
    assert lrs(groups) == [[0.00999, 0.01]] and run.lr == 0.01


def test_folds_are_of_the_images_that_are_trained_on_in_the_end():
    config = resolved(folds=4)
    config.keep = "best"
    (run,) = config_lib.resolve(config)
    assert {next(iter(trial.fold)) for trial in search.settings(run)} == {"train800"}
    assert run_images.splits(search.settings(run)[0]) == (
        "train800, not fold 1/4",
        "train800, fold 1/4",
    )


def test_a_split_is_read_once_for_all_its_folds(monkeypatch):
    read = []
    images = np.zeros((10, 2, 2, 3), np.uint8)
    labels = np.arange(10) % 2
    monkeypatch.setattr(loaders.store, "load_split", lambda *_: (read.append(1), (images, labels))[1])
    load = loaders.images_reader(20)
    for i in range(3):
        for name in folds.names("train", i, 3):
            found = load(tasks.get("digits"), name, None, None, None, None)
            assert found is load(tasks.get("digits"), name, None, None, None, None)
    assert len(read) == 1


def test_a_given_learning_rate_is_another_line_than_a_searched_one():
    """Both were put into one line of a suite's table, which ended a finished start in an error."""
    lines = []
    for lr in (None, 0.01):
        config = resolved(times_own_lr=True, lr=(1.0, 3.0))
        config.lr = lr
        (run,) = config_lib.resolve(config)
        lines.append(identity.digests(identity.described(run))["line"])
        assert bool(run.grid.times_own_lr) == (lr is None)
    assert lines[0] != lines[1] and list(run.grid.lr) == [0.01]
