"""Whatever a file or a configuration holds: it is read, or one sentence says what is wrong with it.

More examples: `pytest tests/test_fuzz.py --hypothesis-profile=long` (about an hour).
"""

import functools
import io
import json
import random
import string

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlrr_jax import adapters, cards, methods
from rlrr_jax import config as config_lib
from rlrr_jax.configs import vtab
from rlrr_jax.data import decoding, sources, tasks
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.runs import identity
from rlrr_jax.weights import reader, vit_writers

TINY = vit.ViT(width=4, depth=2, mlp_dim=8, num_heads=2, patch_size=2, num_classes=3)
seeds = st.integers(0, 2**32 - 1)


def said(error):
    """Checks that an error is one line that a user can read."""
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text, text


def mutate(data, rng):
    """Some bytes flipped, cut out, doubled or replaced."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 300))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = rng.randbytes(length)
        else:
            del data[at:]
    return bytes(data)


# Weight files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A good file's arrays, and a folder."""
    folder = tmp_path_factory.mktemp("weights")
    reader.save(folder / "good.npz", tiny_tree())
    return folder, dict(np.load(folder / "good.npz"))


def read(path):
    """Weights are whole and finite, or refused."""
    try:
        tree = reader.load(str(path), model=TINY, image_size=4)
    except UserError as e:
        said(e)
        return False
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in jax.tree.leaves(tree))
    return True


@given(seeds)
def test_damaged_weight_files(weights, seed):
    folder, _ = weights
    data = mutate((folder / "good.npz").read_bytes(), random.Random(seed))
    (folder / "damaged.npz").write_bytes(data)
    read(folder / "damaged.npz")


ARRAYS = {
    "nan": lambda x, rng: np.where(np.arange(x.size).reshape(x.shape) == x.size // 2, np.nan, x),
    "huge": lambda x, rng: x.astype(np.float64) * 1e300,
    "integers": lambda x, rng: rng.integers(-5, 5, x.shape),
    "complex": lambda x, rng: x * 1j,
    "bool": lambda x, rng: x > 0,
    "text": lambda x, rng: np.array(["a"] * 3),
    "bytes": lambda x, rng: np.frombuffer(rng.bytes(8), "V2"),
    "record": lambda x, rng: np.zeros(3, [("a", "f4"), ("b", "f4")]),
    "dates": lambda x, rng: np.zeros(x.shape, "M8[s]"),
    "scalar": lambda x, rng: np.float32(1),
    "empty": lambda x, rng: np.zeros((0, *x.shape[1:]), np.float32),
    "transposed": lambda x, rng: x.T,
    "more axes": lambda x, rng: x[None, None],
    "objects": lambda x, rng: np.array([{}, []], dtype=object),
    "half": lambda x, rng: x.astype(np.float16),
}
NAMES = [
    "params/x",
    "x",
    "params/",
    "",
    "/",
    "../x",
    "params/cls/deeper",
    "params/pos_embedding/x",
    "ä",
]


@pytest.mark.slow
@given(seeds, st.sampled_from(sorted(ARRAYS)), st.sampled_from(["value", "name", "lost", "also"]))
def test_weight_files_with_other_arrays(weights, seed, kind, where):
    folder, good = weights
    rng = np.random.default_rng(seed)
    arrays = dict(good)
    name = sorted(good)[rng.integers(len(good))]
    if where == "lost":
        del arrays[name]
    value = ARRAYS[kind](good[name], rng)
    arrays[NAMES[rng.integers(len(NAMES))] if where in ("name", "also") else name] = value
    if where == "name":
        del arrays[name]
    np.savez(folder / "other.npz", **arrays)
    if read(folder / "other.npz"):
        harmless = kind in ("half", "transposed", "bytes")  # bytes may be bfloat16
        assert where == "also" or harmless or name.startswith("params/head"), (kind, where)


@given(seeds)
def test_damaged_safetensors(tmp_path_factory, seed):
    """Of timm, and adapters of ours: the head of such a file is JSON that may say anything."""
    folder = tmp_path_factory.getbasetemp()
    weights = {k: np.ascontiguousarray(v) for k, v in vit_writers.to_timm(tiny_tree()).items()}
    data = mutate(safetensors.numpy.save(weights), random.Random(seed))
    (folder / "augreg.safetensors").write_bytes(data)
    read(folder / "augreg.safetensors")
    (folder / "adapter.safetensors").write_bytes(mutate(tiny_adapter(), random.Random(seed)))
    try:
        adapter = adapters.read(folder / "adapter.safetensors")
    except UserError as e:
        return said(e)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter.trainable))


@functools.cache
def tiny_tree():
    return TINY.init(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]


@functools.cache
def tiny_adapter():
    """Bytes of an adapter of the bundled model that trains the head only."""
    (run,) = config_lib.resolve(vtab.get_config("digits,method=linear"))
    head = {"kernel": np.zeros((96, 10), np.float32), "bias": np.zeros(10, np.float32)}
    card = cards.card(run, {"backbone_sha256": "0", "dataset": "digits"}, "0123456789", {})
    flat = {f"head/{k}": v for k, v in head.items()}
    return safetensors.numpy.save(flat, {"rlrr_jax": json.dumps(card)})


# Lists and images -----------------------------------------------------------------------------


def picture(kind, mode, size, rng):
    out = io.BytesIO()
    array = rng.integers(0, 256, (*size[::-1], 4), np.uint8)
    image = Image.fromarray(array, "RGBA").convert(mode)
    frames = [image.rotate(90 * i) for i in range(3)]
    several = {"save_all": True, "append_images": frames} if kind in ("GIF", "TIFF", "WEBP") else {}
    image.save(out, kind, **several)
    return out.getvalue()


KINDS = [("PNG", m) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
KINDS += [("JPEG", m) for m in ("L", "RGB", "CMYK")]
KINDS += [
    ("GIF", "P"),
    ("BMP", "RGB"),
    ("TIFF", "RGB"),
    ("TIFF", "F"),
    ("WEBP", "RGBA"),
    ("PPM", "RGB"),
]
WHERE = sources.Split(1, ("digits",), lambda a, b: [], {}, lambda i: "image 0 of a list")


def decode(data):
    """Either an image of the size asked for, or a sentence."""
    try:
        with decoding.readable(WHERE, 0):
            image = decoding.decode(data, 16)
    except UserError as e:
        said(e)
        return False
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    return True


@given(seeds, st.sampled_from(KINDS), st.tuples(st.integers(1, 60), st.integers(1, 60)), st.booleans())
def test_images(seed, kind, size, damage):
    mode = kind[1] if kind[1] != "I;16" else "L"
    data = picture(kind[0], mode, size, np.random.default_rng(seed))
    if damage:
        decode(mutate(data, random.Random(seed)))
    else:
        assert decode(data)


SIZES = [(1, 1), (30000, 2), (65000, 65000), (2**31 - 1, 2**31 - 1), (0, 5), (20000, 9000)]


@pytest.mark.parametrize("size", SIZES)
def test_images_that_say_they_are_huge(size):
    """A PNG's or BMP's head may promise any size; nobody allocates it."""
    import struct
    import zlib

    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    decode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("list") / "vtab-1k" / "dtd"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(picture("JPEG", "RGB", (8, 8), np.random.default_rng(0)))
    (folder.parents[1] / "secret.jpg").write_bytes(b"secret")
    return folder


PARTS = [
    "images/a.jpg",
    "images/b.jpg",
    "../../secret.jpg",
    "images/../../../secret.jpg",
    "/etc/passwd",
]
PARTS += ["images", ".", "~", "C:\\x", "images/a.jpg\0", "x" * 5000, "²", "-1", "0", "46", "47", "1e3"]
PARTS += ["99999999999999999999", "\t", " ", "", "\ufeff", "\u2028", "٣"]


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(PARTS) | st.text(max_size=9))))
def test_list_files(folder, lines):
    text = "\n".join(f"{a} {b}" for a, b in lines)
    (folder / "test.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    found = sources.Found("folder", folder, "vtab-1k/dtd")
    try:
        split = sources._folder(tasks.get("dtd"), "test", found)
        examples = split.read(0, split.number)
    except UserError as e:
        return said(e)
    except OSError as e:  # main makes a sentence of it
        return said(e.strerror)
    good = (folder / "images" / "a.jpg").read_bytes()
    assert all(image == good and 0 <= label < 47 for image, (label,) in examples)


# Configurations -------------------------------------------------------------------------------

words = st.sampled_from(
    ["hearts", "digits", "all", "cifar", "task", "method", "rlrr", "lora", "full+rlrr", "rank", "init"]
    + [
        "where",
        "targets",
        "1",
        "-1",
        "0",
        "1e9",
        "None",
        "True",
        "(1,2)",
        "damped",
        "mha+ffn",
        "",
        "__",
    ]
)
words = words | st.text(string.printable, max_size=8)


@given(st.lists(st.tuples(words, words), max_size=4), st.booleans())
def test_configuration_arguments(pairs, equals):
    """What follows the colon of --config=configs/vtab.py:..."""
    text = ",".join(f"{a}={b}" if equals else a for a, b in pairs)
    resolve(vtab.get_config(text))


VALUES = [-1, 0, 1, 2, 7, 10**30, 0.5, -0.0, 1e-30, 1e300, float("nan"), float("inf")]
VALUES += ["", "x", "B/16", "rlrr", "hearts", True, (), (1,), (0, 0), (-1, 2**70), ({},), ({"lr": 0},)]
VALUES += [({"seed": (1, 1)},), ({"x": 1},), ("rank",), ({"method": "lora", "rank": 2},), None]
KEYS = [*vtab.get_config().keys(), "model.variant", "model.gelu", "model.unroll", "pretrained.name"]
KEYS += ["pretrained.grid", "data.source", "data.variant", "grid.lr", "grid.drop_path"]


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=3))
def test_configuration_values(changes):
    config = vtab.get_config("hearts")
    for key, value in changes:
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError, KeyError, AttributeError):
            return  # of ml_collections: _parse_flags makes a sentence of it
    resolve(config)


def resolve(config):
    """Either runs whose every value is there, or a sentence."""
    try:
        runs = config_lib.resolve(config)
    except UserError as e:
        return said(e)
    for run in runs:
        assert run.task in tasks.TASKS and run.method in methods.METHODS and run.epochs > 0
        identity.fingerprint([run])
