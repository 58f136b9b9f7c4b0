import json

import numpy as np
import pictures
import pytest
from PIL import Image

from rlrr_jax.errors import UserError
from rlrr_jax.projects.leakage import __main__ as command


@pytest.mark.slow  # two minutes of compiling
def test_runs_are_attacked_and_the_page_says_how(tuned_runs, tmp_path, capsys):
    runs = [str(tuned_runs / "digits" / method / "seed0") for method in ("rlrr",)]
    out = tmp_path / "out"
    flags = ["--candidates=30", "--probes=3", "--batches=1,2", "--invert=2", "--steps=4"]
    with pictures.drawn():
        command.main([*runs, *flags, f"--out={out}"])
    found = json.loads((out / "leakage.json").read_text())
    rows = found["reidentification"]
    assert len(rows) == 2 * 2 * (1 + 4)  # states, sizes of batches, four defences and none
    plain = {(r["run"], r["gradient at"], r["batch"]): r for r in rows if r["defence"] == "none"}
    for run in ("rlrr depth=2",):
        start, trained = plain[run, "start", 1], plain[run, "trained", 1]
        assert start["adapter"]["mrr"] == pytest.approx(1 / 15.5)  # all are equal: in the middle
        assert start["head"] == trained["adapter"] == trained["both"] == {"top1": 1.0, "mrr": 1.0}
    assert all(r["labels"] == 1 and r["feature error"] < 1e-4 for r in found["exact"])
    assert found["inversion"][0]["PSNR mean image"] > found["inversion"][0]["PSNR recovered"] > 0
    with Image.open(out / "leakage.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    text = (out / "leakage.md").read_text()
    assert "digits, 32 pixels, 30 candidates (test images, seed 0),\n3 batches of each size" in text
    assert "guessing\nhas 0.033, 0.133." in text  # 1/30, and the mean of 1/1 to 1/30
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["{tmp}"], "there is no finished run in .*: give a --workdir"),
        (["{runs}/digits", "{runs}/hearts"], "is a run with task=hearts, the first with digits: give"),
        pytest.param(
            ["{runs}/digits", "--candidates=99999"],
            "--candidates=99999 is more than the .* test images",
            marks=pytest.mark.slow,
        ),
        (
            ["{runs}/digits", "--candidates=4", "--batches=8"],
            "--batches=8 is more than the 4 candidates: ask for fewer",
        ),
    ],
)
def test_what_cannot_be_attacked_is_said(flags, message, tuned_runs, tmp_path):
    small = [] if "candidates" in " ".join(flags) else ["--candidates=10", "--probes=1", "--batches=1"]
    arguments = [flag.format(tmp=tmp_path, runs=tuned_runs) for flag in flags]
    with pytest.raises(UserError, match=message):
        command.main([*arguments, *small, f"--out={tmp_path / 'out'}"])
