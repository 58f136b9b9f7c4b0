"""Convolutions on CPUs: XLA's own beside one matmul of patches, as models/resnet.py has them.

    python benchmarks/convolution.py

A ResNet-18 at 64 pixels, batch 32, float32: images a second of the forward pass and of the gradient of
all weights, each compiled by itself, in turns. Prints medians over rounds and the median of the ratios.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from rlrr_jax import models
from rlrr_jax.models import resnet

BATCH, SIZE, ROUNDS = 32, 64, 3


def main():
    """The command."""
    model = models.build("resnet18", 10)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), models.shapes(model, SIZE))
    images = jax.random.normal(jax.random.key(0), (BATCH, SIZE, SIZE, 3))
    apply = lambda params: model.apply({"params": params}, images)
    forms = {"matmul": resnet.by_matmul, "XLA's": resnet.by_xla}
    programs = {}
    for name, form in forms.items():
        resnet.by_matmul = resnet.by_xla = form
        for what, function in (
            ("forward", apply),
            ("gradient", jax.grad(lambda p: jnp.square(apply(p)).sum())),
        ):
            programs[name, what] = jax.jit(function).lower(params).compile()
    rates = {key: [] for key in programs}
    for _ in range(ROUNDS):
        for key, program in programs.items():
            jax.block_until_ready(program(params))
            begun = time.perf_counter()
            jax.block_until_ready(program(params))
            rates[key].append(BATCH / (time.perf_counter() - begun))
    print("| | forward images/s | gradient images/s |\n| --- | ---: | ---: |")
    for name in forms:
        cells = [f"{statistics.median(rates[name, what]):.0f}" for what in ("forward", "gradient")]
        print(f"| {name} | {' | '.join(cells)} |")
    ratios = [
        statistics.median(a / b for a, b in zip(rates["matmul", what], rates["XLA's", what]))
        for what in ("forward", "gradient")
    ]
    print(f"| ratio | {ratios[0]:.1f} | {ratios[1]:.1f} |")


if __name__ == "__main__":
    main()
