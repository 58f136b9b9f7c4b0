"""Runs many commands, each in a fork of a process that has imported what they need: much faster.

Reads `[[module, argument, ...], ...]` as JSON from standard input, writes `[{"code", "out", "err",
"seconds"}, ...]` to standard output. Nothing is forked once JAX has looked for devices.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

from flags import xla_flags


def ask(commands, cwd):
    """The answers to commands, two at a time."""
    found = {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    environment = {**os.environ, **found}
    done = subprocess.run(
        [sys.executable, __file__],
        **dict(input=json.dumps(commands), env=environment, cwd=cwd, capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    """Forks and waits."""
    sys.path.insert(0, os.getcwd())
    commands = json.load(sys.stdin)
    modules = {name: importlib.import_module(name) for name, *_ in commands}
    for name in ("suite", "report", "export", "html", "predict"):  # which commands import when they run
        importlib.import_module(f"rlrr_jax.{name}")
    answers, running = {}, {}
    for i, (name, *arguments) in enumerate(commands):
        files = [tempfile.TemporaryFile() for _ in range(2)]
        if not (pid := os.fork()):
            os.dup2(files[0].fileno(), 1), os.dup2(files[1].fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = [name, *arguments]
            end(getattr(modules[name], "run", modules[name].main))
        running[pid] = (i, files, time.monotonic())
        while len(running) > 1 or (running and i + 1 == len(commands)):
            pid, status = os.wait()
            j, files, begun = running.pop(pid)
            texts = [(f.seek(0), f.read().decode())[1] for f in files]
            code = os.waitstatus_to_exitcode(status)
            times = {"seconds": time.monotonic() - begun}
            answers[j] = {"code": code, "out": texts[0], "err": texts[1], **times}
    print(json.dumps([answers[i] for i in range(len(commands))]))


def end(program):
    """Runs a command to the end of its process, without Python's own, which takes longer than most."""
    from rlrr_jax.errors import one_sentence

    code = 0
    try:
        one_sentence(program)
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
