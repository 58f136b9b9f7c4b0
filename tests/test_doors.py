"""Small doors that a reader of the change found open, or shut before somebody's sound input."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlrr_jax import cards, files, methods, models
from rlrr_jax.data import huggingface, sources
from rlrr_jax.data.task import Found
from rlrr_jax.errors import UserError
from rlrr_jax.methods import base
from rlrr_jax.runtime import distributed
from rlrr_jax.weights import names, preprocessing, state_dicts, vit_layouts


def test_what_nohup_ignores_stays_ignored():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import rlrr_jax.main as m; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(m.STOPPING)"], capture_output=True, text=True
    )
    assert done.stdout.count("SIG") == 2 and "SIGHUP" not in done.stdout, done.stderr


@pytest.mark.parametrize(
    "text", [r'{"pythonClassName": "evil\u002eThing"}', r'{"a": [{"\u0070ythonClassName": "os.x"}]}']
)
def test_escapes_in_a_dataset_import_nothing(text, tmp_path):
    (tmp_path / "features.json").write_text(text)
    with pytest.raises(UserError, match="is no class of tfds and is not imported"):
        sources._check_classes(Found("tfds", tmp_path, "x"))
    (tmp_path / "features.json").write_text(
        '{"pythonClassName": "tensorflow_datasets.core.x.Y", "type": "z"}'
    )
    sources._check_classes(Found("tfds", tmp_path, "x"))


def test_cards_of_datasets(tmp_path):
    pytest.importorskip("yaml")
    good = "---\nlicense_link: https://x.org\nconfigs:\n- data_files: data/*.parquet\n---\nsee https://y.org\n---\n"
    (tmp_path / "README.md").write_text(good)
    huggingface._check_data_files(tmp_path)
    for name, place in (
        ("README.md", r'"https:\x2f\x2fe/x"'),
        (".huggingface.yaml", "../x"),
        ("README.md", "/etc"),
    ):
        head = f"configs:\n- data_files:\n  - path: {place}\n"
        (tmp_path / name).write_text(f"---\n{head}---\n" if name == "README.md" else head)
        with pytest.raises(UserError, match="names data at .* which is not in the folder"):
            huggingface._check_data_files(tmp_path)
        (tmp_path / name).unlink()


def test_a_length_that_begins_as_a_pickle_is_none(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": np.ones(2, np.float32)}, path, {"note": "n"})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    path.write_bytes((640).to_bytes(8, "little") + header.ljust(640) + data[8 + size :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert names.fetch(str(path))[0] == str(path)


def test_names_of_weights_that_have_gone_are_portable():
    for name, portable in (
        ("/data/model_dir", "model_dir"),
        ("model_dir", "model_dir"),
        ("x/y.npz", "y.npz"),
    ):
        assert cards._portable_name(name) == portable
        assert cards._portable_name(portable) == portable


def test_folders_that_must_not_be_read_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a" / "x").write_text("")
    cls = type(files.below(tmp_path, "a")[0])
    plain = cls.iterdir

    def iterdir(self):
        if self.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)

    monkeypatch.setattr(cls, "iterdir", iterdir)
    assert [path.name for path in files.below(tmp_path, "*", "x")] == ["x"]


def test_addresses_of_a_coordinator(monkeypatch):
    good = {"h:1": True, "h:65535": True, "h:99999": False, "h": False, "h:0": False, "h:x": False}
    assert {text: distributed._is_address(text) for text in good} == good
    monkeypatch.setenv("http_proxy", "http://p")
    monkeypatch.delenv("no_proxy", raising=False)
    assert distributed._proxied()
    monkeypatch.setenv("no_proxy", "h")
    assert not distributed._proxied()


def test_a_method_may_close_over_a_key():
    key = jax.random.key(3)

    def merge(frozen, adapter):
        noise = jax.random.normal(key, ())
        return base.change_dense(
            frozen, base.DENSE, lambda n, k, b: (k * (1 + noise * adapter["g"]), b)
        )

    method = base.Method(
        lambda k, f: {"g": jnp.zeros(())},
        merge,
        lambda adapter: jax.tree.map(lambda x: False, adapter),
        dict(lr=1.0, weight_decay=0.0, drop_path=0.0),
    )
    methods.check("mine", method, models.shapes(models.build("bundled", 2), 32))


def test_another_patch_size_is_resized_as_asked(tmp_path):
    path = tmp_path / "vit_base_patch16_224.augreg.safetensors"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is of B/16 .*, config.model.variant is B/8"):
        preprocessing.read(path, variant="B/8")
    assert preprocessing.read(path, variant="B/8", resized=True).num_heads == 12
    said = {"model_type": "vit", "patch_size": 16, "hidden_size": 768}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    )
    with pytest.raises(UserError, match="its patch_size is 16, that of B/8 8"):
        preprocessing.read(path, variant="B/8")
    assert preprocessing.read(path, variant="B/8", resized=True).gelu == "exact"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError) as e:
        files.write(tmp_path / "page.html", "x")
    assert e.value.filename == str(tmp_path / "page.html") and not list(tmp_path.iterdir())


def test_losing_a_process_is_told_from_a_fault():
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert distributed._lost(lost)
    assert not distributed._lost(jax.errors.JaxRuntimeError("INTERNAL: bad program"))
    assert not distributed._lost(ValueError("Connection reset"))


def test_names_of_facebooks_code_are_read(tmp_path):
    """DINOv2's blocks in chunks, DeiT-III's LayerScale beside the block; of timm's the same numbers."""
    import named_vits

    weights = named_vits.timm_weights(np.random.default_rng(0), scale=True)
    chunks = {
        k.replace("blocks.", "blocks.0.", 1) if k.startswith("blocks.") else k: v
        for k, v in weights.items()
    }
    deit = {
        k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v
        for k, v in weights.items()
    }
    assert any("gamma_1" in key for key in deit)
    plain, _ = vit_layouts.from_timm(weights, 3, "x")
    for other in (chunks, deit):
        found, _ = vit_layouts.from_timm(other, 3, "x")
        assert found.keys() == plain.keys()
        assert all(map(np.array_equal, (found[k] for k in plain), plain.values()))


LAYOUTS = {
    "conv_proj.weight": "torchvision's names of a ViT",
    "features.0.0.weight": "torchvision's names of a Swin",
    "visual.transformer.resblocks.0.attn.in_proj_weight": "open_clip's names",
    "resnet.embedder.embedder.convolution.weight": "transformers' names of a ResNet",
    "bit.embedder.convolution.weight": "transformers' names of BiT",
    "rope_embed.periods": "rotary positions",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_are_not_read_are_named(name):
    with pytest.raises(UserError, match=f"x has {LAYOUTS[name]}"):
        state_dicts.refuse(["a", name], "x")
