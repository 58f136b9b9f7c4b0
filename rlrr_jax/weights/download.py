"""Files from https:// and gs:// addresses, cached on disk.

An address may come from somebody else, in the card of an adapter: it decides neither where a file lies
here nor that it is fetched.
"""

import base64
import hashlib
import os
import pathlib
import re
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
from rlrr_jax.hub import NotFetched

ATTEMPTS = 5
PUBLIC_GS = "https://storage.googleapis.com/"
_BLOCK = 1 << 20


def place(url: str, folder: Any = None) -> pathlib.Path:
    """Where the file of an address is kept: in a folder named by the digest of the whole address.

    Of the address itself only letters of its last part are used, so it decides no folder.
    """
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).replace("\\", "/").rpartition("/")[2]
    name = re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).lstrip(".")[-100:] or "file"
    return files.cache(folder) / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def cached(url: str, folder: Any = None, wanted: str | None = None, fetch: bool = True) -> tuple:
    """Downloads `url` once; returns its local path and its SHA-256.

    The SHA-256 is computed at download, kept beside the file as `<file>.sha256` and checked at each
    call. A file appears under its final name only when it is whole.

    Args:
      url: address of the file.
      folder: folder of caches; None is the default, see `files.cache`.
      wanted: hex SHA-256 that the file must have; another never gets the final name. None: any.
      fetch: whether it may be downloaded if it is not there.

    Raises:
      NotFetched: if it is not there and must not be downloaded.
      UserError: if the address cannot be read, leads from https to elsewhere, or has another file, or
        if the cached file has changed.
    """
    path = place(url, folder)
    record = path.with_name(path.name + ".sha256")
    if not (path.exists() and record.exists()):  # a cache that is complete may be read-only
        if not fetch and not path.exists():
            raise NotFetched(f"{url} is not on this machine")
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(path.parent, f"{path.name}.lock", wait=True):
            if not path.exists():
                _fetch(url, path, wanted)
            if not record.exists():  # it is new, or somebody put it there by hand
                record.write_text(files.sha256(path) + "\n")
    found = files.sha256(path)
    if found != record.read_text().strip():
        raise UserError(
            f"{path} has changed since it was downloaded (SHA-256 {found[:12]}... instead of "
            f"{record.read_text()[:12]}...): delete it and its .sha256 to download it again"
        )
    return path, found


def _fetch(url, path, known):
    """Brings a file to a path: over https:// where it is public, else with the user's own rights."""
    if not url.startswith("gs://"):
        return _download(url, path, known)
    try:
        return _download(PUBLIC_GS + url.removeprefix("gs://"), path, known)
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


class _Downloader(pooch.HTTPDownloader):
    """pooch's, which stays on https, and compares the MD5 that Google's storage sends with a file."""

    def __init__(self):
        super().__init__(progressbar=True, timeout=60, hooks={"response": self._look})
        self.md5 = None

    def _look(self, response, **_):
        sent = response.headers.get("x-goog-hash", "")
        plain = "Content-Encoding" not in response.headers  # else it is of other bytes
        self.md5 = (re.search(r"md5=([\w+/=]+)", sent) or [None, None])[1] if plain else None
        target = urllib.parse.urljoin(response.url, response.headers.get("Location", ""))
        leaves = response.url.startswith("https:") and not target.startswith("https:")
        if response.is_redirect and leaves:
            raise UserError(f"{response.url} leads to {target}, which is not https: it is not followed")

    def __call__(self, url, output_file, pooch, check_only=False):
        super().__call__(url, output_file, pooch, check_only)
        with open(output_file, "rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if self.md5 not in (None, found):
            raise requests.ConnectionError("its MD5 is not what its server says")


def _download(url, path, known):
    """Downloads an http(s) file, whole or not at all; asks again after a fault of server or network."""
    pooch.get_logger().setLevel("WARNING")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            known_hash = known and f"sha256:{known}"
            pooch.retrieve(url, known_hash, fname=path.name, path=path.parent, downloader=_Downloader())
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
        except UserError:
            raise
        except ValueError as e:  # pooch's, of a file with another hash
            raise UserError(
                f"{url} has another file than the one wanted (SHA-256 {known[:12]}...): it was not kept"
            ) from e
        time.sleep(min(2**attempt, 30) / 4)
