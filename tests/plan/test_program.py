"""What is read from compiled and traced programs, by hand and against XLA's own counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrr_jax import models
from rlrr_jax.plan import flops, program

PROGRAM = """
HloModule jit_train_steps

%fused (p: f32[10,4], i: s32[]) -> f32[1,4] {
  %p = f32[10,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,4]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,4}
}

%stacked (q: bf16[6,8], new: bf16[1,8], j: s32[]) -> bf16[6,8] {
  %q = bf16[6,8]{1,0} parameter(0)
  %new = bf16[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %update = bf16[6,8]{1,0} dynamic-update-slice(%q, %new, %j, %nil)
}

%inner (arg: (f32[10,4], s32[])) -> (f32[10,4], s32[]) {
  %arg = (f32[10,4]{1,0}, s32[]) parameter(0)
  %x = f32[10,4]{1,0} get-tuple-element(%arg), index=0
  %n = s32[] get-tuple-element(%arg), index=1
  %row = f32[1,4]{1,0} fusion(%x, %n), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/row"}
  ROOT %out = (f32[10,4]{1,0}, s32[]) tuple(%x, %n)
}

%step (arg: (f32[10,4], s32[])) -> (f32[10,4], s32[]) {
  %arg.1 = (f32[10,4]{1,0}, s32[]) parameter(0)
  %a = f32[10,4]{1,0} get-tuple-element(%arg.1), index=0
  %k = s32[] get-tuple-element(%arg.1), index=1
  %b = f32[4,3]{1,0} constant({...})
  %product = f32[10,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all = bf16[6,8]{1,0} constant({...})
  %one = bf16[1,8]{1,0} constant({...})
  %kept = bf16[6,8]{1,0} fusion(%all, %one, %k), kind=kLoop, calls=%stacked
  %loop = (f32[10,4]{1,0}, s32[]) while(%arg.1), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %done = (f32[10,4]{1,0}, s32[]) tuple(%a, %k)
}

ENTRY %main (x: f32[10,4]) -> f32[10,4] {
  %x.1 = f32[10,4]{1,0} parameter(0)
  %before = f32[10,4]{1,0} negate(%x.1)
  %start = (f32[10,4]{1,0}, s32[]) tuple(%before)
  %steps = (f32[10,4]{1,0}, s32[]) while(%start), condition=%less, body=%step
  ROOT %end = f32[10,4]{1,0} get-tuple-element(%steps), index=0
}
"""


def test_bytes_are_counted_by_hand():
    """A matmul whole, a row of a slice and of an update in place, a loop of five, nothing before it."""
    found = program.moved(PROGRAM)
    row = 4 * 4 + 4 + 4 * 4  # read, with its index, and written
    update = 2 * 8 + 4 + 2 * 8
    assert found == {
        ("dot", "f32[10,3]{1,0}"): 4 * (40 + 12 + 30),
        ("body/row", "f32[1,4]{1,0}"): 5 * row,
        ("fusion", "bf16[6,8]{1,0}"): update,
    }
    assert program.moved(PROGRAM, loop=False)["negate", "f32[10,4]{1,0}"] == 2 * 4 * 40  # and before


SUMS = PROGRAM.replace(
    "  %kept = bf16",
    "  %sum = (f32[10,3]{1,0}, f32[7]{0}) all-reduce(%product, %b), to_apply=%add\n  %kept = bf16",
).replace(
    "  %row = f32[1,4]",
    "  %begun = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), dimensions={0}\n"
    "  %whole = f32[8,4]{1,0} all-gather-done(%begun)\n  %row = f32[1,4]",
)


def test_collectives_are_counted_with_their_loops():
    found = program.collectives(SUMS)
    assert found == {"all-reduce": (1, 4 * (30 + 7)), "all-gather": (5, 5 * 4 * 32)}
    assert program.collectives(PROGRAM) == {}


# A TPU's: three fusions that each go on with the same all-gather, of the third of which comes the result.
ASYNC = PROGRAM.replace(
    "  %kept = bf16",
    "  %start = (f32[1,4]{1,0}, f32[4,4]{1,0}) fusion(%x), kind=kLoop, calls=%part\n"
    "  %done = f32[4,4]{1,0} fusion(%start), kind=kLoop, calls=%part.1\n  %kept = bf16",
) + "".join(
    f"""
%{name} (p: f32[1,4]) -> f32[4,4] {{
  %p = f32[1,4]{{1,0}} parameter(0)
  ROOT %all = f32[4,4]{{1,0}} all-gather(%p), channel_id=7, dimensions={{0}}
}}
"""
    for name in ("part", "part.1")
)


def test_a_collective_in_several_fusions_is_one():
    assert program.collectives(ASYNC) == {"all-gather": (1, 4 * 16)}


def traced(function, *arguments):
    return flops.flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def test_flops_of_loops_and_convolutions_by_hand():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    scan = lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]
    assert traced(scan, x, w) == 5 * 2 * 3 * 4 * 4
    assert traced(jax.grad(lambda w: scan(x, w).sum()), w) == 3 * 5 * 2 * 3 * 4 * 4
    branch = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)
    assert traced(branch, x, w) == 2 * 2 * 3 * 4 * 4
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forwards = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert traced(convolve, image, kernel) == forwards
    back = jax.grad(lambda image, kernel: convolve(image, kernel).sum(), (0, 1))
    # The gradient of the kernel slides over what is padded to 9 pixels, that of the image over zeros.
    assert traced(back, image, kernel) == pytest.approx(3 * forwards, rel=0.3)


@pytest.mark.parametrize("variant", ["bundled", "swin_t", "resnet18"])
def test_flops_of_a_model_are_nearly_those_xla_counts(variant):
    """XLA counts what is no matmul, too, and of a scan one block, so depth is unrolled."""
    size = models.sizes(variant)
    scanned = "unroll" in models.attributes(variant)
    every = dict(unroll=max(size.get("depths", (size.get("depth", 1),)))) if scanned else {}
    side = {"bundled": 32, "swin_t": 224}.get(variant, 64)
    model = models.build(variant, 10, **every)
    tree, image = models.shapes(model, side), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    apply = jax.jit(lambda tree, image: model.apply({"params": tree}, image))
    wanted = apply.lower(tree, image).cost_analysis()["flops"]
    found = flops.flops(apply.trace(tree, image).jaxpr.jaxpr)
    assert 0.85 * wanted < found <= 1.02 * wanted
    if scanned:
        again = models.build(variant, 10, unroll=1)
        apply = jax.jit(lambda tree, image: again.apply({"params": tree}, image))
        again_found = flops.flops(apply.trace(tree, image).jaxpr.jaxpr)
        assert found <= again_found < 1.2 * found  # the last block computes all tokens, too
        np.testing.assert_array_less(apply.lower(tree, image).cost_analysis()["flops"], 0.7 * wanted)
