"""The tables of a plan."""

import collections
import math
import pathlib

from rlrr_jax import files
from rlrr_jax.plan import measure
from rlrr_jax.plan.groups import Group
from rlrr_jax.plan.topology import GIB, Topology
from rlrr_jax.results import tables
from rlrr_jax.runs.forecast import duration

HEAD = ["program", "first for", "on", "compiled in", "weights", "images", "state", "temporaries"]
HEAD += ["collectives", "GFLOP", "GB moved", "bound"]


def text(devices: Topology, groups: list[Group], parts: int = 1) -> str:
    """The tables as Markdown.

    Args:
      devices: those of each part.
      groups: the groups of all parts.
      parts: number of parts to which runs were dealt out.
    """
    chip, lines, seen = devices.chip, [], set()
    for group in groups:
        for found in group.programs.values():
            if id(found) not in seen:
                seen.add(id(found))
                lines.append(_line(found, group.where))
    each = f"each of {parts} parts on " if parts > 1 else ""
    room = f"; {chip.memory / GIB:.4g} GiB of each can be used" if chip else ""
    out = [
        f"{each}{devices.name}: {len(devices.devices)} devices{room}. GiB are of a device; "
        f"collectives, GFLOP, GB and the bound of a step, a batch, or all weights. Neither weights nor "
        f"images were read: networks are as configured, images as large as a network's.",
        tables.markdown(HEAD, lines, left=3),
    ]
    if any(group.remat for group in groups):
        out.append("Activations are computed twice (model.remat): else they do not fit.")
    out += dict.fromkeys(_too_large(group, devices) for group in groups)
    whole = _whole(devices, groups)
    if parts > 1 and any(group.seconds for group in groups):
        whole.append(_dealt(devices, groups, parts))
    return "\n\n".join([*filter(None, out), *whole])


def _dealt(devices: Topology, groups: list[Group], parts: int) -> str:
    """How long the longest and the shortest part take, and what all chips cost until then."""
    loads = [
        sum(sum(group.seconds.values()) for group in groups if group.part == i + 1)
        for i in range(parts)
    ]
    chips = parts * len(devices.devices)
    return (
        f"The times of {parts} parts, one after another, are added up above. The longest part takes "
        f"{duration(max(loads))}, the shortest {duration(min(loads))}: {chips} chips until the longest "
        f"ends are {duration(chips * max(loads))} of chips."
    )


def _too_large(group: Group, devices: Topology) -> str:
    """Says that a step does not fit even so, and in how many parts it might."""
    found, chip = group.programs["train"], devices.chip
    if not chip or found.needs <= chip.memory:
        return ""
    room = chip.memory - (found.needs - found.temporary)
    parts = 2 ** math.ceil(math.log2(found.temporary / room)) if room > 0 else 0
    way = f"try --config.accumulate={parts}, or a smaller config.batch_size"
    return (
        f"A step of {found.of} does not fit: it takes {found.needs / GIB:.1f} GiB of "
        f"{chip.memory / GIB:.1f}. {way if parts else 'Its weights and images alone are too large.'}"
    )


def _line(found: measure.Measured, where: str) -> list[str]:
    gib = lambda number: f"{number / GIB:.2f}"
    sent = [f"{n} {kind} {_size(size)}" for kind, (n, size) in found.collectives.items()]
    return [
        found.name,
        found.of,
        where,
        f"{found.seconds:.0f} s",
        gib(found.arguments["weights"]),
        gib(found.arguments.get("images", 0)),
        gib(found.arguments.get("state", 0)),
        gib(found.temporary),
        ", ".join(sent) or "none",
        f"{found.flops / 1e9:.3g}" if found.flops < 1e11 else f"{found.flops / 1e9:,.0f}",
        f"{found.moved / 1e9:.3g}",
        f"{1e3 * found.turn:.3g} ms" if found.turn else "",
    ]


def _size(number: float) -> str:
    """`"2.6 MiB"`, `"12 B"`."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _whole(devices: Topology, groups: list[Group]) -> list[str]:
    """What all runs take, by method."""
    total: dict[tuple[str, str], float] = collections.defaultdict(float)
    number: dict[str, int] = collections.defaultdict(int)
    for group in groups:
        method = group.label.partition(" ")[2]
        number[method] += group.runs
        for name, seconds in group.seconds.items():
            total[method, name] += seconds
    if not total:
        return ["How long this takes cannot be said: nothing is known of these devices' speed."]
    lines, names = [], ("first blocks", "train", "evaluate", "merge")
    chips = lambda seconds: duration(seconds * len(devices.devices))
    for method, runs in number.items():
        each = [total[method, name] for name in names]
        shown = [duration(x) if x else "" for x in each]
        lines.append([method, str(runs), *shown, duration(sum(each)), chips(sum(each))])
    if len(lines) > 1:
        whole = sum(total.values())
        rest = [*[""] * len(names), duration(whole), chips(whole)]
        lines.append(["all", str(sum(number.values())), *rest])
    compiling = {id(f): f.seconds for group in groups for f in group.programs.values()}
    head = ["method", "runs", "first blocks", "training", "evaluating", "merging", "in all", "of chips"]
    said = "Times are bounds by the roofline, without reading images, starting and saving."
    once = f"Compiling took {sum(compiling.values()):.0f} s here, once for all runs."
    return [tables.markdown(head, lines), f"{said} {once}"]


def write(folder: pathlib.Path, page: str, devices: Topology, groups: list[Group]) -> None:
    """Writes `plan.md` and `plan.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "plan.md", page + "\n")
    values = [
        {
            **group._asdict(),
            "programs": {
                name: {key: x for key, x in found._asdict().items() if key != "compiled"}
                for name, found in group.programs.items()
            },
        }
        for group in groups
    ]
    whole = {"topology": devices.name, "devices": len(devices.devices), "groups": values}
    files.write_json(folder / "plan.json", whole)
