"""Projects know the core, and not the other way round."""

import ast

import core
import pytest


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
