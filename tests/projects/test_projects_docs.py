"""The commands and links of the pages of projects, run as written, smaller; see tests/test_docs.py."""

import pytest
import test_docs as docs
from PIL import Image
from squeeze import squeeze

PAGES = sorted((docs.RUN / "projects").glob("**/README.md"))
COMMANDS = list(dict.fromkeys(text for _, text in docs.commands(PAGES)))
KINDS = ("analysis", "leakage", "exits", "peft", "soups", "main")
data, dinov2 = docs.data, docs.dinov2


def kind(text):
    """How a command is tested."""
    if "loss=exits" in text or "depth=6" in text:
        return "exits"
    return next(
        (word for word in KINDS if f"rlrr_jax.{word}" in text or f"projects.{word}" in text), None
    )


def test_there_is_a_rule_for_every_command():
    assert all(map(kind, COMMANDS)) and len(COMMANDS) >= 4, [t for t in COMMANDS if not kind(t)]


@pytest.mark.slow
def test_images_leave_early_as_the_page_says(data, tmp_path):
    """Every command of the page of exits, in order, with the bundled model of six blocks."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), "green").save(tmp_path / "photos/a.jpg")
    every = [text for text in COMMANDS if kind(text) == "exits"]
    assert len(every) == 4
    for text in every:
        small = text.replace("(4,6,8,10)", "(2,4)").replace("depth=6", "depth=3")
        words = docs.program(small.replace("(0,1,2)", "(0,)"))
        if "rlrr_jax.main" in text:
            words += [*docs.SMALL, "--config.pretrained.name=bundled", f"--config.data.dir={data}"]
        out = docs.run(words, tmp_path)
        if "projects.exits runs" in text:
            assert (
                "## rlrr loss=exits at=2+4 precision=bfloat16" in out
                and "rlrr precision=bfloat16 depth=3" in out
            )
        if "predict" in text:
            assert "photos/a.jpg" in out and "of the FLOPs of the whole network" in out


@pytest.mark.slow
@pytest.mark.parametrize("text", [t for t in COMMANDS if kind(t) == "main"])
def test_training(text, data, dinov2, tmp_path):
    out = docs.trained(text, tmp_path, data, dinov2)
    assert "| test acc |" in squeeze(out) or "(val)" in out


@pytest.mark.slow
@pytest.mark.parametrize("text", [t for t in COMMANDS if kind(t) == "analysis"])
def test_analysing(text, tuned_runs, tmp_path):
    *words, workdir = docs.program(text)
    (tmp_path / workdir).parent.mkdir(parents=True)
    (tmp_path / workdir).symlink_to(tuned_runs)
    out = docs.run([*words, workdir, "--out", tmp_path / "out"], tmp_path)
    assert "digits" in out and list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_seeds_are_put_together_as_the_page_says(tmp_path):
    """The trained runs of the other tests have one seed each."""
    (text,) = (t for t in COMMANDS if kind(t) == "soups")
    words = docs.program("python -m rlrr_jax.main --config configs/vtab.py:digits,method=linear")
    docs.run([*words, *docs.SMALL, "--config.seeds=(0,1)", "--workdir", "runs/x"], tmp_path)
    assert "| weights, mirrored |" in squeeze(docs.run(docs.program(text), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("text", [t for t in COMMANDS if kind(t) == "leakage"])
def test_gradients_are_attacked_as_the_page_says(text, tuned_runs, tmp_path):
    *words, path, flag, out = docs.program(text)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).symlink_to(tuned_runs / "digits/rlrr/seed0")
    small = ["--candidates=20", "--probes=1", "--batches=1"]
    assert "Whose gradient is it?" in docs.run([*words, path, flag, out, *small], tmp_path)
    assert (tmp_path / out / "leakage.md").exists()


@pytest.mark.slow
def test_an_adapter_goes_to_peft_and_back_as_the_page_says(tuned_runs, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/x").symlink_to(tuned_runs)
    out = [docs.run(docs.program(text), tmp_path) for text in COMMANDS if kind(text) == "peft"]
    assert "digits-lora: LORA of rank 16; read back" in out[0] and "lora of rank 16 on" in out[1]


def test_links_and_programs():
    docs.check_links(PAGES)
    docs.check_programs(docs.inline(PAGES))
