"""Images that are no squares: from the store to an exported file."""

import json

import jax
import jax.numpy as jnp
import named_vits
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from rlrr_jax import adapters, elsewhere, export, models, predict, sides, suite
from rlrr_jax.configs import vtab
from rlrr_jax.data import decoding, resize
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import positions, preprocessing, reader

HALF = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")


def test_a_size_is_a_side_or_a_pair():
    assert sides.pair(224) == (224, 224) and sides.pair([192, 256]) == (192, 256)
    assert sides.text(224) == "224" and sides.text((192, 256)) == "192x256"


def test_decoding_and_enlarging_are_pillows():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decoding.decode(image, (32, 48)), wanted)
    ours = resize.normalize(jnp.asarray(image)[None], (32, 48))
    np.testing.assert_allclose(ours[0], wanted / np.float32(127.5) - 1, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be enlarged to 32x16"):
        resize.bicubic(jnp.asarray(image)[None], (32, 16))


def test_a_vit_on_a_wide_grid_is_timms(tmp_path):
    """3 x 3 patches, resized to 2 x 5."""
    weights = named_vits.timm_weights(np.random.default_rng(0))
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(weights, path)
    model = vit.ViT(24, 3, 48, 3, 4, num_classes=5, gelu="exact")
    tree = reader.load(path, model=model, image_size=(8, 20), how=HALF, head=True)
    grid = weights["pos_embed"][:, 1:].reshape(3, 3, 24)
    position = positions.resize_position(grid, (2, 5), "bicubic").reshape(1, 10, 24)
    weights["pos_embed"] = np.concatenate([weights["pos_embed"][:, :1], position], 1)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 20, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda x: model.apply({"params": tree}, x))(images)
    np.testing.assert_allclose(ours, named_vits.timm(weights, images, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_its_adapter_and_its_file(tmp_path, monkeypatch):
    config = vtab.get_config("hearts,method=linear")
    config.update(epochs=1, image_size=32, image_width=48)
    rows, problems = suite.run(config, tmp_path / "w")
    assert not problems and rows[0]["test_acc_final"] > 0.1
    (path,) = (tmp_path / "w").rglob("adapter.safetensors")
    adapter = adapters.read(path)
    assert adapter.card["image_size"] == [32, 48]
    tuned = adapters.load(adapter)
    assert tuned.params["pos_embedding"].shape == (1, 4 * 6, 96)
    picture = tmp_path / "x.png"
    Image.fromarray(np.full((50, 90, 3), 99, np.uint8)).save(picture)
    ((_, probabilities, why),) = predict.predict(tuned, [picture])
    assert why is None and probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert export.export(adapter, "timm", tmp_path / "x.safetensors") < 1e-4
    assert "img_size=(32, 48)" in elsewhere.advice("timm", adapter, "x.safetensors")
    export.export(adapter, "hub", tmp_path / "hub")
    assert "| images | 32 x 48 pixels" in (tmp_path / "hub/README.md").read_text()
    files = export.transformers_files(adapter)
    assert files["config.json"]["image_size"] == [32, 48]
    assert files["preprocessor_config.json"]["size"] == {"height": 32, "width": 48}
    saved = json.loads((path.parent / "config.json").read_text())
    assert (saved["image_size"], saved["image_width"]) == (32, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_width=30), "image size 30 is not divisible .* set config.image_width to 32"),
        (dict(image_width=48, crop="resmall", crop_from=64), "cuts squares: leave config.image_width"),
        (dict(image_width=0), "config.image_width=0 must be greater than 0"),
    ],
)
def test_what_does_not_go_is_said(changes, message, tmp_path):
    config = vtab.get_config("hearts,method=linear")
    config.update(image_size=32, **changes)
    with pytest.raises(UserError, match=message):
        suite.run(config, tmp_path)


def test_a_swin_takes_squares():
    with pytest.raises(UserError, match="images of a Swin are squares"):
        models.check_size(models.build("swin_t", 1), (224, 448))
    models.check_size(models.build("resnet18", 1), (64, 96))
