"""Speed, memory and compile time of our own step, and how much of the device's matmul rate it reaches.

    pip install -e . && python benchmarks/step.py                       # B/16; float32 on CPUs
    python benchmarks/step.py --batch 32,128 --trials 1,8               # on a GPU: bfloat16
    python benchmarks/step.py --precision highest,bfloat16              # on a CPU
    python benchmarks/step.py --variant bundled --size 32 --batch 32 --trials 1,8 --steps 32
    python benchmarks/step.py --variant H/14 --compile_only             # needs no memory
    python benchmarks/step.py --method rlrr --loss cross_entropy,pace,pace_lazy,pace_fast

Each combination of method, model, dtype, batch, size, trials and loss is a case. All are compiled,
then take turns: a round is some training steps and evaluated batches of each, so that a slow minute
hits all of them. Prints medians over rounds, the ratio of each case to the first with its range over
rounds, and the share of the rate of a plain matmul of the same dtype, measured in the same turns; the
last line is JSON. Speeds count the images of all trials.

FLOPs are those of matmuls, 2 for a multiplication with its addition; training counts three times what
evaluating does. `plain` evaluates the backbone itself: a merged model should be as fast. Drop path and
flip are on in training, as in most recipes (`--drop_path 0`: off).
"""

import argparse
import itertools
import json
import statistics
import time

import jax
from ours import Ours

KEYS = ("method", "variant", "dtype", "precision", "batch", "size", "trials", "loss")
COLUMNS = (
    "train images/s",
    "ratio",
    "of matmul",
    "eval images/s",
    "ratio",
    "of matmul",
    "plain/merged",
)


def main():
    """The command."""
    args = arguments()
    jax.config.update("jax_enable_compilation_cache", args.cache)
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
    cases = [dict(zip(KEYS, values)) for values in itertools.product(*(getattr(args, k) for k in KEYS))]
    rows = measure(cases, args)
    print(compile_table(rows))
    if not args.compile_only:
        print(f"\n{speed_table(rows)}")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"\n{json.dumps({'device': device, 'jax': jax.__version__, 'rows': rows})}")


def arguments():
    """Of the command; defaults go by the platform."""
    several = lambda kind: lambda text: [kind(x) for x in text.split(",")]
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", type=several(str), default=["rlrr", "full"], help="or rlrr/rank=4")
    parser.add_argument("--variant", type=several(str), default=["B/16"], help="or bundled")
    parser.add_argument("--dtype", type=several(str), default=["float32" if cpu else "bfloat16"])
    parser.add_argument("--precision", type=several(str), default=[None], help="as config.precision")
    parser.add_argument("--batch", type=several(int), default=[8] if cpu else [32, 128])
    parser.add_argument("--size", type=several(int), default=[224])
    parser.add_argument("--trials", type=several(int), default=[1])
    parser.add_argument("--loss", type=several(str), default=["cross_entropy"], help="or pace, ...")
    parser.add_argument("--steps", type=int, default=2 if cpu else 20, help="in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drop_path", type=float, default=0.1)
    parser.add_argument("--unroll", type=int, help="as config.model.unroll")
    parser.add_argument("--remat", action="store_true", help="as config.model.remat")
    parser.add_argument("--attention", default="xla", help="or cudnn")
    parser.add_argument("--cache", default="", help="folder of compiled programs; default: none")
    parser.add_argument("--compile_only", action="store_true")
    return parser.parse_args()


def measure(cases, args):
    """A row for each case; rates are lists over rounds."""
    programs, rows = [], []
    options = {key: getattr(args, key) for key in ("drop_path", "unroll", "remat", "attention")}
    for case in cases:
        programs.append(Ours(**case, **options, steps=args.steps))
        rates = {key: [] for key in ("train", "eval", "plain", "merge", "matmul")}
        rows.append({**case, **programs[-1].compile(), **rates})
        print(f"{name(case)}: compiled", flush=True)
        if not args.compile_only:
            programs[-1].fill()
    for i in range(0 if args.compile_only else args.rounds):
        for program, row in zip(programs, rows):
            turn(program, row, args.steps)
        print(f"round {i + 1} of {args.rounds} done", flush=True)
    return rows


def turn(program, row, steps):
    """Adds a round to a row: images/s, seconds of a merge, GFLOP/s of a matmul."""
    images = program.batch * steps * program.trials
    for what, function in (
        ("train", program.train),
        ("eval", program.evaluate),
        ("plain", program.plain),
    ):
        if what == "eval":
            row["merge"].append(timed(program.merge))
        function(1)  # whoever ran before has the caches
        row[what].append(images / timed(lambda function=function: function(steps)))
    row["matmul"].append(program.matmul_flop() / min(timed(program.matmul) for _ in range(5)) / 1e9)


def timed(function):
    """Seconds of a call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def compile_table(rows):
    """Compile times, memory and work, as Markdown."""
    header = ["case", "train compiles in", "eval compiles in", "train memory", "GFLOP/image"]
    out = [header, ["---", *["---:"] * 4]]
    for r in rows:
        seconds = (f"{r[f'{what}_compile_seconds']:.1f} s" for what in ("train", "eval"))
        out.append([name(r), *seconds, f"{r['train_gib']:.2f} GiB", f"{r['gflop']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in out)


def speed_table(rows):
    """Speeds, as Markdown."""
    out = [["case", *COLUMNS, "merge"], ["---", *["---:"] * (len(COLUMNS) + 1)]]
    for r in rows:
        cells = [name(r)]
        for what, times in (("train", 3), ("eval", 1)):
            share = [times * r["gflop"] * a / b for a, b in zip(r[what], r["matmul"])]
            cells += [f"{statistics.median(r[what]):,.2f}", ratio(r[what], rows[0][what])]
            cells += [f"{100 * statistics.median(share):.0f} %"]
        cells += [ratio(r["plain"], r["eval"]), f"{statistics.median(r['merge']):.3f} s"]
        out.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in out)


def ratio(ours, others):
    """Median and range of the ratios of each round: `"1.02 (0.99 to 1.03)"`."""
    ratios = [a / b for a, b in zip(ours, others)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def name(case):
    """`"rlrr B/16 float32, batch 8, 224 px"`, with the number of trials if there are several."""
    trials = f", {case['trials']} trials" if case["trials"] > 1 else ""
    trials += f", {case['loss']}" if case["loss"] != "cross_entropy" else ""
    trials += f", matmuls in {case['precision']}" if case["precision"] else ""
    return "{method} {variant} {dtype}, batch {batch}, {size} px".format(**case) + trials


if __name__ == "__main__":
    main()
