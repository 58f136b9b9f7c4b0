"""Figures of an analysis, as PNG bytes."""

import numpy as np

from rlrr_jax.results import plots
from rlrr_jax.results.plots import COLOURS, MARKS


def _by_block(numbers, kernel, key):
    """Blocks and values of one kernel."""
    rows = [row for row in numbers["kernels"] if row["kernel"] == kernel]
    return [row["block"] for row in rows], [row[key] for row in rows]


def _kernels(found):
    """Names of the kernels: six Dense layers of a Transformer, or convolutions."""
    return list(dict.fromkeys(row["kernel"] for row in next(iter(found.values()))["kernels"]))


def _panels(what, draw, found):
    """A panel for each kernel of a block, sharing the legend."""
    kernels = _kernels(found)
    grid = (2, 3, (9, 5.2)) if len(kernels) > 1 else (1, 1, (7, 4))
    figure, axes = plots.subplots(*grid, sharex=True, sharey=True)
    for axis, kernel in zip(axes.flat, kernels):
        for i, (label, numbers) in enumerate(found.items()):
            draw(axis, numbers, kernel, label, COLOURS[i % 8], MARKS[i % 8])
        axis.set_title(kernel, fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel(what, fontsize=10)
    return figure, axes


def _legend(figure, axes):
    lines, labels = axes.flat[0].get_legend_handles_labels()
    names = list(map(plots.wrapped, labels))
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, min(len(names), 4, 125 // (longest + 5)))  # 125 characters fit
    figure.legend(lines, names, loc="outside upper center", ncols=columns, fontsize=9)


def change(found: dict) -> bytes:
    """Heat maps: relative change of each kernel of each block, a panel for each run, one scale."""
    names = _kernels(found)
    tables = {
        label: 100 * np.array([_by_block(numbers, name, "relative_change")[1] for name in names])
        for label, numbers in found.items()
    }
    depth = next(iter(tables.values())).shape[1]
    columns = min(len(tables), 3)
    rows = -(-len(tables) // columns)
    size = (1.2 + columns * max(2.6, 0.36 * depth), 0.5 + 2.1 * rows)
    figure, axes = plots.subplots(rows, columns, size)
    top = max(table.max() for table in tables.values()) or 1
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    for axis, (label, table) in zip(axes.flat, tables.items()):
        image = axis.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        axis.set_title(plots.wrapped(label), fontsize=10)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xticks(range(depth), range(1, depth + 1), fontsize=8 if depth <= 12 else 5)
        for (y, x), value in np.ndenumerate(table) if depth <= 12 else ():
            colour = "white" if value > 0.6 * top else "black"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xlabel("block", fontsize=9)
    figure.colorbar(image, ax=axes, label="|W' - W| / |W|  [%]", shrink=0.9)
    return plots.png(figure, dpi=150)


def rank(found: dict) -> bytes:
    """Effective rank of the change by depth."""

    def draw(axis, numbers, kernel, label, colour, mark):
        axis.plot(
            *_by_block(numbers, kernel, "effective_rank"), color=colour, marker=mark, ms=4, label=label
        )
        most = max(len(row["values"]) for row in numbers["kernels"] if row["kernel"] == kernel)
        axis.axhline(most, color="0.6", lw=1)

    figure, axes = _panels("effective rank of W' - W", draw, found)
    axes.flat[0].set_yscale("symlog", linthresh=1)
    axes.flat[0].set_ylim(
        0, 2 * max(len(row["values"]) for x in found.values() for row in x["kernels"])
    )
    _legend(figure, axes)
    return plots.png(figure, dpi=150)


def turn(found: dict) -> bytes:
    """Angles of the leading left and right singular subspaces by depth."""

    def draw(axis, numbers, kernel, label, colour, mark):
        style = dict(color=colour, marker=mark, ms=4)
        axis.plot(*_by_block(numbers, kernel, "left_turn"), label=f"{label}, left", **style)
        axis.plot(
            *_by_block(numbers, kernel, "right_turn"), "--", label=f"{label}, right", mfc="w", **style
        )

    figure, axes = _panels("mean principal angle [degrees]", draw, found)
    axes.flat[0].set_ylim(bottom=0)
    _legend(figure, axes)
    return plots.png(figure, dpi=150)


def spectra(found: dict) -> bytes:
    """Singular values of the middle block, of W (black) and every W', and their ratio below."""
    kernels = _kernels(found)
    rows, columns = (4, 3) if len(kernels) > 1 else (2, 1)
    tall = dict(height_ratios=(2, 1.2) * (rows // 2))
    figure, axes = plots.subplots(rows, columns, (9, 2 * rows), gridspec_kw=tall)
    first = next(iter(found.values()))["kernels"]
    middle = (max(row["block"] for row in first) + 1) // 2
    pick = lambda rows, name: next(r for r in rows if (r["kernel"], r["block"]) == (name, middle))
    for i, kernel in enumerate(kernels):
        axis, below = (axes[2 * (i // 3) + j, i % 3] for j in range(2))
        values = np.array(pick(first, kernel)["values"])
        numbers = range(1, len(values) + 1)
        axis.plot(numbers, values, color="black", lw=2.5, label="W, pretrained")
        for j, (label, numbers_of) in enumerate(found.items()):
            tuned = np.array(pick(numbers_of["kernels"], kernel)["tuned_values"])
            axis.plot(numbers, tuned, color=COLOURS[j % 8], lw=1.2, label=label)
            below.plot(numbers, tuned / np.maximum(values, 1e-12), color=COLOURS[j % 8], lw=1.2)
        axis.set_title(kernel, fontsize=10)
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(min(values), 1e-4 * max(values)) / 2)
        below.axhline(1, color="black", lw=1)
        below.set_ylim(0.7, 1.5)
        for one in (axis, below):
            one.grid(alpha=0.3)
    for row, text in enumerate(("singular value", "W' / W") * (rows // 2)):
        axes[row, 0].set_ylabel(text, fontsize=9)
    figure.supxlabel(f"singular value's number (block {middle})", fontsize=10)
    _legend(figure, axes)
    return plots.png(figure, dpi=150)


def scales(found: dict) -> bytes | None:
    """Mean and standard deviation of the learnt scales by depth; None if no run has any."""
    kinds = ("scale_in", "scale_out", "scale")
    panels = []
    for label, numbers in found.items():
        if any(_kind(row) == "kernel" for row in numbers["trained"]):
            continue  # `scale` is then a weight of LayerNorms
        for kind in kinds:
            rows = [row for row in numbers["trained"] if row["block"] and _kind(row) == kind]
            panels += [(f"{label}: {kind}", rows)] if rows else []
    if not panels:
        return None
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    size = (1 + 5 * columns, 0.4 + 3.1 * lines)
    figure, axes = plots.subplots(lines, columns, size)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, panels):
        names = list(dict.fromkeys(row["name"] for row in rows))
        for i, name in enumerate(names):
            mine = [row for row in rows if row["name"] == name]
            shift = 0.08 * (i - (len(names) - 1) / 2)
            style = dict(color=COLOURS[i % 8], fmt=MARKS[i % 8], ms=4, lw=1, capsize=0)
            blocks = [row["block"] + shift for row in mine]
            means, deviations = [row["mean"] for row in mine], [row["std"] for row in mine]
            axis.errorbar(blocks, means, deviations, label=name.split("/")[-2], **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("block", fontsize=9)
        axis.set_ylabel("mean ± standard deviation", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return plots.png(figure, dpi=150)


def _kind(row):
    return row["name"].rsplit("/", 1)[-1]
