"""What a training step moves through a device's memory, compiled for a device that is not there.

    python benchmarks/bytes.py                                  an H100; needs jax[cuda13], no GPU
    python benchmarks/bytes.py --device v5e:1x1 --forms scanned,unrolled        needs jax[tpu], no TPU

The optimised program is read: every operation at its top level reads its operands and writes its
results once; of an array that it only slices, the slices; loops are multiplied; caches are not counted.
So it is a bound from above on the memory's work, and the milliseconds beside it are that at full
bandwidth. `--top 10` prints the largest operations, `--dump DIR` writes the programs.
"""

import collections
import os
import pathlib
import re
import time

if __name__ == "__main__":  # before JAX
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlrr_jax import backend, methods, models, step
from rlrr_jax.errors import Parser, UserError, first_line, one_sentence, unknown
from rlrr_jax.recipe import Hyper, Recipe
from rlrr_jax.results import tables
from rlrr_jax.runtime import mesh as mesh_lib

# Bytes and FLOPs (bfloat16) a second: NVIDIA's data sheet of the H100 SXM, Google's page of TPU v5e.
SPEED = {"h100": (3.35e12, 989e12), "v5e": (819e9, 197e12)}
FORMS = {  # arguments of the model
    "scanned": dict(unroll=1),
    "unrolled": dict(unroll=None),
    "cudnn": dict(unroll=None, attention="cudnn"),
    "scanned cudnn": dict(unroll=1, attention="cudnn"),
}


def main():
    """Prints the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="h100", help="h100, or a topology of TPUs such as v5e:2x2")
    parser.add_argument("--variants", default="B/16")
    parser.add_argument("--forms", default="scanned,unrolled,cudnn", help=", ".join(FORMS))
    parser.add_argument("--method", default="rlrr")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--dump")
    args = parser.parse_args()
    device, forms = args.device.partition(":")[0], args.forms.split(",")
    for what, name, known in (("device", device, SPEED), *(("form", form, FORMS) for form in forms)):
        if name not in known:
            raise unknown(what, name, known)
    kind, devices = topology(args.device)
    bandwidth, peak = SPEED[device]
    lines = []
    for variant in args.variants.split(","):
        for form in forms:
            with backend.compiling_for(kind):
                compiled, seconds = program(variant, form, args, devices)
            text, memory = compiled.as_text(), compiled.memory_analysis()
            if args.dump:
                name = f"{variant}-{form}-{args.device}.txt".replace("/", "")
                (pathlib.Path(args.dump) / name).write_text(text)
            found = moved(text)
            total = sum(found.values())
            flops = 6 * products(variant) * args.batch / len(devices)
            lines.append([variant, form, f"{total / 1e9:.1f} GB", f"{1e3 * total / bandwidth:.1f} ms"])
            lines[-1] += [
                f"{1e3 * flops / peak:.1f} ms",
                f"{memory.temp_size_in_bytes / 2**30:.2f} GiB",
            ]
            lines[-1] += [f"{seconds:.0f} s"]
            for (what, shape), number in found.most_common(args.top):
                print(f"{number / 1e9:7.2f} GB  {what}  {shape}", flush=True)
    head = ["model", "form", "bytes a step", "at full bandwidth", "matmuls at peak", "temporaries"]
    print(tables.markdown([*head, "compiled in"], lines, left=2))


def topology(name):
    """Platform and devices, none of which are there; UserError without the wheels that know them."""
    extra = "cuda13" if name == "h100" else "tpu"
    try:
        return ("gpu", h100()) if name == "h100" else ("tpu", tpus(name))
    except (NotImplementedError, RuntimeError, ImportError) as e:
        raise UserError(f"{name} is unknown here ({first_line(e)}): pip install 'jax[{extra}]'") from e


def tpus(name):
    """The chips of a topology."""
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def h100():
    """One H100, as `h100.txt` describes it."""
    import jax._src.cudnn.fused_attention_stablehlo as cudnn
    from jax._src import xla_bridge

    xla_bridge.discover_pjrt_plugins()
    known = xla_bridge.canonicalize_platform  # which knows no platform without a device
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name in ("cuda", "gpu") else known(name)
    cudnn.check_compute_capability = lambda wanted: float(wanted) <= 9.0
    cudnn.is_cuda_compute_capability_equal = lambda wanted: wanted == "9.0"
    config = (pathlib.Path(__file__).parent / "h100.txt").read_text()
    found = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    return found.devices


def program(variant, form, args, devices):
    """The compiled steps of a run, and the seconds it took."""
    options = {key: x for key, x in FORMS[form].items() if key in models.attributes(variant)}
    if options.get("unroll", 1) is None:
        size = models.sizes(variant)
        options["unroll"] = size["depth"] if "depth" in size else max(size["depths"])
    model = models.build(variant, 100, dtype=jnp.bfloat16, **options)
    side = models.default_size(variant)
    method = methods.get(args.method)
    recipe = Recipe(model, method, args.batch, 1000, side, precision="default")
    mesh = mesh_lib.make_mesh(devices, 1, args.batch)
    put = lambda tree, spec: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
    )
    shape = jax.ShapeDtypeStruct
    data = {"images": shape((1000, side, side, 3), jnp.uint8), "labels": shape((1000,), jnp.int32)}
    groups = mesh.shape["trial"]
    scalar = lambda kind, *axes: shape((groups, *axes), kind)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), groups))
    rates = [scalar(jnp.float32, recipe.steps * 100), *[scalar(jnp.float32)] * 2, scalar(jnp.bool_)]
    hyper = Hyper(*rates, keys, keys, {})
    frozen = models.shapes(model, side)
    state = mesh_lib.abstract(step.map_start(recipe, mesh), mesh, keys, frozen)
    begun = time.perf_counter()
    steps = step.map_train_steps(recipe, mesh)
    chunk = put((shape((), jnp.int32),) * 3, P())
    hyper = put(hyper, P("trial"))
    lowered = steps.lower(put(frozen, P()), put(data, P()), *state, hyper, chunk)
    return lowered.compile(), time.perf_counter() - begun


def products(variant):
    """Multiplications of matrices for an image forwards: 6 times as many FLOPs in training."""
    model, side = models.build(variant, 100), models.default_size(variant)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    tree = models.shapes(model, side)
    size = models.sizes(variant)
    every = size["depth"] if "depth" in size else max(size["depths"])
    plain = model.clone(unroll=every) if "unroll" in models.attributes(variant) else model
    apply = jax.jit(lambda tree, image: plain.apply({"params": tree}, image))
    return apply.lower(tree, image).cost_analysis()["flops"] / 2


# Reading programs -----------------------------------------------------------------------------

SIZES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "u16": 2}
SIZES |= {"s16": 2, "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1, "f8e5m2": 1}
FREE = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "iota")
FREE += ("copy-done", "all-reduce-done", "opt-barrier", "partition-id", "slice-done")
SLICES = ("dynamic-slice", "slice", "gather")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
Op = collections.namedtuple("Op", "name shape kind operands rest")


def size(shape, chip=False):
    """Bytes of a shape, or of all in a tuple; of a TPU's without what lies on the `chip`, `S(1)`."""
    total = 0
    for kind, sides, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", shape):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * SIZES.get(kind, 4) * (chip or not re.search(r"S\([1-9]", layout))
    return total


def fetched(op):
    """Bytes of a copy or slice that a TPU starts before it is needed, at each end that is in memory."""
    found = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", op.shape)
    target, source = found[:2] if op.kind == "copy-start" else found[1::-1]
    return size(target, True) * sum(size(x) > 0 for x in (target, source))


def computations(text):
    """Name -> operations of each computation; the entry is also called "ENTRY"."""
    out, now = {}, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            now = out.setdefault(head[2], [])
            if head[1]:
                out["ENTRY"] = now
        elif found := LINE.match(line):
            name, shape, kind, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
            now.append(Op(name, shape, kind, operands, rest))
    return out


def read(op, shapes, inner):
    """Bytes that an operation reads: of what a fusion only slices, the slices."""
    if not inner:
        return sum(size(shapes.get(name, "")) for name in op.operands)
    total, number = (
        0,
        {x.name: int(re.match(r"(\d+)", x.rest)[1]) for x in inner if x.kind == "parameter"},
    )
    for parameter, index in number.items():
        whole = size(shapes.get(op.operands[index], "")) if index < len(op.operands) else 0
        users = [x for x in inner if parameter in x.operands]
        if users and all(x.kind in SLICES and x.operands[0] == parameter for x in users):
            total += min(whole, sum(size(x.shape) for x in users))
        elif not (
            users
            and all(x.kind == "dynamic-update-slice" and x.operands[0] == parameter for x in users)
        ):
            total += whole
    return total


def written(op, inner):
    """Bytes that an operation writes: of what it updates in place, the update."""
    shapes = {x.name: x.shape for x in inner}
    updates = [x for x in inner if x.kind == "dynamic-update-slice"] if inner else []
    shape = re.sub(r", s8\[\d+\]\{0\}\)$", ")", op.shape) if op.kind == "custom-call" else op.shape
    whole = size(shape)  # without cuBLAS's workspace
    for update in updates:
        whole -= size(update.shape) - size(shapes.get(update.operands[1], ""))
    return max(whole, 0)


def trips(op, comps):
    """How often a loop goes round, as XLA says or its condition compares; 1 where neither is known."""
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
        return int(count[1])
    condition = comps.get(re.search(r"condition=%?([\w.\-]+)", op.rest)[1], [])
    known = [re.match(r"(\d+)\)", x.rest) for x in condition if x.kind == "constant"]
    known = [int(found[1]) for found in known if found]
    return known[0] if len(known) == 1 and known[0] > 0 else 1


def moved(text):
    """(what, shape) -> bytes that the operations of a step move, without what comes before the loop."""
    comps = computations(text)
    steps = [op for op in comps["ENTRY"] if op.kind == "while"]
    found = collections.Counter()

    def walk(name, times):
        shapes = {}
        for op in comps[name]:
            shapes[op.name] = op.shape
            if op.kind == "while":
                walk(body(op), times * trips(op, comps))
            elif op.kind == "call":
                walk(re.search(r"to_apply=%?([\w.\-]+)", op.rest)[1], times)
            elif op.kind in ("copy-start", "slice-start"):
                found[op.kind, op.shape[:60]] += times * fetched(op)
            elif op.kind not in FREE:
                calls = re.search(r"calls=%?([\w.\-]+)", op.rest) if op.kind == "fusion" else None
                inner = comps.get(calls[1], []) if calls else []
                tag = re.search(r'op_name="([^"]*)"', op.rest)
                what = re.sub(r".*/(?=[^/]*/[^/]*$)", "", tag[1]) if tag else op.kind
                found[what, op.shape[:60]] += times * (read(op, shapes, inner) + written(op, inner))

    body = lambda op: re.search(r"body=%?([\w.\-]+)", op.rest)[1]
    largest = max(steps, key=lambda op: len(comps[body(op)]))
    walk(body(largest), 1)
    return found


if __name__ == "__main__":
    one_sentence(main)
