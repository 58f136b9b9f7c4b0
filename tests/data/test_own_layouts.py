"""Folders and lists as people have them: what looks like something else is refused or said."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from rlrr_jax.data import decoding, huggingface, own, sources
from rlrr_jax.data.examples import Unusable
from rlrr_jax.errors import UserError


def pictures(folder, number=4, seed=0, **save):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        rng = np.random.default_rng([seed, i, *map(ord, folder.name)])
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.png", **save)


def made(root, *folders):
    for i, name in enumerate(folders):
        pictures(root / name, seed=i)
    return root


def read(path):
    return own.read(str(path), own.Options())


LAYOUTS = {
    "splits with longer names": (
        ("training_set/cat", "training_set/dog", "test_set/cat", "test_set/dog"),
        "has the folders test_set and training_set, which look like splits",
    ),
    "splits in themselves": (
        (
            "seg_train/seg_train/a",
            "seg_train/seg_train/b",
            "seg_test/seg_test/a",
            "seg_test/seg_test/b",
        ),
        "has the folders seg_test and seg_train, which look like splits",
    ),
    "no class in both": (
        ("train/a", "train/b", "test/c", "test/d"),
        "no class has both training and test images",
    ),
    "one level too high": (
        ("train/train/a", "train/train/b"),
        "train/train if its folders are the classes",
    ),
    "two levels too high": (
        ("data/images/a", "data/images/b"),
        "data/images if its folders are the classes",
    ),
    "code of accents": (("caf\u00e9", "cafe\u0301x/../cafe\u0301"), None),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts(what, tmp_path):
    folders, message = LAYOUTS[what]
    if message is None:  # NFC and NFD are one class, as file systems mix them
        images = read(made(tmp_path / "x", "caf\u00e9", "cafe\u0301", "tea"))
        assert images.classes == ("caf\u00e9", "tea")
        return
    with pytest.raises(UserError, match=message):
        read(made(tmp_path / "x", *folders))


def test_classes_that_differ_in_case_are_warned_of(tmp_path):
    """Letters are such classes, and so is a slip."""
    images = read(made(tmp_path / "x", "Cat", "cat"))
    assert images.classes == ("Cat", "cat")
    assert "warning: classes that differ in case alone are several: 'Cat' and 'cat'" in images.notes


@pytest.mark.parametrize("junk", ["@eaDir", "$RECYCLE.BIN", "__MACOSX", "#recycle"])
def test_folders_of_systems_are_no_classes(junk, tmp_path):
    root = made(tmp_path / "x", "a", "b", junk, f"a/{junk}")
    images = read(root)
    assert images.classes == ("a", "b") and sum(map(len, images.splits.values())) == 8
    assert any("8 in folders of the system" in note for note in images.notes)


def test_classes_of_unread_files_are_said(tmp_path):
    root = made(tmp_path / "x", "b")
    (root / "a").mkdir()
    for i in range(9):
        (root / "a" / f"{i}.HEIC").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not read \(9 .heic\): convert them to JPEG"):
        read(root)
    (tmp_path / "l.csv").write_text("path,label\nx/a/0.HEIC,a\nx/b/0.png,b\n")
    with pytest.raises(UserError, match="x/a/0.HEIC .HEIC, which is not read: convert it to JPEG"):
        read(tmp_path / "l.csv")


TABLES = {
    "a quote at the end": (
        'path,label\nb/0.png,b\na/0.png,"a\na/1.png,a\n',
        r"l.csv:3: a quote opens here",
    ),
    "two quotes": ('path,label\na/0.png,"a\na/1.png,a\nb/0.png,b"\n', r"l.csv:2: a quote opens here"),
    "long": ('path,label\na/0.png,"a' + "x" * 140_000 + "\n", "l.csv:2: a quote opens here"),
    "two columns": ("path,label,label\na/0.png,a,b\n", "has two columns 'label'"),
}


@pytest.mark.parametrize("what", TABLES)
def test_tables(what, tmp_path):
    made(tmp_path, "a", "b")
    text, message = TABLES[what]
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.zip", "is an archive"),
        ("x.parquet", "is no list"),
        ("x.json", "is no list"),
        ("x.jpg", "no list"),
    ],
)
def test_files_that_are_no_list(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def icon(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 4, 12, 12))
    return image.quantize() if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white_where_they_are_ones_own(mode, tmp_path):
    out = io.BytesIO()
    icon(mode).save(out, "PNG")
    white = decoding.decode(out.getvalue(), decoding.Pixels(16, white=True))
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[4:12, 4:12] = 0
    np.testing.assert_array_equal(white, expected)
    assert not decoding.decode(out.getvalue(), decoding.Pixels(16)).any()  # VTAB's numbers drop alpha
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            icon(mode).resize((16 + i, 16)).save(tmp_path / name / f"{i}.png")
    assert any(
        "6 of 6 images are transparent, and are laid on white" in n for n in read(tmp_path).notes
    )


def test_pictures_that_are_not_what_they_seem_are_said(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        values = np.random.default_rng(ord(name)).integers(0, 3500, (16, 16)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / name / "dark.png")
        frames = [Image.new("L", (16, 16), i) for i in (ord(name), 50)]
        frames[0].save(tmp_path / name / "two.tif", save_all=True, append_images=frames[1:])
        Image.fromarray(np.uint8(values // 14)).save(tmp_path / name / "plain.png")
    notes = read(tmp_path).notes
    assert [n[:40] for n in notes if "several pages" in n] == [
        "note: 2 of 6 images have several pages o"
    ]
    assert [n[:40] for n in notes if "nearly black" in n] == [
        "warning: 2 of 6 images have 16 bits, use"
    ]


def test_pgm_of_16_bits_is_png_of_16_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    pgm = b"P5 8 8 65535\n" + values.astype(">u2").tobytes()
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    np.testing.assert_array_equal(decoding.decode(pgm, 8), decoding.decode(out.getvalue(), 8))


def test_texts_and_exif_of_a_picture_do_not_refuse_it():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8))
    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("drawing", "x" * 3_000_000, zip=True)
    picture.save(out, "PNG", pnginfo=info)
    np.testing.assert_array_equal(decoding.decode(out.getvalue(), (8, 12)), np.asarray(picture))
    exif, out = Image.Exif(), io.BytesIO()
    exif[274] = 6
    picture.save(out, "PNG", exif=exif)
    turned = decoding.decode(out.getvalue(), decoding.Pixels((12, 8), upright=True))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(picture), -1))


def test_words_in_names_of_files_are_no_splits(tmp_path):
    pytest.importorskip("datasets")
    root = made(tmp_path / "pets", "a", "b")
    for i in (0, 1):
        (root / "a" / f"{i}.png").rename(root / "a" / f"train_{i}.png")
    (root / "b" / "0.png").rename(root / "b" / "my_test_0.png")
    with pytest.raises(UserError, match=r"would leave out \d of 8 images.*give the folder without hf:"):
        huggingface.read(root)
    assert sum(map(len, read(root).splits.values())) == 8


def test_a_column_called_label_is_the_label(tmp_path):
    datasets = pytest.importorskip("datasets")
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    rows = {
        "image": [{"bytes": out.getvalue(), "path": None}] * 3,
        "label": ["wren", "owl", "owl"],
        "camera": [0, 1, 0],
    }
    kinds = {"image": datasets.Image(), "label": datasets.Value("string")}
    kinds["camera"] = datasets.ClassLabel(names=["left camera", "right camera"])
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(
        tmp_path / "t.parquet"
    )
    _, examples, kind = huggingface.read(tmp_path)
    assert [e.label for e in examples] == ["wren", "owl", "owl"] and kind == "class"
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: https://x.org/t.parquet\n---\n")
    with pytest.raises(
        UserError, match="README.md names data at .*, which is not in the folder and not"
    ):
        huggingface.read(tmp_path)


def test_a_dataset_imports_nothing(tmp_path):
    (tmp_path / "features.json").write_text('{"pythonClassName": "os.system", "x": 1}')
    with pytest.raises(
        UserError, match="names os.system, which is no class of tfds and is not imported"
    ):
        sources.open_tfds(sources.Found("tfds", tmp_path, "x"), "train", ())


def test_all_that_cannot_be_used_is_kept():
    error = Unusable("root", 9, [(f"{i}.png", "no image") for i in range(7)])
    assert len(error.bad) == 7 and error.number == 9 and str(error).count("no image") == 5
