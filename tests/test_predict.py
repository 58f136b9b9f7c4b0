"""Image files in, classes out: the answers of the run's own evaluation."""

import csv
import io
import json
import os
import pathlib
import sys

import forked
import numpy as np
import pytest
from PIL import Image

from rlrr_jax import adapters, export, files, predict
from rlrr_jax.data import decoding, store
from rlrr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tuned_runs):
    return tuned_runs / "hearts/rlrr/seed0"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The test images of hearts as PNG files, named by their number, and their labels."""
    folder = tmp_path_factory.mktemp("hearts")
    images, labels = store.load_split("hearts", "test", 32)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:04d}.png")
    return folder, labels


def command(monkeypatch, capsys, *args, stdin=""):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        predict.main()
        error = ""
    except UserError as e:
        error = str(e)
    out = capsys.readouterr()
    return out.out, out.err, error


def test_fine_tuned_exported_predicted_is_what_the_run_counted(run, pictures, tmp_path):
    """2,000 files; the accuracy is the one in result.json, to the last image."""
    folder, labels = pictures
    export.export(adapters.read(run / "adapter.safetensors"), "adapter", tmp_path / "a.safetensors")
    words = ["rlrr_jax.predict", folder, "--adapter", tmp_path / "a.safetensors"]
    done = forked.run([*words, "--format", "jsonl", "--top_k", "16", "--batch_size", "256"])
    out, error = done.stdout, done.returncode
    rows = [json.loads(line) for line in out.splitlines()]
    assert not error and [row["file"] for row in rows] == sorted(str(p) for p in folder.iterdir())
    classes = adapters.read(run / "adapter.safetensors").card["classes"]
    right = [row["top"][0]["class"] == classes[label] for row, label in zip(rows, labels)]
    assert np.mean(right) == files.read_json(run / "result.json")["test_acc_final"]
    for row in rows[:50]:
        ps = [best["p"] for best in row["top"]]
        assert ps == sorted(ps, reverse=True) and sum(ps) == pytest.approx(1, abs=1e-5)


def test_probabilities_do_not_depend_on_the_batch(run, pictures):
    tuned = adapters.load(run / "adapter.safetensors")
    paths = sorted(pictures[0].iterdir())[:11]
    some = [[p for _, p, _ in predict.predict(tuned, paths, size)] for size in (4, 64)]
    np.testing.assert_allclose(*some, rtol=1e-4, atol=1e-6)


def test_every_mode_size_and_way_to_name_files(run, pictures, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (40, 60, 4), np.uint8), "RGBA")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        colours.convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    (tmp_path / "below").mkdir()
    colours.convert("RGB").save(tmp_path / "below" / "x.JPEG", "JPEG")
    colours.convert("RGB").save(tmp_path / "below" / "hidden", "BMP")
    (tmp_path / "notes.txt").write_text("no image")
    adapter = ("--adapter", run / "adapter.safetensors")
    out, _, error = command(monkeypatch, capsys, tmp_path, *adapter, "--format", "csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert (
        not error
        and len(rows) == 9
        and rows[0] == ["file", "class1", "p1", "class2", "p2", "class3", "p3"]
    )
    listed = f"{tmp_path}/L.png\n\n{tmp_path}/below/hidden\n"
    out, _, error = command(monkeypatch, capsys, "-", f"{tmp_path}/*A.png", *adapter, stdin=listed)
    assert [line.split()[0].rsplit("/", 1)[1] for line in out.splitlines()] == [
        "L.png", "hidden", "LA.png", "RGBA.png"
    ]  # fmt: skip
    assert not error and out.count("%") == 12
    out, _, error = command(
        monkeypatch, capsys, tmp_path / "L.png", *adapter, "--out", tmp_path / "out.txt"
    )
    assert out == "" and (tmp_path / "out.txt").read_text().startswith(f"{tmp_path}/L.png ")


def test_unreadable_files_are_reported_at_the_end(run, pictures, tmp_path, monkeypatch, capsys):
    good = sorted(pictures[0].iterdir())[0]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "short.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    names = [tmp_path / "text.png", good, tmp_path / "missing.png", tmp_path / "short.png"]
    out, err, error = command(monkeypatch, capsys, *names, "--adapter", run / "adapter.safetensors")
    assert error == "3 of 4 files could not be read: see above" and out.startswith(f"{good} ")
    said = err[err.index("not read:") :]
    assert f"  {tmp_path}/text.png: it is no image\n" in said
    assert f"  {tmp_path}/missing.png: No such file or directory\n" in said and "short.png: " in said
    out, err, error = command(
        monkeypatch, capsys, tmp_path / "text.png", "--adapter", run / "adapter.safetensors"
    )
    assert (out, error) == ("", "1 of 1 files could not be read: see above")


def test_sixteen_bits_are_read_and_pixels_without_a_range_refused(run, tmp_path, monkeypatch, capsys):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    assert Image.open(tmp_path / "16.png").mode == "I;16"
    np.testing.assert_array_equal(
        predict.read(tmp_path / "16.png", decoding.Pixels(32))[..., 0], np.round(ramp / 257)
    )
    Image.fromarray(np.float32(ramp) / 65535).save(tmp_path / "f.tiff")
    *_, err, error = command(monkeypatch, capsys, tmp_path, "--adapter", run / "adapter.safetensors")
    assert error == "1 of 2 files could not be read: see above"
    assert "f.tiff: pixels of mode F have no known range; save it with 8 or 16 bits" in err


def test_names_that_are_no_text(run, pictures, tmp_path, monkeypatch, capsys):
    good = sorted(pictures[0].iterdir())[0].read_bytes()
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    pathlib.Path(name).write_bytes(good)
    args = ("--adapter", run / "adapter.safetensors", "--out", tmp_path / "out.csv", "--format", "csv")
    assert command(monkeypatch, capsys, tmp_path, *args)[2] == ""
    assert "\\udcff.png," in (tmp_path / "out.csv").read_text()
    with pytest.raises(UserError, match="names no home directory"):
        predict.find(["~nobody-here/x.png"])
    with pytest.raises(UserError, match="gs://x/y.png is not on this machine"):
        predict.find(["gs://x/y.png"])


def test_nothing_to_predict_is_said(run, tmp_path, monkeypatch, capsys):
    for args in ([tmp_path], [f"{tmp_path}/*.png"], ["-"]):
        *_, error = command(monkeypatch, capsys, *args, "--adapter", run / "adapter.safetensors")
        assert error.startswith("there is no image in "), error


def test_folders_are_searched_as_a_person_expects(run, pictures, tmp_path, monkeypatch, capsys):
    """Linked folders and every usual ending are read, hidden ones are not, and the rest is told."""
    good = sorted(pictures[0].iterdir())[0].read_bytes()
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    (tmp_path / "set/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "real").mkdir()
    for name in ("set/a.png", "set/._a.png", "set/.ipynb_checkpoints/a.png", "real/c.PNG"):
        (tmp_path / name).write_bytes(good)
    (tmp_path / "set/._b.png").write_bytes(b"AppleDouble")
    (tmp_path / "set/linked").symlink_to("../real")
    (tmp_path / "real/back").symlink_to("../set")
    for ending, kind in (("jfif", "JPEG"), ("jpe", "JPEG"), ("avif", "AVIF"), ("webp", "WEBP")):
        colours.save(tmp_path / f"set/x.{ending}", kind)
    (tmp_path / "set/notes.txt").write_text("no image")
    (tmp_path / "set/raw.heic").write_bytes(b"")
    adapter = ("--adapter", run / "adapter.safetensors", "--format", "csv")
    out, err, error = command(monkeypatch, capsys, tmp_path / "set", *adapter)
    names = [line.split(",")[0].removeprefix(f"{tmp_path}/set/") for line in out.splitlines()[1:]]
    assert sorted(names) == ["a.png", "linked/c.PNG", "x.avif", "x.jfif", "x.jpe", "x.webp"]
    said = f"note: {tmp_path}/set has other files, passed over: 1 .heic, 1 .txt, 3 hidden"
    assert not error and said in err


def test_photos_are_turned_upright(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    read = predict.read(tmp_path / "x.png", decoding.Pixels(32))
    np.testing.assert_array_equal(read, np.rot90(image, -1))


def test_workdirs_with_linked_folders_are_found_by_every_command(run, tuned_runs, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/hearts").symlink_to(tuned_runs / "hearts")
    (found,) = adapters.finished(tmp_path / "w")
    assert found == tmp_path / "w/hearts/rlrr/seed0/adapter.safetensors"
    assert adapters.find(tmp_path / "w") == found
    from rlrr_jax import html as page
    from rlrr_jax import report

    (row,) = report.collect(tmp_path / "w", out=tmp_path / "out")
    assert page._folder([tmp_path / "w"], row) == tmp_path / "w/hearts/rlrr/seed0"
