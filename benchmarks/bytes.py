"""What a training step moves through a device's memory, compiled for a device that is not there.

    python benchmarks/bytes.py                                  an H100; needs jax[cuda13], no GPU
    python benchmarks/bytes.py --device v5e:1x1 --forms scanned,unrolled        needs jax[tpu], no TPU

The optimised program is read: every operation at its top level reads its operands and writes its
results once; of an array that it only slices, the slices; loops are multiplied; caches are not counted.
So it is a bound from above on the memory's work, and the milliseconds beside it are that at full
bandwidth. `--top 10` prints the largest operations, `--dump DIR` writes the programs.
"""

import itertools
import os
import pathlib

if __name__ == "__main__":  # before JAX
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")

from rlrr_jax import config as config_lib
from rlrr_jax import models
from rlrr_jax import run as run_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import Parser, one_sentence, unknown
from rlrr_jax.plan import measure, outline, program, topology
from rlrr_jax.results import tables

FORMS = {  # arguments of the model; None is all blocks
    "scanned": dict(unroll=1, attention="xla"),
    "unrolled": dict(unroll=None, attention="xla"),
    "cudnn": dict(unroll=None, attention="cudnn"),
    "scanned cudnn": dict(unroll=1, attention="cudnn"),
}


def main():
    """Prints the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="h100:1", help="h100:1, or a topology of TPUs: v5e:2x2")
    parser.add_argument("--variants", default="B/16")
    parser.add_argument("--forms", default="scanned,unrolled,cudnn", help=", ".join(FORMS))
    parser.add_argument("--method", default="rlrr")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--dump")
    args = parser.parse_args()
    forms, lines = args.forms.split(","), []
    for form in forms:
        if form not in FORMS:
            raise unknown("form", form, FORMS)
    with topology.compiling_for(args.device) as devices:
        for variant, form in itertools.product(args.variants.split(","), forms):
            built = outline.of([run(variant, form, args)], devices.devices)
            found = measure.Cache(devices.chip, lambda text: None).train(built)
            text = found.compiled.as_text()
            if args.dump:
                name = f"{variant}-{form}-{args.device}.txt".replace("/", "")
                (pathlib.Path(args.dump) / name).write_text(text)
            ms = [1e3 * found.moved / devices.chip.bandwidth, 1e3 * found.flops / devices.chip.bfloat16]
            lines.append([variant, form, f"{found.moved / 1e9:.1f} GB", *(f"{x:.1f} ms" for x in ms)])
            lines[-1] += [f"{found.temporary / topology.GIB:.2f} GiB", f"{found.seconds:.0f} s"]
            for (what, shape), number in program.moved(text).most_common(args.top):
                print(f"{number / 1e9:7.2f} GB  {what}  {shape}", flush=True)
    head = ["model", "form", "bytes a step", "at full bandwidth", "matmuls at peak", "temporaries"]
    print(tables.markdown([*head, "compiled in"], lines, left=2))


def run(variant, form, args):
    """A run of a form."""
    config = vtab.get_config(f"cifar,method={args.method}")
    config.model.variant, config.batch_size, config.pretrained.name = variant, args.batch, "any.npz"
    config.drop_path = 0.1
    size = models.sizes(variant)
    options = {key: x for key, x in FORMS[form].items() if key in models.attributes(variant)}
    if options.get("unroll", 1) is None:
        options["unroll"] = size["depth"] if "depth" in size else max(size["depths"])
    config.model.update(options)
    (resolved,) = config_lib.resolve(config)
    return run_lib.of(resolved)


if __name__ == "__main__":
    one_sentence(main)
