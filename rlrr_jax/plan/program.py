"""What an optimised program does: the bytes that it moves, and its collectives, from XLA's text.

Every operation at the top level reads its operands and writes its results once; of an array that it
only slices, the slices; loops are multiplied; caches are not counted. So it is a bound from above on
the memory's work.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "u16": 2}
SIZES |= {"s16": 2, "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1, "f8e5m2": 1}
FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "iota"}
FREE |= {"copy-done", "all-reduce-done", "opt-barrier", "partition-id", "slice-done", "async-done"}
FREE |= {"all-gather-done", "collective-permute-done", "async-update"}
SLICES = ("dynamic-slice", "slice", "gather")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


class Op(NamedTuple):
    """An operation: its name, shape and kind, the names of its operands, and the rest of its line."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    rest: str


Computations = dict[str, list[Op]]


def moved(text: str, loop: bool = True) -> collections.Counter:
    """`(what, shape) -> bytes` that the operations of a program move.

    Args:
      text: the optimised program.
      loop: whether it is one step that counts, the body of the largest loop, and not what is around it.
    """
    comps = computations(text)
    found: collections.Counter = collections.Counter()
    for op, times, shapes in operations(comps, loop):
        if op.kind in ("copy-start", "slice-start"):
            found[op.kind, op.shape[:60]] += times * fetched(op)
        elif op.kind not in FREE:
            inner = comps.get(_named("calls", op), []) if op.kind == "fusion" else []
            tag = re.search(r'op_name="([^"]*)"', op.rest)
            what = re.sub(r".*/(?=[^/]*/[^/]*$)", "", tag[1]) if tag else op.kind
            found[what, op.shape[:60]] += times * (read(op, shapes, inner) + written(op, inner))
    return found


def collectives(text: str, loop: bool = True) -> dict[str, tuple[int, int]]:
    """`kind -> (number, bytes of results)` of the collectives of a program, see `moved`.

    A TPU goes on with one while it computes: several fusions then have a part of the same channel.
    """
    comps, channels = computations(text), set()
    number: collections.Counter = collections.Counter()
    total: collections.Counter = collections.Counter()
    for op, times, _ in operations(comps, loop):
        inside = op.kind in ("async-start", "fusion")
        for each in comps.get(_named("calls", op), []) if inside else [op]:
            kind = each.kind.removesuffix("-start")
            channel = op.kind == "fusion" and re.search(r"channel_id=\d+", each.rest)
            if kind in COLLECTIVES and not (channel and channel[0] in channels):
                channels |= {channel[0]} if channel else set()
                shape = each.shape
                if each.kind.endswith("-start") and shape.startswith("("):
                    shape = shape[len(shape) // 2 :]  # operands, then results of the same number
                number[kind] += times
                total[kind] += times * size(shape, chip=True)
    return {kind: (number[kind], total[kind]) for kind in number}


def operations(comps: Computations, loop: bool) -> Iterator[tuple[Op, int, dict[str, str]]]:
    """The operations that run, how often each does, and the shapes of those before it."""

    def walk(name: str, times: int) -> Iterator:
        shapes: dict[str, str] = {}
        for op in comps[name]:
            shapes[op.name] = op.shape
            if op.kind == "while":
                yield from walk(_named("body", op), times * trips(op, comps))
            elif op.kind == "call":
                yield from walk(_named("to_apply", op), times)
            else:
                yield op, times, shapes

    loops = [_named("body", op) for op in comps["ENTRY"] if op.kind == "while"]
    if loop and not loops:  # on CPUs it may lie in what the entry calls
        loops = [_named("body", op) for ops in comps.values() for op in ops if op.kind == "while"]
    yield from walk(max(loops, key=lambda name: len(comps[name])) if loop else "ENTRY", 1)


def _named(what: str, op: Op) -> str:
    """The computation that an operation names, such as its `body`; "" for none."""
    found = re.search(rf"{what}=%?([\w.\-]+)", op.rest)
    return found[1] if found else ""


def size(shape: str, chip: bool = False) -> int:
    """Bytes of a shape, or of all in a tuple; of a TPU's without what lies on the `chip`, `S(1)`."""
    total = 0
    for kind, sides, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", shape):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * SIZES.get(kind, 4) * (chip or not re.search(r"S\([1-9]", layout))
    return total


def fetched(op: Op) -> int:
    """Bytes of a copy or slice that a TPU starts before it is needed, at each end that is in memory."""
    found = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", op.shape)
    target, source = found[:2] if op.kind == "copy-start" else found[1::-1]
    return size(target, True) * sum(size(x) > 0 for x in (target, source))


def computations(text: str) -> Computations:
    """Name -> operations of each computation; the entry is also called "ENTRY"."""
    out: Computations = {}
    now: list[Op] = []
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


def read(op: Op, shapes: dict[str, str], inner: list[Op]) -> int:
    """Bytes that an operation reads: of what a fusion only slices, the slices."""
    if not inner:
        return sum(size(shapes.get(name, "")) for name in op.operands)
    parameters = (x for x in inner if x.kind == "parameter")
    total, number = 0, {x.name: int(x.rest.partition(")")[0]) for x in parameters}
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


def written(op: Op, inner: list[Op]) -> int:
    """Bytes that an operation writes: of what it updates in place, the update."""
    shapes = {x.name: x.shape for x in inner}
    updates = [x for x in inner if x.kind == "dynamic-update-slice"] if inner else []
    shape = re.sub(r", s8\[\d+\]\{0\}\)$", ")", op.shape) if op.kind == "custom-call" else op.shape
    whole = size(shape)  # without cuBLAS's workspace
    for update in updates:
        whole -= size(update.shape) - size(shapes.get(update.operands[1], ""))
    return max(whole, 0)


def trips(op: Op, comps: Computations) -> int:
    """How often a loop goes round, as XLA says or its condition compares; 1 where neither is known."""
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
        return int(count[1])
    condition = comps.get(_named("condition", op), [])
    constants = [re.match(r"(\d+)\)", x.rest) for x in condition if x.kind == "constant"]
    known = [int(found[1]) for found in constants if found]
    return known[0] if len(known) == 1 and known[0] > 0 else 1
