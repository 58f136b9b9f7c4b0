"""Tables and files of results."""

import json

from rows import row as make

from rlrr_jax import files, report
from rlrr_jax.results import tables

ROW = make(
    "hearts",
    **dict(lr=0.02, epochs=12, source="bundled", trainable_params=18_240, test_acc_final=0.7955),
    **dict(num_test=2000, wall_seconds=13.4, images_per_second=1300.2),
)
FULL = make(
    "hearts",
    method="full",
    **dict(lr=0.02, epochs=12, source="bundled", trainable_params=691_392, test_acc_final=0.81349),
    **dict(num_test=2000, wall_seconds=13.4, images_per_second=1300.2),
)


def test_table_is_aligned_markdown_without_empty_columns():
    lines = tables.table([ROW, FULL]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [c.strip() for c in lines[0].strip("|").split("|")] == [
        *(
            "task",
            "method",
            "protocol",
            "test acc",
            "params",
            "of full",
            "head",
            "lr",
            "epochs",
            "images/s",
            "time",
        )
    ]
    cells = [c.strip() for c in lines[2].strip("|").split("|")]
    assert cells == [
        *(
            "hearts",
            "rlrr",
            "fast",
            "79.55 %",
            "18,240",
            "2.64 %",
            "1,552",
            "0.02",
            "12",
            "1,300",
            "13 s",
        )
    ]
    assert "81.35 %" in lines[3] and "100.00 %" in lines[3]


def test_lines_of_several_settings_are_told_apart():
    """Two equal lines for two settings, and "of full" by the last full of any size."""
    larger = make("hearts", method="full", epochs=12, source="bundled", lr=0.02, trainable_params=10**7)
    larger["config"]["model"]["variant"] = "B/16"
    other = make("hearts", epochs=12, source="bundled", image_size=64, trainable_params=18_240)
    lines = tables.table([ROW, other, FULL, larger]).splitlines()[2:]
    names = [line.split("|")[2].strip() for line in lines]
    assert names == [
        "rlrr image_size=32",
        "rlrr image_size=64",
        "full variant=bundled",
        "full variant=B/16",
    ]
    shares = [line.split("|")[6].strip() for line in lines]
    assert shares == ["2.64 %", "2.64 %", "100.00 %", "100.00 %"]
    twice = tables.labels([[ROW], [{**ROW, "epochs": 6, "config": {**ROW["config"], "epochs": 6}}]])
    assert twice == ["rlrr epochs=12", "rlrr epochs=6"]


def test_best_and_validation_accuracy_are_named_as_such():
    official = {**ROW, "test_acc_best": 0.8}
    assert "best" in tables.table([official]) and "80.00 %" in tables.table([official])
    tuned = {**ROW, "val_acc": 0.75, "test_acc_final": None, "num_test": None, "num_val": 200}
    assert "75.00 % (val)" in tables.table([tuned])
    assert "200 validation images" in tables.caption([tuned])


def test_caption_names_backbone_source_and_device():
    text = tables.caption([ROW, FULL])
    for part in ("2,000 test images", "backbone bundled", "abababababab", "original pixels", "1 x cpu"):
        assert part in text


def test_rows_are_written_whole_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.write_rows(path, [{"epoch": 0, "loss": 0.1 + 0.2}, {"epoch": 1, "loss": 1e-30}])
    assert files.read_rows(path) == [{"epoch": 0, "loss": 0.1 + 0.2}, {"epoch": 1, "loss": 1e-30}]
    assert len(path.read_text().splitlines()) == 2
    assert files.read_rows(tmp_path / "none.jsonl") == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_results_are_collected_from_the_runs(tmp_path):
    for i, row in enumerate((FULL, ROW)):
        row = {**row, "identity": str(i), "train_loss": 0.1}
        folder = tmp_path / row["task"] / row["method"] / "seed0"
        folder.mkdir(parents=True)
        files.write_json(folder / "result.json", row)
    rows = report.collect(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert {r["method"] for r in rows} == {"rlrr", "full"}
    assert (tmp_path / "results.md").read_text() == f"{tables.table(rows)}\n\n{tables.caption(rows)}\n"
    assert not list(tmp_path.rglob("*.part"))
    (folder / "error.txt").write_text("in use")  # by a process that finished it
    (tmp_path / "hearts/linear/seed1").mkdir(parents=True)
    (tmp_path / "hearts/linear/seed1/error.txt").write_text("Traceback\nsome reason")
    report.collect(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.endswith("\n\nnot finished: hearts linear seed1: some reason\n")
    assert "in use" not in text


def test_what_a_run_changes_is_told_from_the_name_of_its_folder():
    row = {
        "trial": "lr1e-05-label_smoothing0.1-losspace_lazy-lam0.5-depth3-aug2",
        "loss_kwargs": {"lam": 0.5},
        "config": {"model": {"depth": 3}, "label_smoothing": 0.1},
        **{"lr": 1e-05, "loss": "pace_lazy", "label_smoothing": 0.1},
    }
    words = "lr=1e-05 label_smoothing=0.1 loss=pace_lazy lam=0.5 depth=3 aug2"
    assert " ".join(tables.changed(row)) == words and tables.changed({}) == []


def test_what_a_search_chose_of_a_loss_is_shown():
    row = {
        "grid": {"lam": [0.1, 1.0], "sigma": []},
        "loss_kwargs": {"lam": 0.1, "sigma": 1.0, "every": 2},
    }
    assert tables.chosen(row) == "lam=0.1" and tables.chosen({"loss_kwargs": {"lam": 1.0}}) == ""
