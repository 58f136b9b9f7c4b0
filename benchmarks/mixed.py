"""A batch whose images name their adapters: merged one after another, or changed in one pass.

    python benchmarks/mixed.py runs/birds/birds/rlrr/seed0

The adapter is RLRR's, copied under several names; of a batch as many images name each. Prints images a
second of both ways (merged models are there already), and how many times as fast the second is: the
median and range over rounds, in which the ways take turns.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from rlrr_jax import adapters, cards, mixed, sides


def timed(given, images, names, **options):
    """Images a second of a batch; the best of two calls."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        mixed.predict(given, images, names, **options)
        seconds.append(time.perf_counter() - begun)
    return len(images) / min(seconds)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--numbers", default="1,4,16,64", help="of adapters")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    adapter = adapters.read(adapters.find(args.adapter))
    on = adapters.backbone(adapter)
    size = sides.pair(cards.image_size(adapter.card))
    images = np.random.default_rng(0).integers(0, 256, (args.batch, *size, 3), np.uint8)
    print("| adapters | merged images/s | changed images/s | ratio |\n| ---: | ---: | ---: | ---: |")
    for number in map(int, args.numbers.split(",")):
        names = [f"{i % number}" for i in range(args.batch)]
        plain = {f"{i}": adapter for i in range(number)}
        tuned = adapters.load(adapter, on)  # which all share: only time is measured
        merged = {name: tuned._replace(params=tuned.params) for name in plain}
        ways = [
            lambda merged=merged, names=names: timed(merged, images, names),
            lambda plain=plain, names=names: timed(plain, images, names, on=on, merge=False),
        ]
        rounds = [[way() for way in ways] for _ in range(args.rounds + 1)][1:]  # the first compiles
        first, second = (statistics.median(each) for each in zip(*rounds))
        ratios = [b / a for a, b in rounds]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {number} | {first:,.1f} | {second:,.1f} | {spread} |", flush=True)
    print(f"\n{args.batch} images of {size}, {jax.device_count()} x {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
