"""How far the starts of RLRR move what a backbone says, before any training.

    python benchmarks/start.py
    python benchmarks/start.py --variant Ti/16 --pretrained FILE --task cifar --data_dir DIR --size 112

Prints the cosine between the class tokens of a backbone with its adapters in place and without, the
mean over 64 validation images, for three seeds.
"""

import argparse

import jax
import jax.numpy as jnp

from rlrr_jax import config as config_lib
from rlrr_jax import methods, run_images, run_model
from rlrr_jax.configs import vtab
from rlrr_jax.data import store
from rlrr_jax.data.resize import normalize
from rlrr_jax.weights import names

IMAGES, SEEDS = 64, (0, 1, 2)
STARTS = ("paper", "damped", "identity")


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="bundled")
    parser.add_argument("--pretrained", default="bundled", help="as config.pretrained.name")
    parser.add_argument("--task", default="hearts")
    parser.add_argument("--data_dir", help="as config.data.dir")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    args = parser.parse_args()
    run = resolve(args)
    path, _ = names.fetch(run.pretrained.name)
    for note in run_model.follow(run, path):
        print(note)
    model = run_model.build_model(run)
    frozen = run_model.load_weights(run, path, model)
    images = normalize(pictures(run), args.size)
    print(f"| {args.variant}, {args.task} at {args.size} px | cosines |\n| --- | ---: |")
    for start in STARTS:
        found = [f"{cosine(model, frozen, images, start, seed):.2f}" for seed in SEEDS]
        print(f"| init={start} | {', '.join(found)} |")


def resolve(args):
    """The run of a task with these weights."""
    config = vtab.get_config(f"{args.task},method=rlrr")
    config.model.variant, config.pretrained.name = args.variant, args.pretrained
    config.image_size, config.data.dir, config.seeds = args.size, args.data_dir, (0,)
    (run,) = config_lib.resolve(config)
    return run


def pictures(run):
    """Validation images of a run's task [n, h, w, 3] uint8."""
    found, task = run_images.locate(run), run_images.task_of(run)
    images, _ = store.load_split(task, task.parts[1], run_images.pixels(run), found)
    return jnp.asarray(images[:IMAGES])


def cosine(model, frozen, images, start, seed):
    """Mean cosine between class tokens with the adapters of a start and without."""
    method = methods.get("rlrr", init=start)
    merged = methods.merge(method, frozen, methods.start(method, jax.random.key(seed), frozen))
    a, b = (tokens(model)(params, images) for params in (frozen, merged))
    cosines = (a * b).sum(1) / jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1)
    return float(cosines.mean())


def tokens(model):
    """A function from parameters and images to normalised class tokens [n, D]."""

    @jax.jit
    def apply(params, images):
        _, kept = model.apply({"params": params}, images, mutable=["intermediates"])
        return kept["intermediates"]["encoded"][0][:, 0]

    return apply


if __name__ == "__main__":
    main()
