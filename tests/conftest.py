"""Four CPU devices for every test, and runs that several files look at."""

import ctypes
import gc
import os
import pathlib

import forked
from flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(4)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pictures
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
pictures.skip()


def pytest_collection_finish():
    """Python looks for garbage less often, and not among what was imported: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory, worker_id):
    """Programs are compiled once for all tests of a session, as a user's are for all starts."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker_id == "master" else shared.parent) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def dropped():
    """Programs go when their file ends."""
    yield
    jax.clear_caches()
    gc.collect()


def resident():
    """Bytes of this process, 0 where that is not said."""
    memory = pathlib.Path("/proc/self/statm")  # of Linux
    return int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if memory.exists() else 0


@pytest.fixture(autouse=True)
def returned():
    """Memory is given back: the allocator keeps gigabytes of what compilers used, JAX the programs."""
    yield
    for drop in (lambda: None, jax.clear_caches):
        if resident() > 1.5 * 2**30:
            drop()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)


hypothesis.settings.register_profile("short", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("short")


@pytest.fixture(scope="session")
def tuned_runs(tmp_path_factory, worker_id):
    """A workdir with runs: RLRR, LoRA and SSF on digits, RLRR on hearts, two blocks, trained briefly."""
    from rlrr_jax import files

    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent  # of all workers of pytest-xdist
    finished = shared / "tuned.finished"
    with files.lock(shared, "tuned.lock", wait=True):
        if not finished.exists():
            command = ["rlrr_jax.main", "--config.epochs=2", "--config.model.depth=2"]
            command += [f"--workdir={shared / 'tuned'}"]
            tasks = ("digits,method=rlrr+lora+ssf", "hearts,method=rlrr")
            done = forked.ask([[*command, f"--config=configs/vtab.py:{arg}"] for arg in tasks])
            done.append(forked.run(["rlrr_jax.report", shared / "tuned"]))  # the rows of both
            assert [x.returncode for x in done] == [0, 0, 0], [x.stderr for x in done]
        finished.touch()
    return shared / "tuned"
