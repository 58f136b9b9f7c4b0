import statistics

import pytest
from rows import row as make

from rlrr_jax import report
from rlrr_jax.errors import UserError
from rlrr_jax.projects.fgvc import table as fgvc_table
from rlrr_jax.projects.fgvc.data import FGVC


def rows(names=tuple(FGVC), seeds=(0, 1), **changes):
    accuracy = lambda name, seed: (80 + 2 * list(FGVC).index(name) + seed) / 100
    return [
        make(
            name, seed, **{"test_acc_final": accuracy(name, seed), "head_params": 769 * 100, **changes}
        )
        for name in names
        for seed in seeds
    ]


def cells(text, label):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ours_stand_above_the_published():
    text = fgvc_table.table(rows())
    found = cells(text, "rlrr ")
    deviation = statistics.stdev([0, 1])
    assert found[1:7] == [f"{80.5 + 2 * i:.2f} ± {deviation:.2f}" for i in (0, 1, 2, 3, 4, 2)]
    assert found[-1] == "trainval"
    assert cells(text, "RLRR, published")[1:7] == ["89.3", "84.7", "99.5", "92.0", "87.0", "90.5"]
    assert text.index("| rlrr") < text.index("| Full fine-tuning, published")


def test_a_missing_dataset_leaves_out_the_mean():
    found = cells(fgvc_table.table(rows(names=("cub", "cars"), seeds=(3,))), "rlrr")
    assert found[1:7] == ["83.00", "", "", "", "91.00", ""]


def test_two_runs_of_a_seed_are_not_averaged():
    with pytest.raises(UserError, match="two different runs of cub rlrr seed 0 are to be put into one"):
        fgvc_table.table(rows() + rows(names=("cub",), seeds=(0,), test_acc_final=0.1))


def test_published_means_are_those_printed():
    """To a rounding of the paper's: it prints 90.4 for RLRR's 90.5."""
    printed = dict(zip(("RLRR", "ARC", "VPT-Deep", "RLRR*", "SSF*"), (90.4, 90.1, 89.1, 91.0, 90.7)))
    for line in fgvc_table.published():
        mean = statistics.mean(float(line[name]) for name in fgvc_table.COLUMNS.values())
        assert mean == pytest.approx(printed.get(line["method"], mean), abs=0.11) and line["source"]
    assert len(fgvc_table.published()) == 14


def test_other_tasks_have_no_such_table():
    assert fgvc_table.table([{**rows()[0], "task": "hearts"}]) == ""
    assert fgvc_table.table(rows(test_acc_final=None)) == ""
    assert fgvc_table.CAPTION in report.show(rows())
