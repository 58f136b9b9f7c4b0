"""Exports, read back by others: the same logits; fine-tune, export, predict: the same answers."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import named_vits
import numpy as np
import pytest
import safetensors.numpy
from flags import xla_flags
from hub import serve
from PIL import Image

from rlrr_jax import adapters, cards, elsewhere, export
from rlrr_jax.data import store
from rlrr_jax.errors import UserError
from rlrr_jax.results import model_card
from rlrr_jax.weights import names, preprocessing, reader

ROOT = pathlib.Path(__file__).parents[1]
OUT = {"big_vision": "x.npz", "vit_jax": "x.npz", "timm": "x.safetensors", "adapter": "x.safetensors"}
OUT |= {"transformers": "x", "hub": "y"}


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
    assert "params/Transformer/encoderblock_1/MlpBlock_0/Dense_1/kernel" in named
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


@pytest.mark.slow
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
    worse = lambda tree: export.vit_writers.to_big_vision(jax.tree.map(lambda x: x + 1e-3, tree))
    monkeypatch.setitem(export.LAYOUTS["vit"], "big_vision", worse)
    (tmp_path / "x.npz").write_bytes(b"older")
    with pytest.raises(UserError, match="would differ by .* it was not kept"):
        export.export(adapters.read(run / "adapter.safetensors"), "big_vision", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_an_exported_adapter_names_no_folder_of_this_machine(run, tmp_path):
    adapter = adapters.read(run / "adapter.safetensors")
    config = json.loads(json.dumps(adapter.card["config"]))
    config["own"]["path"], config["data"]["dir"] = "/home/me/birds", "/home/me/data"
    config["data"]["cache_dir"] = config["pretrained"]["cache_dir"] = "/home/me/cache"
    weights = tmp_path / "home" / "vit.npz"
    weights.parent.mkdir()
    shutil.copy(names.BUNDLED, weights)
    config["pretrained"]["name"] = f"{weights}:params"
    adapter = adapter._replace(card={**adapter.card, "config": config, "backbone": f"{weights}:params"})
    export.export(adapter, "adapter", tmp_path / "a.safetensors")
    for to, out in OUT.items():
        export.export(adapter, to, tmp_path / to / out)
    text = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for secret in (b"/home/me", str(weights).encode(), str(tmp_path).encode(), b"hunter2"):
        assert secret not in text
    again = adapters.read(tmp_path / "a.safetensors").card
    assert again["config"]["own"]["path"] == "birds" and again["classes"] == adapter.card["classes"]
    assert again["backbone"] == again["config"]["pretrained"]["name"] == "vit.npz:params"
    for name, portable in {
        "https://me:hunter2@x.org/w.npz": "https://x.org/w.npz",
        "https://x.org/w.npz?token=hunter2": "https://x.org/w.npz",
        "https://x.org/w.npz?id=2:params": "https://x.org/w.npz?id=2:params",
        "hf:timm/vit@main": "hf:timm/vit@main",
        "imagenet21k/ViT-B_16": "imagenet21k/ViT-B_16",
        "bundled": "bundled",
    }.items():
        assert cards._portable_name(name) == portable


def test_what_to_export_is_found_or_asked_for(tuned_runs, run, tmp_path, monkeypatch):
    for where in (run, run / "adapter.safetensors", run.parent):
        assert adapters.find(where) == run / "adapter.safetensors"
    with pytest.raises(
        UserError, match=r"holds 4 runs: add one of digits/lora/seed0, digits/rlrr/seed0, "
    ):
        adapters.find(tuned_runs)
    with pytest.raises(UserError, match="there is no finished run in"):
        adapters.find(tmp_path)
    shutil.copytree(run, tmp_path / "search" / "mine")
    assert adapters.find(tmp_path / "search") == tmp_path / "search/mine/adapter.safetensors"
    with pytest.raises(UserError, match="there is no finished run in"):
        adapters.find(tmp_path)
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    with pytest.raises(UserError, match="there is no finished run in"):
        adapters.find(tmp_path)
    with pytest.raises(UserError, match="unknown format 'tim': did you mean 'timm'"):
        command(monkeypatch, run, "--to", "tim", tmp_path / "x")
    with pytest.raises(UserError, match="timm files end in .safetensors: .*x.pth does not"):
        command(monkeypatch, run, "--to", "timm", tmp_path / "x.pth")


def test_transformers_computes_the_same_logits(run, tuned, images, tmp_path):
    """The folder as AutoModelForImageClassification reads it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export.export(adapters.read(run / "adapter.safetensors"), "transformers", tmp_path / "x")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "x").eval()
    assert model.config.id2label[3] == "3"
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    ours = tuned.model.apply({"params": tuned.params}, images)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


def test_a_folder_for_transformers_is_read_here(run, tuned, tmp_path):
    """As `--config.pretrained.name` of another run: heads, GELU and pixels come from its JSON."""
    export.export(adapters.read(run / "adapter.safetensors"), "transformers", tmp_path / "x")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {
        *("config.json", "preprocessor_config.json", "model.safetensors")
    }
    card = preprocessing.read(tmp_path / "x/model.safetensors")
    assert (card.gelu, card.num_heads, card.mean) == ("tanh", 3, (0.5, 0.5, 0.5))
    tree = reader.load(tmp_path / "x", model=tuned.model, image_size=32, head=True)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    jax.tree.map(same, tree, jax.device_get(tuned.params))


# The Hub --------------------------------------------------------------------------------------


def test_a_folder_for_the_hub_has_a_card_with_a_yaml_head(run, tmp_path, monkeypatch, capsys):
    yaml = pytest.importorskip("yaml")
    command(monkeypatch, run, "--to", "hub", tmp_path / "share")
    assert "read back, its logits differ by at most" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "share").iterdir()} == {"adapter.safetensors", "README.md"}
    _, head, text = (tmp_path / "share/README.md").read_text().split("---\n", 2)
    head, card = yaml.safe_load(head), adapters.read(run / "adapter.safetensors").card
    assert head["library_name"] == "rlrr_jax" and head["pipeline_tag"] == "image-classification"
    assert "rlrr" in head["tags"] and "datasets" not in head
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(card["accuracy"]["test_acc"], 4)
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in text and card["backbone_sha256"] in text
    again = adapters.load(tmp_path / "share/adapter.safetensors")
    assert again.card == card


def test_a_folder_that_is_not_ours_is_left_alone(run, tmp_path, capsys):
    adapter, out = adapters.read(run / "adapter.safetensors"), tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("my notes")
    with pytest.raises(UserError, match=r"mine has other files \(README.md\): name a new folder"):
        export.export(adapter, "hub", out)
    (out / "README.md").rename(out / "notes.txt")
    with pytest.raises(UserError, match=r"mine has other files \(notes.txt\): name a new folder"):
        export.export(adapter, "transformers", out)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is not the backbone"):
        export.export(adapter, "hub", tmp_path / "new", weights=run / "adapter.safetensors")
    assert not (tmp_path / "new").exists()
    export.export(adapter, "hub", tmp_path / "new")
    export.export(adapter, "hub", tmp_path / "new")  # once more
    card = tmp_path / "new" / "README.md"
    card.write_text(card.read_text().replace("Trained values", "Our values"))
    export.export(adapter, "hub", tmp_path / "new")
    assert "Our values" in card.read_text() and "was edited, and is kept" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "new"]


def test_characters_that_control_a_screen_reach_no_card():
    assert (
        model_card.plain("caf\u00e9\0 \x1b[31mred\x9b \u202egpj.\u2066") == "caf\u00e9 \\[31mred gpj."
    )


@pytest.mark.parametrize(
    "name", ["a|b", "a\nb\n---\n# c", "[x](http://y)", "<script>", "`rm`", "*b*", "$x$", "\u2028"]
)
def test_no_name_of_a_class_breaks_a_card(name, run):
    yaml, markdown = pytest.importorskip("yaml"), pytest.importorskip("markdown_it")
    card = {**adapters.read(run / "adapter.safetensors").card, "classes": ["ok", name], "task": name}
    _, head, body = model_card.text(card).split("---\n", 2)
    assert yaml.safe_load(head)["model-index"][0]["name"].startswith(name)
    tokens = markdown.MarkdownIt().enable("table").parse(body)
    kinds = [child.type for token in tokens for child in token.children or ()]
    assert {"text", "softbreak", "code_inline"} >= set(kinds)
    assert [t.content[:9] for t in tokens if t.type == "html_block"] == ["<!-- made"]
    cells = [t.content for t in tokens if t.type == "inline"]
    assert len(cells) == 2 + 2 + 2 * 5  # heading, text, head and lines of the table
    shown = [c.content for t in tokens for c in t.children or () if c.type == "text"]
    assert any("ok, " + " ".join(name.split()) == text.strip() for text in ("".join(shown),)) or any(
        " ".join(name.split()) in text for text in shown
    )


@pytest.fixture
def hub():
    with serve() as server:
        yield server


@pytest.mark.slow
def test_an_adapter_goes_to_the_hub_and_comes_back(run, hub, tmp_path):
    """Processes with the real huggingface_hub: one uploads, another predicts with what it gets."""
    pytest.importorskip("huggingface_hub")
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "HF_ENDPOINT": hub.url, "HF_TOKEN": "x"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    python = lambda *args: subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        **dict(cwd=ROOT, env=environment, capture_output=True, text=True),
    )
    out = tmp_path / "share"
    done = python("rlrr_jax.export", run, "--to", "hub", out, "--push", "me/birds")
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/me/birds (private)" in done.stdout and hub.private["me/birds"]
    edited = hub.files["/me/birds/resolve/main/README.md"].replace(b"Trained", b"My")
    hub.files["/me/birds/resolve/main/README.md"] = edited
    done = python("rlrr_jax.export", run, "--to", "hub", out, "--push", "me/birds")
    assert "the card of hf:me/birds was edited, and is kept" in done.stdout, done.stderr
    assert hub.files["/me/birds/resolve/main/README.md"] == edited
    hub.private["me/birds"] = False
    done = python("rlrr_jax.export", run, "--to", "hub", out, "--push", "me/birds")
    assert done.returncode == 1 and "hf:me/birds is public: add --public" in done.stderr
    files = {path.removeprefix("/me/birds/resolve/main/"): data for path, data in hub.files.items()}
    assert files["adapter.safetensors"] == (run / "adapter.safetensors").read_bytes()
    assert b"--adapter hf:me/birds" in files["README.md"]
    image, _ = store.load_split("digits", "test", 32)
    Image.fromarray(image[0]).resize((32, 32)).save(tmp_path / "x.png")
    done = python("rlrr_jax.predict", "--adapter", "hf:me/birds", tmp_path / "x.png")
    assert done.returncode == 0 and "x.png" in done.stdout, done.stderr
    local = python("rlrr_jax.predict", "--adapter", run / "adapter.safetensors", tmp_path / "x.png")
    assert local.stdout == done.stdout
    hub.files.clear()
    done = python("rlrr_jax.predict", "--adapter", "hf:me/other", tmp_path / "x.png")
    assert (
        done.returncode == 1 and "error: cannot get adapter.safetensors of hf:me/other" in done.stderr
    )
    done = python("rlrr_jax.export", run, "--to", "timm", tmp_path / "x.safetensors", "--push", "me/x")
    assert done.returncode == 1 and "--push uploads what --to hub writes" in done.stderr


# What other libraries compute --------------------------------------------------------------------


def of_other_habits(run, **model):
    """The run's adapter with another activation or epsilon: another model of the same weights."""
    adapter = adapters.read(run / "adapter.safetensors")
    config = json.loads(json.dumps(adapter.card["config"]))
    config["model"] |= model
    gelu = config["model"]["gelu"]
    return adapter._replace(card={**adapter.card, "config": config, "gelu": gelu})


def test_what_another_library_does_otherwise_is_said(run, tmp_path):
    adapter = of_other_habits(run, gelu="quick", norm_eps=1e-5)
    for to in ("big_vision", "vit_jax"):
        said = elsewhere.advice(to, adapter, "x.npz")
        assert "has the quick GELU: change nn.gelu(x) there to x * nn.sigmoid(1.702 * x)" in said
        assert "its LayerNorms have epsilon=1e-05: change nn.LayerNorm() there" in said
    files = export.transformers_files(adapter)
    assert files["config.json"]["hidden_act"] == "quick_gelu"
    assert files["config.json"]["layer_norm_eps"] == 1e-5
    plain = elsewhere.advice("big_vision", adapters.read(run / "adapter.safetensors"), "x.npz")
    assert "GELU" not in plain and "epsilon" not in plain


def test_transformers_has_the_quick_gelu(run, images, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    adapter = of_other_habits(run, gelu="quick", norm_eps=1e-5)
    export.export(adapter, "transformers", tmp_path / "x")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "x").eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    tuned = adapters.load(adapter)
    ours = tuned.model.apply({"params": tuned.params}, images)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


def test_transformers_crops_as_the_run_did(run, tmp_path):
    """FGVC's recipe: the whole image as a square, of which the middle is taken."""
    adapter = of_other_habits(run)
    adapter.card["config"] |= {"crop": "square", "crop_from": 40}
    pixels = export.transformers_files(adapter)["preprocessor_config.json"]
    assert pixels["size"] == {"height": 40, "width": 40} and pixels["do_center_crop"]
    assert pixels["crop_size"] == {"height": 32, "width": 32}
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    square = np.asarray(picture.resize((40, 40), Image.Resampling.BICUBIC))[4:36, 4:36]
    np.testing.assert_allclose(theirs, np.float32(square) / 127.5 - 1, rtol=0, atol=0.02)


@pytest.mark.slow
def test_a_projection_and_a_head_are_one_head():
    from rlrr_jax import models

    model = models.build("bundled", 5, projection=8)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    tuned = adapters.Tuned(model, params, {})
    one = export._one_head(tuned)
    assert "projection" not in one.params and one.params["head"]["kernel"].shape == (96, 5)
    with jax.default_matmul_precision("highest"):
        both = [t.model.apply({"params": t.params}, images) for t in (tuned, one)]
    np.testing.assert_allclose(*both, rtol=0, atol=1e-5)
