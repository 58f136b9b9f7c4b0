"""The folder of decoded images: what lies in it, what is of no use any more, what of it is ours."""

import json
import os
import pathlib
import re
import shutil

import PIL
from etils import epath

from rlrr_jax import files
from rlrr_jax.data import sources, tasks
from rlrr_jax.errors import UserError

FORMAT = 2  # of an entry


_NOT_THERE = " is not there"


# Decoded again by another major version only: others have given the same pixels.
PILLOW = int(PIL.__version__.partition(".")[0])


def images_folder(cache_dir: str | None = None) -> pathlib.Path:
    """Where decoded images lie."""
    if "://" in str(cache_dir):
        raise UserError(
            f"config.data.cache_dir={cache_dir} is no local folder: images are mapped from it"
        )
    return files.cache(cache_dir) / "images"


TAG = "CACHEDIR.TAG"  # marks folders of caches (bford.info/cachedir), ours among them


TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Decoded images of rlrr_jax.\n"


def is_ours(cache_dir: str | None) -> bool:
    """Whether images were decoded into a cache before."""
    if cache_dir is None or "://" in str(cache_dir):
        return False
    root = images_folder(cache_dir)
    tagged = (root / TAG).is_file() and (root / TAG).read_text(errors="replace") == TAG_TEXT
    return tagged or (root.is_dir() and any(map(_made, root.iterdir())))


def described(cache_dir: str | None = None) -> str:
    """What lies in the cache already, in words that follow a sentence; empty if nothing does."""
    there = entries(cache_dir)
    if not there:
        return ""
    unused = [size for _, size, why in there if why and not why.endswith(_NOT_THERE)]
    text = f"; {images_folder(cache_dir)} holds {sum(e[1] for e in there) / 1e9:.2f} GB"
    if unused:
        text += f", {sum(unused) / 1e9:.2f} GB of no use any more (python -m rlrr_jax.prepare --prune)"
    return text


def entries(cache_dir: str | None = None, thorough: bool = False) -> list:
    """What lies in the cache: `[(folder, bytes, why no task uses it or None), ...]`.

    Folders that are not as `build` makes them are somebody's own, and not among them.

    Args:
      thorough: whether to see if the dataset is still the one that was decoded.
    """
    root, out = images_folder(cache_dir), []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        try:
            if not _made(folder):
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
        except FileNotFoundError:  # another process has just finished or removed it
            continue
        out.append((folder, size, _unused(folder, thorough)))
    return out


_ENTRY = re.compile(r".+-(original|jpeg75|stored)-[0-9a-f]{10}")


_PART = re.compile(rf"\.{_ENTRY.pattern}\.[0-9a-f]{{8}}\.part")


_FILE = re.compile(r"images\.npy|labels-.+\.npy|entry\.json|\.[0-9a-f]{12}\.part(\.json)?")


def _made(folder: pathlib.Path) -> bool:
    """Whether a folder has the name and the files of an entry (or of one in the making) alone."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    whole = _ENTRY.fullmatch(folder.name) and (folder / "entry.json").is_file()
    if not whole and not _PART.fullmatch(folder.name):
        return False
    return all(_FILE.fullmatch(p.name) and p.is_file() and not p.is_symlink() for p in folder.iterdir())


def foreign(cache_dir: str | None = None) -> list:
    """Names in the folder of decoded images that `prune` leaves alone, since we did not make them."""
    root = images_folder(cache_dir)
    mine = {TAG, *(folder.name for folder, *_ in entries(cache_dir))}
    there = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    return [name for name in there if name not in mine and not re.fullmatch(r"\..*\.lock", name)]


def _unused(folder, thorough):
    if folder.name.endswith(".part"):
        return "its decoding was interrupted, or goes on in another process"
    try:
        key = json.loads((folder / "entry.json").read_text())["key"]
        if key["format"] != FORMAT:
            return "made by an older version of rlrr_jax"
        if key["pillow"] != PILLOW:
            return f"decoded by Pillow {key['pillow']}, this is {PILLOW}"
        if "own" in key:  # a user's images, of which any list may come again
            return None if os.path.exists(key["own"]) else f"its images {key['own']}{_NOT_THERE}"
        if key["labels"] != [tasks.get(name).rule for name in key["tasks"]]:
            return "its labels are of an older version"
        if "path" not in key and "folder" not in key:  # of a data source that a fork added
            return None
        kind = "tfds" if "path" in key else "folder"
        path = epath.Path(key["path"] if kind == "tfds" else key["folder"])
        if not path.exists():
            return f"its dataset {path}{_NOT_THERE}"
        if thorough:
            found = sources.Found(kind, path, key.get("dataset", ""))
            now = json.loads(json.dumps(sources.open_split(key["tasks"][0], key["split"], found).key))
            if any(key.get(name) != value for name, value in now.items()):
                return f"its dataset {path} has changed"
    except UserError as e:
        return f"its dataset cannot be read: {e}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "made by an older version of rlrr_jax, or damaged"
    return None


def prune(cache_dir: str | None = None) -> list:
    """Removes what no task uses, and returns it as `entries` does.

    What is being decoded stays, and so does what belongs to a dataset that is not there.
    """
    removed, root = [], images_folder(cache_dir)
    for folder, size, why in entries(cache_dir, thorough=True):
        if why is None or why.endswith(_NOT_THERE):  # a disk may come back
            continue
        name = folder.name.strip(".").removesuffix(".part").partition(".part")[0]
        name = re.sub(r"\.[0-9a-f]{8}$", "", name) if folder.name.endswith(".part") else name
        try:
            with files.lock(root, f".{name}.lock") as held:  # which whoever decodes it holds
                if not held and folder.name.endswith(".part"):
                    continue
                shutil.rmtree(folder)
        except UserError:
            continue
        removed.append((folder, size, why))
    return removed


def check_space(wanted: int, cache_dir: str | None = None) -> None:
    """UserError if so many bytes do not fit into the cache folder's disk."""
    folder = root = images_folder(cache_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"the decoded images take {wanted / 1e9:.1f} GB and {root} has "
            f"{free / 1e9:.1f} GB free: make space, or point config.data.cache_dir at a larger disk"
        )
