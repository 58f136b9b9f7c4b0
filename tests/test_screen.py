"""Commands whose output is closed, cut off, of another encoding, or drawn with strange settings."""

import os
import pathlib
import subprocess
import sys

import pytest
from flags import xla_flags
from squeeze import squeeze

from rlrr_jax import files
from rlrr_jax.results import plots

ROOT = pathlib.Path(__file__).parents[1]
RUN = "{python} -m rlrr_jax.main --config configs/vtab.py:digits,method=linear --config.epochs=1"


def shell(command, cwd, **environment):
    """A shell command line, run elsewhere than in the clone."""
    line = command.format(python=sys.executable)
    extra = {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env={**os.environ, **extra}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two seeds on a screen that knows ASCII alone, with strange settings of Matplotlib."""
    folder = tmp_path_factory.mktemp("screen")
    (folder / "matplotlibrc").write_text("text.usetex: True\nfont.size: nonsense\n")
    settings = {"MPLBACKEND": "module://not_installed", "MATPLOTLIBRC": str(folder / "matplotlibrc")}
    done = shell(
        f'{RUN} --config.seeds="(0,1)" --workdir w', folder, PYTHONIOENCODING="ascii", **settings
    )
    assert done.returncode == 0, done.stderr
    assert " +- " in done.stdout and done.stdout.isascii() and "was not drawn" not in done.stderr
    return folder / "w"


@pytest.mark.slow
def test_ascii_and_foreign_plot_settings_cost_nothing(workdir):
    from PIL import Image

    for seed in (0, 1):
        folder = workdir / f"digits/linear/seed{seed}"
        assert files.read_json(folder / "result.json")["test_acc_final"] > 0.8
        with Image.open(folder / "curves.png") as picture:
            assert picture.size == (1080, 420)
    again = shell(f"{{python}} -m rlrr_jax.report {workdir}", workdir, PYTHONIOENCODING="ascii")
    assert again.returncode == 0 and " +- " in again.stdout, again.stderr


def test_a_pipe_that_closes_ends_no_command(workdir):
    done = shell(f"set -o pipefail; {{python}} -m rlrr_jax.report {workdir} | head -1", workdir)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("| task ")


def test_a_run_goes_on_when_nobody_reads_it(tmp_path):
    done = shell(f"set -o pipefail; {RUN} --workdir w | head -1", tmp_path)
    assert done.returncode == 0 and done.stdout == "workdir: w\n", done.stderr
    assert (tmp_path / "w/digits/linear/seed0/result.json").exists()
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_needs_no_standard_error(tmp_path):
    done = shell(f"{RUN} --workdir w 2>&-", tmp_path)
    assert done.returncode == 0 and "| digits | linear |" in squeeze(done.stdout)
    assert (tmp_path / "w/digits/linear/seed0/result.json").exists()


def test_a_picture_that_fails_costs_no_result(tmp_path, capsys):
    def broken():
        raise RuntimeError("no LaTeX")

    assert plots.save(tmp_path / "x.png", broken) is False
    assert capsys.readouterr().err == f"warning: {tmp_path}/x.png was not drawn (no LaTeX)\n"
    assert plots.save(tmp_path / "x.png", lambda: None) is False and not list(tmp_path.iterdir())
    assert plots.save(tmp_path / "x.png", lambda: b"picture") is True
    assert (tmp_path / "x.png").read_bytes() == b"picture"


def test_results_are_written_before_pictures(tmp_path, monkeypatch):
    """Whatever a picture does, even a kill while it is drawn, the result is there."""
    from rlrr_jax import suite
    from rlrr_jax.configs import vtab

    def die(*_):
        raise KeyboardInterrupt

    config = vtab.get_config("digits,method=linear")
    config.epochs, config.num_devices = 1, 1
    monkeypatch.setattr(plots, "curves", die)
    with pytest.raises(KeyboardInterrupt):
        suite.run(config, tmp_path)
    assert files.read_json(tmp_path / "digits/linear/seed0/result.json")["test_acc_final"] > 0.8


def test_interrupted_says_what_is_true(tmp_path):
    code = "from rlrr_jax.errors import one_sentence\ndef f(): raise KeyboardInterrupt\none_sentence(f)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


@pytest.mark.parametrize(
    "begin",
    [
        "from rlrr_jax import screen; screen.prepare()",
        "from rlrr_jax import suite; import contextlib\nwith contextlib.suppress(Exception): suite.run({})",
    ],
    ids=["command", "script"],
)
def test_a_line_comes_when_it_is_printed(begin, tmp_path):
    """Through a pipe, and though the process is killed after it."""
    code = f"{begin}\nprint('a line')\nimport os; os._exit(9)"
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(ROOT)
    how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert (done.returncode, done.stdout) == (9, "a line\n"), done.stderr
