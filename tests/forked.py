"""Commands as `python -m` runs them, in forks of a process that has imported what they need.

Importing JAX, Orbax and Matplotlib takes a third of a short run's time. Nothing is forked once JAX has
looked for devices, so a command has the devices and flags of its own environment. How a process starts is
tested with real ones, see test_stop.py, test_screen.py and the README's first command.
"""

import atexit
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
import time
import traceback

from flags import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
IMPORTED = [f"rlrr_jax.{name}" for name in ("suite", "report", "export", "html", "predict", "combine")]
IMPORTED += ["absl.app", "ml_collections.config_flags", "matplotlib.figure"]
IMPORTED += ["matplotlib.backends.backend_agg"]


class Process:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, words, cwd, environment):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.returncode = None
        job = {"words": [str(x) for x in words], "cwd": str(cwd), "environment": environment}
        server = _server()
        server.stdin.write(json.dumps({**job, "folder": str(self.folder)}) + "\n")
        server.stdin.flush()
        self.pid = int(self._said("pid", server, 60))

    def _said(self, name, server, seconds):
        end = time.monotonic() + seconds
        while not (self.folder / name).exists():
            if server.poll() is not None:
                raise AssertionError("the process that is forked has ended")
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", seconds)
            time.sleep(0.01)
        return (self.folder / name).read_text()

    def poll(self):
        return self.wait(0) if self.returncode is not None or (self.folder / "code").exists() else None

    def wait(self, timeout=600):
        """Its exit code, that of a signal negative; afterwards `stdout` and `stderr` are its texts."""
        if self.returncode is None:
            code = int(self._said("code", _server(), timeout))
            self.stdout, self.stderr = ((self.folder / x).read_text() for x in ("out", "err"))
            shutil.rmtree(self.folder)
            self.returncode = code
        return self.returncode

    def communicate(self, timeout=600):
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number):
        os.kill(self.pid, number)


def start(words, cwd=ROOT, **environment):
    """Starts a module with its arguments; XLA's flags are the tests' unless given."""
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
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if not os.fork():
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
    part.write_text(str(number))
    part.rename(part.with_suffix(""))


def command(job):
    """What `python -m MODULE ARGUMENT...` does, without Python's own end, which takes half a second."""
    code = 1
    try:
        for number, name in enumerate((os.devnull, "out", "err")):
            opened = os.open(pathlib.Path(job["folder"], name), os.O_RDWR | os.O_CREAT)
            os.dup2(opened, number)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        first = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:3] = [job["cwd"], *filter(None, first), str(ROOT)]
        module, *sys.argv[1:] = job["words"]
        sys.modules.pop(module, None)  # it is run, not imported
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
