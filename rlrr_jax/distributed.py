"""Several processes in one run: starting, agreeing, and ending together.

The same program runs on every host. Process 0 decides (what is finished, how many steps the next dispatch
has, whether to stop) and writes results; all others follow. Workdir and weights are on disks that all
share, or behind gs://.
"""

import contextlib
import json
import os
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlrr_jax.errors import UserError, first_line

MODES = ("auto", "on", "off")
_FAILED = "rlrr_jax/failed"


def start(mode="auto", timeout=300):
    """Joins the other processes; to be called before anything asks for a device.

    SLURM, TPU pods, GKE and Open MPI are recognised by JAX; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

    Args:
      mode: "auto" goes on alone if nothing announces others, "on" does not, "off" never joins.
      timeout: seconds to wait for the others.

    Raises UserError if the others do not come, naming them.
    """
    if mode == "off":
        return
    number, mine = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=number and int(number),
            process_id=mine and int(mine),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=30,
        )
    except ValueError as e:  # nothing announces others
        if mode == "on" or number:
            raise UserError(
                f"--distributed={mode} found no other processes ({first_line(e)}): start through SLURM, "
                f"a TPU pod or GKE, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from e
        return
    except RuntimeError as e:
        raise UserError(
            f"gave up after {timeout} s without all other processes ({_missing(e)}): see whether the same "
            f"command runs on every host"
        ) from e
    if jax.process_count() > 1:
        print(
            f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
            f"{jax.device_count()} {jax.default_backend()} devices",
            file=sys.stderr,
            flush=True,
        )
        threading.Thread(target=_watch, daemon=True).start()


def _missing(error):
    """The tasks that JAX says did not come, or the first line of what it says."""
    names = [part.split()[0].strip(",.") for part in str(error).split("/task:")[1:]]
    return f"missing: {', '.join(sorted(set(names)))}" if names else first_line(error)


def lead():
    """Whether this process is the one that writes and shows."""
    return jax.process_index() == 0


def agree(value):
    """Process 0's value, any JSON, in every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if lead() else np.zeros(size, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)))


def any_of(flag):
    """Whether a flag is set in some process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait(name):
    """Returns when every process is here: what process 0 wrote before can be read after."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree):
    """A tree of arrays as NumPy, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    whole = lambda x: x.is_fully_addressable or x.is_fully_replicated
    get = lambda x: np.asarray(x) if whole(x) else multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(get, tree)


@contextlib.contextmanager
def together():
    """Whatever ends one process ends all of them, each with its message."""
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except BaseException as e:
        text = str(e) if isinstance(e, UserError | SystemExit) else f"{type(e).__name__}: {first_line(e)}"
        _client().key_value_set(_FAILED, f"process {jax.process_index()}: {text}", allow_overwrite=True)
        raise


def _watch():
    """Waits for another process to fail, then ends this one, which may hang in a collective."""
    with contextlib.suppress(Exception):  # the service ends with a run that went well
        text = _client().blocking_key_value_get(_FAILED, 2**31 - 1)
        if not text.startswith(f"process {jax.process_index()}:"):
            print(f"error: {text}", file=sys.stderr, flush=True)
            os._exit(1)


def _client():
    """JAX's key-value service; it has no public name, Orbax uses it in the same way."""
    from jax._src import distributed

    return distributed.global_state.client
