"""Exports, read back by others: the same logits; fine-tune, export, predict: the same answers."""

import json
import re
import shutil
import sys

import jax
import named_vits
import numpy as np
import pytest
import safetensors.numpy

from rlrr_jax import adapters, export
from rlrr_jax.data import store
from rlrr_jax.errors import UserError
from rlrr_jax.weights import preprocessing, reader

OUT = {"big_vision": "x.npz", "vit_jax": "x.npz", "timm": "x.safetensors", "adapter": "x.safetensors"}


@pytest.fixture(scope="module")
def run(tuned_runs):
    return tuned_runs / "digits/rlrr/seed0"


@pytest.fixture(scope="module")
def tuned(run):
    return adapters.load(run / "adapter.safetensors")


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
    export.main()


@pytest.fixture(scope="module")
def images():
    """Test images of digits as the model gets them."""
    return np.float32(store.load_split("digits", "test", 32)[0][:64]) / 127.5 - 1


@pytest.mark.parametrize("to", OUT)
def test_every_format_is_read_back_by_the_command(to, run, tmp_path, monkeypatch, capsys):
    command(monkeypatch, run, "--to", to, tmp_path / OUT[to])
    said = capsys.readouterr().out
    difference = re.search(r"rlrr on digits \(test accuracy .* %\).*differ by at most (\S+)\n", said)
    assert float(difference[1]) <= 1e-5
    assert [p.name for p in tmp_path.iterdir()] == [OUT[to]]


def test_others_compute_the_same_from_the_files(run, tuned, images, tmp_path):
    """Plain ViTs of big_vision's and timm's names, written in the tests, on real images."""
    adapter = adapters.read(run / "adapter.safetensors")
    ours = tuned.model.apply({"params": tuned.params}, images)
    export.export(adapter, "big_vision", tmp_path / "x.npz")
    named = dict(np.load(tmp_path / "x.npz"))
    assert "params/Transformer/encoderblock_5/MlpBlock_0/Dense_1/kernel" in named
    np.testing.assert_allclose(named_vits.big_vision(named, images), ours, rtol=0, atol=1e-3)
    export.export(adapter, "timm", tmp_path / "x.safetensors")
    named = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    np.testing.assert_allclose(named_vits.timm(named, images, 3, "tanh"), ours, rtol=0, atol=1e-3)
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        card = json.loads(file.metadata()["rlrr_jax"])
        assert file.metadata()["format"] == "pt"
    assert card["classes"] == list("0123456789") and card["mean"] == [0.5] * 3
    assert preprocessing.read(tmp_path / "x.safetensors")[:3] == (
        "tanh",
        preprocessing.HALF,
        preprocessing.HALF,
    )


def test_an_exported_model_is_a_backbone_again(run, tuned, images, tmp_path):
    export.export(adapters.read(run / "adapter.safetensors"), "timm", tmp_path / "x.safetensors")
    tree = reader.load(str(tmp_path / "x.safetensors"), model=tuned.model, image_size=32)
    assert not tree["head"]["kernel"].any()
    tree["head"] = tuned.params["head"]
    logits = [tuned.model.apply({"params": p}, images[:4]) for p in (tree, tuned.params)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)


def test_a_folder_called_like_a_public_one_is_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = adapters.read(run / "adapter.safetensors")
    assert export.export(adapter, "big_vision", "sam/x.npz") < 1e-5
    assert (tmp_path / "sam" / "x.npz").exists()


def test_a_file_that_would_differ_is_not_kept(run, tmp_path, monkeypatch):
    worse = lambda tree: export.vit_layouts.to_big_vision(jax.tree.map(lambda x: x + 1e-3, tree))
    monkeypatch.setitem(export.FORMATS, "big_vision", (".npz", worse))
    (tmp_path / "x.npz").write_bytes(b"older")
    with pytest.raises(UserError, match="would differ by .* it was not kept"):
        export.export(adapters.read(run / "adapter.safetensors"), "big_vision", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_what_to_export_is_found_or_asked_for(tuned_runs, run, tmp_path, monkeypatch):
    for where in (run, run / "adapter.safetensors", run.parent):
        assert export.find_adapter(where) == run / "adapter.safetensors"
    with pytest.raises(
        UserError, match=r"holds 4 runs: add one of digits/lora/seed0, digits/rlrr/seed0, "
    ):
        export.find_adapter(tuned_runs)
    with pytest.raises(UserError, match="there is no finished run in"):
        export.find_adapter(tmp_path)
    shutil.copytree(run, tmp_path / "search" / "mine")
    assert export.find_adapter(tmp_path / "search") == tmp_path / "search/mine/adapter.safetensors"
    with pytest.raises(UserError, match="there is no finished run in"):
        export.find_adapter(tmp_path)
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    with pytest.raises(UserError, match="there is no finished run in"):
        export.find_adapter(tmp_path)
    with pytest.raises(UserError, match="unknown format 'tim': did you mean 'timm'"):
        command(monkeypatch, run, "--to", "tim", tmp_path / "x")
    with pytest.raises(UserError, match="timm files end in .safetensors: .*x.pth does not"):
        command(monkeypatch, run, "--to", "timm", tmp_path / "x.pth")
