"""Time of predictions with early exits beside the FLOPs they save, in one run.

    python -m rlrr_jax.projects.exits.benchmark RUN    # a run's folder, with exits
    python -m rlrr_jax.projects.exits.benchmark RUN --images 5400 --thresholds 2,0.99,0.9,0

Images are those of the run's test set, decoded before. The whole network, without exits, is timed
among the thresholds; each time is the best of three. A threshold of 2 lets no image leave early.
"""

import argparse
import pathlib
import time

import numpy as np

from rlrr_jax import adapters, cards, run_images
from rlrr_jax.data import store
from rlrr_jax.projects.exits import leave


def pictures(run, number):
    """Test images of a run, uint8 [N, h, w, 3]."""
    found, task = run_images.locate(run), run_images.task_of(run)
    images, _ = store.load_split(task, "test", run_images.pixels(run), found, run.data.cache_dir)
    return np.asarray(images[:number])


def whole(tuned, images, size):
    """Logits of all images, as `python -m rlrr_jax.predict` computes them without exits."""
    for start in range(0, len(images), size):
        np.asarray(tuned.logits(images[start : start + size]))


def best(function, rounds=3):
    """Seconds of the fastest call, after one that compiles."""
    function()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--thresholds", default="2,0.999,0.99,0.9,0")
    args = parser.parse_args()
    path = pathlib.Path(args.run) / "adapter.safetensors"
    adapter = adapters.read(path)
    exits = leave.load(adapter, adapters.backbone(adapter))
    plain = adapters.Tuned(exits.model, exits.trees[-1], exits.card)
    images = pictures(adapter.run, args.images // args.batch * args.batch)
    base = best(lambda: whole(plain, images, args.batch))
    size = cards.image_size(exits.card)
    costs = leave.flops(exits.model, exits.at, size, exits.own)
    full = leave.flops(exits.model, (), size)[-1]
    print(f"{len(images)} images, batches of {args.batch}; the whole network takes {base:.2f} s")
    print("| threshold | FLOPs | time |\n| ---: | ---: | ---: |")
    for threshold in map(float, args.thresholds.split(",")):
        leaver = leave.Leaver(exits, threshold, args.batch)
        seconds = best(lambda leaver=leaver: leaver(images))
        share = leaver.counts @ costs / leaver.counts.sum() / full
        print(f"| {threshold:g} | {share:.2f} | {seconds / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
