"""Checkpoints that were damaged, or come from somewhere else."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrr_jax.errors import UserError
from rlrr_jax.runtime import checkpoint

STATE = {"trainable": {"scale": jnp.arange(600.0).reshape(2, 300), "shift": jnp.ones(3)}}
METRICS = {"loss": jnp.zeros(4)}


def save(folder, values=(1.0,), state=STATE):
    """A checkpoint for each value, which says how far the run is."""
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        keeper = checkpoint.Keeper(manager, 0.0, lambda: False)
        for value in values:
            clock = SimpleNamespace(numbers=lambda epoch, step: [epoch])
            keeper.save_if_due(
                SimpleNamespace(saved=state, metrics=METRICS, epoch=value, step=0, clock=clock)
            )


def restore(folder):
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        return checkpoint.Keeper(manager, 0.0, lambda: False).restore((STATE, METRICS), 1)


def data_files(folder):
    """What Orbax wrote, largest first."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: (-path.stat().st_size, str(path)))


def test_the_newest_is_restored(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, (1.0, 2.0, 3.0))
    state, metrics, numbers = restore(tmp_path)
    np.testing.assert_array_equal(state["trainable"]["scale"], STATE["trainable"]["scale"])
    assert numbers == [3.0] and metrics["loss"].shape == (4,)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "3"]


def test_any_flipped_byte_and_any_missing_file_is_found_or_harmless(tmp_path, capsys):
    """Arrays are stored as they are: without checksums, one would train on a flipped byte."""
    save(tmp_path / "good", (1.0, 2.0))
    number = len(data_files(tmp_path / "good/checkpoints/2"))
    assert number > 3
    rng, passed_over = np.random.default_rng(0), 0
    for i in range(number):
        for damage in ("flip", "flip", "flip", "remove"):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "run")
            path = data_files(tmp_path / "run/checkpoints/2")[i]
            data = bytearray(path.read_bytes())
            path.unlink()
            if damage == "flip":
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                path.write_bytes(data)
            state, _, numbers = restore(tmp_path / "run")
            jax.tree.map(np.testing.assert_array_equal, state, STATE)
            said = capsys.readouterr().err
            if numbers == [1.0] and said:
                passed_over += 1
                assert said.startswith("warning: checkpoint 2 is damaged ("), said
                assert said.endswith("): the one before it is taken\n")
    assert passed_over > number  # of some files, times and names are not read


def test_a_flipped_byte_of_an_array_is_named(tmp_path):
    """Values that do not compress are stored as they are."""
    noise = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    state = {"trainable": {"scale": jnp.asarray(noise)}}
    save(tmp_path, state=state)
    raw = noise.tobytes()[400:800]
    (path,) = [p for p in data_files(tmp_path) if raw in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(raw) + 200] ^= 1
    path.write_bytes(data)
    with (
        checkpoint.open_manager(tmp_path / "checkpoints") as manager,
        pytest.raises(UserError, match=r"is damaged \(its array state/trainable/scale\)"),
    ):
        checkpoint.Keeper(manager, 0.0, lambda: False).restore((state, METRICS), 1)


def test_if_all_are_damaged_a_sentence_says_what_to_do(tmp_path):
    save(tmp_path, (1.0, 2.0))
    for number in (1, 2):
        for path in data_files(tmp_path / f"checkpoints/{number}"):
            path.write_bytes(b"")
    with pytest.raises(UserError) as e:
        restore(tmp_path)
    start = f"no checkpoint in {tmp_path}/checkpoints can be read (checkpoint 2 is damaged ("
    assert str(e.value).startswith(start)
    assert str(e.value).endswith(f": delete {tmp_path} to start this run again")


FOREIGN = {
    "name": {"trainable": {"scale": STATE["trainable"]["scale"], "gain": jnp.ones(3)}},
    "shape": {"trainable": {"scale": STATE["trainable"]["scale"], "shift": jnp.ones(4)}},
    "dtype": {"trainable": {"scale": STATE["trainable"]["scale"], "shift": jnp.ones(3, jnp.bfloat16)}},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_another_run_is_refused(what, tmp_path):
    save(tmp_path, state=FOREIGN[what])
    with pytest.raises(UserError, match=r"checkpoint 1 is another run's \(its array .*trainable"):
        restore(tmp_path)
