"""A model as a graph: written, read by the library it is for, and compared with `predict`."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from marks import quick
from PIL import Image

from rlrr_jax import adapters, cards, export, graphs, models
from rlrr_jax.errors import UserError


@pytest.fixture(scope="module")
def adapter(tuned_runs):
    return adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")


def pictures(folder, number=5, side=32):
    """Files of noise, one of them of another size, and their pixels as predict takes them."""
    for i in range(number):
        noise = np.random.default_rng(i).integers(0, 256, (side + 8 * (i == 1), side, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


def need(name):
    for module in graphs.FORMATS[name].needs:
        pytest.importorskip(module)


@pytest.mark.parametrize("name", ["stablehlo", "onnx", "savedmodel"])
def test_a_graph_gives_what_predict_gives(name, adapter, tmp_path):
    need(name)
    out = tmp_path / ("model.onnx" if name == "onnx" else "model")
    assert export.export(adapter, name, out) < 1e-5
    tuned, call = adapters.load(adapter), graphs.FORMATS[name].call(out)
    for number in (1, 7):
        images = np.random.default_rng(number).integers(0, 256, (number, 32, 32, 3), np.uint8)
        logits = np.float64(tuned.logits(images))
        wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(call(images), wanted, atol=1e-5)
    export.export(adapter, name, out)  # again, over what is there


def test_the_loader_needs_nothing_of_ours(adapter, tmp_path):
    need("stablehlo")
    paths = pictures(tmp_path)
    export.export(adapter, "stablehlo", tmp_path / "model")
    said = json.loads((tmp_path / "model/model.json").read_text())
    assert said["classes"] == adapter.card["classes"] and said["kind"] == "class"
    assert said["image_size"] == [32, 32] and said["trained_with"] == adapter.card["versions"]
    assert said["versions"]["jax"] == jax.__version__
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.stablehlo",
        "model.json",
        "load.py",
    }
    code = "import sys; sys.modules['rlrr_jax'] = None; sys.argv = sys.argv[1:]; " + (
        "exec(compile(open(sys.argv[0]).read(), sys.argv[0], 'exec'), {'__file__': sys.argv[0]})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model/load.py"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from rlrr_jax import predict
    from rlrr_jax.results import predictions

    found = predict.predict(adapters.load(adapter), paths)
    for line, (path, shares, _) in zip(done.stdout.splitlines(), found, strict=True):
        ((name, share),) = predictions.top(shares, adapter.card["classes"], 1)
        place, best, number = line.split()
        assert (place, best) == (str(path), name) and float(number) == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize(
    "variant",
    quick(
        ["swin_t", "swinv2_t", "resnet50", "bit_50x1", "convnext_t", "dinov3_s16"],
        "bit_50x1",
        "dinov3_s16",
    ),
)
def test_every_family_traces_for_any_batch(variant):
    """Shapes alone: whole models take minutes; the slow test below runs some."""
    model = models.build(variant, 3)
    size = models.default_size(variant)
    shapes = models.shapes(model, size)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
    out = jax.eval_shape(lambda params, x: model.apply({"params": params}, x), shapes, images)
    assert out.shape == (batch, 3)


@pytest.mark.parametrize("name", ["stablehlo", "onnx", "savedmodel"])
@pytest.mark.parametrize("variant", ["swin_t", "resnet50", "bit_50x1", "swinv2_t", "dinov3_s16"])
@pytest.mark.slow
def test_whole_models_of_every_family_where_installed(variant, name, adapter, tmp_path):
    need(name)
    model = models.build(variant, 3)
    size = models.default_size(variant)
    random = np.random.default_rng(0)
    draw = lambda x: np.float32(0.05 * random.normal(size=x.shape))
    params = jax.tree.map(draw, models.shapes(model, size))
    config = {**adapter.card["config"], "image_size": size}
    card = {**adapter.card, "config": config, "classes": ["a", "b", "c"], "image_size": size}
    tuned = adapters.Tuned(model, params, card)
    path = tmp_path / ("m.onnx" if name == "onnx" else "m")
    if (variant, name) == ("dinov3_s16", "onnx"):  # whose scan jax2onnx 0.13 writes wrongly
        card["model"] = variant
        with pytest.raises(UserError, match="--to onnx cannot write dinov3_s16 with what is installed"):
            graphs.made(name, cards.Adapter({}, card), tuned, path)
        return
    assert graphs.made(name, cards.Adapter({}, card), tuned, path) < graphs.TOLERANCE


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("onnx", "model.pb", "onnx files end in .onnx: .* does not"),
        ("onnx", ".onnx", "onnx files end in .onnx: .* does not"),
        ("stablehlo", "file", "is a file: name a folder"),
        ("stablehlo", "full", r"has other files \(mine.txt\): name a new folder"),
        ("savedmodel", "full", r"has other files \(mine.txt\): name a new folder"),
        ("stablehl", "model", "unknown format 'stablehl': did you mean 'stablehlo'"),
        ("tensorflow", "model", "unknown format 'tensorflow'"),
    ],
)
def test_wrong_places_are_one_sentence(name, out, message, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "check", lambda name: None)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(UserError, match=message) as e:
        export.export(adapter, name, tmp_path / out)
    assert "\n" not in str(e.value) and (tmp_path / "full/mine.txt").exists()


@pytest.mark.parametrize("name", ["stablehlo", "onnx", "savedmodel"])
def test_what_is_not_installed_is_named_before_the_work(name, adapter, tmp_path, monkeypatch):
    for module in graphs.FORMATS[name].needs:
        monkeypatch.setitem(sys.modules, module, None)
    first, way = next(iter(graphs.FORMATS[name].needs.items()))
    monkeypatch.setattr(adapters, "backbone", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=f"--to {name} needs {first}: {way}"):
        export.export(adapter, name, tmp_path / "model.onnx")


def test_a_graph_that_differs_is_not_kept(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "check", lambda name: None)
    monkeypatch.setattr(graphs, "made", lambda *args: 2e-4)
    with pytest.raises(UserError, match="would differ by 0.0002 from the model's: it was not kept"):
        export.export(adapter, "stablehlo", tmp_path / "model")
    assert not (tmp_path / "model").exists() and not list(tmp_path.iterdir())


def test_advice_names_what_is_there(adapter):
    for name in graphs.FORMATS:
        text = graphs.advice(name, adapter, pathlib.Path("out"))
        assert "out" in text and ("load.py" in text or "[batch, 32, 32, 3]" in text)
