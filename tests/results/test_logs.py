"""TensorBoard's event files and W&B's offline runs, against `metrics.jsonl`."""

import importlib.machinery
import json
import struct
import sys
import types

import pytest

from rlrr_jax import files, suite
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError


def config(**changes):
    config = vtab.get_config("digits,method=linear")
    config.model.depth = 2
    with config.unlocked():
        config.update({"num_devices": 1, "epochs": 3, "seeds": (0, 1), **changes})
    return config


def events(folder):
    """`{(name, step): value}` of TensorBoard's event files, later ones replacing earlier ones."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    out = {}
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            out |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return out


@pytest.mark.slow
def test_event_files_have_the_rows_of_metrics(tmp_path):
    pytest.importorskip("tensorboardX")
    rows, problems = suite.run(config(log="tensorboard"), tmp_path)
    assert not problems and len(rows) == 2
    for seed in (0, 1):
        folder = tmp_path / f"digits/linear/seed{seed}"
        found = events(folder / "tensorboard")
        history = files.read_rows(folder / "metrics.jsonl")
        wanted = {(k, r["epoch"]): v for r in history for k, v in r.items() if k != "epoch"}
        assert found.keys() == wanted.keys() and ("test_acc", 2) in wanted
        assert all(found[key] == pytest.approx(wanted[key], rel=1e-6) for key in wanted)
    again, _ = suite.run(config(), tmp_path)  # the same run, logged or not
    assert again == rows


def test_wandb_gets_them_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, problems = suite.run(config(log="wandb", seeds=(0,), epochs=1), tmp_path)
    assert not problems and wandb.run is None
    (folder,) = (tmp_path / "digits/linear/seed0/wandb").glob("offline-run-*")
    (data,) = folder.glob("*.wandb")
    assert data.stat().st_size > 500 and rows[0]["identity"] in data.name


def test_a_log_that_cannot_be_costs_no_run(tmp_path, monkeypatch, capsys):
    """Without a key or a network wandb raises; here a stand-in does."""

    class Fake(types.ModuleType):
        Settings = staticmethod(lambda **given: given)

        def init(self, **_):
            raise RuntimeError("api_key not configured (no-tty)\nmore")

    fake = Fake("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows, problems = suite.run(config(log="wandb", seeds=(0,), epochs=1), tmp_path)
    assert not problems and rows[0]["test_acc_final"] > 0.5
    said = capsys.readouterr().err
    assert "has no curves in wandb (api_key not configured (no-tty)): set WANDB_MODE=offline" in said


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_without_the_package_it_is_one_sentence(kind, tmp_path, monkeypatch):
    name = {"tensorboard": "tensorboardX", "wandb": "wandb"}[kind]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"config.log={kind} needs {name}: pip install {name}"):
        suite.run(config(log=kind, seeds=(0,), epochs=1), tmp_path)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    with pytest.raises(UserError, match="unknown value of config.log 'tensorbord': did you mean"):
        suite.run(config(log="tensorbord"), tmp_path / "b")
    assert json.dumps(config().to_dict()["log"]) == "null"
