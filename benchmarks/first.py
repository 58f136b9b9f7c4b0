"""Seconds from the shell to the first steps of the bundled task, without and with cached programs.

python benchmarks/first.py
"""

import os
import subprocess
import sys
import tempfile
import time

METHODS, STARTS = ("linear", "rlrr"), 3


def seconds(method, home):
    """Until the first loss is shown by a process with a home of its own."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "rlrr_jax.main", f"--workdir={workdir}/run"]
        command += ["--config", f"configs/vtab.py:hearts,method={method}"]
        begun, shown = time.perf_counter(), b""
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0)
        with subprocess.Popen(command, env={**os.environ, "HOME": home}, **quiet) as process:
            while b"loss=" not in shown and (more := process.stderr.read(64)):
                shown += more
            taken = time.perf_counter() - begun
            process.terminate()
            process.stderr.read()
    return taken if b"loss=" in shown else float("nan")


def main():
    """The command; from the repository's root."""
    print("| method | empty cache | filled, best of two |\n| --- | ---: | ---: |")
    for method in METHODS:
        with tempfile.TemporaryDirectory() as home:
            first, *others = [seconds(method, home) for _ in range(STARTS)]
        print(f"| {method} | {first:.1f} s | {min(others):.1f} s |", flush=True)


if __name__ == "__main__":
    main()
