"""How fast images are decoded into the store, and stream from it to the device.

    pip install -e . && python benchmarks/input.py

Writes a VTAB-1k folder of JPEGs of 500 x 375 pixels into a temporary folder and measures, in turns:

    store     decode, resize and write them, as the first start of a task does (`store.load_split`)
    stream    batches from the store to the device, as an evaluation does (`evaluate.batches`)
    decode    the same batches decoded anew, in as many threads: a loader without a store, at each epoch

Prints images/s, medians over rounds with their range; the last line is JSON.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from eval_memory import write_folder
from PIL import Image
from step import timed

from rlrr_jax import evaluate
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.runtime import mesh as mesh_lib


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(args, pathlib.Path(folder))
    print("| what | images/s | range |\n| --- | ---: | ---: |")
    for what, values in rates.items():
        print(
            f"| {what} | {statistics.median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f} |"
        )
    print(json.dumps({"images": args.images, "size": args.size, "cpus": os.cpu_count(), **rates}))


def measure(args, folder):
    """Images/s of each round."""
    task = tasks.get("sun397")._replace(num_test=args.images)
    tasks.TASKS["sun397"] = task
    write_folder(folder / "sun397", args.images, task.classes, (500, 375))
    found = sources.find("sun397", folder, "folder")
    load = lambda: store.load_split("sun397", "test", args.size, found=found, cache_dir=cache)
    cache = folder / "cache"
    rates = {"store": [], "stream": [], "decode": []}
    for _ in range(args.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        rates["store"].append(args.images / timed(load))
        images, labels = load()
        rates["stream"].append(args.images / timed(lambda: stream(images, labels, args.batch)))
        paths = sorted((folder / "sun397/images/test").iterdir())
        paths = [paths[i % len(paths)] for i in range(args.images)]
        rates["decode"].append(args.images / timed(lambda: decode(paths, args.size)))
    return rates


def stream(images, labels, batch):
    """Puts every batch on the device, waiting for each."""
    for arrays in evaluate.batches(images, labels, batch, mesh_lib.make_mesh(jax.devices())):
        jax.block_until_ready(arrays)


def decode(paths, size):
    """Pillow, in as many threads as there are processors."""

    def one(path):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(len(image) for image in pool.map(one, paths))


if __name__ == "__main__":
    main()
