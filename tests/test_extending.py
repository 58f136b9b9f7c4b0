"""A method, a loss and a data source as a fork adds them: one file and one line each."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from flags import xla_flags
from squeeze import squeeze

ROOT = pathlib.Path(__file__).parents[1]


def block(page, word):
    """The Python block of a page that has a word in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    (found,) = [text for text in blocks if word in text]
    return found


def register(path, line, entry, before=None):
    """Adds an import and a line to a table, the way the page says."""
    text = path.read_text()
    table = re.search(rf"^{entry[0]}\b.*? = {{", text, re.M)
    text = text[: table.end()] + entry[1] + text[table.end() :]
    where = text.index(before) if before else 0
    path.write_text(text[:where] + line + text[where:])


def test_a_fork_adds_one_file_and_one_line_each(tmp_path):
    for name in ("rlrr_jax", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    package = tmp_path / "rlrr_jax"
    (package / "methods/gain.py").write_text(block("README.md", "def method("))
    register(
        package / "methods/__init__.py",
        "from rlrr_jax.methods import gain\n",
        ("METHODS", '"gain": gain,'),
        before="METHODS = {",
    )
    (package / "smooth.py").write_text(block("docs/extending.md", "def smooth("))
    register(
        package / "losses.py",
        "from rlrr_jax.smooth import smooth\n",
        ("LOSSES", '"smooth": smooth,'),
        before="LOSSES:",
    )
    (package / "data/stripes.py").write_text(block("docs/extending.md", "TASK = Task("))
    register(
        package / "data/tasks.py",
        "from rlrr_jax.data import stripes\n",
        ("TASKS", '"stripes": stripes.TASK,'),
        before="# Chosen on",
    )
    command = [sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:stripes,method=gain"]
    command += ["--config.loss=smooth", "--config.model.variant=bundled", "--workdir=w"]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(tmp_path)}
    environment["RLRR_JAX_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| stripes | gain loss=smooth | official |" in squeeze(done.stdout)
    assert "100 test images, source stripes (stripes, version 1, original pixels)" in done.stdout
    folder = tmp_path / "w/stripes/gain/seed0"
    row = json.loads((folder / "result.json").read_text())
    assert row["loss"] == "smooth" and row["trainable_params"] == 36 and row["test_acc_final"] > 0.9
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["train_entropy"] < 0.694 and last["train_loss"] > -0.1 * last["train_entropy"]
    assert b'"standing"' in (folder / "adapter.safetensors").read_bytes().replace(b"\\", b"")
