"""Six runs of the bundled tasks: one process with one core against parts with a core each.

    python benchmarks/parts.py [--parts 2] [further arguments of rlrr_jax.main]

Each start is a new process with an empty cache of programs; seconds are those from its start to its
end, imports and compiling included. Exits with 1 unless every trained value is the same to the bit.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from safetensors.numpy import load_file

COMMAND = [sys.executable, "-m", "rlrr_jax.main", "--config", "configs/vtab.py"]


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=int, default=2)
    args, rest = parser.parse_known_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < args.parts:
        parser.error(f"{args.parts} parts need a core each, and there are {len(cores)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        whole = seconds(folder / "whole", [["--part=off"]], rest, cores)
        flags = [[f"--part={i + 1}/{args.parts}"] for i in range(args.parts)]
        dealt = seconds(folder / "dealt", flags, rest, cores)
        number, different = compared(folder / "whole", folder / "dealt")
    print("| start | seconds | times as fast |\n| --- | ---: | ---: |")
    print(f"| one process, one core | {whole:.0f} | 1.00 |")
    print(f"| {args.parts} parts, a core each | {dealt:.0f} | {whole / dealt:.2f} |")
    print(f"\n{number} adapters compared, different: {', '.join(different) or 'none'}")
    sys.exit(bool(different) or not number)


def seconds(workdir, flags, rest, cores):
    """What the slowest of these starts takes, each on a core of its own."""
    begun, started = time.monotonic(), []
    for core, own in zip(cores, flags):
        place = {"JAX_COMPILATION_CACHE_DIR": f"{workdir}-programs", "PYTHONUNBUFFERED": "1"}
        command = ["taskset", "-c", str(core), *COMMAND, f"--workdir={workdir}", *own, *rest]
        with open(f"{workdir}-{core}.log", "w") as log:
            started.append(
                subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log)
            )
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(f"error: exit codes {codes}: {pathlib.Path(log.name).read_text()[-2000:]}")
    return time.monotonic() - begun


def compared(one, other):
    """How many adapters there are, and which differ in a bit."""
    paths = sorted(one.glob("*/*/*/adapter.safetensors"))
    names = [path.relative_to(one) for path in paths]
    different = []
    for name in names:
        a, b = load_file(one / name), load_file(other / name)
        if a.keys() != b.keys() or not all(np.array_equal(a[k], b[k]) for k in a):
            different.append(str(name.parent))
    return len(names), different


if __name__ == "__main__":
    main()
