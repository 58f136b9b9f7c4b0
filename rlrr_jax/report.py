"""Result files, tables and curves. `python -m rlrr_jax.report WORKDIR...` makes them again."""

from typing import Any

from etils import epath

from rlrr_jax import files, lookup
from rlrr_jax.data import tasks
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.results import paired, plots, rows, tables, vtab_table

MOST_CURVES = 12  # in one picture
MOST_COMPARED = 4  # tasks in one picture


def collect(*workdirs: Any, out: Any = None) -> list[dict]:
    """All finished runs below workdirs, also as files in the folder `out`.

    These are `results.json` (all rows), `results.md` (what the screen shows, and each run), where there
    is a VTAB task, `summary.{csv,json,png}`, where there are several methods, `comparison.png`, and
    with one workdir of few runs, `curves.png`. Without `out`, in the first workdir. A workdir may be a
    `results.json`; where all are, `out` is `report`.
    Raises UserError if there is no finished run, or if two workdirs disagree about one.
    """
    paths = [epath.Path(w).expanduser() for w in workdirs]
    folders = _folders(paths)
    out = epath.Path(out or (folders[0] if folders else "report")).expanduser()
    found = rows.find(folders, [path for path in paths if path not in folders])
    if not found:
        raise UserError(f"there is no finished run in {', '.join(map(str, paths))}")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "results.json", found)
    lines = vtab_table.lines(found)
    text = [
        tables.table(found),
        tables.caption(found),
        *(u for p in folders for u in rows.unfinished(p)),
    ]
    if len(rows.fold(found)) < len(found):
        text += ["Each run:", tables.grouped([[row] for row in found])]
    if lines:
        text = [vtab_table.markdown(lines), vtab_table.CAPTION, *text]
        files.write(out / "summary.csv", vtab_table.csv(lines))
        files.write_json(out / "summary.json", vtab_table.plain(lines))
    files.write(out / "results.md", "\n\n".join([*_others(found), *text]) + "\n")
    alive = rows.fold([row for row in found if not rows.diverged(row)])
    tested = [group for group in alive if group[0]["test_acc_final"] is not None]
    if len(tested) > len({group[0]["task"] for group in tested}) <= MOST_COMPARED:
        plots.save(out / "comparison.png", plots.comparison, tested)
    if lines:
        plots.save(out / "summary.png", vtab_table.picture, lines)
    if paths == folders[:1] and len(found) <= MOST_CURVES:
        plots.save(out / "curves.png", plots.curves, plots.histories(paths[0], found))
    return found


def _folders(paths: list) -> list:
    """Those that are workdirs, and no files of rows."""
    return [path for path in paths if path.suffix != ".json" or path.is_dir()]


def show(found: list[dict]) -> str:
    """What is printed at the end: the table of tasks where there are several, else of runs."""
    lines = vtab_table.lines(found)
    several = len({row["task"] for row in found if row["task"] in tasks.VTAB}) > 1
    if several and all(row["test_acc_final"] is not None for row in found):
        text = [vtab_table.text(lines), vtab_table.CAPTION]
    else:
        text = [tables.table(found)]
    return "\n\n".join([*text, *_others(found), tables.caption(found)])


def _others(found: list[dict]) -> list[str]:
    """The tables of projects."""
    every = [lookup.find("table", name)(found) for name in lookup.names("table")]
    return [text for text in every if text]


def main() -> None:
    """The command."""
    parser = Parser(description="Makes the tables of finished runs again.")
    parser.add_argument(
        "workdirs", nargs="+", metavar="WORKDIR", help="several are merged; or a results.json"
    )
    parser.add_argument("--out", help="folder of the files; WORKDIR if it is one, else ./report")
    parser.add_argument("--against", help="a method: paired differences to it, with intervals")
    args = parser.parse_args()
    folders = _folders([epath.Path(w).expanduser() for w in args.workdirs])
    out = args.out or (folders[0] if len(args.workdirs) == len(folders) == 1 else "report")
    found = collect(*args.workdirs, out=out)
    print(show(found))
    if args.against:
        text = paired.table(found, args.against)
        if len({row["task"] for row in found}) > 1:
            text = f"{paired.by_task(found, args.against)}\n\n{text}"
        print(f"\n{text}")
        with (epath.Path(out).expanduser() / "results.md").open("a") as file:
            file.write(f"\n{text}\n")
    for workdir in folders:
        print(*rows.unfinished(workdir), sep="\n", end="")
    print(f"\nfiles: {out}")


if __name__ == "__main__":
    one_sentence(main)
