"""How long the whole of VTAB-1k takes here: 19 tasks by each protocol, from measured speeds.

    pip install -e . && python benchmarks/suite_time.py                # B/16 by the authors' recipes
    python benchmarks/suite_time.py --seeds 3 --trials 3               # three seeds, trained together

Measures training (drop path on) and evaluation of one batch shape and the compile time, then adds up
the steps and images that `forecast.cost` counts, the compilations (one for all tasks, and one for the
search of "vtab", see compilations.py) and a merge for each evaluation. Decoding images, once ever, is
not in it: see input.py. The last line is JSON.
"""

import argparse
import json
import statistics

import jax
from ours import Ours
from step import timed

from rlrr_jax import config as config_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import one_sentence
from rlrr_jax.runs import forecast, search


def main():
    """The command."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="rlrr")
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=1, help="trained together")
    parser.add_argument("--steps", type=int, default=1 if cpu else 32, help="in a turn")
    parser.add_argument("--eval_batch", type=int, default=32 if cpu else 256)
    parser.add_argument("--rounds", type=int, default=2 if cpu else 5)
    args = parser.parse_args()
    speed = measure(args)
    times = {protocol: total(args, protocol, speed) for protocol in ("fast", "official", "vtab")}
    print(
        f"{args.method} {args.variant}, {args.trials} trial(s) at once: trains {speed['train']:,.1f} "
        f"and evaluates {speed['eval']:,.1f} images/s, compiles in {speed['compile']:.1f} s, merges in "
        f"{speed['merge']:.2f} s"
    )
    print(f"| protocol | 19 tasks, {args.seeds} seed(s) |\n| --- | ---: |")
    for protocol, seconds in times.items():
        print(f"| {protocol} | {forecast.duration(seconds)} |")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(json.dumps({"device": device, **vars(args), **speed, "seconds": times}))


def measure(args):
    """Images/s over all trials, and seconds."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    common = dict(method=args.method, variant=args.variant, dtype=dtype, trials=args.trials)
    training = Ours(**common, batch=32, steps=args.steps)
    compiled = training.compile()
    training.fill()
    testing = Ours(**{**common, "trials": 1}, batch=args.eval_batch, steps=4)
    testing.fill()
    rates = {"train": [], "eval": [], "merge": []}
    for _ in range(args.rounds):
        training.train(1)
        seconds = timed(lambda: training.train(args.steps))
        rates["train"].append(32 * args.steps * args.trials / seconds)
        testing.evaluate(1)
        rates["eval"].append(4 * args.eval_batch / timed(lambda: testing.evaluate(4)))
        rates["merge"].append(timed(testing.merge))
    seconds = compiled["train_compile_seconds"] + compiled["eval_compile_seconds"]
    return {"compile": seconds, **{what: statistics.median(values) for what, values in rates.items()}}


def total(args, protocol, speed):
    """Seconds of all 19 tasks."""
    config = vtab.get_config(f"all,method={args.method}")
    config.seeds, config.protocol = tuple(range(args.seeds)), protocol
    config.model.variant = args.variant
    seconds, compiled = 0.0, set()
    for run in config_lib.resolve(config):
        runs = [run]
        if protocol == "vtab" and run.seed == 0:
            runs += search.settings(run)
        for one in runs:
            cost = forecast.cost(one)
            seconds += cost.images / speed["train"] + cost.evaluated / speed["eval"]
            seconds += cost.evaluations * speed["merge"]
            compiled.add(one.protocol)  # which trains on 800 images or on all
    return seconds + len(compiled) * speed["compile"]


if __name__ == "__main__":
    one_sentence(main)
