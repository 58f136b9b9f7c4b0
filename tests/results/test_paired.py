"""Paired differences against SciPy and numbers worked out by hand."""

import json

import numpy as np
import pictures
import pytest
from rows import row
from scipy import stats

from rlrr_jax import report
from rlrr_jax.errors import UserError
from rlrr_jax.results import paired
from rlrr_jax.results import rows as rows_lib


def rows(method, values, **changes):
    return [row(t, seed, method, test_acc_final=x, **changes) for (t, seed), x in values.items()]


A = {("kitti", 0): 0.50, ("kitti", 1): 0.52, ("kitti", 2): 0.54}
B = {("kitti", 0): 0.53, ("kitti", 1): 0.54, ("kitti", 2): 0.58}


def test_seeds_of_one_task_are_paired():
    (found,) = paired.differences(rows("rlrr", B) + rows("lora", A), "lora")
    each = np.array([0.03, 0.02, 0.04])
    low, high = stats.ttest_rel(list(B.values()), list(A.values())).confidence_interval(0.95)
    assert found.label == "rlrr" and (found.tasks, found.pairs) == (1, 3)
    assert found.mean == pytest.approx(each.mean())
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    text = paired.table(rows("rlrr", B) + rows("lora", A), "lora")
    assert "| rlrr           |    +3.00 | +0.52 to +5.48 |          yes |       1 |       3 |" in text


def test_tasks_count_once_however_many_seeds_they_have():
    more = {("dtd", 0): 0.7, ("dtd", 1): 0.7}
    other = {("dtd", 0): 0.71, ("dtd", 5): 0.9}
    (found,) = paired.differences(rows("rlrr", B | other) + rows("lora", A | more), "lora")
    assert (found.tasks, found.pairs) == (2, 4)
    assert found.mean == pytest.approx((0.03 + 0.01) / 2)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 1) * 0.02 / 2)  # of 0.03 and 0.01


def test_what_is_mixed_or_averaged_is_another_line():
    low = rows("rlrr", B, precision="bfloat16") + rows("rlrr", A, precision="highest")
    assert {paired.differences(low, "rlrr precision=bfloat16")[0].label} == {"rlrr"}
    both = rows("rlrr", A) + rows("rlrr", B, mixup=0.8, average=0.99)
    (found,) = paired.differences(both, "rlrr mixup=0.8 average=0.99")
    assert found.label == "rlrr" and found.mean == pytest.approx(-0.03)


def test_settings_of_one_label_are_not_mixed():
    """52 % and 82 % of two settings became one line, and +31.00 clear of 0."""
    small, large = (("kitti", s) for s in (0, 1)), (("kitti", s) for s in (2, 3))
    low = rows("rlrr", dict.fromkeys(small, 0.52), image_size=64, epochs=5)
    high = rows("rlrr", dict.fromkeys(large, 0.82), image_size=128, epochs=5)
    base = rows("lora", dict.fromkeys([("kitti", s) for s in range(4)], 0.51), image_size=64, epochs=5)
    found = paired.differences(low + high + base, "lora")
    assert [(d.label, d.pairs, d.other) for d in found] == [
        ("rlrr image_size=64", 2, ()),
        ("rlrr image_size=128", 2, ("image_size",)),
    ]
    assert found[1].mean == pytest.approx(0.31)
    text = paired.table(low + high + base, "lora")
    assert "differ in, too" in text and text.splitlines()[3].rstrip(" |").endswith("image_size")
    with pytest.raises(UserError, match="rlrr is there in several ways: name one of 'rlrr image_size="):
        paired.differences(low + high + base, "rlrr")
    other = rows("rlrr", {("kitti", 0): 0.6}, image_size=64, epochs=5)
    other[0]["identity"] = "searched again"
    with pytest.raises(UserError, match="two different runs of kitti rlrr.* have the same seed"):
        paired.differences(low + other + base, "lora")


def test_a_single_pair_has_no_interval():
    one = {("kitti", 0): 0.5}
    (found,) = paired.differences(rows("rlrr", {("kitti", 0): 0.6}) + rows("lora", one), "lora")
    assert found.half is None and found.mean == pytest.approx(0.1)


def test_lines_are_named():
    both = rows("lora", A) + rows("rlrr", A) + rows("rlrr", B, method_kwargs={"init": "damped"})
    assert [d.label for d in paired.differences(both, "lora")] == ["rlrr", "rlrr init=damped"]
    assert [d.label for d in paired.differences(both, "rlrr init=damped")] == ["lora", "rlrr"]
    for name, message in (
        ("ssf", "unknown line 'ssf': .*lora, rlrr, rlrr init=damped"),
        ("rlrr i", "unknown line 'rlrr i': did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            paired.differences(both, name)
    damped = rows("rlrr", A, method_kwargs={"init": "damped"})
    two = damped + rows("rlrr", A, method_kwargs={"init": "identity"})
    with pytest.raises(
        UserError, match="rlrr is there in several ways: name one of 'rlrr init=damped'"
    ):
        paired.differences(two, "rlrr")
    with pytest.raises(UserError, match="nothing ran on the tasks and seeds of lora"):
        paired.differences(rows("lora", A), "lora")


def test_a_table_of_tasks_has_scores_and_differences_of_each():
    more = {("dtd", 0): 0.70, ("dtd", 1): 0.74}
    less = {("dtd", 0): 0.69, ("dtd", 1): 0.71}
    alone = rows("ssf", {("dtd", 0): 0.6})
    text = paired.by_task(rows("rlrr", B | more) + rows("lora", A | less) + alone, "lora")
    head, _, *lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert head == ["method", "params", "kitti", "kitti against lora", "dtd", "dtd against lora"]
    found = {line[0]: line[2:] for line in lines}
    assert found["lora"] == ["52.00 ± 2.00 %", "", "70.00 ± 1.41 %", ""]
    assert found["rlrr"][:3] == ["55.00 ± 2.65 %", "+3.00 (+0.52 to +5.48)", "72.00 ± 2.83 %"]
    low, high = stats.ttest_rel([0.70, 0.74], [0.69, 0.71]).confidence_interval(0.95)
    assert found["rlrr"][3] == f"+2.00 ({100 * low:+.2f} to {100 * high:+.2f})"
    assert found["ssf"] == ["", "", "60.00 %", "-9.00"]
    # A task without the line that is compared to has scores alone.
    only = paired.by_task(rows("rlrr", B | more) + rows("lora", A), "lora")
    assert only.splitlines()[2].split("|")[-2].strip() == ""


def test_rows_are_read_from_a_file_as_from_a_workdir(tmp_path):
    every = rows("rlrr", B) + rows("lora", A)
    (tmp_path / "settled.json").write_text(json.dumps(every))
    found = rows_lib.find([], [tmp_path / "settled.json"])
    assert paired.table(found, "lora") == paired.table(every, "lora")
    for text in ("[1]", "[]", "{}", '[{"identity": "a"}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json is no list of rows that runs wrote: name a"):
            rows_lib.find([], [tmp_path / "bad.json"])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="bad.json is no JSON .*: name a results.json"):
        rows_lib.find([], [tmp_path / "bad.json"])
    with pytest.raises(
        UserError, match="there is no file .*no.json: name a results.json, or a workdir"
    ):
        rows_lib.find([], [tmp_path / "no.json"])
    with pytest.raises(UserError, match="are results of the same run that differ"):
        other = [{**every[0], "test_acc_final": 0.1}]
        (tmp_path / "other.json").write_text(json.dumps(other))
        rows_lib.find([], [tmp_path / "settled.json", tmp_path / "other.json"])


def test_the_command_reads_files_and_writes_beside_none(tmp_path, monkeypatch, capsys):
    every = rows("rlrr", B | {("dtd", 0): 0.7}) + rows("lora", A | {("dtd", 0): 0.6})
    (tmp_path / "settled.json").write_text(json.dumps(every))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "settled.json", "--against", "lora"])
    with pictures.drawn():
        report.main()
    said = capsys.readouterr().out
    assert "dtd against lora |" in said and "files: report" in said
    assert json.loads((tmp_path / "report/results.json").read_text()) == rows_lib.find(
        [], [tmp_path / "settled.json"]
    )


def test_a_table_of_tasks_survives_what_diverged_or_is_there_twice():
    """Numbers stood in the wrong column, and report ended in an error."""
    gone = rows("rlrr", {("dtd", 0): 0.1}, image_size=64, train_loss=None)
    both = rows("lora", {("dtd", 0): 0.6}, image_size=64) + rows("lora", {("dtd", 0): 0.5})
    text = paired.by_task(rows("rlrr", B | {("dtd", 0): 0.7}) + rows("lora", A) + both + gone, "lora")
    found = {line.split("|")[1].strip(): line.split("|")[3:-1] for line in text.splitlines()[2:]}
    strip = {label: [cell.strip() for cell in cells] for label, cells in found.items()}
    assert strip["rlrr"] == ["55.00 ± 2.65 %", "+3.00 (+0.52 to +5.48)", "", ""]
    assert strip["rlrr image_size=64"] == ["", "", "diverged", ""]
    assert strip["rlrr image_size=224"] == ["", "", "70.00 %", ""]  # against which lora?
    other = rows("lora", {("kitti", 7): 0.9})
    assert "55.00 ± 2.65 %" in paired.by_task(rows("rlrr", B) + other, "lora")  # no seed in common
