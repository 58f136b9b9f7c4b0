"""Training and evaluation speed of a ViT-B/16 (or Swin-B) beside its peers, in one run.

    pip install -e . 'torch==2.13.0' && python benchmarks/peers.py --batch 8
    pip install timm && python benchmarks/peers.py --variant swin_b --peers rlrr,torch,compiled
    python benchmarks/peers.py --variant dinov3_b16 --peers rlrr,torch

Each peer is a process of its own, so that none shares memory or threads with another, and they take
turns: a round is some steps of each. Prints medians over rounds, and ratios to `torch` with the range
over rounds; the last line is JSON. Peers, all in float32 with drop path 0 and AdamW:

    rlrr      ours
    full      ours with all weights trained: the same forward and backward without a merge
    torch     RLRR as the authors do it: every layer rescales its frozen weight as it is used
    compiled  the same through torch.compile
    lora      LoRA of rank 8 on query and value, in PyTorch
    ours_lora the same, ours

PyTorch's attention is `scaled_dot_product_attention`, as in timm today.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

OURS = {"rlrr": "rlrr", "full": "full", "ours_lora": "lora"}  # peers and methods
PEERS = (*OURS, "torch", "compiled", "lora")
LOW = "_bfloat16"
CLASSES, SIZE = 100, 224


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="rlrr,full,torch,lora", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--variant", default="B/16", help="or swin_b, dinov3_b16, in PyTorch timm's")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    names = args.peers.split(",")
    for name in names:
        if name.removesuffix(LOW) not in PEERS:
            parser.error(f"unknown peer {name!r}: use {', '.join(PEERS)}, with {LOW} behind it or not")
    rows = measure(names, args)
    print(table(rows, "torch" if "torch" in rows else names[0]))
    print(json.dumps({"batch": args.batch, "steps": args.steps, "peers": rows}))


def measure(names, args):
    """`{peer: {"train": [images/s of each round], "eval": [...], "matmul", "peak_gib", "first"}}`."""
    command = [sys.executable, __file__, f"--batch={args.batch}", f"--steps={args.steps}"]
    command.append(f"--variant={args.variant}")
    workers, rows = {}, {}
    for name in names:  # one after another: compiling takes both cores
        pipe = subprocess.Popen(
            [*command, f"--worker={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # several on a GPU
        )
        workers[name], rows[name] = pipe, {"train": [], "eval": [], "matmul": []}
        rows[name]["first"] = ask(pipe, "start")
        print(f"{name}: ready after {rows[name]['first']:.1f} s", file=sys.stderr)
    for i in range(args.rounds):
        for what, images in (("train", args.batch * args.steps), ("eval", args.batch * args.steps)):
            for name in names:
                rows[name][what].append(images / ask(workers[name], what))
        for name in names:
            rows[name]["matmul"].append(ask(workers[name], "matmul"))
        print(f"round {i + 1} of {args.rounds} done", file=sys.stderr)
    for name, pipe in workers.items():
        rows[name]["peak_gib"] = ask(pipe, "memory")
        pipe.kill()
        pipe.wait()
    return rows


def ask(pipe, what):
    """A worker's answer, a number. It is stopped between answers, so that none disturbs another."""
    pipe.send_signal(signal.SIGCONT)
    pipe.stdin.write(what + "\n")
    pipe.stdin.flush()
    line = pipe.stdout.readline()
    pipe.send_signal(signal.SIGSTOP)
    if not line:
        sys.exit("error: a worker ended; its message is above")
    return float(line)


def table(rows, base):
    """A Markdown table: medians, and the median and range of the ratios to a peer."""
    lines = ["| peer | train images/s | ratio | eval images/s | ratio | matmul GFLOP/s | peak GiB |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in rows.items():
        cells = [name]
        for what in ("train", "eval"):
            ratios = [a / b for a, b in zip(row[what], rows[base][what])]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells += [f"{statistics.median(row[what]):.2f}", spread]
        cells += [f"{statistics.median(row['matmul']):.0f}", f"{row['peak_gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# A worker -------------------------------------------------------------------------------------


def work(args):
    """Answers `start`, `train`, `eval` and `matmul` with seconds or rates, `memory` with GiB."""
    make = jax_peer if args.worker.removesuffix(LOW) in OURS else torch_peer
    begun = time.perf_counter()
    train, evaluate, matmul = make(args.worker, args.variant, args.batch, args.steps)
    for number in (1, args.steps):
        train(number)
        evaluate(number)
    for line in sys.stdin:
        what = line.strip()
        if what == "start":
            answer = time.perf_counter() - begun
        elif what == "memory":
            # Not getrusage's maximum, which begins at that of the parent.
            text = pathlib.Path("/proc/self/status").read_text()
            answer = int(re.search(r"VmHWM:\s*(\d+)", text)[1]) / 2**20
        elif what == "matmul":
            seconds = min(timed(matmul) for _ in range(5))
            answer = 2 * args.batch * 197 * 768 * 3072 / seconds / 1e9
        else:
            function = {"train": train, "eval": evaluate}[what]
            function(1)  # whoever ran before has the caches and the memory
            answer = timed(lambda: function(args.steps))
        print(answer, flush=True)


def timed(function):
    """Seconds of a call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def jax_peer(name, variant, batch, steps):
    """Our own step as a run calls it: several steps in one dispatch."""
    import jax
    from ours import Ours

    options = dict(batch=batch, steps=steps, drop_path=0, size=SIZE)
    if name.endswith(LOW):
        options |= {"precision" if jax.default_backend() == "cpu" else "dtype": "bfloat16"}
    ours = Ours(OURS[name.removesuffix(LOW)], variant, **options)
    ours.fill()

    def evaluate(number):
        if number == 1:  # the warm-up: once for a whole test set, so it is no part of the time
            ours.merge()
        ours.evaluate(number)

    return ours.train, evaluate, ours.matmul


def torch_peer(name, variant, batch, steps):
    """A plain PyTorch loop over batches."""
    import torch
    from torch_vit import make

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    low, name = name.endswith(LOW), name.removesuffix(LOW)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=low)
    model = make("lora" if name == "lora" else "rlrr", CLASSES, variant)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    images = torch.rand(batch * steps, 3, SIZE, SIZE) * 2 - 1
    labels = torch.randint(0, CLASSES, (batch * steps,))
    forward = torch.compile(model) if name == "compiled" else model

    def train(number):
        model.train()
        for i in range(0, number * batch, batch):
            optimizer.zero_grad()
            with autocast():
                logits = forward(images[i : i + batch])
            torch.nn.functional.cross_entropy(logits.float(), labels[i : i + batch]).backward()
            optimizer.step()
        wait()

    def evaluate(number):
        model.eval()
        with torch.no_grad(), autocast():
            for i in range(0, number * batch, batch):
                forward(images[i : i + batch]).argmax(1)
        wait()

    kind = torch.bfloat16 if low else torch.float32
    a, b = torch.ones(batch * 197, 768, dtype=kind), torch.ones(768, 3072, dtype=kind)
    return train, evaluate, lambda: (a @ b, wait())


if __name__ == "__main__":
    main()
