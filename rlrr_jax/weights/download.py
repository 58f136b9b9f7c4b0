"""Files from https:// and gs:// addresses, cached on disk."""

import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
import urllib.parse
from typing import Any

import pooch
import requests
from etils import epath

from rlrr_jax import files
from rlrr_jax.errors import UserError, first_line

ATTEMPTS = 5
PUBLIC_GS = "https://storage.googleapis.com/"
_BLOCK = 1 << 20


def sha256(path: Any) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cached(url: str, folder: Any = None) -> tuple:
    """Downloads `url` once; returns its local path and its SHA-256.

    The SHA-256 is computed at download, kept beside the file as `<file>.sha256` and checked at each
    call. A file appears under its final name only when it is whole. Raises UserError if the address
    cannot be read or the cached file has changed.
    """
    parts = urllib.parse.urlsplit(url)
    path = files.cache(folder) / parts.netloc / parts.path.lstrip("/")
    record = path.with_name(path.name + ".sha256")
    if not (path.exists() and record.exists()):  # a cache that is complete may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(path.parent, f"{path.name}.lock", wait=True):
            if not path.exists():
                _fetch(url, path)
            if not record.exists():  # it is new, or somebody put it there by hand
                record.write_text(sha256(path) + "\n")
    found = sha256(path)
    if found != record.read_text().strip():
        raise UserError(
            f"{path} has changed since it was downloaded (SHA-256 {found[:12]}... instead of "
            f"{record.read_text()[:12]}...): delete it and its .sha256 to download it again"
        )
    return path, found


def hub_file(name: str, file: str, folder: Any = None) -> pathlib.Path:
    """Local path of one file of a repository on Hugging Face; UserError if it cannot be had."""
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError(f"hf:{name} needs huggingface_hub: pip install huggingface_hub") from e
    try:
        cache = folder and files.local(folder) / "hub"
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file, cache_dir=cache))
    except Exception as e:  # of the network, the name, the disk
        raise UserError(
            f"cannot get {file} of hf:{name} ({first_line(e)}): check the name and the network, or "
            f"download it by hand and give its path"
        ) from e


def from_hub(name: str, folder: Any = None) -> pathlib.Path:
    """Local path of a model's `model.safetensors` (or the index of its shards) on Hugging Face.

    Its `config.json` and `preprocessor_config.json` lie beside it.

    Its own library downloads it, with its environment variables (HF_TOKEN, HF_ENDPOINT,
    HF_HUB_OFFLINE) and, unless `folder` says otherwise, its cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as e:
        raise UserError(f"hf:{name} needs huggingface_hub: pip install huggingface_hub") from e
    place = dict(cache_dir=folder and files.local(folder) / "hub")

    def get(file, offline=False):
        """Its path, None if the model has no such file (or, `offline`, if none can be had)."""
        try:
            return pathlib.Path(huggingface_hub.hf_hub_download(name, file, **place))
        except LocalEntryNotFoundError:  # a kind of the next, of the network
            if offline:
                return None
            raise
        except EntryNotFoundError:
            return None

    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "model.safetensors", **place)
        there = isinstance(cached, str)  # then the network is not needed, and may be missing
        for file in ("config.json", "preprocessor_config.json"):
            get(file, offline=there)
        if whole := get("model.safetensors"):
            return whole
        if index := get("model.safetensors.index.json"):
            for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                get(shard)
            return index
        raise FileNotFoundError("it has no model.safetensors")
    except Exception as e:  # of the network, the name, the disk
        raise UserError(
            f"cannot get model.safetensors of hf:{name} ({first_line(e)}): check the name and the "
            f"network, or download it by hand and give its path"
        ) from e


def _fetch(url, path):
    """Brings a file to a path: over https:// where it is public, else with the user's own rights."""
    if not url.startswith("gs://"):
        return _download(url, path)
    try:
        return _download(PUBLIC_GS + url.removeprefix("gs://"), path)
    except UserError as e:
        if not isinstance(e.__cause__, requests.HTTPError):
            raise
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with epath.Path(url).open("rb") as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        os.replace(part, path)
    except ImportError as e:
        raise UserError(f"{url} is not public and needs a package for gs://: pip install gcsfs") from e
    except Exception as e:  # each storage library has its own exceptions
        raise UserError(f"cannot read {url}: {type(e).__name__}: {e}") from e
    finally:
        part.unlink(missing_ok=True)


def _download(url, path):
    """Downloads an http(s) file, whole or not at all; asks again after a fault of server or network."""
    pooch.get_logger().setLevel("WARNING")
    get = pooch.HTTPDownloader(progressbar=True, timeout=60)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            pooch.retrieve(url, None, fname=path.name, path=path.parent, downloader=get)
            return
        except requests.HTTPError as e:
            answer = e.response
            if answer.status_code < 500 or attempt == ATTEMPTS:
                text = f"cannot download {url}: {answer.status_code} {answer.reason}"
                raise UserError(text) from e
        except requests.RequestException as e:
            if attempt == ATTEMPTS:
                raise UserError(
                    f"cannot download {url} ({first_line(e)}): check the network, or put the file at "
                    f"{path} and start again"
                ) from e
        time.sleep(min(2**attempt, 30) / 4)
