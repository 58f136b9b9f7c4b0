"""The size of the core and of the path through it, and whether it knows a project.

    python tools/core.py          prints the table; exit code 1 where the core imports a project, or has
                                  the name of one

Lines are those of `wc -l`, docstrings included. Files and functions are those of ours that a run of the
bundled hearts passes from `main.run` to its first update.
"""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CORE = ROOT / "rlrr_jax"
PROJECTS = CORE / "projects"


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Our Python files of the core, or of the projects."""
    every = sorted(CORE.glob("**/*.py"))
    inside = lambda path: PROJECTS in path.parents
    return [p for p in every if (folder == PROJECTS) == inside(p) and "configs" not in p.parts]


def lines(paths: list[pathlib.Path]) -> int:
    """How many lines these files have."""
    return sum(path.read_bytes().count(b"\n") for path in paths)


def imports() -> list[str]:
    """Imports of projects in the core."""
    found = []
    for path in files(CORE):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            found += [f"{path.relative_to(ROOT)} imports {n}" for n in names if ".projects" in n]
    return found


def words() -> list[str]:
    """Names of projects, and of what they add, in the core."""
    if not PROJECTS.exists():
        return []
    sys.path.insert(0, str(ROOT))
    from rlrr_jax import projects

    known = {path.name for path in PROJECTS.iterdir() if path.is_dir() and path.name[0] != "_"}
    known |= {name for names in projects.NAMES.values() for name in names}
    pattern = re.compile(rf"\b({'|'.join(sorted(known))})\b")
    found = []
    for path in files(CORE):
        for i, line in enumerate(path.read_text().splitlines(), 1):
            if hit := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{i}: {hit[0]}: {line.strip()}")
    return found


def passed() -> tuple[int, int, int]:
    """Files and functions that a run passes before its first update, and changes of file."""
    seen: dict = {}
    switches, last = 0, None
    ours = (f"{CORE}{os.sep}", f"{ROOT / 'configs'}{os.sep}")  # a venv may lie beside them

    def listen(frame, event, arg):
        nonlocal switches, last
        if event != "call":
            return
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if name == "apply_updates" and "optax" in path:
            raise SystemExit
        if path.startswith(ours) and name != "<module>":
            seen[path, name] = True
            switches, last = switches + (path != last), path

    with tempfile.TemporaryDirectory() as work:
        sys.argv = ["main", "--config", str(ROOT / "configs/vtab.py") + ":hearts,method=rlrr"]
        sys.argv += ["--config.protocol=tune", "--config.epochs=1", f"--workdir={work}"]
        from rlrr_jax import main

        sys.setprofile(listen)
        try:
            main.run()
        except BaseException:
            pass
        sys.setprofile(None)
    return len({path for path, _ in seen}), len(seen), switches


def main() -> None:
    """The command."""
    if sys.argv[1:] == ["--passed"]:
        print(*passed(), file=sys.stderr)
        return
    command = [sys.executable, __file__, "--passed"]
    told = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    path = told.stderr.decode().split()[-3:]
    sys.path.insert(0, str(ROOT))
    from rlrr_jax import methods, step

    largest = max(files(CORE), key=lambda p: lines([p]))
    rows = [
        ("lines of the core", lines(files(CORE)), 12_500),
        ("files of the core", len(files(CORE)), ""),
        ("lines of projects", lines(files(PROJECTS)), 3_000),
        ("files, functions on a run's way to its first update", f"{path[0]}, {path[1]}", "45, 330"),
        ("changes of file on that way", path[2], ""),
        (f"largest file ({largest.relative_to(CORE)})", lines([largest]), 400),
        ("fields of Method", len(methods.Method._fields), 6),
        ("fields of Recipe", len(step.Recipe._fields), 10),
        ("lines of the README", lines([ROOT / "README.md"]), 130),
    ]
    print("| | now | aim |\n| --- | ---: | ---: |")
    print(
        *(
            f"| {what} | {now:,} | {aim:,} |"
            if isinstance(now, int) and isinstance(aim, int)
            else f"| {what} | {now} | {aim} |"
            for what, now, aim in rows
        ),
        sep="\n",
    )
    if found := imports() + words():
        print("\nthe core knows projects:", *found, sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
