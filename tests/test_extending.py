"""A method, a loss and a data source of a fork: files beside the run, no file of ours touched."""

import json
import pathlib
import re

import forked
import pytest
from squeeze import squeeze

ROOT = pathlib.Path(__file__).parents[1]


def block(page, word):
    """The Python block of a page that has a word in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    (found,) = [text for text in blocks if word in text]
    return found


def run(folder, *words):
    return forked.run(words, folder, RLRR_JAX_CACHE=str(folder / "cache"))


TRAIN = ("rlrr_jax.main", "--config=configs/vtab.py:stripes:TASK,method=gain:method,loss=smooth:smooth")
TRAIN += ("--config.model.variant=bundled", "--config.loss_kwargs.amount=0.2", "--workdir=w")


def test_a_fork_is_files_beside_the_run(tmp_path):
    (tmp_path / "gain.py").write_text(block("README.md", "def method("))
    (tmp_path / "smooth.py").write_text(block("docs/extending.md", "def smooth("))
    (tmp_path / "stripes.py").write_text(block("docs/extending.md", "TASK = Task("))
    done = run(tmp_path, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "| stripes:TASK | gain:method loss=smooth:smooth | official |" in squeeze(done.stdout)
    assert "100 test images, source stripes (stripes, version 1, original pixels)" in done.stdout
    folder = tmp_path / "w/stripes.TASK/gain.method/seed0"
    row = json.loads((folder / "result.json").read_text())
    assert row["loss"] == "smooth:smooth" and row["trainable_params"] == 36
    assert row["test_acc_final"] > 0.9 and row["loss_kwargs"] == {"amount": 0.2}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["train_entropy"] < 0.694 and last["train_loss"] > -0.2 * last["train_entropy"]
    adapter = folder / "adapter.safetensors"
    assert b'"standing"' in adapter.read_bytes().replace(b"\\", b"")
    # What a path names is in the run's identity, by its file.
    (tmp_path / "smooth.py").write_text((tmp_path / "smooth.py").read_text() + "# another\n")
    done = run(tmp_path, *TRAIN)
    assert done.returncode == 1 and "holds a run with code=['gain:method " in done.stderr
    # A card imports nothing by itself.
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    predict = ("rlrr_jax.predict", "--adapter", str(adapter), "a.png")
    done = run(tmp_path, *predict)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line == (
        "error: the method gain:method is somebody's code: read it, and add --import gain:method to let "
        "it run"
    )
    for command in (predict, ("rlrr_jax.export", str(adapter), "--to", "timm", "x.safetensors")):
        done = run(tmp_path, *command, "--import", "gain:method")
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.slow
def test_a_network_of_a_fork(tmp_path):
    """Trained, predicted, refused where no user named it; its head is not that of the file."""
    import numpy as np
    from PIL import Image

    (tmp_path / "small.py").write_text(block("docs/extending.md", "class Net("))
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in (("Conv_0", (4, 4, 3, 32)), ("Conv_1", (4, 4, 32, 64))):
        arrays[f"{name}/kernel"] = rng.normal(0, np.prod(shape[:3]) ** -0.5, shape).astype(np.float32)
        arrays[f"{name}/bias"] = np.zeros(shape[-1], np.float32)
    for i, width in enumerate((32, 64)):
        for key in ("scale", "bias"):
            arrays[f"LayerNorm_{i}/{key}"] = np.full(width, key == "scale", np.float32)
    np.savez(tmp_path / "small.npz", **arrays)
    train = ["rlrr_jax.main", "--config=configs/vtab.py:digits,method=full+linear+rlrr", "--workdir=w"]
    train += [
        "--config.model.variant=small:Net",
        "--config.image_size=32",
        "--config.epochs=5",
        "--config.lr=0.003",
    ]
    done = run(tmp_path, *train, "--config.pretrained.name=small.npz")
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads((tmp_path / f"w/digits/{m}/seed0/result.json").read_text())
        for m in ("full", "linear", "rlrr")
    ]
    assert [row["model"] for row in rows] == ["small:Net"] * 3 and rows[0]["train_loss"] < 1.5
    assert rows[0]["test_acc_final"] > 0.96 > 0.94 > rows[1]["test_acc_final"] > 0.85
    assert rows[2]["test_acc_final"] > 0.93 and rows[2]["train_loss"] < rows[1]["train_loss"]
    assert rows[0]["trainable_params"] == 16 * (3 * 32 + 32 * 64) + 3 * (32 + 64) and rows[0][
        "head_params"
    ] == 10 * (2 * 2 * 64 + 1)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    adapter = "w/digits/full/seed0"
    done = run(tmp_path, "rlrr_jax.predict", "--adapter", adapter, "a.png")
    assert "the model small:Net is somebody's code: read it, and add --import small:Net" in done.stderr
    done = run(tmp_path, "rlrr_jax.predict", "--adapter", adapter, "a.png", "--import", "small:Net")
    assert done.returncode == 0 and done.stdout.count("%") == 3, done.stderr
    done = run(tmp_path, "rlrr_jax.report", "w")  # which imports nothing
    assert done.returncode == 0 and "small.npz (" in done.stdout
    out = ("rlrr_jax.export", adapter, "--to", "timm", "x.safetensors", "--import", "small:Net")
    assert "small:Net is not exported to timm: use adapter, hub" in run(tmp_path, *out).stderr
    text = (tmp_path / "small.py").read_text()
    for wrong, message in (
        (
            text.replace('self.sow("pre_logits", "features", x)', ""),
            "and sow what that gets: self.sow(",
        ),
        (text.replace(', name="head"', ""), 'of a Dense with the name "head"'),
        (text.replace("dtype: Any = jnp.float32", "kind: Any = jnp.float32"), "num_classes and dtype"),
    ):
        (tmp_path / "small.py").write_text(wrong)
        done = run(tmp_path, *train, "--config.pretrained.name=small.npz")
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and message in line, line
    (tmp_path / "small.py").write_text(text)
    np.savez(tmp_path / "other.npz", **arrays, extra=np.zeros(3, np.float32))
    done = run(tmp_path, *train, "--config.pretrained.name=other.npz", "--workdir=x")
    assert "other.npz does not fit the model (check config.model): unknown: extra" in done.stderr


WRONG = """
def number(key): return 1
value = 3
class Block: pass
def method(): return None
"""


def test_what_a_path_names_must_be_of_its_kind(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    cases = (
        ("method=wrong:method", "method 'wrong:method' must return a methods.Method, not NoneType"),
        ("method=wrong:value", "the method wrong:value is int: name a function or a class"),
        ("loss=wrong:value", "the loss wrong:value is int: name a function or a class"),
        ("--config.gradients=wrong:number", "must make an optax transformation of a key, not int"),
        ("--config.gradients=noise2", "unknown gradients 'noise2': did you mean 'noise1'"),
        ("--config.model.block=wrong:Block", "must be a class like rlrr_jax.models.vit.Block"),
        ("wrong:value", "wrong:value is no task: make it a rlrr_jax.data.task.Task"),
        ("method=:method", "the method ':method' is no path: write module:object"),
        ("method=wrong:", "the method 'wrong:' is no path: write module:object"),
        ("method=../wrong:method", "the method '../wrong:method' is no path: write module:object"),
    )
    commands = []
    for flag, _ in cases:
        given = flag.startswith("--")
        argument = "digits" if given else f"{flag}" if flag == "wrong:value" else f"digits,{flag}"
        flags = [flag] if given else []
        commands.append(["rlrr_jax.main", f"--config=configs/vtab.py:{argument}", *flags])
    for (flag, message), done in zip(cases, forked.ask(commands, tmp_path)):
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and len(lines) == 1 and message in lines[0], (flag, lines)
    assert not (tmp_path / "runs").exists()


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "mine.py").write_text("import nothing_like_this\n")
    (tmp_path / "other.py").write_text("def method():\n    pass\n")
    said = lambda name: run(tmp_path, "rlrr_jax.main", f"--config=configs/vtab.py:digits,method={name}")
    (line,) = said("gone:method").stderr.splitlines()
    assert line == (
        f"error: there is no module 'gone' for the method 'gone:method': it is neither in {tmp_path} nor "
        f"installed"
    )
    assert (
        "unknown object of other for the method 'methd': did you mean 'method'"
        in said("other:methd").stderr
    )
    done = said("mine:method")
    assert "Traceback" in done.stderr and "No module named 'nothing_like_this'" in done.stderr
