"""Locks that are missing, folders that are linked, names that are pipes."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from rlrr_jax import files
from rlrr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def no_locks(monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_told", set())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_there_is_one_warning_that_names_the_folder(code, tmp_path, monkeypatch, capsys):
    no_locks(monkeypatch, code)
    for name in ("a", "b"):
        with files.lock(tmp_path, name) as held:
            assert held is False
    said = f"cannot be locked ({os.strerror(code)}): start no second process there"
    assert capsys.readouterr().err == f"warning: {tmp_path} {said}\n"


def test_other_troubles_with_a_lock_are_raised(tmp_path, monkeypatch):
    no_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError), files.lock(tmp_path):
        pass
    with pytest.raises(FileNotFoundError):
        with files.lock(tmp_path / "none"):
            pass


def test_a_lock_that_is_held_is_said(tmp_path):
    with files.lock(tmp_path) as held:
        assert held is True
        with pytest.raises(UserError, match=f"another process is training in {tmp_path}"):
            with files.lock(tmp_path):
                pass


def test_two_writers_share_no_name(tmp_path):
    """Twenty threads replace one file: it always holds one whole text, and nothing else is left."""
    path, texts = tmp_path / "x.json", [str(i) * 10_000 for i in range(20)]
    threads = [threading.Thread(target=files.write, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert len({str(files.temporary(path)) for _ in range(100)}) == 100


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    files.write(tmp_path / "x", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        files.write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_links_stay_and_pipes_and_devices_are_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("old")
    (tmp_path / "link").symlink_to("real/x")
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/x").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write(tmp_path / "pipe", "through")
    reader.join()
    assert got == ["through"] and (tmp_path / "pipe").is_fifo()
    files.write("/dev/null", "gone")
    assert not pathlib.Path("/dev/null").is_file()
    code = "from rlrr_jax import files; files.write('/dev/stdout', 'out')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "out", done.stderr


def test_linked_folders_are_walked_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/1", "a/b/2"):
        (tmp_path / name).write_text("")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")  # a circle
    (tmp_path / "other").mkdir()
    (tmp_path / "other/3").write_text("")
    (tmp_path / "a/link").symlink_to(tmp_path / "other")
    found = [str(p.relative_to(tmp_path)) for p in files.walk(tmp_path / "a")]
    assert found == ["a/1", "a/b/2", "a/link/3"]


def test_where_caches_are(monkeypatch):
    monkeypatch.delenv("RLRR_JAX_CACHE", raising=False)
    assert files.cache() == pathlib.Path("~/.cache/rlrr_jax").expanduser()
    assert files.cache("/x") == pathlib.Path("/x")
    monkeypatch.setenv("RLRR_JAX_CACHE", "/y")
    assert files.cache() == pathlib.Path("/y") and files.cache("/x") == pathlib.Path("/x")


def test_nobodys_home_is_one_sentence(monkeypatch):
    """An arbitrary user of a container: neither HOME nor an entry in passwd."""
    import pwd

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("RLRR_JAX_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="no home directory: set RLRR_JAX_CACHE to a folder"):
        files.cache()
    with pytest.raises(UserError, match="~/x names no home directory: write the whole path"):
        files.local("~/x")


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*/nowhere: check the path"):
        list(files.walk(tmp_path / "nowhere"))


def test_folders_as_files_and_missing_ones_are_said_by_their_own_names(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is a folder: name a file"):
        files.write(tmp_path, "x")
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none for x.csv: make it"):
        files.write(tmp_path / "none/x.csv", "x")
    assert not list(tmp_path.iterdir())
