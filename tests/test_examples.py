"""The walk-through runs as it is written."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from flags import xla_flags
from squeeze import squeeze

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_walk_through_runs(tmp_path):
    """All its code in one process, as a notebook would; only what installs is left out."""
    cells = json.loads((ROOT / "examples/walkthrough.ipynb").read_text())["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(source) > 8 and not any(cell.get("outputs") for cell in cells)
    source = [text for text in source if "%pip" not in text]
    (tmp_path / "walkthrough.py").write_text("\n\n".join(source))
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "walkthrough.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "18,240 trained values beside" in done.stdout and "| hearts | rlrr" in squeeze(done.stdout)
    assert "weight 1.0: " in done.stdout and "hearts-adapter.safetensors: logits differ" in done.stdout
    assert (tmp_path / "runs/walkthrough/hearts.safetensors").stat().st_size > 1e6
