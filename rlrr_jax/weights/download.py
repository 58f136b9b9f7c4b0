"""Files from https:// and gs:// addresses, cached on disk."""

import errno
import hashlib
import http.client
import json
import os
import pathlib
import secrets
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

from etils import epath
from tqdm import tqdm

from rlrr_jax import files
from rlrr_jax.errors import UserError, first_line

ATTEMPTS = 5
PUBLIC_GS = "https://storage.googleapis.com/"
_BLOCK = 1 << 20
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def sha256(path):
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cached(url, folder=None):
    """Downloads `url` once; returns its local path and its SHA-256.

    The SHA-256 is computed at download, kept beside the file as `<file>.sha256` and checked at each
    call. A download goes on where an interrupted one stopped, and appears under its final name only
    when it is whole. Raises UserError if the address cannot be read or the cached file has changed.
    """
    parts = urllib.parse.urlsplit(url)
    path = files.cache(folder) / parts.netloc / parts.path.lstrip("/")
    record = path.with_name(path.name + ".sha256")
    if not (path.exists() and record.exists()):  # a cache that is complete may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(path.parent, f"{path.name}.lock", wait=True) as held:
            if not path.exists():
                own = "" if held else f".{secrets.token_hex(4)}"  # two writers share no name
                part = path.with_name(f"{path.name}{own}.part")
                (_fetch_gs if parts.scheme == "gs" else _download)(url, part)
                record.write_text(sha256(part) + "\n")
                os.replace(part, path)
            if not record.exists():  # a file somebody put there by hand
                record.write_text(sha256(path) + "\n")
    found = sha256(path)
    if found != record.read_text().strip():
        raise UserError(
            f"{path} has changed since it was downloaded (SHA-256 {found[:12]}... instead of "
            f"{record.read_text()[:12]}...): delete it and its .sha256 to download it again"
        )
    return path, found


def from_hub(name, folder=None):
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


def _fetch_gs(url, part):
    """A gs:// file: over https:// if it is public, else with the user's own rights."""
    try:
        return _download(PUBLIC_GS + url.removeprefix("gs://"), part)
    except UserError as e:
        if not isinstance(e.__cause__, urllib.error.HTTPError):
            raise
    try:
        with epath.Path(url).open("rb") as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
    except ImportError as e:
        raise UserError(f"{url} is not public and needs a package for gs://: pip install gcsfs") from e
    except Exception as e:  # each storage library has its own exceptions
        raise UserError(f"cannot read {url}: {type(e).__name__}: {e}") from e


def _download(url, part):
    """Downloads an http(s) file into `part`, appending to what is there."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _download_once(url, part)
        except urllib.error.HTTPError as e:
            if e.code == 416:  # what we have is longer than the file: start again
                part.unlink(missing_ok=True)
            if (e.code < 500 and e.code != 416) or attempt == ATTEMPTS:
                raise UserError(f"cannot download {url}: {e.code} {e.reason}") from e
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "filename", None) or getattr(e, "errno", None) in _DISK:
                raise  # ours, not the network's
            if attempt == ATTEMPTS:
                raise UserError(
                    f"cannot download {url} ({getattr(e, 'reason', e)}): check the network, or put "
                    f"the file at {part.with_suffix('')} and start again"
                ) from e
        time.sleep(min(2**attempt, 30) / 4)


def _download_once(url, part):
    tag = part.with_name(part.name + ".etag")  # tells whether the rest belongs to what we have
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag.read_text())
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # the server sends the whole file
            have = 0
            part.unlink(missing_ok=True)  # before the new tag is written
            tag.unlink(missing_ok=True)
            if response.headers.get("ETag"):
                tag.write_text(response.headers["ETag"])
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        name = url.rsplit("/", 1)[-1]
        with (
            open(part, "ab" if have else "wb") as f,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name) as bar,
        ):
            while block := response.read(_BLOCK):
                f.write(block)
                bar.update(len(block))
        if total is not None and part.stat().st_size != total:
            raise ConnectionError(f"connection closed after {part.stat().st_size} of {total} bytes")
    tag.unlink(missing_ok=True)
