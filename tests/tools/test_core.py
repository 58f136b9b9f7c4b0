"""Projects know the core, and not the other way round."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import core
import pytest
from marks import quick

FOLDERS = sorted(path.parent.name for path in core.PROJECTS.glob("*/__init__.py"))
NAMED = [name for name in FOLDERS if "NAMES" in (core.PROJECTS / name / "__init__.py").read_text()]


def test_the_core_imports_no_project_and_has_no_name_of_one():
    assert core.imports() == [] and core.words() == []


@pytest.mark.skipif(not core.PROJECTS.exists(), reason="projects were removed")
def test_both_would_be_seen(tmp_path, monkeypatch):
    path = core.CORE / "step.py"
    text = path.read_text() + "\nfrom rlrr_jax.projects.pace import change\nx = 'noise10'\n"
    read = type(path).read_text
    monkeypatch.setattr(type(path), "read_text", lambda p: text if p == path else read(p))
    assert ast.parse(path.read_text())
    assert core.imports() == ["rlrr_jax/step.py imports rlrr_jax.projects.pace.change"]
    assert {line.split(": ")[1] for line in core.words()} == {"pace", "noise10"}


@pytest.mark.parametrize("name", quick(FOLDERS, *NAMED[:1]) if NAMED else FOLDERS)
def test_a_project_goes_with_its_folder(name, tmp_path):
    """Its names are gone, and everything else goes on."""
    package = tmp_path / "rlrr_jax"
    shutil.copytree(core.CORE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(package / "projects" / name)
    names = "[f'{kind} {x}' for kind in projects.NAMES for x in projects.NAMES[kind]]"
    script = f"""
from rlrr_jax import config, projects
from rlrr_jax.configs import vtab
print(__import__("rlrr_jax").__file__, len(config.resolve(vtab.get_config("digits"))), {names}, sep="|")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, runs, left = done.stdout.strip().split("|")
    assert pathlib.Path(file).parent == package and runs == "3"  # by three methods
    from rlrr_jax import projects

    paths = {f"{kind} {x}": path for kind, of in projects.NAMES.items() for x, path in of.items()}
    its = {x for x, path in paths.items() if path.startswith(f"rlrr_jax.projects.{name}.")}
    assert set(ast.literal_eval(left)) == paths.keys() - its
