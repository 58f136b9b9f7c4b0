"""Every command and Python block of the README and the other pages, run as written.

Only addresses, sizes and epochs are replaced: tasks are of real formats with tiny images, and the
bundled model stands for the large ones. A command that no rule below knows fails this file.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import forked
import named_vits
import numpy as np
import pytest
import safetensors.numpy
import vtab_data
from flags import xla_flags
from PIL import Image
from squeeze import squeeze

from rlrr_jax.data import tasks

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*/README.md"))]
PAGES += [p for p in sorted(ROOT.glob("rlrr_jax/*/README.md")) if p.parent.name != "projects"]
SMALL = ["--config.model.variant=bundled", "--config.image_size=32", "--config.epochs=1"]
RUN = ROOT / "rlrr_jax"


def blocks(kind, pages=PAGES):
    """`(page, text)` of every fenced block of a language."""
    fence = re.compile(rf"^```{kind}\n(.*?)^```", re.S | re.M)
    return [(page, text) for page in pages for text in fence.findall(page.read_text())]


def commands(pages=PAGES):
    """`(page, command)` of every line of the shell blocks, those that go on joined."""
    out = []
    for page, text in blocks("bash", pages):
        lines = re.sub(r"\\\n\s*", "", text).splitlines()
        out += [(page, re.sub(r"\s+#.*$", "", line)) for line in lines if line.strip()]
    return out


def inline(pages=PAGES):
    """`(page, command)` of every command in running text."""
    found = re.compile(r"`((?:venv/bin/)?python [^`]+|launch/\S+ [^`]+|DRY_RUN=1 [^`]+)`")
    return [
        (page, " ".join(text.split()))
        for page in pages
        for text in found.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    ]


COMMANDS = list(dict.fromkeys(text for _, text in commands()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four tasks of the real numbers of images, all tiny."""
    root = tmp_path_factory.mktemp("data")
    splits = {"train": 800, "validation": 200}
    vtab_data.write(root, tasks.get("kitti"), {**splits, "test": 711}, "array_record")
    vtab_data.write(root, tasks.get("dtd"), {**splits, "test": 1880}, "tfrecord")
    parts = {"train800": 800, "val200": 200, "train800val200": 1000}
    vtab_data.write_folder(root, "eurosat", {**parts, "test": 5400})
    vtab_data.write_folder(root, "cifar", {**parts, "test": 10_000}, side=32)
    return root


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A ViT-Ti/14 with DINOv2's names: LayerScale, a mask token, a position embedding of 37 x 37."""
    sizes = dict(width=192, depth=12, mlp=768, patch=14, grid=37)
    weights = named_vits.timm_weights(np.random.default_rng(0), **sizes)
    weights = {k: np.ascontiguousarray(v) for k, v in weights.items() if not k.startswith("head")}
    path = tmp_path_factory.mktemp("dinov2") / "dinov2.safetensors"
    safetensors.numpy.save_file({**weights, "mask_token": weights["cls_token"]}, path)
    return path


def run(words, cwd, code=0, **environment):
    words = list(map(str, words))
    if words[:2] == [sys.executable, "-m"]:
        done = forked.run(words[2:], cwd, 900, **environment)
    else:
        done = real(words, cwd, **environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def real(words, cwd, **environment):
    extra = {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        words, **dict(cwd=cwd, env={**os.environ, **extra}, capture_output=True, text=True, timeout=900)
    )


def program(text):
    """Words of `venv/bin/python -m ...` with this Python."""
    words = shlex.split(text.replace("~/tensorflow_datasets", "DIR"))
    assert words[0] in ("venv/bin/python", "python"), text
    return [sys.executable, *words[1:]]


def trained(text, folder, data, dinov2):
    """Runs a command of rlrr_jax.main."""
    words = [str(data) if word == "DIR" else word for word in program(text)]
    if "dinov2" in text:
        small = [f"--config.pretrained.name={dinov2}", "--config.model.variant=Ti/14"]
        words += [*small, "--config.image_size=28", "--config.epochs=1", f"--config.data.dir={data}"]
    elif "dinov3" in text:
        words += [*SMALL, "--config.pretrained.name=bundled", f"--config.data.dir={data}"]
    elif "hf:timm" in text:
        twice = ("grid.lr", "config.seeds")  # tuples of two flags are joined
        words = [word for word in words if not any(key in word for key in twice)]
        words += [*SMALL, "--config.pretrained.name=bundled", "--config.grid.lr=(1.0,)"]
        words += ["--config.seeds=(0,)"]
    elif "cifar" in text or ":all" in text:
        words += SMALL
    else:
        words += ["--config.epochs=1"]
    if "jpeg75" in text and "seeds" not in text:  # of folders here and of tfds
        words.append("--config.seeds=(42,)")
    if ":all" not in text:
        out = run(words, folder)
        assert "| test acc |" in squeeze(out) or "(val)" in out
        return out
    out = run(words, folder, code=1)  # 15 of the 19 tasks are not there
    for task in ("cifar", "dtd", "eurosa", "kitti"):
        assert task in out
    assert "15 of them" in out or re.search(
        r"error: \d+ of \d+ runs did not finish \(caltech101, ", out
    )
    return out


def test_there_is_a_rule_for_every_command():
    for text in COMMANDS:
        assert rule(text), f"no rule for: {text}"
    assert len(COMMANDS) >= 15


def rule(text):
    """How a command is tested."""
    if text.startswith(("python3 -m venv", "venv/bin/pip")):
        return "install"
    if "birds" in text:
        return "own"
    if "launch/" in text:
        return "launch"
    if text.startswith(("export JAX_", "JAX_PROCESS_ID")):
        return "processes"
    match = re.match(r"(?:venv/bin/)?python -m rlrr_jax\.(\w+)", text)
    return match and match[1]


@pytest.mark.parametrize("text", [t for t in COMMANDS if rule(t) == "install"])
def test_what_is_installed_exists(text):
    """Extras are in setup.py, lock files are there; .ci/run runs the first two as they are written."""
    setup = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"\[([\w,]+)\]", text):
        assert all(f'"{name}": [' in setup for name in extra.split(",")), extra
    for path in re.findall(r"-c (\S+)", text):
        assert (ROOT / path).exists()
    for module in re.findall(r"-m (rlrr_jax\.\w+|pytest|venv)", text):
        assert module in ("pytest", "venv") or (RUN / f"{module.split('.')[1]}.py").exists()
    if text.startswith("python3 -m venv"):
        wanted = [
            what for what in ("rlrr_jax.main", "pytest") if text.partition(" -m venv ")[2].count(what)
        ]
        assert wanted and all(what in (ROOT / ".ci/run").read_text() for what in wanted)


@pytest.mark.parametrize("text", [t for t in COMMANDS if rule(t) == "launch"])
def test_launch_commands_run_dry(text):
    words, environment = shlex.split(text), {"DRY_RUN": "1"}
    while "=" in words[0] and not words[0].startswith("-"):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    if words[0] == "sbatch":
        script = words.index("launch/slurm.sbatch")
        if found := re.search(r"--array=(\d+)-(\d+)", " ".join(words[:script])):
            variables = ("ID", found[2]), ("MIN", found[1]), ("COUNT", found[2])
            environment |= {f"SLURM_ARRAY_TASK_{key}": value for key, value in variables}
        words = ["bash", *words[script:]]
    if words[0].endswith(".sh"):
        words.insert(1, "--dry-run")
    out = run(words, ROOT, **environment)
    assert "-m rlrr_jax.main" in out.replace("\\", "") and "vtab.py:all" in out


MAIN = [t for t in COMMANDS if rule(t) == "main"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(t, marks=pytest.mark.slow)
        if re.search(":all|[+]full|dinov|tune|pace|batch_size|'rank': 4", t)
        else t
        for t in MAIN
    ],
)
def test_runs_of_the_pages(text, data, dinov2, tmp_path):
    trained(text, tmp_path, data, dinov2)


@pytest.mark.slow
def test_the_page_of_own_images_from_a_folder_to_a_file(tmp_path):
    """Every command of docs/own_images.md and the README on a folder of 60 pictures, in order."""
    rng = np.random.default_rng(0)
    for name, colour in {"robin": 40, "wren": 120, "jay": 200}.items():
        (tmp_path / "birds" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.uint8(colour + rng.integers(0, 50, (40, 30, 3)))
            Image.fromarray(pixels).save(tmp_path / f"birds/{name}/{i}.jpg")
    every = [text for page, text in commands() if rule(text) == "own"]
    assert len(every) == 10
    for text in every:
        if "--to onnx" in text and not importlib.util.find_spec("jax2onnx"):
            continue
        small = ["--config.data.cache_dir=cache", *SMALL] if "--config" in text else []
        out = run([*program(text), *small], tmp_path)
        if "rlrr_jax.main" in text:
            assert "birds: 48 images to train on, 16 to 16 of each of 3 classes; 12 to test on" in out
            named = "knn" if "knn" in text else "rlrr"
            assert f"| birds | {named}" in squeeze(out)
        if "predict" in text:
            assert out.count("robin") >= 60 and "birds/wren/3.jpg" in out
    graph = "birds-graph/model.stablehlo", "birds-features.npz"
    for name in ("birds.html", "birds.safetensors", "birds-timm.safetensors", *graph):
        assert (tmp_path / name).stat().st_size > 10_000
    assert (
        "most confused" in (tmp_path / "birds.html").read_text().lower()
        or "No image was" in (tmp_path / "birds.html").read_text()
    )


@pytest.mark.parametrize("text", [t for t in COMMANDS if rule(t) == "prepare"])
def test_preparing(text, data, tmp_path):
    """Without TensorFlow preparing says what to install; checking needs none."""
    words = [str(data) if word == "DIR" else word for word in program(text)]
    out = run(words, tmp_path, code=1)
    if "--check" in text:
        assert "[9/19] eurosat: ok: vtab-1k/eurosat" in out and "| caltech101 | missing |" in squeeze(
            out
        )
    else:
        assert "error: preparing needs " in out and "pip install -e '.[prepare]'" in out


@pytest.mark.slow
@pytest.mark.parametrize("text", [t for t in COMMANDS if rule(t) == "plan"])
def test_planning(text, tmp_path):
    """For CPUs, which are known everywhere, and a small network."""
    words = re.sub(r"--topology \S+", "--topology cpu:2", text)
    words = re.sub(r"--parts \d+", "--parts 2", words)
    out = run([*program(words), *SMALL, "--config.model.depth=1"], tmp_path)
    assert re.search(
        f"compiling: train, \\w+ rlrr, 3 trials on {1 if '--parts' in text else 2} dev", out
    )
    assert out.count("compiling: train") == 1  # all tasks share it
    assert "| train " in out and "| evaluate " in out and "| merge " in out


@pytest.mark.parametrize("text", [t for t in COMMANDS if rule(t) == "report"])
def test_commands_on_finished_runs(text, tuned_runs, tmp_path):
    if text.endswith(".json"):  # rows that are here
        assert " against rlrr" in run([*program(text), "--out", tmp_path], ROOT)
        return
    *words, workdir = [word.replace(" precision=bfloat16", "") for word in program(text)]
    (tmp_path / workdir).parent.mkdir(parents=True)
    (tmp_path / workdir).symlink_to(tuned_runs)
    out = run([*words, workdir, "--out", tmp_path / "out"], tmp_path)
    assert "digits" in out and list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_two_processes_as_the_page_starts_them(tmp_path):
    """The block of launch/README.md, at another port and for one epoch."""
    ((_, text),) = [(page, t) for page, t in blocks("bash") if "JAX_NUM_PROCESSES" in t]
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        text = text.replace("127.0.0.1:1234", f"127.0.0.1:{s.getsockname()[1]}")
    lines = [
        line.replace("python -m", f"{sys.executable} -m").replace(
            "vtab.py:digits", "vtab.py:digits,method=linear --config.epochs=1"
        )
        for line in text.splitlines()
    ]
    out = run(["bash", "-c", "\n".join([*lines, "wait"])], tmp_path)
    assert "process 1 of 2" in out and "| digits | linear |" in squeeze(out)


# Python blocks --------------------------------------------------------------------------------


def test_every_python_block_is_one_of_these():
    known = ("def method(targets", "reader.load(", "torch.load(", "def smooth(", "TASK = Task(")
    known += ("adapters.load(", "class Net(nn.Module)", "adapters.predict_mixed(")
    for page, text in blocks("python"):
        assert any(word in text for word in known), f"{page.name}: {text}"


def test_the_python_example(monkeypatch):
    """The lines of docs/backbones.md, with the bundled model for B/16."""
    ((_, text),) = [b for b in blocks("python") if "reader.load(" in b[1]]
    text = text.replace('models.build("B/16"', 'models.build("bundled"')
    text = text.replace('"imagenet21k/ViT-B_16"', '"bundled"').replace(
        "image_size=224", "image_size=32"
    )

    names = {"images": np.zeros((2, 32, 32, 3), np.float32)}
    exec(compile(text, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 100) and names["frozen"].keys() == names["params"].keys()


def test_an_adapter_predicts_as_the_readme_says(tuned_runs, tmp_path, monkeypatch, capsys):
    ((_, text),) = [b for b in blocks("python") if "adapters.load(" in b[1]]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(tuned_runs)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {"images": np.zeros((2, 28, 28, 3), np.uint8)})
    first, second = re.findall(r"'(\d)'", capsys.readouterr().out)
    assert first == second


def test_the_conversion_of_a_checkpoint(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    ((_, text),) = [b for b in blocks("python") if "torch.load(" in b[1]]
    weights = named_vits.timm_weights(np.random.default_rng(0))
    state = {f"module.base_encoder.{k}": torch.from_numpy(v) for k, v in weights.items()}
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "epoch": 300}, "vit-b-300ep.pth.tar")
    exec(compile(text, "README.md", "exec"), {})
    again = safetensors.numpy.load_file("mocov3-vit-b.safetensors")
    assert again.keys() == state.keys()


# In running text ------------------------------------------------------------------------------


def test_commands_in_running_text_name_what_exists():
    """Programs and flags; the programs themselves have tests of their own."""
    found = inline()
    assert len(found) >= 12
    if not (RUN / "projects").exists():
        found = [(page, text) for page, text in found if "rlrr_jax.projects" not in text]
    check_programs(found)


def check_programs(found):
    for page, text in found:
        words = shlex.split(text)
        while "=" in words[0] and not words[0].startswith("-"):
            words.pop(0)
        if "python" in words[0]:
            name = words[2] if words[1] == "-m" else words[1]
            path = ROOT / (f"{name.replace('.', '/')}.py" if words[1] == "-m" else name)
            path = path if path.exists() else path.with_suffix("") / "__main__.py"
            assert name == "pytest" or path.exists(), f"{page.name}: {text}"
            source = "" if name in ("pytest", "rlrr_jax.main") else path.read_text()
            for flag in re.findall(r"(--\w+)", text) if source else ():
                known = f'"{flag}"', f'("{flag[2:]}"'  # argparse's, absl's
                assert any(text in source for text in known), f"{page.name}: {flag} of {name}"
        else:
            script = next(word for word in words if word.startswith("launch/"))
            assert (ROOT / script).exists(), f"{page.name}: {text}"


def test_links_between_the_pages_lead_somewhere():
    check_links(PAGES)


def check_links(pages):
    """Links to projects may lead nowhere where that folder was removed."""
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if "://" in target or ("rlrr_jax/projects" in target and not (RUN / "projects").exists()):
                continue
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), f"{page.name}: {target}"
            heads = re.findall(r"^#+ (.*)$", found.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not anchor or anchor in slugs, f"{page.name}: {target}"


def test_a_batch_whose_images_name_their_adapters(tuned_runs, tmp_path, monkeypatch):
    ((_, text),) = [(page, t) for page, t in blocks("python") if "predict_mixed(" in t]
    for name, task in (("birds", "digits"), ("trees", "hearts")):
        file = tuned_runs / task / "rlrr/seed0/adapter.safetensors"
        (tmp_path / f"{name}.safetensors").write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {"images": np.zeros((3, 32, 32, 3), np.uint8)}
    exec(text, names)
    assert [len(x) for x in names["shares"]] == [10, 16, 10]
