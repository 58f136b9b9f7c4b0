"""Several processes in one run: starting, agreeing, and ending together.

The same program runs on every host. Process 0 decides how many steps a dispatch has and writes results;
all others follow. The workdir is on a disk that all share, or behind gs://.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import hardware_utils  # what joining looks at; neither has a public name
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from rlrr_jax.errors import TRACEBACK, UserError, first_line

_FAILED, _STOPPED = "rlrr_jax/failed", "rlrr_jax/stopped"
_INTERRUPTED = "interrupted: what was saved and what is finished is kept"
WAITING_SECONDS = 5  # after which a process says that it waits for others
STOPPED_TEXT = "stopped and saved: the same command goes on"


class Announced(NamedTuple):
    """What the surroundings say: how many processes, which this is, and which of its host's."""

    number: int
    mine: int
    local: str | None = None


def announced() -> Announced | None:
    """The processes that were started with this one, as SLURM, a TPU pod or the like says."""
    if _alone():
        return None
    number, mine, local = (
        os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID", "LOCAL_DEVICE_IDS")
    )
    try:
        known = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        cluster = next((kind for kind in known if kind.is_env_present()), None)
        if cluster is not None and local is None:
            place = cluster.get_local_process_id()
            local = None if place is None else str(place)
        if number and mine:
            return Announced(int(number), int(mine), local)
        if cluster is None:
            return None
        return Announced(cluster.get_process_count(), cluster.get_process_id(), local)
    except Exception:  # of a cluster's library: `start` says what is wrong
        return None


def stay_apart(announced: Announced) -> None:
    """Shows this process its own devices alone, as joining the others would.

    What somebody has set of a TPU's chips stays. Of a slice of hosts, libtpu would wait for the others.
    """
    chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
    if chips and not os.environ.get("TPU_VISIBLE_CHIPS"):
        bounds = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}.get(chips, f"{chips},1,1")
        os.environ["TPU_PROCESS_BOUNDS"] = "1,1,1"
        os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] = bounds
        os.environ["TPU_VISIBLE_CHIPS"] = ",".join(map(str, range(chips)))
        os.environ["TPU_WORKER_ID"], os.environ["TPU_WORKER_HOSTNAMES"] = "0", "localhost"
        os.environ.pop("TPU_PROCESS_ADDRESSES", None)
    elif not chips and announced.local is not None:
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", announced.local)


def check_apart(timeout: int) -> None:
    """Looks for this process's own devices, which must not be those of others, too.

    Raises UserError if they are. If it has to wait for others so many seconds, it ends with a sentence.
    """
    text = f"error: gave up after {timeout} s: this process finds no devices of its own: add --part=off"
    timer = threading.Timer(timeout, lambda: (print(text, file=sys.stderr), os._exit(1)))
    timer.daemon = True
    timer.start()
    number = jax.process_count()
    timer.cancel()
    if not several() and number > 1:
        raise UserError(
            f"this process sees all {number} hosts of the TPU, and should see its own: "
            f"add --part=off, which trains each run on all of them"
        )


def start(mode: str = "auto", timeout: int = 300) -> None:
    """Joins the other processes; to be called before anything asks for a device.

    SLURM, TPU pods, GKE and Open MPI are recognised by JAX; elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

    Args:
      mode: "auto" goes on alone if nothing announces others, "on" does not, "off" never joins.
      timeout: seconds to wait for the others.

    Raises UserError if "on" finds nothing. If the others do not come, the process ends with a sentence:
    JAX itself would abort.
    """
    if mode == "off" or (mode == "auto" and _alone()):
        return
    _check_address()
    number, mine = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    timer = threading.Timer(timeout, _give_up, [timeout, number, mine])
    timer.daemon = True
    timer.start()
    told = threading.Timer(WAITING_SECONDS, _waiting, [number, timeout])
    told.daemon = True
    told.start()
    try:
        jax.distributed.initialize(
            num_processes=int(number) if number else None,
            process_id=int(mine) if mine else None,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=30,
        )
    except ValueError as e:  # nothing announces others
        if mode == "on" or number:
            raise UserError(
                f"--distributed={mode} found no other processes ({first_line(e)}): start through "
                f"SLURM, a TPU pod or GKE, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID"
            ) from e
        return
    except Exception as e:
        # Of a cluster's library that has no rights, such as kubernetes without a token.
        if mode == "on" or number or isinstance(e, jax.errors.JaxRuntimeError):
            raise UserError(
                f"the other processes cannot be joined ({type(e).__name__}: {first_line(e)}): see "
                f"whether the same command runs on every host and whether the port is free, or add "
                f"--distributed=off to go alone"
            ) from e
        print(
            f"warning: no cluster can be asked for other processes ({type(e).__name__}): going alone, "
            f"as with --distributed=off",
            file=sys.stderr,
        )
        return
    finally:
        timer.cancel()
        told.cancel()
    if several():
        numbers = _numbers_of_devices(timeout)
        if len(set(numbers)) > 1:
            raise UserError(
                f"the processes have {', '.join(numbers)} devices: give each as "
                f"many (CUDA_VISIBLE_DEVICES, or XLA_FLAGS on CPUs)"
            )
        print(
            f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
            f"{jax.device_count()} {jax.default_backend()} devices",
            file=sys.stderr,
        )


def _numbers_of_devices(timeout):
    """Of each process, as text; asked without a collective, which unequal ones could not have."""
    client, key = _client(), "rlrr_jax/devices"
    client.key_value_set(f"{key}/{jax.process_index()}", str(jax.local_device_count()))
    every = range(jax.process_count())
    return [client.blocking_key_value_get(f"{key}/{i}", 1000 * timeout) for i in every]


def _check_address():
    """UserError for an address of the coordinator that JAX cannot read."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not _is_address(address):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} is no host:port of process 0: add the port, or "
            f"--distributed=off to go alone"
        )
    if address is not None and os.environ.get("JAX_PROCESS_ID") == "0":
        _check_port(int(address.rpartition(":")[2]))
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        number = os.environ["OMPI_COMM_WORLD_SIZE"]
        if number != "1" and address is None:
            raise UserError(
                f"Open MPI announces {number} processes in a way that JAX does not know: set "
                f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
                f"--distributed=off"
            )


def _is_address(text):
    found = re.fullmatch(r"\S+:(\d{1,5})", text)
    return bool(found) and 0 < int(found[1]) < 1 << 16


def _check_port(port):
    """UserError for a port that another program listens on: JAX would share it, and end both runs."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as e:
            raise UserError(
                f"port {port} of JAX_COORDINATOR_ADDRESS is taken ({e.strerror}): another run may hold "
                f"it, choose another port"
            ) from e


def _alone():
    """Whether SLURM or Open MPI started one process: JAX would take only the first of its GPUs."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    given = [os.environ[name] for name in names if name in os.environ]
    return "JAX_NUM_PROCESSES" not in os.environ and given[:1] == ["1"]


def _waiting(number, timeout):
    announced = number or os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS")
    print(
        f"waiting for {announced or 'the announced'} processes, {timeout} s at most: --distributed=off "
        f"goes alone"
        + "; http_proxy is set, which reaches no host of a cluster: set no_proxy"
        * _proxied(),
        file=sys.stderr,
    )


def _proxied():
    proxies = {"http_proxy", "HTTP_PROXY", "grpc_proxy"} & os.environ.keys()
    return bool(proxies) and "no_proxy" not in os.environ


def _give_up(timeout, number, mine):
    where = os.environ.get("JAX_COORDINATOR_ADDRESS", "process 0")
    this = f"process {mine}" if mine else "one of a cluster"
    print(
        f"error: gave up after {timeout} s: not all of the {number or 'announced'} processes came to "
        f"{where} (this is {this}): see whether the same command runs on every host, raise "
        f"--distributed_timeout, or add --distributed=off to go alone",
        file=sys.stderr,
    )
    os._exit(1)


def several() -> bool:
    """Whether there are other processes; asks for no device, which may be missing."""
    return _client() is not None and jax.process_count() > 1


def is_process_zero() -> bool:
    """Whether this process is the one that writes and shows."""
    return not several() or jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Process 0's value, any JSON, in every process."""
    if not several():
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if is_process_zero() else np.zeros(size, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)))


def any_of(flag: Any) -> bool:
    """Whether a flag is set in some process."""
    if not several():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait(name: str) -> None:
    """Returns when every process is here: what process 0 wrote before can be read after."""
    if several():
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """A tree of arrays as NumPy, whole in every process."""
    if not several():
        return jax.device_get(tree)

    def get(x):
        if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(get, tree)


@contextlib.contextmanager
def together(stopped: type[BaseException], code: int) -> Iterator[None]:
    """Whatever ends one process ends all of them, each with its message.

    Args:
      stopped: the exception that says that a process was asked to stop and all is saved.
      code: the exit code that goes with it.
    """
    if not several():
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=[over, code], daemon=True)
    watch.start()
    try:
        yield
    except stopped:
        _tell(_STOPPED, str(jax.process_index()))
        _leave(STOPPED_TEXT, code, 3)
    except BaseException as e:
        if _said(_STOPPED):  # a collective with a process that has left
            _leave(STOPPED_TEXT, code, 0)
        if isinstance(e, KeyboardInterrupt):
            _tell(_FAILED, _INTERRUPTED)
            _leave(_INTERRUPTED, 130, 4)
        if _lost(e):
            text = (
                f"process {jax.process_index()}: another one was lost ({first_line(e)[:100]}): see "
                f"what that one said at its end; the same command goes on from the last checkpoint"
            )
            _tell(_FAILED, text)
            _leave(f"error: {text}", 1, 4)
        expected = isinstance(e, UserError | OSError)
        if not expected or os.environ.get(TRACEBACK):
            traceback.print_exc()
        text = str(e) if isinstance(e, UserError | OSError) else f"{type(e).__name__}: {first_line(e)}"
        _tell(_FAILED, f"process {jax.process_index()}: {text}")
        _leave(f"error: {text}", 1, 4)
    finally:
        over.set()
        watch.join()


def _lost(error):
    """Whether an error is that of a collective with a process that has ended."""
    words = r"Gloo|NCCL|[Cc]onnection (reset|closed)|heartbeat|[Cc]oordination service|UNAVAILABLE"
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(re.search(words, str(error)))


def _watch(over, code):
    """Ends this process, which may hang in a collective, when another one has failed or stopped."""
    while not over.wait(1):
        if text := _said(_FAILED):
            if text == _INTERRUPTED:
                _leave(text, 130, 0)
            if not text.startswith(f"process {jax.process_index()}:"):
                _leave(f"error: {text}", 1, 0)
        elif (text := _said(_STOPPED)) and text != str(jax.process_index()):
            _leave(STOPPED_TEXT, code, 0)


def _leave(text, code, seconds):
    """Ends this process after so many seconds; process 0, which keeps the service, goes last.

    A regular exit would wait for the others, or abort if one has left.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the code is decided
    print(text, file=sys.stderr)
    time.sleep(seconds + 6 * is_process_zero())
    os._exit(code)


def _tell(key, text):
    """Says something to all processes; the first to say it is heard."""
    with contextlib.suppress(Exception):
        _client().key_value_set(key, text)


def _said(key):
    """The text that a process left under a key, None if there is none."""
    try:
        return _client().key_value_try_get(key)
    except Exception:  # not set
        return None


def _client():
    """JAX's key-value service; it has no public name, Orbax uses it in the same way."""
    from jax._src import distributed

    return distributed.global_state.client
