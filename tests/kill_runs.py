"""Kills runs at random moments, again and again: every run must end as an uninterrupted one does.

    python tests/kill_runs.py --kills 100

Each run is started until it has finished; each start but the last is killed (SIGKILL) after a random
time.
Prints one line for each finished run, exits with 1 at the first difference.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from flags import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:digits,method=rlrr")
COMMAND += ("--config.epochs=4", "--config.protocol=official", "--config.drop_path=0.2")
COMMAND += ("--config.checkpoint_seconds=0", "--config.model.depth=2")
TIMES = ("wall_seconds", "images_per_second", "seconds")


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_runs(args.kills, pathlib.Path(folder), random.Random(args.seed))


def kill_runs(kills, folder, rng):
    """Raises SystemExit at the first run that is not as the reference; returns the finished runs."""
    begun = time.monotonic()
    start(folder / "reference").wait()
    seconds = time.monotonic() - begun
    reference, done, finished = contents(folder / "reference"), 0, 0
    while done < kills:
        workdir, mine = folder / "run", 0
        while True:
            process = start(workdir)
            try:
                process.wait(rng.uniform(0, 1.2 * seconds) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                whole(workdir)
                done, mine = done + 1, mine + 1
        if process.returncode or contents(workdir) != reference:
            sys.exit(f"error: after {mine} kills the run in {workdir} is another: {process.returncode}")
        finished += 1
        print(f"run {finished}: killed {mine} times, the same; {done} kills in all", flush=True)
        shutil.rmtree(workdir)
    return finished


def start(workdir):
    """The run's process."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu"}
    out = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([*COMMAND, f"--workdir={workdir}"], cwd=ROOT, env=environment, **out)


def whole(workdir):
    """Raises ValueError if some file is half-written."""
    for path in workdir.rglob("*.json"):
        if "checkpoints" not in path.parts:
            json.loads(path.read_text())
    for path in workdir.rglob("*.jsonl"):
        list(map(json.loads, path.read_text().splitlines()))


def contents(workdir):
    """All results but times."""
    run = workdir / "digits/rlrr/seed0"
    plain = lambda row: {k: v for k, v in row.items() if k not in TIMES}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return (
        plain(json.loads((run / "result.json").read_text())),
        [plain(json.loads(line)) for line in lines],
        (run / "adapter.safetensors").read_bytes(),
    )


if __name__ == "__main__":
    main()
