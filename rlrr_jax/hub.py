"""Hugging Face's Hub: files and datasets of repositories `user/name[@revision]`, by its own library.

Its environment variables hold (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE), and its cache.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from rlrr_jax import files
from rlrr_jax.errors import UserError, first_line

PREFIX = "hf:"


class NotFetched(UserError):
    """A file is not on this machine, and may not be downloaded without its user's word."""


_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w-][\w.-]*(/[\w-][\w.-]*)*)?", re.ASCII)


def _library(name: str, folder: Any) -> tuple[Any, dict[str, Any]]:
    """Hugging Face's library, and what a repository `user/name[@revision]` is to its functions.

    Raises UserError without the library, or for a name that could be a path.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(f"hf:{name} is no repository: write hf:user/name or hf:user/name@revision")
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError(f"hf:{name} needs huggingface_hub: pip install huggingface_hub") from e
    repository, _, revision = name.partition("@")
    where = {"repo_id": repository, "revision": revision or None}
    return huggingface_hub, {**where, "cache_dir": folder and files.local(folder) / "hub"}


@contextlib.contextmanager
def asking(what: str, way: str) -> Iterator[None]:
    """Explains whatever its library raises, of the network, a name, a token, the disk.

    Args:
      what: what cannot be done, such as "get x of hf:user/name".
      way: what to do about it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"cannot {what} ({first_line(e)}): {way}") from e


BY_HAND = "check the name and the network, or download it by hand and give its path"


def file(name: str, path: str, folder: Any = None) -> pathlib.Path:
    """Local path of one file of a repository `user/name[@revision]` on Hugging Face.

    Raises UserError if it cannot be had.
    """
    library, where = _library(name, folder)
    with asking(f"get {path} of hf:{name}", BY_HAND):
        return pathlib.Path(library.hf_hub_download(filename=path, **where))


def weights(
    name: str, folder: Any = None, wanted: str | None = None, fetch: bool = True
) -> pathlib.Path:
    """Local path of a model's `model.safetensors` (or the index of its shards) on Hugging Face.

    Its `config.json` and `preprocessor_config.json` lie beside it.

    Args:
      name: repository `user/name[@revision]`.
      folder: folder of caches; None is the library's own.
      wanted: hex SHA-256 that the file must have; one that the Hub says to be another is not fetched.
      fetch: whether it may be downloaded if it is not there.

    Raises:
      NotFetched: if it is not there and must not be downloaded.
      UserError: if it cannot be had, or is another file.
    """
    library, where = _library(name, folder)
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(file, offline=False):
        """Its path, None if the model has no such file (or, `offline`, if none can be had)."""
        try:
            return pathlib.Path(library.hf_hub_download(filename=file, **where))
        except LocalEntryNotFoundError:  # a kind of the next, of the network
            if offline:
                return None
            raise
        except EntryNotFoundError:
            return None

    with asking(f"get model.safetensors of hf:{name}", BY_HAND):
        kept = lambda file: library.try_to_load_from_cache(filename=file, **where)
        there = isinstance(kept("model.safetensors"), str)
        if not fetch:  # a path of the cache, and nothing of the network
            for file in ("model.safetensors", "model.safetensors.index.json"):
                if isinstance(path := kept(file), str):
                    return pathlib.Path(path)
            raise NotFetched(f"hf:{name} is not on this machine")
        for file in ("config.json", "preprocessor_config.json"):
            get(file, offline=there)  # without the network, if need be
        if wanted and not there:
            with contextlib.suppress(EntryNotFoundError):  # in shards, whose digest is compared later
                _check_offer(library, where, wanted)
        if whole := get("model.safetensors"):
            return _whole(whole)
        if index := get("model.safetensors.index.json"):
            for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                if pathlib.PurePath(shard).name != shard:
                    raise ValueError(f"its index names {shard!r}, which is no file beside it")
                get(shard)
            return index
        raise FileNotFoundError("it has no model.safetensors")


def _check_offer(library: Any, where: dict, wanted: str) -> None:
    """UserError if the Hub says that a model's file has another SHA-256; of small ones it says none."""
    url = library.hf_hub_url(where["repo_id"], "model.safetensors", revision=where["revision"])
    offered = str(library.get_hf_file_metadata(url).etag)
    if re.fullmatch(r"[0-9a-f]{64}", offered) and offered != wanted:
        raise UserError(
            f"hf:{where['repo_id']} has another file now (SHA-256 {offered[:12]}... instead of "
            f"{wanted[:12]}...): it was not downloaded"
        )


def _whole(path: pathlib.Path) -> pathlib.Path:
    """A file of the Hub's cache; UserError unless it has the SHA-256 that its publisher gave it."""
    given = path.resolve().name  # the Hub names large files so
    if re.fullmatch(r"[0-9a-f]{64}", given) and (found := files.sha256(path)) != given:
        raise UserError(
            f"{path} is damaged (SHA-256 {found[:12]}..., on the Hub {given[:12]}...): delete "
            f"{path.resolve()} to download it again"
        )
    return path


def is_name(text: str) -> bool:
    """Whether a text can be a repository `user/name[@revision]`."""
    return bool(_NAME.fullmatch(text)) and "/" in text.partition("@")[0] and ".." not in text


def dataset(name: str, fetch: bool) -> pathlib.Path:
    """Local folder of a dataset on Hugging Face, in its library's cache, named by its commit.

    Args:
      name: repository `user/name[@revision]`.
      fetch: whether it may be downloaded; else what an earlier call left is taken.

    Raises:
      NotFetched: if it is not there and must not be downloaded.
      UserError: if it cannot be had.
    """
    library, where = _library(name, None)
    what = dict(repo_type="dataset", ignore_patterns=["*.py"], local_files_only=not fetch)
    way = "check the name and the network; no folder here has that name"
    try:
        with asking(f"get the dataset hf:{name}", way):
            return pathlib.Path(library.snapshot_download(**where, **what))
    except UserError as e:
        raise e if fetch else NotFetched(f"the images hf:{name} are not on this machine") from e
