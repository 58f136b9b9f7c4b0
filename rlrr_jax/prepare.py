"""Prepares VTAB-1k through tfds, and checks it.

python -m rlrr_jax.prepare --tasks all --data_dir DIR            (needs the extra `prepare`)
python -m rlrr_jax.prepare --tasks all --data_dir DIR --check    (needs nothing more)
python -m rlrr_jax.prepare --prune              (removes decoded images that no task uses)
"""

import importlib.util
from typing import Any

from etils import epath

from rlrr_jax.data import cache, sources, tasks, vtab_check
from rlrr_jax.data.examples import some
from rlrr_jax.errors import Parser, UserError, first_line, one_sentence
from rlrr_jax.results import tables

STEPS = {
    "resisc45": "get NWPU-RESISC45 (tensorflow.org/datasets/catalog/resisc45 says where) and extract "
    "it to {manual}/NWPU-RESISC45/<class>/*.jpg",
    "diabetic_retinopathy": "accept the rules at kaggle.com/c/diabetic-retinopathy-detection/data, and "
    "extract it to {manual}/train, {manual}/test and {manual}/sample, with "
    "{manual}/trainLabels.csv (train.zip.005 is easily missed)",
    "sun397": "its address is dead: put a copy of SUN397.tar.gz (39,077,296,924 bytes; tfds checks its "
    "SHA-256) at {manual}/SUN397.tar.gz",
    "eurosat": "if its address fails (an expired certificate), put EuroSAT.zip (94,280,567 bytes, on "
    "huggingface.co/datasets/torchgeo/eurosat) at {manual}/EuroSAT.zip",
}
NOTES = {
    "caltech101": "its split depends on the order in which this machine lists files, so copy the "
    "prepared folder instead of preparing it twice"
}


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tasks", default="all", help="names or groups, joined by commas; default all")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets", help="default %(default)s")
    parser.add_argument("--manual_dir", help="of files fetched by hand; DATA_DIR/downloads/manual")
    parser.add_argument("--source", choices=sources.KINDS, help="what --check reads if both are there")
    parser.add_argument("--check", action="store_true", help="only checks what is there")
    parser.add_argument("--prune", action="store_true", help="removes decoded images that no task uses")
    parser.add_argument("--cache_dir", help="folder of decoded images; default ~/.cache/rlrr_jax")
    args = parser.parse_args()
    if args.prune:
        print(prune(args.cache_dir))
        return
    every = tasks.expand(args.tasks.replace("+", ",").split(","))
    if not (names := [name for name in every if tasks.get(name).tfds]):
        raise UserError(f"{args.tasks} is not part of VTAB-1k: there is nothing to prepare")
    data_dir = epath.Path(args.data_dir).expanduser()
    manual = epath.Path(args.manual_dir or data_dir / "downloads" / "manual").expanduser()
    if not args.check:
        prepare(names, data_dir, manual)
    problems = {}
    for i, name in enumerate(names, 1):
        try:
            line = "ok: " + (vtab_check.check if args.check else vtab_check.look)(
                name, data_dir, args.source
            )
        except (UserError, OSError) as e:
            problems[name] = "wrong" if _is_there(name, data_dir, args.source) else "missing"
            line = f"not ready: {first_line(e)}"
        print(f"[{i}/{len(names)}] {name}: {line}")
    print(summary(names, problems, manual))
    if problems:
        raise UserError(f"{len(problems)} of {len(names)} tasks are not ready: {', '.join(problems)}")


def summary(names: list[str], problems: dict, manual: Any) -> str:
    """The table of what is ready, what is missing and what to do about it."""
    lines = []
    for name in names:
        state = problems.get(name, "ready")
        todo = {"ready": NOTES.get(name, ""), "missing": STEPS.get(name, "see the line above")}
        todo = todo.get(state, "see the line above")
        lines.append([name, state, todo.format(manual=manual)])
    return "\n" + tables.markdown(["task", "state", "what to do"], lines, left=3)


def prune(cache_dir: str | None = None) -> str:
    """Removes decoded images that no task uses; what was removed and what is left, in words."""
    removed = cache.prune(cache_dir)
    lines = [f"removed {folder.name}, {size / 1e9:.2f} GB: {why}" for folder, size, why in removed]
    left = cache.entries(cache_dir)
    total = sum(size for _, size, _ in left) / 1e9
    if foreign := cache.foreign(cache_dir):
        lines.append(f"note: not made by rlrr_jax, and left alone: {some(foreign)}")
    return "\n".join([*lines, f"{cache.images_folder(cache_dir)}: {len(left)} left, {total:.2f} GB"])


def _is_there(name, data_dir, kind):
    try:
        return bool(sources.find(name, data_dir, kind))
    except sources.Twice:
        return True
    except UserError:
        return False


# Preparing ------------------------------------------------------------------------------------


def prepare(names: list[str], data_dir: Any, manual: Any) -> None:
    """Downloads and prepares the datasets of tasks that are not there yet; goes on after a failure.

    Raises UserError if the packages it needs are not installed.
    """
    needed = ("tensorflow", "importlib_resources", "cv2", "scipy", "h5py")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"preparing needs {', '.join(missing)}: install them by pip install -e '.[prepare]' "
            f"(reading, training and --check do not need them)"
        )
    absent = [name for name in names if not _is_there(name, data_dir, None)]
    datasets = list(dict.fromkeys(f"{tasks.get(n).tfds}:{tasks.get(n).version}" for n in absent))
    for i, dataset in enumerate(datasets, 1):
        label = f"[{i}/{len(datasets)}] {dataset}"
        print(f"{label}: preparing")
        try:
            print(f"{label}: {_prepare_one(dataset, data_dir, manual)}")
        except Exception as e:  # a builder can raise anything; the others go on
            print(f"{label}: failed: {type(e).__name__}: {first_line(e)}")


def _prepare_one(dataset, data_dir, manual):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # leave them to JAX
    builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=manual)
    builder.download_and_prepare(download_config=config)
    return f"prepared, {builder.info.dataset_size}"


if __name__ == "__main__":
    one_sentence(main)
