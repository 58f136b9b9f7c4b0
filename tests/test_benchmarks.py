"""The programs under benchmarks/, which no other test runs."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))


def modules(tree):
    """Names of a file that are our modules: name -> module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlrr_jax"):
            for alias in node.names:
                try:
                    module = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
                else:
                    found[alias.asname or alias.name] = module
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_benchmark_uses_is_there(path):
    tree = ast.parse(path.read_text())
    ours = modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ours:
                assert hasattr(ours[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_every_benchmark_has_its_place_in_the_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    parts = ("ours", "torch_vit")  # of others
    assert not [path.name for path in FILES if path.stem not in parts and path.name not in text]
