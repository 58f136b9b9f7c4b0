"""Checkpoints that were damaged, or come from somewhere else."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from rlrr_jax import checkpoint
from rlrr_jax.errors import UserError

STATE = {"trainable": {"scale": jnp.arange(600.0).reshape(2, 300), "shift": jnp.ones(3)}}
METRICS = {"loss": jnp.zeros(4)}


def save(folder, values=(1.0,), state=STATE):
    """A checkpoint for each value, which is its place."""
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        keeper = checkpoint.Keeper(manager, 0.0)
        for value in values:
            keeper.save_if_due(state, METRICS, [value])


def restore(folder):
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        return checkpoint.Keeper(manager, 0.0).restore((STATE, METRICS), 1)


def data_files(folder):
    """What Orbax wrote, largest first."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: (-path.stat().st_size, str(path)))


def test_the_newest_is_restored(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, (1.0, 2.0, 3.0))
    state, metrics, place = restore(tmp_path)
    np.testing.assert_array_equal(state["trainable"]["scale"], STATE["trainable"]["scale"])
    assert place == [3.0] and metrics["loss"].shape == (4,)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "3"]


def test_any_flipped_byte_and_any_missing_file_is_found(tmp_path, capsys):
    """Arrays are stored as they are: without checksums, one would train on a flipped byte."""
    save(tmp_path / "good", (1.0, 2.0))
    number = len(data_files(tmp_path / "good/checkpoints/2"))
    assert number > 3
    rng = np.random.default_rng(0)
    for i in range(number):
        for damage in ("flip", "remove"):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "run")
            path = data_files(tmp_path / "run/checkpoints/2")[i]
            data = bytearray(path.read_bytes())
            path.unlink()
            if damage == "flip":
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                path.write_bytes(data)
            _, _, place = restore(tmp_path / "run")
            assert place == [1.0], (path, damage)
            said = capsys.readouterr().err
            assert said.startswith("warning: checkpoint 2 is damaged (its file "), said
            assert said.endswith("): the one before it is taken\n")


def test_if_all_are_damaged_a_sentence_says_what_to_do(tmp_path):
    save(tmp_path, (1.0, 2.0))
    for number in (1, 2):
        data_files(tmp_path / f"checkpoints/{number}")[0].write_bytes(b"")
    with pytest.raises(UserError) as e:
        restore(tmp_path)
    start = f"no checkpoint in {tmp_path}/checkpoints can be read (checkpoint 2 is damaged (its file "
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


def test_a_checkpoint_from_elsewhere_without_its_checksums_is_refused(tmp_path, capsys):
    save(tmp_path / "mine", (1.0,))
    save(tmp_path / "other", (7.0, 8.0), {"trainable": {"kernel": jnp.ones((5, 5))}})
    shutil.copytree(tmp_path / "other/checkpoints/2", tmp_path / "mine/checkpoints/2")
    assert restore(tmp_path / "mine")[2] == [1.0]  # it has no mark of ours
    assert capsys.readouterr().err == "warning: checkpoint 2 was not finished: removed\n"
    shutil.rmtree(tmp_path / "mine/checkpoints/1")
    shutil.copytree(tmp_path / "other/checkpoints/1", tmp_path / "mine/checkpoints/1")
    with pytest.raises(UserError, match="checkpoint 1 is damaged"):
        restore(tmp_path / "mine")


def test_a_kill_between_the_checkpoint_and_its_checksums_loses_only_that_one(tmp_path, capsys):
    save(tmp_path, (1.0,))
    marks = (tmp_path / "checkpoints.json").read_bytes()
    save(tmp_path, (2.0,))
    (tmp_path / "checkpoints.json").write_bytes(marks)
    assert restore(tmp_path)[2] == [1.0]
    assert capsys.readouterr().err == "warning: checkpoint 2 was not finished: removed\n"
    for value in (5.0, 6.0):  # killed again and again, it goes on from what is whole
        save(tmp_path, (value,))
        (tmp_path / "checkpoints.json").write_bytes(marks)
        assert restore(tmp_path)[2] == [1.0]
    save(tmp_path, (7.0,))
    assert restore(tmp_path)[2] == [7.0]


def test_a_kill_in_the_very_first_checkpoint_starts_again(tmp_path):
    save(tmp_path, (1.0,))
    (tmp_path / "checkpoints.json").unlink()
    assert restore(tmp_path) is None


def test_checkpoints_that_came_without_their_checksums_are_not_thrown_away(tmp_path):
    save(tmp_path, (1.0, 2.0))
    marks = (tmp_path / "checkpoints.json").read_bytes()
    (tmp_path / "checkpoints.json").unlink()
    with pytest.raises(UserError, match="has checkpoints without checkpoints.json beside it"):
        restore(tmp_path)
    (tmp_path / "checkpoints.json").write_bytes(marks)
    assert restore(tmp_path)[2] == [2.0]
