"""The versions that were tested are within the bounds, and the bounds end where nothing was tested."""

import importlib.metadata
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import rlrr_jax

ROOT = pathlib.Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("py*.txt"))


@pytest.fixture(scope="module")
def wanted():
    """Requirements of the installed package and of its tests."""
    every = map(Requirement, importlib.metadata.requires("rlrr_jax"))
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": "test"})]


def test_the_package_knows_its_version():
    assert importlib.metadata.version("rlrr_jax") == rlrr_jax.__version__


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_file_pins_everything_within_the_bounds(path, wanted):
    pinned = pins(path)
    for requirement in wanted:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{name} is not in {path.name}"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]}"


def test_both_ends_of_the_supported_range_are_locked(wanted):
    """jax 0.10.2 is the last for Python 3.11; the next minor after the newest tested is excluded."""
    assert [path.stem for path in LOCKS] == ["py311", "py312"]
    oldest, newest = (pins(path)["jax"] for path in LOCKS)
    (jax,) = (r for r in wanted if r.name == "jax")
    assert jax.specifier.contains(oldest) and jax.specifier.contains(newest)
    assert not jax.specifier.contains(f"{newest.major}.{newest.minor + 1}.0")
    assert str(oldest) in str(jax.specifier)


def test_only_what_breaks_has_an_upper_bound():
    every = [Requirement(text) for text in importlib.metadata.requires("rlrr_jax")]
    capped = {r.name for r in every if "<" in str(r.specifier).replace("<=", "")}
    assert capped == {"jax", "flax", "orbax-checkpoint", "tensorflow-datasets"}


def test_the_wheel_brings_the_configurations(tmp_path):
    """Built as pip builds it and unpacked elsewhere, it finds them from any folder."""
    import os
    import subprocess
    import sys
    import zipfile

    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for name in ("vtab", "compare", "ablations", "transfer"):
        assert f"rlrr_jax/configs/{name}.py" in names
    (tmp_path / "site" / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "rlrr_jax.main", "--config", "configs/compare.py:digits"]
    done = subprocess.run(
        [*command, "--config.batch_size=0"],
        **dict(cwd=tmp_path / "site/elsewhere", env=environment, capture_output=True, text=True),
    )
    assert done.stderr == "error: config.batch_size=0 must be greater than 0\n"
    done = subprocess.run(
        [sys.executable, "-m", "rlrr_jax.main", "--help"],
        **dict(cwd=tmp_path, env=environment, capture_output=True, text=True),
    )
    assert done.returncode == 0 and "--config configs/vtab.py:cifar" in done.stdout and not done.stderr
