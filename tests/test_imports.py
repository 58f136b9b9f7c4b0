"""Which part of the package may know which: read from the import statements."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "rlrr_jax"
# What a folder or file may import of ours, besides itself. What is not here may import all.
ALLOWED = {
    "errors.py": {"screen"},
    "backend.py": set(),
    "sides.py": set(),
    "screen.py": set(),
    "files.py": {"errors"},
    "hub.py": {"errors", "files"},
    "models": {"backend", "errors", "lookup", "sides"},
    "methods": {"errors", "lookup"},
    "lookup.py": {"errors"},
    "recipe.py": {"methods", "mixing", "optim", "sides"},
    "losses.py": {"errors", "lookup", "methods", "recipe"},
    "metrics.py": set(),
    "answers.py": {"data", "errors", "files", "losses", "methods", "metrics"},
    "keeping.py": {"runtime"},
    "mixing.py": set(),
    "batch.py": {"data", "mixing", "recipe"},
    "optim.py": {"errors", "methods"},
    "runtime": {"backend", "errors"},
    "data": {"errors", "files", "hub", "lookup", "sides"},
    "weights": {"errors", "files", "hub", "models", "sides"},
    "checks.py": {"backend", "data", "errors", "losses", "lookup", "models", "optim", "weights"},
    "run_images.py": {"checks", "data", "errors", "methods", "sides"},
    "run_model.py": {
        *("checks", "errors", "losses", "methods", "models", "run_images", "sides", "weights"),
        "blockwise",
    },
    "blockwise.py": {"errors", "losses", "methods", "models", "recipe", "runtime"},
    "run.py": {
        *("data", "lookup", "losses", "methods", "mixing", "optim", "recipe"),
        *("answers", "run_images", "run_model", "blockwise", "runtime"),
    },
    "step.py": {
        *("batch", "losses", "methods"),
        *("mixing", "models", "optim", "recipe", "runtime", "sides"),
    },
    "evaluate.py": {"data", "recipe", "runtime"},
    "feed.py": {"data", "evaluate"},
    "prefix.py": {
        *("data", "evaluate", "losses", "methods", "models", "recipe", "run", "runtime", "sides"),
        "blockwise",
    },
}
EXCEPTIONS = {"methods/__main__.py"}  # a command, which names models


def imported(path):
    """Names of our modules that a file imports, as `"data"` or `"errors"`."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlrr_jax"):
            inner = node.module.removeprefix("rlrr_jax").lstrip(".")
            out |= {inner.split(".")[0]} if inner else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            out |= {a.name.split(".")[1] for a in node.names if a.name.startswith("rlrr_jax.")}
    return out


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_knows_only_what_lies_below_it(part):
    files = [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).glob("*.py"))
    assert files
    for path in files:
        name = str(path.relative_to(ROOT))
        others = imported(path) - {part.removesuffix(".py")}
        assert name in EXCEPTIONS or others <= ALLOWED[part], f"{name} imports {others - ALLOWED[part]}"


def loaded_with(name, names):
    """Modules of ours that importing one of them imports, but those that functions import."""
    path = ROOT.parent / pathlib.Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            of = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {module if module in names else node.module for module in of} & names
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & names


def test_no_circle_of_imports():
    """Every file can be imported first."""
    parts = [path.relative_to(ROOT.parent) for path in sorted(ROOT.glob("**/*.py"))]
    parts = [part for part in parts if part.stem != "__main__" and "configs" not in part.parts]
    names = {".".join(part.with_suffix("").parts).removesuffix(".__init__") for part in parts}
    assert len(names) > 60
    graphlib.TopologicalSorter({x: {*loaded_with(x, names)} for x in names}).prepare()
    code = "import sys\nfor name in sys.argv[1:]: __import__(name)"
    code += "\nassert not {'tensorflow', 'tensorflow_datasets'} & {*sys.modules}"
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(names)], cwd=ROOT.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


COMMANDS = [path for path in sorted(ROOT.rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_command_starts_by_itself(path):
    """Other tests fork commands from a process that has imported more than each of them does."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__main__")
    done = subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"python -m {name}" in done.stdout or "usage: " in done.stdout
