"""Decoding and resizing against Pillow itself and against a second formulation of bicubic."""

import io
import json
import pathlib
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import vtab_data
from PIL import Image

from rlrr_jax.data import cache, decoding, sources, store, tasks
from rlrr_jax.data import task as task_lib
from rlrr_jax.errors import UserError


def encoded(image, kind, mode="RGB"):
    out = io.BytesIO()
    Image.fromarray(image).convert(mode).save(out, kind)
    return out.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def bicubic(image, size):
    """Antialiased bicubic interpolation with a = -0.5, written out, rounded after each pass."""

    def weights(n):
        scale = max(n / size, 1.0)
        center = (np.arange(size) + 0.5) * n / size
        x = np.abs((np.arange(n) + 0.5 - center[:, None]) / scale)
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        w = np.where(x < 1, near, np.where(x < 2, far, 0))
        return w / w.sum(1, keepdims=True)

    height, width, _ = image.shape
    rows = np.clip(np.round(np.einsum("sw,hwc->hsc", weights(width), image)), 0, 255)
    return np.clip(np.round(np.einsum("sh,hwc->swc", weights(height), rows)), 0, 255)


@pytest.mark.parametrize("shape", [(40, 70), (16, 16), (300, 200)])
def test_resize_is_pillows_antialiased_bicubic_without_cropping(shape):
    image = noise(*shape, 3)
    ours = decoding.decode(encoded(image, "PNG"), 32)
    pillow = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ours, pillow)
    assert np.abs(ours.astype(int) - bicubic(image.astype(float), 32)).max() <= 1


def test_right_size_is_left_alone():
    image = noise(32, 32, 3)
    np.testing.assert_array_equal(decoding.decode(encoded(image, "PNG"), 32), image)


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK")]
)
def test_every_mode_becomes_rgb(kind, mode):
    data = encoded(noise(32, 32, 3), kind, mode)
    out = decoding.decode(data, 32)
    assert out.shape == (32, 32, 3)
    np.testing.assert_array_equal(out, Image.open(io.BytesIO(data)).convert("RGB"))


def test_arrays_of_one_and_three_channels():
    grey = noise(32, 32)
    np.testing.assert_array_equal(decoding.decode(grey, 32), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(decoding.decode(noise(32, 32, 3), 32), noise(32, 32, 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_jpeg75_is_pillows_default_save_and_load(mode):
    data = encoded(noise(40, 50, 3), "PNG", mode)
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(out, "JPEG")
    saved = Image.open(out)
    assert saved.layer[0][1:3] == (2, 2)  # 4:2:0
    resized = saved.resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decoding.decode(data, decoding.Pixels(32, "jpeg75")), resized)
    assert not np.array_equal(decoding.decode(data, 32), resized)


def test_dsprites_values_are_scaled():
    data = encoded(noise(64, 64) // 128, "PNG", "L")
    out = decoding.decode(data, 64, scale=255)
    assert set(np.unique(out)) == {0, 255}
    np.testing.assert_array_equal(out[..., 0] // 255, Image.open(io.BytesIO(data)))


# Entries --------------------------------------------------------------------------------------

SMALL = {"train": 24, "test": 300}
PARTS = {"train800": "train[:8]", "val200": "train[15:17]", "test": "test"}


@pytest.fixture
def pets(monkeypatch, tmp_path):
    """Images of many sizes, and a function that loads a split of them."""
    monkeypatch.setattr(task_lib, "SPLITS", {"train800": 8, "val200": 2})
    task = tasks.get("oxford_iiit_pet")._replace(splits=PARTS, num_test=300)
    monkeypatch.setitem(tasks.TASKS, "oxford_iiit_pet", task)
    vtab_data.write(tmp_path / "data", task, SMALL, "tfrecord")

    def load(split="test", size=32, variant="original"):
        found = sources.find("oxford_iiit_pet", tmp_path / "data")
        return store.load_split(
            "oxford_iiit_pet", split, decoding.Pixels(size, variant), found, tmp_path
        )

    return load


def raw(tmp_path, split="test"):
    opened = sources.open_split("pets", split, sources.find("pets", tmp_path / "data"))
    return [image for image, _ in opened.read(0, opened.number)]


@pytest.mark.parametrize("variant", decoding.VARIANTS)
def test_stored_pixels_are_those_of_the_host(variant, pets, tmp_path):
    images, labels = pets(variant=variant)
    assert images.shape == (300, 32, 32, 3) and len(images) == len(labels) == 300
    for image, stored in zip(raw(tmp_path), images[:]):
        np.testing.assert_array_equal(stored, decoding.decode(image, decoding.Pixels(32, variant)))
    np.testing.assert_array_equal(images[250:260], images[:][250:260])


def entries(tmp_path):
    return sorted(p.name for p in (tmp_path / "images").iterdir() if re.match(r"[^.C]", p.name))


def test_an_entry_is_made_once_for_all_that_shapes_it(pets, tmp_path, monkeypatch):
    pets()
    built = []
    build = store.build
    monkeypatch.setattr(store, "build", lambda *args: built.append(args) or build(*args))
    pets()
    assert not built
    pets(size=16)
    pets(variant="jpeg75")
    pets(split="train800")
    assert len(built) == 3 and len(entries(tmp_path)) == 4
    monkeypatch.setattr(cache, "PILLOW", 99)
    pets()
    assert len(built) == 4
    next((tmp_path / "data").rglob("*test.tfrecord-00001*")).open("ab").write(b"x")
    pets()  # the file is another one
    assert len(built) == 5


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "labels", "entry", "gone"])
def test_a_damaged_entry_is_made_again(damage, pets, tmp_path):
    images, labels = pets()
    before = images[:]
    (folder,) = (p for p in (tmp_path / "images").iterdir() if p.is_dir())
    file = folder / {"labels": "labels-oxford_iiit_pet.npy", "entry": "entry.json"}.get(
        damage, "images.npy"
    )
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    again, again_labels = pets()
    np.testing.assert_array_equal(again[:], before)
    np.testing.assert_array_equal(again_labels, labels)


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(pets, tmp_path):
    """A real process, killed while it decodes."""
    code = f"""
import sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.data import task as task_lib
task_lib.SPLITS = {{"train800": 8, "val200": 2}}
tasks.TASKS["oxford_iiit_pet"] = tasks.get("pets")._replace(splits={PARTS}, num_test=300)
decode = store.decode
def slow(*args):
    time.sleep(0.02)
    return decode(*args)
store.decode = slow
found = sources.find("pets", {str(tmp_path / "data")!r})
store.load_split("pets", "test", 32, found=found, cache_dir={str(tmp_path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    part = lambda: list((tmp_path / "images").glob("*.part/images.npy"))
    while not part():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not list((tmp_path / "images").glob("*/entry.json"))
    images, _ = pets()
    np.testing.assert_array_equal(images[299], decoding.decode(raw(tmp_path)[299], 32))
    assert not part()


def test_a_full_disk_is_forecast(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=900_000))
    with pytest.raises(UserError, match="take 0.0 GB and .* has 0.0 GB free: make space"):
        pets()
    assert not list((tmp_path / "images").glob("*/"))
    found = sources.find("pets", tmp_path / "data")
    entry = store.locate("oxford_iiit_pet", "test", decoding.Pixels(32), found, tmp_path)
    assert entry.bytes == 300 * 32 * 32 * 3 == store.missing_bytes([entry, entry])
    monkeypatch.undo()


def test_the_suite_at_224_pixels_takes_21_gigabytes_and_43_without_native_sizes():
    """What the README says; tasks that share images count once."""
    unique = {(t.tfds, t.splits["test"]): t for t in tasks.VTAB.values()}.values()
    size = lambda side: sum(t.num_test * side(t) ** 2 * 3 for t in unique)
    assert round(size(lambda t: 224) / 1e9) == 43
    assert round(size(lambda t: t.side or 224) / 1e9) == 21


def test_tasks_with_the_same_images_share_an_entry(monkeypatch, tmp_path):
    monkeypatch.setattr(task_lib, "SPLITS", {})
    for name in ("smallnorb_azi", "smallnorb_ele"):
        task = tasks.get(name)._replace(splits={"test": "test[50%:]"}, num_test=150)
        monkeypatch.setitem(tasks.TASKS, name, task)
    vtab_data.write(tmp_path / "data", task, SMALL, "array_record")
    found = sources.find("smallnorb_azi", tmp_path / "data")
    (a, azimuth), (b, elevation) = (
        store.load_split(name, "test", 224, found=found, cache_dir=tmp_path)
        for name in ("smallnorb_azi", "smallnorb_ele")
    )
    assert a.path == b.path and a.shape == (150, 96, 96, 3)  # its own size, not 224
    opened = sources.open_split("smallnorb_ele", "test", found)
    np.testing.assert_array_equal([k for _, (_, k) in opened.read(0, 150)], elevation)
    assert not np.array_equal(azimuth, elevation)
    saved = json.loads((a.path.parent / "entry.json").read_text())
    assert saved["key"]["native"] and saved["key"]["tasks"] == ["smallnorb_azi", "smallnorb_ele"]


def test_an_image_that_breaks_the_native_size_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(task_lib, "SPLITS", {"train800val200": 3})
    monkeypatch.setitem(tasks.TASKS, "svhn", tasks.get("svhn")._replace(num_test=3))
    folder = vtab_data.write_folder(tmp_path, "svhn", {"test": 3}, side=32)
    load = lambda: store.load_split(
        "svhn", "test", 224, found=sources.find("svhn", tmp_path), cache_dir=tmp_path
    )
    assert load()[0].shape == (3, 32, 32, 3)
    Image.new("RGB", (31, 31)).save(folder / "images/test/000002.jpg")
    with pytest.raises(UserError, match="test.txt:3: .*000002.jpg is damaged .*not 32 x 32"):
        load()
    for i in range(3):  # a folder that was resized throughout is taken as it is
        Image.new("RGB", (31, 31), (i, 0, 0)).save(folder / f"images/test/{i:06d}.jpg")
    assert load()[0].shape == (3, 224, 224, 3)


def test_entries_of_other_data_are_not_shared(monkeypatch, tmp_path):
    """The same images and file sizes with other labels; an image replaced in place; another label."""
    monkeypatch.setattr(task_lib, "SPLITS", {})
    task = tasks.get("dtd")._replace(splits={"test": "test"}, num_test=10)
    monkeypatch.setitem(tasks.TASKS, "dtd", task)
    load = lambda root: store.load_split(
        "dtd", "test", 16, found=sources.find("dtd", root), cache_dir=tmp_path
    )

    def make(shift):
        def example(spec, rng):
            out = vtab_data.example(spec, rng)
            return {**out, "label": (out["label"] + shift) % 20}

        return example

    for shift in (0, 1):
        root = tmp_path / str(shift)
        vtab_data.write(root, task, {"test": 10}, "tfrecord", make(shift))
    first, second = load(tmp_path / "0")[1], load(tmp_path / "1")[1]
    np.testing.assert_array_equal((first + 1) % 20, second)
    changed = task._replace(label=lambda example: 19 - example["label"] % 20)
    monkeypatch.setitem(tasks.TASKS, "dtd", changed)
    with pytest.raises(UserError, match="raise the version in its rule .'label, 1'"):
        load(tmp_path / "0")
    monkeypatch.setitem(tasks.TASKS, "dtd", changed._replace(rule="label backwards, 1"))
    np.testing.assert_array_equal(load(tmp_path / "0")[1], 19 - first)


def test_an_image_replaced_in_place_is_seen(monkeypatch, tmp_path):
    monkeypatch.setitem(tasks.TASKS, "dtd", tasks.get("dtd")._replace(num_test=3))
    folder = vtab_data.write_folder(tmp_path, "dtd", {"test": 3})
    found = sources.find("dtd", tmp_path)
    load = lambda: store.load_split("dtd", "test", 16, found=found, cache_dir=tmp_path)[0][:]
    load()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(folder / "images/test/000001.jpg")
    assert np.abs(load()[1].astype(int) - 9).max() <= 1


def hostile(kind):
    """Encoded images that are not what one expects."""
    out = io.BytesIO()
    if kind == "bomb":  # 400 million pixels in some 50 kB
        Image.new("1", (20_000, 20_000)).save(out, "PNG")
    elif kind == "animated":
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
        frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    elif kind == "one pixel":
        Image.new("RGB", (1, 1), "red").save(out, "PNG")
    elif kind == "wide":
        Image.new("RGB", (30_000, 4), "red").save(out, "PNG")
    elif kind == "truncated":
        Image.fromarray(noise(64, 64, 3)).save(out, "JPEG")
        return out.getvalue()[:900]
    elif kind == "text":
        return b"this is no image"
    return out.getvalue()


@pytest.mark.parametrize("kind", ["animated", "one pixel", "wide"])
def test_odd_images_are_read(kind):
    image = decoding.decode(hostile(kind), 32)
    assert image.shape == (32, 32, 3)
    assert np.abs(image.astype(int) - (255, 0, 0)).max() <= 2  # the first frame is red


@pytest.mark.parametrize("kind", ["bomb", "truncated", "text", "nothing"])
def test_hostile_images_end_in_one_sentence(kind):
    split = sources.Split(1, ("digits",), None, {}, lambda i: f"image {i} of digits test")
    begun = time.monotonic()
    with (
        pytest.raises(UserError, match="^image 0 of digits test is damaged .*: prepare it again$"),
        decoding.readable(split, 0),
    ):
        decoding.decode(hostile(kind), 32)
    assert time.monotonic() - begun < 10


# What lies in the cache ------------------------------------------------------------------------


def test_what_no_task_uses_is_told_and_removed(pets, tmp_path, monkeypatch, capsys):
    from rlrr_jax import prepare

    pets()
    pets(size=16)
    assert [why for *_, why in cache.entries(tmp_path, thorough=True)] == [None, None]
    folder = tmp_path / "images"
    old = folder / "cifar100-test-32px-original-0123456789"
    old.mkdir()
    (old / "entry.json").write_text('{"key": {"format": 1}}')  # of the format before
    part = ".cifar100-test-32px-original-0123456789.0a1b2c3d.part"
    (folder / part).mkdir()
    mine = {
        folder / "holiday" / "a.png",
        folder / "x.part" / "b.png",
        old.with_name(f"{old.name}0") / "c",
    }
    mine |= {
        folder / "cifar100-test-32px-original-aaaaaaaaaa" / name for name in ("entry.json", "my.png")
    }
    mine |= {folder / "loose.png", folder / "cifar100-test-32px-original-bbbbbbbbbb" / "images.npy"}
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (folder / "cifar100-test-32px-original-cccccccccc").symlink_to(old)
    first = next(p for p in folder.glob("*16px*") if p.is_dir())
    saved = json.loads((first / "entry.json").read_text())
    saved["key"]["labels"] = ["label, 0"]
    (first / "entry.json").write_text(json.dumps(saved))
    said = {path.name: why for path, _, why in cache.entries(tmp_path) if why}
    assert said[part].startswith("its decoding was interrupted")
    assert said[first.name] == "its labels are of an older version"
    assert len(said) == 3
    assert "older version of rlrr_jax" in said["cifar100-test-32px-original-0123456789"]
    text = prepare.prune(tmp_path)
    assert text.count("removed ") == 3 and text.splitlines()[-1].startswith(f"{folder}: 1 left, 0.0")
    assert "note: not made by rlrr_jax, and left alone: cifar100" in text
    assert all(path.exists() for path in mine)
    assert len(cache.entries(tmp_path)) == 1
    with (next((tmp_path / "data").rglob("*test.tfrecord-00001*"))).open("ab") as f:
        f.write(b"x")
    (why,) = [why for *_, why in cache.entries(tmp_path, thorough=True)]
    assert why.startswith("its dataset ") and why.endswith(" has changed")


def test_a_new_python_or_minor_pillow_decodes_nothing_again(pets, tmp_path, monkeypatch):
    """Keys have no bytecode and only Pillow's major version."""
    pets()
    saved = json.loads(next((tmp_path / "images").glob("*/entry.json")).read_text())["key"]
    assert saved["labels"] == ["label, 1"] and saved["pillow"] == int(
        cache.PIL.__version__.split(".")[0]
    )
    monkeypatch.setattr(store, "build", None)
    code = tasks.get("oxford_iiit_pet").label
    same = lambda example: code(example)  # other bytecode, the same rule
    monkeypatch.setitem(tasks.TASKS, "oxford_iiit_pet", tasks.get("pets")._replace(label=same))
    pets()


def test_every_rule_of_a_label_has_a_name_and_a_version():
    rules = {}
    for task in tasks.TASKS.values():
        assert task.rule.rpartition(", ")[2].isdigit(), task.rule
        other = rules.setdefault(task.rule, task.label)
        assert other.__code__ == task.label.__code__, "two functions under one rule"


def test_two_that_decode_at_once_without_locks_end_with_one_entry(pets, tmp_path):
    """As on a file system without locks: the second finds the first one's folder in its way."""
    pets()
    found = sources.find("oxford_iiit_pet", tmp_path / "data")
    entry = store.locate("oxford_iiit_pet", "test", decoding.Pixels(32), found, tmp_path)
    other = entry.folder.parent / f".{entry.folder.name}.0123abcd.part"
    other.mkdir()
    store.build(entry, tasks.get("pets"), "test", alone=False)
    assert store.intact(entry) and other.exists()  # which may be going on
    store.build(entry, tasks.get("pets"), "test", alone=True)
    assert store.intact(entry) and not other.exists()


def test_a_whole_entry_is_read_from_a_disk_that_cannot_be_written(pets, tmp_path, monkeypatch):
    images, _ = pets()

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store.files, "lock", read_only)
    monkeypatch.setattr(pathlib.Path, "mkdir", read_only)
    again, _ = pets()
    np.testing.assert_array_equal(again[:], images[:])


def rotated(image, orientation=6):
    """A PNG that says that it lies on its side."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(out, "PNG", exif=exif)
    return out.getvalue()


def test_upright_is_an_option():
    image = noise(32, 32, 3)
    lying = decoding.decode(rotated(image), 32)
    np.testing.assert_array_equal(lying, image)
    upright = decoding.decode(rotated(image), decoding.Pixels(32, upright=True))
    np.testing.assert_array_equal(upright, np.rot90(image, -1))


def test_a_palette_with_transparency_is_read_without_a_warning(recwarn):
    out = io.BytesIO()
    picture = Image.fromarray(noise(32, 32, 3)).convert("P")
    picture.save(out, "PNG", transparency=bytes(range(256)))
    image = decoding.decode(out.getvalue(), 32)
    np.testing.assert_array_equal(image, picture.convert("RGB"))
    assert not recwarn.list


def test_bundled_images_shrink_for_a_smaller_model():
    images, _ = store.load_split("digits", "test", 16)
    ((original, _),) = sources.open_split("digits", "test", sources.find("digits")).read(5, 6)
    assert images.shape[1:] == (16, 16, 3)
    wanted = Image.fromarray(original).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[5], wanted)
