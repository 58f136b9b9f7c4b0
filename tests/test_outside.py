"""What comes from outside decides no path, import or address: audited by Python itself.

Cards of adapters, configurations beside weights, addresses, lists, indices and headers are made of
hostile parts. Each is read, or one sentence says what is wrong with it; meanwhile nothing may be written
outside a folder, imported that is not installed, run, or asked of the network.
"""

import contextlib
import copy
import json
import os
import pathlib
import random
import sys
import sysconfig
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlrr_jax import adapters, cards
from rlrr_jax.data import own, sources, tasks
from rlrr_jax.errors import UserError
from rlrr_jax.results import model_card
from rlrr_jax.weights import download, names, preprocessing, reader

STRANGE = (
    *(
        "../../x",
        "/etc/passwd",
        "..\\..\\x",
        "%2e%2e/%2e%2e/x",
        "a\0b",
        "a\nb",
        "~root/x",
        "~nobody/x",
        "",
    ),
    *(
        "http://127.0.0.1:9/../../x.npz",
        "https://127.0.0.1:9/x.npz?a=../b",
        "gs://b/../x.npz",
        "hf:../x",
    ),
    *(
        "hf:a/b@../../c",
        "hf:a/b",
        "file:///etc/x.npz",
        "x.npz:../..",
        "os:system",
        "__import__('os')",
        "é" * 300,
    ),
    *(
        "bundled",
        "augreg/../../x/y",
        "imagenet21k/ViT-B_16",
        "x.pth",
        "model.safetensors.index.json",
        "a|b",
    ),
    *(
        0,
        -1,
        1e308,
        float("nan"),
        2**63,
        True,
        None,
        [],
        {},
        [[]],
        {"a": {"b": 1}},
        ["../x"],
        [1e9, 1e9, 1],
    ),
)
WORDS = (
    "..",
    ".",
    "/",
    "\\",
    "%2e",
    "%2f",
    "x",
    "x.npz",
    "?id=1",
    "#y",
    ":",
    "@",
    "\0",
    " ",
    "~",
    "http://h",
    "é",
)
_SEEN: list = []  # of the audit, while it is on
_STATE: dict = {"root": None}
_HOME = tuple(
    str(pathlib.Path(p).resolve())
    for p in {*sysconfig.get_paths().values(), os.path.dirname(os.__file__)}
)


def _hook(event, args):
    root = _STATE["root"]
    if root is None:
        return
    if event in (
        "socket.connect",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
    ):
        _SEEN.append((event, str(args)[:100]))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "shutil.rmtree"):
        if not str(os.path.abspath(os.fsdecode(args[0]))).startswith(root):
            _SEEN.append((event, str(args)[:200]))
    elif event == "open" and isinstance(args[0], str | bytes) and args[2]:
        flags = args[2] if isinstance(args[2], int) else 0
        path = os.path.abspath(os.fsdecode(args[0]))
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not path.startswith((root, "/dev/", "/proc/")) and "__pycache__" not in path:
            _SEEN.append((event, path))
    elif event == "import" and args[1] and not str(args[1]).startswith(_HOME):
        if "rlrr_jax" not in str(args[0]):
            _SEEN.append((event, str(args[:2])))


sys.addaudithook(_hook)


@contextlib.contextmanager
def audited(root):
    """Fails if anything happens outside of a folder; whatever is raised must be a UserError's sentence."""
    _SEEN.clear()
    _STATE["root"] = str(root)
    try:
        yield
    except UserError as e:
        text = str(e)
        assert text and "Traceback" not in text
    finally:
        _STATE["root"] = None
    assert not _SEEN, _SEEN


def strange(value, rng, depth=0):
    """A copy of plain values in which some are hostile."""
    if isinstance(value, dict) and depth < 3:
        out = {k: strange(v, rng, depth + 1) for k, v in value.items()}
        for key in rng.sample(sorted(out), min(len(out), rng.randint(0, 1 if depth else 2))):
            out[key] = copy.deepcopy(rng.choice(STRANGE))
        if rng.random() < 0.1 and out:
            del out[rng.choice(sorted(out))]
        return out
    return value


def text_of(rng, most=8):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


@pytest.fixture(scope="module")
def good(tuned_runs):
    return adapters.read(tuned_runs / "digits/rlrr/seed0/adapter.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("outside")
    (root / "home").mkdir()
    return root


def of_cards(rng, root, good):
    card = strange(good.card, rng)
    path = root / "a.safetensors"
    flat = {k: np.asarray(v) for k, v in adapters.flattened(good.trainable).items()}
    path.write_bytes(safetensors.numpy.save(flat, {"rlrr_jax": json.dumps(card)}))
    with audited(root):
        adapter = adapters.read(path)
        with contextlib.suppress(UserError):
            adapters.backbone(adapter, cache_dir=str(root / "cache"))
        assert "\0" not in model_card.text(cards.portable(adapter).card)


def of_addresses(rng, root, good):
    url = rng.choice(("http://h/", "https://h:1/a/", "gs://b/", "")) + text_of(rng)
    with audited(root):
        path = download.place(url, str(root / "cache"))
        assert path.parts[: len(root.parts) + 2] == (*root.parts, "cache", "weights")
        assert len(path.parts) == len(root.parts) + 4 and not path.name.startswith(".")
        file, _ = names.split_subtree(url)
        names.address(file)
        names.canonical(url)
        cards._portable_name(url)
    with audited(root):
        names.fetch(url, str(root / "cache"), fetch=False)


def of_configs(rng, root, good):
    path = root / "w" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    timm = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"num_heads": 3},
        "global_pool": "token",
    }
    timm["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 224, 224]}
    hugging = {"model_type": "vit", "hidden_size": 192, "hidden_act": "gelu", "image_size": 224}
    hugging |= {"num_attention_heads": 3, "layer_norm_eps": 1e-12, "patch_size": 16}
    pixels = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    (path.parent / "config.json").write_text(json.dumps(strange(rng.choice((timm, hugging)), rng)))
    (path.parent / "preprocessor_config.json").write_text(json.dumps(strange(pixels, rng)))
    with audited(root):
        preprocessing.read(
            path, str(path), variant=rng.choice(("Ti/16", "bundled", "swin_t", "resnet50"))
        )


def of_lists(rng, root, good):
    folder = root / "vtab"
    folder.mkdir(exist_ok=True)
    lines = [f"{text_of(rng)} {rng.choice((0, 1, -1, 10**9, 'x'))}" for _ in range(rng.randint(1, 4))]
    (folder / "test.txt").write_text("\n".join(lines), errors="replace")
    task = tasks.TASKS["cifar"]
    with audited(root):
        sources.open_vtab(task, "test", sources.Found("folder", folder, "x")).read(0, 1)


def of_tables(rng, root, good):
    folder = root / "own"
    folder.mkdir(exist_ok=True)
    quote = lambda text: f'"{text}"' if rng.random() < 0.3 else text
    rows = [
        ",".join(quote(text_of(rng, 3)) for _ in range(rng.randint(1, 3)))
        for _ in range(rng.randint(0, 5))
    ]
    head = rng.choice(("path,label", "path,label,split", "label,path", "path;label", text_of(rng)))
    (folder / "x.csv").write_text("\n".join([head, *rows]), errors="replace")
    with audited(root):
        own.read(str(folder / "x.csv"), own.Options())


def of_headers(rng, root, good):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = {text_of(rng, 3): strange(entry, rng) for _ in range(rng.randint(1, 3))}
    data = json.dumps(header).encode()
    size = rng.choice((len(data), 2**40, 0, len(data) + 1))
    (root / "h.safetensors").write_bytes(size.to_bytes(8, "little") + data + bytes(16))
    with audited(root):
        reader._read_safetensors(root / "h.safetensors", 1 << 20)


def of_archives(rng, root, good):
    shape = rng.choice(("(2,)", "(10**12,)", "(2**40, 2**20)", "(-1,)", "('x',)", "__import__('os')"))
    head = f"{{'descr': '{rng.choice(('<f4', '|O', 'V2', '<U9'))}', 'fortran_order': False, 'shape': {shape}}}"
    npy = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(8)
    with zipfile.ZipFile(root / "b.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(
            rng.choice(("x.npy", "../x.npy", "/etc/x.npy", text_of(rng).replace("\0", "0") + ".npy")),
            npy,
        )
        if rng.random() < 0.3:
            file.writestr("y.npy", bytes(1 << 22))  # a small bomb
    with audited(root):
        reader._read_npz(root / "b.npz", 1 << 20)
    index = root / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: copy.deepcopy(rng.choice(STRANGE)) for k in "xy"}}))
    with audited(root):
        for shard in names.shards(index):
            assert shard.parent == root


KINDS = (of_cards, of_addresses, of_configs, of_lists, of_tables, of_headers, of_archives)
OPTIONS = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def check(kind, place, good, seed):
    before = sorted(p for p in place.parent.iterdir())
    kind(random.Random(seed), place, good)
    assert sorted(p for p in place.parent.iterdir()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_from_outside(kind, place, good, monkeypatch):
    monkeypatch.setenv("RLRR_JAX_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_HOME", str(place / "hf"))

    @settings(max_examples=15 if kind is of_cards else 40, **OPTIONS)
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        check(kind, place, good, seed)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_of_them(kind, place, good, monkeypatch):
    monkeypatch.setenv("RLRR_JAX_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_HOME", str(place / "hf"))

    @settings(max_examples=300 if kind is of_cards else 1620, **OPTIONS)  # cards take a second each
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        check(kind, place, good, seed)

    run()


def test_the_audit_sees(place):
    """It would notice each of these."""
    with pytest.raises(AssertionError), audited(place / "home"):
        (place / "other").write_text("x")
    with pytest.raises(AssertionError), audited(place):
        import socket

        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 9), 0.1)
