"""Rates of the forms of a matmul that XLA has for CPUs, of which `models/matmul.py` uses the fast ones.

    python benchmarks/matmul.py
    python benchmarks/matmul.py --sizes 1600,192,768

`m,k,n` are rows, inputs and outputs; the default is the first layer of a ViT-B/16's MLP for 32 images.
Prints GFLOP/s, the best of several calls of each.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from jax import lax

LOW, HIGH = jnp.bfloat16, jnp.float32


def product(summed, kind):
    """A function of two matrices: the axes that are summed over, and the dtype of the sums."""
    axes = tuple((axis,) for axis in summed), ((), ())
    return lambda a, b: lax.dot_general(a, b, axes, preferred_element_type=kind)


def in_order(x):
    """A transpose that XLA writes in memory."""
    return lax.optimization_barrier(x.T[None])[0]


# name -> dtype of the factors, their shapes by letters, what is computed
FORMS = {
    "float32": (HIGH, "mk kn", product((1, 0), HIGH)),
    "bfloat16, the result bfloat16": (LOW, "mk kn", product((1, 0), LOW)),
    "bfloat16, the sums float32": (LOW, "mk kn", product((1, 0), HIGH)),
    "the same, second factor transposed": (LOW, "mn kn", product((1, 1), HIGH)),
    "the same, first factor transposed": (LOW, "mk mn", product((0, 0), HIGH)),
    "the same, written in order before": (
        *(LOW, "mk mn"),
        lambda a, b: product((1, 0), HIGH)(in_order(a), b),
    ),
}


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="6304,768,3072")
    parser.add_argument("--calls", type=int, default=8)
    args = parser.parse_args()
    sizes = dict(zip("mkn", map(int, args.sizes.split(","))))
    work = 2 * sizes["m"] * sizes["k"] * sizes["n"]
    print("| form | GFLOP/s |\n| --- | ---: |")
    for name, (kind, shapes, function) in FORMS.items():
        factors = [jnp.full([sizes[c] for c in letters], 0.01, kind) for letters in shapes.split()]
        run = jax.jit(function)
        jax.block_until_ready(run(*factors))
        seconds = []
        for _ in range(args.calls):
            begun = time.perf_counter()
            jax.block_until_ready(run(*factors))
            seconds.append(time.perf_counter() - begun)
        print(f"| {name} | {work / min(seconds) / 1e9:,.0f} |")


if __name__ == "__main__":
    main()
