"""Speed and memory of this machine, appended to its page: `benchmarks/tables/<device>.md`.

    pip install -e . && python benchmarks/table.py
    pip install torch && python benchmarks/table.py     # with PyTorch beside it

Measures the rate of a plain matmul, then training and evaluation of ViTs with random weights: sizes,
batches, methods, and eight trials at once. A case that fails, as for want of memory, says so in its
row. On a GPU in bfloat16, less than ten minutes; on a CPU fewer cases, in float32 and with
`config.precision=bfloat16`. Drop path and flip are on, as in most recipes.
"""

import argparse
import datetime
import os
import pathlib
import platform
import re
import statistics
import subprocess

import jax
import peers
from ours import Ours
from step import turn

TABLES = pathlib.Path(__file__).parent / "tables"
COLUMNS = ("case", "train images/s", "of matmul", "eval images/s", "of matmul", "compiles in", "memory")
METHODS = ("full", "lora", "linear")


def cases(cpu):
    """Arguments of `Ours`, in the order of the table."""
    if cpu:
        sizes = [("Ti/16", 8), ("Ti/16", 32), ("B/16", 8)]
        out = [
            dict(variant=variant, batch=batch, precision=precision)
            for precision in ("highest", "bfloat16")
            for variant, batch in sizes
        ]
        out += [dict(variant="B/16", batch=8, method=name) for name in METHODS]
        return [*out, dict(variant="Ti/16", batch=32, trials=8)]
    sizes = [(variant, batch) for variant in ("Ti/16", "B/16", "L/16") for batch in (8, 32, 128)]
    out = [dict(variant=variant, batch=batch) for variant, batch in sizes]
    out += [dict(variant="B/16", batch=32, method=name) for name in METHODS]
    out += [dict(variant=variant, batch=32, trials=8) for variant in ("Ti/16", "B/16")]
    return [dict(case, dtype="bfloat16") for case in out]


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="words that a case's name must have")
    parser.add_argument("--out", type=pathlib.Path, default=TABLES, help="folder of the pages")
    args = parser.parse_args()
    cpu = jax.default_backend() == "cpu"
    lines = [
        f"## {datetime.date.today()}",
        "",
        machine(),
        "",
        row(COLUMNS),
        row(["---"] + ["---:"] * 6),
    ]
    print("\n".join(lines), flush=True)
    for case in cases(cpu):
        if all(word in name(case) for word in args.only.split()):
            lines.append(row(measure(case, args.rounds, cpu)))
            print(lines[-1], flush=True)
    if not args.only:
        lines += beside(cpu)
    page = args.out / f"{re.sub(r'[^a-z0-9]+', '-', device().lower()).strip('-')}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    before = page.read_text() if page.exists() else f"# {device()}\n"
    page.write_text(f"{before}\n" + "\n".join(lines) + "\n")
    print(f"added to {page}")


def device():
    """Name of the processor that is measured."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    models = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {models[0] if models else platform.processor()}"


def machine():
    """Driver, versions and instructions, in a line."""
    out = [f"jax {jax.__version__}", f"Python {platform.python_version()}"]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        out.append(f"driver {subprocess.check_output(query, text=True).split()[0]}")
    except (OSError, subprocess.CalledProcessError):
        flags = pathlib.Path("/proc/cpuinfo").read_text().split()
        out += [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{device()}: {', '.join(out)}."


def name(case):
    """`"rlrr B/16, batch 8"`, and what else there is to say."""
    words = [f"{case.get('method', 'rlrr')} {case['variant']}, batch {case['batch']}"]
    words += [f"{case['trials']} trials"] if case.get("trials", 1) > 1 else []
    return ", ".join(words + [case[key] for key in ("dtype", "precision") if key in case])


def measure(case, rounds, cpu):
    """The cells of a case."""
    steps = 2 if cpu else 20
    try:
        program = Ours(**case, steps=steps)
        found = program.compile()
        program.fill()
        rates = {key: [] for key in ("train", "eval", "plain", "merge", "matmul")}
        for _ in range(rounds):
            turn(program, rates, steps)
    except jax.errors.JaxRuntimeError as e:
        return [name(case), str(e).splitlines()[0][:60], *[""] * 5]
    cells = [name(case)]
    for what, times in (("train", 3), ("eval", 1)):
        rate = statistics.median(rates[what])
        share = times * found["gflop"] * rate / statistics.median(rates["matmul"])
        whole = what == "eval" or case.get("method", "rlrr") in ("rlrr", "full")  # all matmuls are done
        cells += [f"{rate:,.1f}", f"{100 * share:.0f} %" if whole else ""]
    return [*cells, f"{found['train_compile_seconds']:.1f} s", f"{found['train_gib']:.2f} GiB"]


def beside(cpu):
    """Lines of the table beside PyTorch, if it is installed for this device."""
    try:
        import torch
    except ImportError:
        return ["", "PyTorch is not installed here."]
    if not cpu and not torch.cuda.is_available():
        return ["", "PyTorch is installed without CUDA, and not compared."]
    low = "_bfloat16"
    names = ["rlrr", "torch", "compiled"] if cpu else []
    names += [f"rlrr{low}", f"torch{low}", f"compiled{low}"]
    options = argparse.Namespace(
        batch=8 if cpu else 32, steps=2 if cpu else 20, rounds=3, variant="B/16"
    )
    text = peers.table(peers.measure(names, options), names[1])
    print(text, flush=True)
    return ["", f"Beside PyTorch {torch.__version__}, batch {options.batch} (peers.py):", "", text]


def row(cells):
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
