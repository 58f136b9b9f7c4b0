"""Commands as `python -m` runs them, in forks of a process that has imported what they need.

Importing JAX, Orbax and Matplotlib takes a third of a short run's time. Nothing is forked once JAX has
looked for devices, so $XLA_FLAGS and what else is read as a command runs are its own; JAX's own variables
are those of the tests. How processes start is tested with real ones: test_imports.py, test_stop.py.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref

import jax
import numpy as np
from flags import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
IMPORTED = [f"rlrr_jax.{name}" for name in ("suite", "report", "export", "html", "predict", "combine")]
IMPORTED += ["absl.app", "ml_collections.config_flags", "matplotlib.figure"]
IMPORTED += ["matplotlib.backends.backend_agg"]


class Process:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, words, cwd, environment):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.returncode = self.pid = None
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for name in ("out", "err"):
            (self.folder / name).touch()
        job = {"words": [str(x) for x in words], "cwd": str(cwd), "environment": environment}
        _server().stdin.write(json.dumps({**job, "folder": str(self.folder)}) + "\n")
        _server().stdin.flush()
        self.pid = int(self._said("pid", 600))
        weakref.finalize(self, _kill, self.folder, self.pid)  # before its folder goes

    def _said(self, name, seconds):
        end = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert _server().poll() is None, "the process that is forked has ended"
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", seconds)
            time.sleep(0.01)
        return (self.folder / name).read_text()

    def poll(self):
        return self.wait(0) if self.returncode is not None or (self.folder / "code").exists() else None

    def wait(self, timeout=600):
        """Its exit code, that of a signal negative; afterwards `stdout` and `stderr` are its texts."""
        if self.returncode is None:
            code = int(self._said("code", timeout))
            self.stdout, self.stderr = ((self.folder / x).read_text() for x in ("out", "err"))
            self.returncode = code
        return self.returncode

    def communicate(self, timeout=600):
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number):
        _kill(self.folder, self.pid, number)


def _kill(folder, pid, number=signal.SIGKILL):
    """Sends a signal to a command that has not ended."""
    if not (folder / "code").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


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


# The process that is forked ---------------------------------------------------------------------


@functools.cache
def _server():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    pipes = dict(stdin=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    server = subprocess.Popen([sys.executable, __file__], **pipes)
    atexit.register(server.kill)
    return server


def serve():
    """Forks for each line of standard input."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert not jax._src.xla_bridge._backends, "devices were looked for"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        if not os.fork():
            signal.signal(signal.SIGINT, interrupt)
            keep(json.loads(line))


def keep(job):
    """Forks a command and says how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        command(job)
    say(job, "pid", pid)
    say(job, "code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def say(job, name, number):
    part = pathlib.Path(job["folder"], f"{name}.part")
    with contextlib.suppress(FileNotFoundError):  # nobody asks any more
        part.write_text(str(number))
        part.rename(part.with_suffix(""))


def command(job):
    """What `python -m MODULE ARGUMENT...` does."""
    code = 1
    try:
        for number, name in enumerate((os.devnull, "out", "err")):
            os.dup2(os.open(pathlib.Path(job["folder"], name), os.O_RDWR), number)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        first = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:3] = [job["cwd"], *filter(None, first), str(ROOT)]
        module, *sys.argv[1:] = job["words"]
        if not hasattr(sys.modules.get(module), "__path__"):
            sys.modules.pop(module, None)  # it is run, not imported
        np.random.seed()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, int | None):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:  # as Python ends, but for what it destroys
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
