"""The table of tasks against numbers worked out by hand, and the published ones against the paper."""

import csv
import io
import json

import numpy as np
import pictures
import pytest
from rows import row as make

from rlrr_jax import report
from rlrr_jax.data import tasks
from rlrr_jax.errors import UserError
from rlrr_jax.results import vtab_table
from rlrr_jax.runs import identity


def accuracy(i, seed):
    return (40 + 3 * i + (seed - 1) * (1 + i % 2)) / 100


def rows(seeds=(0, 1, 2), names=tuple(tasks.VTAB), **changes):
    return [
        make(
            name,
            seed,
            **{
                "head_params": 769 * tasks.VTAB[name].classes,
                "test_acc_final": accuracy(list(tasks.VTAB).index(name), seed),
                **changes,
            },
        )
        for name in names
        for seed in seeds
    ]


def test_means_and_deviations_by_hand():
    line = vtab_table.lines(rows())[0]
    mean, deviation = line.cells["dtd"]
    assert mean == pytest.approx(0.46) and deviation == pytest.approx(0.01)  # 45, 46, 47
    assert line.cells["caltech101"][1] == pytest.approx(0.02)  # 41, 43, 45
    values = [40 + 3 * i for i in range(19)]
    natural, specialized, structured = np.mean(values[:7]), np.mean(values[7:11]), np.mean(values[11:])
    for name, value in (
        ("natural", natural),
        ("specialized", specialized),
        ("structured", structured),
        ("mean_of_groups", (natural + specialized + structured) / 3),
        ("flat_mean", np.mean(values)),
    ):
        assert line.cells[name][0] == pytest.approx(value / 100)
    steps = [1 + i % 2 for i in range(19)]  # what a seed more adds to each task, in points
    assert line.cells["flat_mean"][1] == pytest.approx(np.mean(steps) / 100)
    assert line.cells["natural"][1] == pytest.approx(np.mean(steps[:7]) / 100)
    assert line.params == "288,768" and line.seeds == (0, 1, 2)
    assert line.head == f"{np.mean([769 * t.classes for t in tasks.VTAB.values()]):,.0f}"


def test_one_seed_has_no_deviation():
    line = vtab_table.lines(rows(seeds=(1,)))[0]
    assert line.cells["dtd"] == (pytest.approx(0.46), None)
    assert "±" not in vtab_table.text([line])


def test_no_mean_without_all_its_tasks():
    names = [n for n in tasks.VTAB if n != "kitti"]
    line = vtab_table.lines(rows(names=names))[0]
    assert {"natural", "specialized"} <= line.cells.keys()
    assert not {"structured", "mean_of_groups", "flat_mean", "kitti"} & line.cells.keys()
    assert "kitti" not in vtab_table.text(vtab_table.lines(rows(names=names))).splitlines()[0]


def test_a_missing_seed_of_one_task_leaves_the_mean_without_deviation():
    some = [r for r in rows() if (r["task"], r["seed"]) != ("kitti", 2)]
    line = vtab_table.lines(some)[0]
    assert line.cells["flat_mean"][1] is None and line.cells["structured"][1] is None
    assert line.cells["natural"][1] is not None
    assert "± over 2 to 3 seeds" in vtab_table.text([line])


def test_published_means_are_those_of_the_paper():
    """Flat means as the RLRR paper prints them, from the 19 numbers; and the other kind of mean."""
    lines = {line.label: line.cells for line in vtab_table.published()}
    for label, flat in (
        ("RLRR (ViT-B/16)", 74.5),
        ("RLRR* (ViT-B/16 AugReg)", 75.1),
        ("RLRR (ViT-L/16)", 75.2),
        ("RLRR (ViT-H/14)", 72.0),
    ):
        assert 100 * lines[label]["flat_mean"][0] == pytest.approx(flat, abs=0.06)
    cells = lines["RLRR (ViT-B/16)"]
    groups = [round(100 * cells[g][0], 1) for g in tasks.GROUPS]
    assert groups == [82.6, 85.8, 61.8] or groups == [82.7, 85.8, 61.8]
    assert 100 * cells["mean_of_groups"][0] == pytest.approx(76.8, abs=0.06)
    assert len(lines) == 32 and all(line.source for line in vtab_table.published())


def test_text_has_19_columns_means_and_published_rows():
    lines = vtab_table.text(vtab_table.lines(rows())).splitlines()
    header = lines[0].split()
    assert header == [
        *(
            "protocol",
            "pixels",
            *vtab_table.SHORT.values(),
            *vtab_table.MEANS.values(),
            "params",
            "head",
        )
    ]
    assert lines[1].split()[:5] == ["rlrr", "fast", "tfds", "original", "40.00"]
    assert lines[2].split()[:6] == ["±", "over", "3", "seeds", "1.00", "2.00"]
    (ours,) = [line for line in lines if line.startswith("RLRR (ViT-B/16)")]
    assert "75.6" in ours and "74.5" in ours and "0.33M" in ours
    assert not [line for line in lines if line.startswith("RLRR*")]
    augreg = vtab_table.text(vtab_table.lines(rows(backbone="augreg/B_16-i21k")))
    assert "RLRR* (ViT-B/16 AugReg)" in augreg
    swin = vtab_table.text(vtab_table.lines(rows(backbone="hf:timm/swin_base_patch4_window7_224")))
    assert "RLRR (Swin-B)" in swin and "73.0" in swin and "ViT" not in swin


def test_markdown_and_csv_say_the_same():
    lines = vtab_table.lines(rows())
    table = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in vtab_table.markdown(lines).splitlines()
    ]
    assert table[0][4:23] == [n.replace("_", " ") for n in tasks.VTAB]
    assert table[2][:5] == ["rlrr", "fast", "tfds original", "0, 1, 2", "40.00 ± 1.00"]
    assert len({len(row) for row in table}) == 1
    (ours, *published) = csv.DictReader(io.StringIO(vtab_table.csv(lines)))
    assert float(ours["dtd"]) == pytest.approx(0.46) and float(ours["dtd_sd"]) == pytest.approx(0.01)
    assert ours["seeds"] == "0 1 2" and ours["pixels"] == "tfds original"
    assert len(published) == 32 and float(published[-1]["cifar"]) == pytest.approx(0.79)
    assert json.loads(json.dumps(vtab_table.plain(lines)))[0]["cells"]["dtd"][0] == pytest.approx(0.46)


def test_official_runs_have_a_line_for_the_best_epoch():
    best, *_ = rows(seeds=(0,), names=("kitti",), protocol="official", test_acc_best=0.9)
    first, second, *_ = vtab_table.lines([best])
    assert (first.label, second.label) == ("rlrr", "rlrr, best epoch")
    assert second.cells["kitti"][0] == 0.9 and first.cells["kitti"][0] != 0.9


def test_what_is_not_comparable_is_on_its_own_line():
    other = rows(variant="jpeg75") + rows(protocol="vtab") + rows(method_kwargs={"init": "damped"})
    labels = [(x.label, x.protocol, x.pixels) for x in vtab_table.lines(rows() + other) if not x.source]
    assert labels == [
        ("rlrr", "fast", "tfds original"),
        ("rlrr", "fast", "tfds jpeg75"),
        ("rlrr", "vtab", "tfds original"),
        ("rlrr init=damped", "fast", "tfds original"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("lr", 1.0, "lr=1.0"), ("schedule", "cosine", "schedule=cosine"), ("mean", (0.0,) * 3, "mean=")],
)
def test_seeds_of_other_settings_are_on_their_own_line(key, value, said):
    more = {"std": (0.5,) * 3} if key == "mean" else {}
    other = rows(seeds=(5,), **{key: value}, **more)
    lines = [line for line in vtab_table.lines(rows() + other) if not line.source]
    assert [line.seeds for line in lines] == [(0, 1, 2), (5,)]
    assert said in lines[1].label and said not in lines[0].label
    if key == "lr":  # "vtab" chooses it by itself
        both = rows(protocol="vtab") + rows(seeds=(5,), protocol="vtab", lr=1.0)
        assert vtab_table.lines(both)[0].counts == "4"


def test_versions_of_a_dataset_are_not_averaged():
    other = rows(seeds=(5,), names=("cifar",))
    for row in other:
        row["config"]["dataset"] = "another"
        row |= identity.digests(row["config"])
    with pytest.raises(UserError, match="cifar rlrr .* differ in dataset=d .now another.: .* apart"):
        vtab_table.lines(rows() + other)


def test_lines_say_what_tells_them_apart():
    other = rows(backbone="howto-i21k-B/16", backbone_sha256="cd" * 32, gelu="exact")
    labels = [line.label for line in vtab_table.lines(rows() + other) if not line.source]
    assert labels == [
        "rlrr, gelu=tanh, name=.com/vit_models/imagenet21k/ViT-B_16.npz",
        "rlrr, gelu=exact, name=001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz",
    ]


def test_two_runs_for_one_place_are_refused():
    with pytest.raises(UserError, match="two different runs of cifar rlrr seed 0 .* apart"):
        vtab_table.lines(rows() + rows())


def test_bundled_and_tuned_rows_are_no_part_of_it():
    assert vtab_table.lines(rows(test_acc_final=None)) == []
    assert vtab_table.lines([{**rows()[0], "task": "hearts"}]) == []


def test_the_picture_shows_the_numbers():
    with pictures.drawn():
        one = pictures.look(vtab_table.picture(vtab_table.lines(rows())), colours=5)
        other = pictures.look(vtab_table.picture(vtab_table.lines(rows(test_acc_final=0.9))))
    assert one.shape == other.shape and (one != other).any()


def test_the_screen_shows_the_suite_or_the_runs():
    assert report.show(rows()).startswith(vtab_table.text(vtab_table.lines(rows())))
    assert report.show(rows(names=("kitti",))).startswith("| task ")
