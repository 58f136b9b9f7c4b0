"""Commands as `python -m` runs them, in forks of a process that has imported what they need.

Importing JAX, Orbax and Matplotlib takes a third of a short run's time. Nothing is forked once JAX has
looked for devices, so $XLA_FLAGS and what else is read as a command runs are its own; JAX's own variables
are those of the tests. How processes start is tested with real ones: test_imports.py, test_stop.py.
"""

import gc
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import weakref

import jax
import numpy as np
from flags import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
IMPORTED = [f"rlrr_jax.{name}" for name in ("suite", "report", "export", "html", "predict", "combine")]
IMPORTED += ["absl.app", "ml_collections.config_flags", "matplotlib.figure"]
IMPORTED += ["matplotlib.backends.backend_agg"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED)


class Process:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, words, cwd, environment):
        self.folder = tempfile.TemporaryDirectory()
        how = (list(map(str, words)), str(cwd), environment, self.folder.name)
        self.process = FORKS.Process(target=_command, args=how, daemon=True)  # it ends with the tests
        self.process.start()
        weakref.finalize(self, self.process.kill)

    @property
    def returncode(self):
        """Its exit code, that of a signal negative; None while it runs."""
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=600):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return self.returncode

    @property
    def stdout(self):
        return pathlib.Path(self.folder.name, "out").read_text()

    @property
    def stderr(self):
        return pathlib.Path(self.folder.name, "err").read_text()

    def communicate(self, timeout=600):
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.process.pid, number)


def start(words, cwd=ROOT, **environment):
    """Starts a module with its arguments; XLA's flags are the tests' unless given."""
    assert not any(key.startswith("JAX_") for key in environment), "read when JAX is imported"
    return Process(words, cwd, {**os.environ, "XLA_FLAGS": xla_flags(), **environment})


def run(words, cwd=ROOT, timeout=600, **environment):
    """A command that has ended: `returncode`, `stdout`, `stderr`."""
    process = start(words, cwd, **environment)
    process.wait(timeout)
    return process


def ask(commands, cwd=ROOT):
    """The ends of many commands, two of which run at a time."""
    processes = []
    for words in commands:
        if len(processes) > 1:
            processes[-2].wait()
        processes.append(start(words, cwd))
    for process in processes:
        process.wait()
    return processes


def _command(words, cwd, environment, folder):
    """What `python -m MODULE ARGUMENT...` does, in the fork."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(pathlib.Path(folder, name), os.O_RDWR | os.O_CREAT), number)
    assert not jax._src.xla_bridge._backends, "devices were looked for"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    first = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in sys.path if not path.startswith(str(ROOT / "tests"))]
    sys.path[:] = [cwd, *first, str(ROOT), *others]
    module, *sys.argv[1:] = words
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # it is run, not imported
    np.random.seed()
    gc.freeze()  # garbage is not looked for among what was imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)
