"""How many programs a suite compiles: VTAB-1k's 19 tasks, each with a step and an evaluation.

    python benchmarks/compilations.py
    python benchmarks/compilations.py --variant Ti/16 --size 224 --methods rlrr,linear,lora

Weights and images are random; the images have each task's stored size, classes, flips, drop path and
numbers, as a run of the suite has them. Compilations are counted as JAX reports them, without a
cache: those of `train_steps` and `eval_step`, which take nearly all the time, and the small rest. The
last line is JSON.
"""

import argparse
import collections
import functools
import json
import time

import jax
import numpy as np

from rlrr_jax import config as config_lib
from rlrr_jax import evaluate, heads, job, models, run_images
from rlrr_jax import run as run_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import one_sentence

LARGE = ("train_steps", "eval_step")


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", default="rlrr,linear")
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--tasks", default="all", help="some of them, joined with +")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [{"method": method, **count(args, method)} for method in args.methods.split(",")]
    print("| method | tasks | train_steps | eval_step | seconds | others | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        large = f"{r['train_steps']} | {r['eval_step']} | {r['seconds']:.0f}"
        print(f"| {r['method']} | {r['tasks']} | {large} | {r['others']} | {r['others_seconds']:.0f} |")
    print(json.dumps({**vars(args), "rows": rows, "device": jax.devices()[0].device_kind}))


def count(args, method):
    """Compilations of a suite's tasks, one after another as a suite runs them."""
    config = vtab.get_config(f"{args.tasks},method={method}")
    config.update(epochs=1, image_size=args.size, seeds=(0,))
    config.model.variant = args.variant
    numbers, seconds = collections.Counter(), collections.Counter()

    def listen(event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            name = next((name for name in LARGE if name in fun_name), "others")
            numbers[name] += 1
            seconds["others" if name == "others" else "large"] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    runs, weights, known = config_lib.resolve(config), functools.cache(random_weights), {}
    heads.share(runs)
    for run in runs:
        begun = time.perf_counter()
        load_weights = functools.partial(weights, size=run.image_size)
        one_step(run, load_weights, known)
        print(f"{run.task} {method}: {time.perf_counter() - begun:.1f} s", flush=True)
    jax.monitoring.unregister_event_duration_listener(listen)
    return {
        "tasks": len(runs),
        **{name: numbers[name] for name in (*LARGE, "others")},
        "seconds": seconds["large"],
        "others_seconds": seconds["others"],
    }


def one_step(run, load_weights, known):
    """Builds a run on random images, trains a step, and evaluates two batches."""
    task, rng = run_images.task_of(run), np.random.default_rng(0)

    @functools.cache
    def load_data(split, crop=None):
        side = min(task.side or run.image_size, run.image_size)
        number = min(task.number(split), 2 * run.eval_batch_size if split == "test" else 1000)
        images = rng.integers(0, 256, (number, side, side, 3), np.uint8)
        return images, rng.integers(0, task.classes, number).astype(np.int32)

    built = job.build([run_lib.of(run)], load_weights, load_data, known)
    state, metrics = built.start()
    train = built.compile(state, metrics)
    state, metrics = train(built.data, state, metrics, 0, 0, 1)
    evaluate.trials(built, state["trainable"], built.held_out[0], run.task, lambda: None)


def random_weights(model, size):
    """A tree for a model, with a head of zeros."""
    rng = np.random.default_rng(0)
    draw = lambda x: (0.02 * rng.standard_normal(x.shape)).astype(np.float32)
    tree = jax.tree.map(draw, models.shapes(model, size))
    return {**tree, "head": jax.tree.map(np.zeros_like, tree["head"])}


if __name__ == "__main__":
    one_sentence(main)
