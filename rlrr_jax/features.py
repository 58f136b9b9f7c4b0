"""Writes what a backbone gives its head for every image of a task: features, path, label, split.

  python -m rlrr_jax.features --config configs/own.py:/data/birds --out birds.npz
  python -m rlrr_jax.features --config configs/vtab.py:cifar --out cifar.parquet

  --out FILE  .npz: arrays features [N, D] float32, and path, label and split [N] of text;
              .parquet: the same as columns (extra hf)

Images are not flipped; labels are names, several of them between semicolons, or values.
"""

import contextlib
import io
import os
import tempfile
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from rlrr_jax import main as main_lib
from rlrr_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "file to write, .npz or .parquet")


def table(config: Any) -> dict[str, np.ndarray]:
    """`features` [N, D] float32, and `path`, `label` and `split` [N] of text, of the images of a task.

    Raises UserError for anything that a run of the configuration would end with before it trains, and
    for several tasks.
    """
    import jax

    from rlrr_jax import config as config_lib
    from rlrr_jax import prefix, run_images, suite
    from rlrr_jax import run as run_lib
    from rlrr_jax.data import sources
    from rlrr_jax.runtime import mesh as mesh_lib

    config.method, config.runs, config.seeds, config.protocol = "linear", None, (0,), "fast"
    for key in ("crop", "crop_from", "keep", "patience", "temperature", "class_weights"):
        config[key] = None  # which change no feature
    runs = config_lib.resolve(config)
    if len(runs) > 1:
        names = ", ".join(run.task for run in runs)
        raise UserError(f"these are several tasks ({names}): name one")
    with tempfile.TemporaryDirectory() as folder:
        (work,) = suite.locate(runs, epath.Path(folder), lambda *works: contextlib.nullcontext())
        load = suite.open_weights([work])
    run, task, found = run_lib.of(work.run), run_images.task_of(work.run), work.found
    frozen = load.load_weights(work.run, run.recipe.model)
    mesh = mesh_lib.make_mesh(jax.devices()[: run.limits.devices])
    classes = sources.class_names(task, found)
    columns: dict[str, list] = {"features": [], "path": [], "label": [], "split": []}
    for split in (*task.parts[:2], "test"):
        if not task.number(split):
            continue
        pixels = run_images.pixels(work.run)
        images, labels = load.load_data(task, split, pixels, found, work.run.data.cache_dir, None)
        title = f"{run.label.split()[0]} {split}"
        out = prefix.outputs(run.recipe, frozen, prefix.HEAD, images, mesh, False, title)
        where = sources.open_split(task, split, found).where
        columns["features"].append(np.float32(out[:, 0]))
        columns["path"] += [str(where(i)) for i in range(len(labels))]
        columns["label"] += [_named(task, label, classes) for label in labels]
        columns["split"] += [split] * len(labels)
    return {
        name: np.concatenate(x) if name == "features" else np.array(x) for name, x in columns.items()
    }


def _named(task: Any, label: Any, classes: list[str]) -> str:
    """A label as text."""
    if task.kind == "class":
        return classes[label]
    if task.kind == "labels":
        return ";".join(name for name, yes in zip(classes, label) if yes)
    deviation, mean = task.unit
    return f"{float(label) * deviation + mean:.9g}"


def write(path: Any, columns: dict[str, np.ndarray]) -> None:
    """Writes what `table` returns; UserError for parquet without pyarrow."""
    from rlrr_jax import files

    if path.suffix == ".npz":
        data = io.BytesIO()
        np.savez(data, **columns)
        files.write(path, data.getbuffer())
        return
    parquet, pyarrow = _pyarrow()
    rows = pyarrow.array(list(columns["features"]), pyarrow.list_(pyarrow.float32()))
    made = {"features": rows, **{k: x for k, x in columns.items() if k != "features"}}
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(made), out)
    files.write(path, out.getvalue().to_pybytes())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise UserError(".parquet needs pyarrow: install the extra hf, or write .npz") from e
    return parquet, pyarrow


def save(config: Any, name: str | None) -> None:
    """Writes the features of a configuration's task to a file of this name, and prints how many."""
    from rlrr_jax import files

    if config is None or name is None:
        missing = "--config configs/own.py:FOLDER" if config is None else "--out FILE.npz"
        raise UserError(f"a configuration and a file are needed: add {missing}")
    out = files.local(name)
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"features are written as .npz or .parquet: {name} ends in neither")
    files.writable(out)  # before the work, not after it
    if out.suffix == ".parquet":
        _pyarrow()
    columns = table(config)
    write(out, columns)
    number, width = columns["features"].shape
    size = os.stat(out).st_size / 1e6
    print(f"{out}: {number:,} images of {width} values, {size:.1f} MB")


def main(argv: list[str]) -> None:
    """The command."""
    if argv[1:]:
        raise UserError(f"{argv[1]!r} belongs to no flag: see --help")
    save(main_lib.CONFIG.value, _OUT.value)


def run() -> None:
    """The command line."""
    main_lib.command(main, __doc__ or "")


if __name__ == "__main__":
    run()
