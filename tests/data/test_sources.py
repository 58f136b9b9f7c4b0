"""Real tfds datasets written into a temporary folder, read back without TensorFlow."""

import io
import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import vtab_data
from etils import epath
from PIL import Image
from squeeze import squeeze

from rlrr_jax.data import sources, store, tasks
from rlrr_jax.data import task as task_lib
from rlrr_jax.errors import UserError

TRAIN, TEST = 45_200, 10_000  # cifar's val200 is train[45000:45200]


def picture(i, size=32):
    """A small image whose first pixel tells its number."""
    image = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
    image[0, 0] = (i // 65536, i // 256 % 256, i % 256)
    return image


def png(i):
    out = io.BytesIO()
    Image.fromarray(picture(i)).save(out, "PNG")
    return out.getvalue()


class Cifar100(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The real one's features, images handed over encoded."""

    VERSION = tfds.core.Version("3.0.2")
    name = "cifar100"

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=100),
            "coarse_label": tfds.features.ClassLabel(num_classes=20),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        ranges = {"train": (0, TRAIN), "test": (TRAIN, TRAIN + TEST)}
        return {split: self._generate_examples(*r) for split, r in ranges.items()}

    def _generate_examples(self, start, stop):
        blank = png(0)
        for i in range(start, stop):
            kept = i % 50 == 0  # few need their own picture
            image = io.BytesIO(png(i) if kept else blank)
            yield i, {"id": str(i), "image": image, "label": i % 100, "coarse_label": i % 20}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Cifar100(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def load(split, folder, tmp_path, **kwargs):
    found = sources.find("cifar", folder)
    images, labels = store.load_split("cifar", split, 32, found=found, cache_dir=tmp_path, **kwargs)
    return images[:], labels


def test_splits_are_those_tfds_gives(data_dir, tmp_path):
    builder = tfds.builder_from_directory(data_dir / "cifar100" / "3.0.2")
    task, found = tasks.get("cifar"), sources.find("cifar", data_dir)
    for split, number in (("train800", 800), ("val200", 200), ("train800val200", 1000), ("test", TEST)):
        opened = sources.open_split("cifar", split, found)
        assert opened.number == number and opened.tasks == ("cifar",)
        theirs = builder.as_data_source(task.splits[split])
        ours = opened.read(0, number)
        assert [label for _, (label,) in ours] == [e["label"] for e in theirs]
        for (image, _), example in list(zip(ours, theirs))[:20]:
            np.testing.assert_array_equal(Image.open(io.BytesIO(image)), example["image"])
    train, val, both = (
        load(split, data_dir, tmp_path) for split in ("train800", "val200", "train800val200")
    )
    np.testing.assert_array_equal(both[0], np.concatenate([train[0], val[0]]))
    np.testing.assert_array_equal(both[1], np.concatenate([train[1], val[1]]))


def test_whole_split_is_decoded_in_order(data_dir, tmp_path):
    images, labels = load("test", data_dir, tmp_path)
    assert len(labels) == TEST and np.bincount(labels).tolist() == [100] * 100
    numbers = images[:, 0, 0].astype(int) @ [65536, 256, 1]
    own = np.flatnonzero(numbers)  # the others are blank
    assert sorted(numbers[own]) == list(range(TRAIN, TRAIN + TEST, 50))
    np.testing.assert_array_equal(labels[own], numbers[own] % 100)
    for i in own[:5]:
        np.testing.assert_array_equal(images[i], picture(int(numbers[i])))


def test_unprepared_dataset(tmp_path):
    both = r"no prepared tfds dataset at .*cifar100/3\.0\.2 nor a VTAB-1k folder at .*vtab-1k/cifar"
    with pytest.raises(UserError, match=both + r".*rlrr_jax\.prepare --tasks cifar.*config\.data\.dir"):
        sources.find("cifar", tmp_path)
    only = f"^there is no VTAB-1k folder at {tmp_path}/vtab-1k/cifar: prepare"
    with pytest.raises(UserError, match=only):
        sources.find("cifar", tmp_path, "folder")


def test_dataset_that_is_too_short(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TRAIN", 900)
    Cifar100(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match=r"'train\[45000:45200\]': cannot read the split"):
        sources.open_split("cifar", "val200", sources.find("cifar", tmp_path))


def test_labels_outside_the_task(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "cifar", tasks.get("cifar")._replace(classes=20))
    with pytest.raises(UserError, match="labels of cifar test go from 0 to 99, but the task has 20"):
        load("test", data_dir, tmp_path)


def test_bundled_tasks_are_what_they_say():
    for name in tasks.BUNDLED:
        task = tasks.get(name)
        for split, number in (("train800", 800), ("val200", 200), ("test", task.num_test)):
            images, labels = store.load_split(name, split, 32)
            assert images.shape == (number, 32, 32, 3) and images.dtype == np.uint8
            assert set(labels) == set(range(task.classes))
        whole = store.load_split(name, "train800val200", 32)
        np.testing.assert_array_equal(whole[0][800:], store.load_split(name, "val200", 32)[0])


@pytest.mark.slow
def test_a_cifar_run_from_the_command(data_dir, tmp_path):
    """The command of the README for a tfds task, with the bundled weights in place of a download."""
    command = [sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:cifar"]
    command += [f"--config.data.dir={data_dir}", "--config.pretrained.name=bundled"]
    command += ["--config.model.variant=bundled", "--config.epochs=2", f"--workdir={tmp_path}"]
    command += [f"--config.data.cache_dir={tmp_path}/cache"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert "| cifar | rlrr" in squeeze(out.stdout) and "source tfds" in out.stdout
    assert "| official |" in squeeze(out.stdout) and "No task was named" not in out.stdout


def copy_of(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("damage", ["dataset_info.json", "features.json", "shard", "records"])
def test_damaged_datasets_end_in_one_sentence(damage, data_dir, tmp_path):
    folder = copy_of(data_dir, tmp_path)
    inner = folder / "cifar100" / "3.0.2"
    shard = next(inner.glob("*test.array_record*"))
    if damage == "shard":
        shard.unlink()
    elif damage == "records":
        data = bytearray(shard.read_bytes())
        data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
        shard.write_bytes(data)
    elif damage == "features.json":
        (inner / damage).unlink()
    else:
        (inner / damage).write_text("{")
    with pytest.raises(UserError, match="prepare it again"):
        load("test", folder, tmp_path)


def test_other_formats_are_refused(data_dir, tmp_path):
    folder = copy_of(data_dir, tmp_path)
    info = folder / "cifar100" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "riegeli"))
    with pytest.raises(UserError, match="stored as riegeli, which cannot be read without TensorFlow"):
        sources.open_split("cifar", "test", sources.find("cifar", folder))


def test_test_split_of_another_length(data_dir, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "cifar", tasks.get("cifar")._replace(num_test=9_999))
    with pytest.raises(UserError, match="10000 test images instead of 9999"):
        sources.open_split("cifar", "test", sources.find("cifar", data_dir))


def test_the_version_that_can_be_prepared_comes_first(data_dir, tmp_path):
    folder = copy_of(data_dir, tmp_path)
    names = folder / "cifar100"
    for other in ("3.0.1", "3.1.0", "4.0.0", "incomplete.123"):
        shutil.copytree(names / "3.0.2", names / other)
    assert sources.find("cifar", folder).dataset == "cifar100:3.0.2"
    shutil.rmtree(names / "3.0.2")
    assert sources.find("cifar", folder).dataset == "cifar100:3.1.0"
    shutil.rmtree(names / "3.1.0")
    shutil.rmtree(names / "3.0.1")
    with pytest.raises(UserError, match="no prepared tfds dataset"):  # another major: other images
        sources.find("cifar", folder)


# All 19, in both formats ----------------------------------------------------------------------

SMALL = {"train": 24, "validation": 7, "test": 10}
SPLITS = {"train800": 8, "val200": 2, "train800val200": 10}


@pytest.fixture
def small_tasks(monkeypatch):
    """VTAB's tasks on datasets of `SMALL` sizes: the same expressions with small positions."""
    monkeypatch.setattr(task_lib, "SPLITS", SPLITS)
    for name, task in tasks.VTAB.items():
        parts = {
            k: re.sub(r"train\[\d+:\d+\]", "train[15:17]", v.replace("[:800]", "[:8]")).replace(
                "[:200]", "[:2]"
            )
            for k, v in task.splits.items()
        }
        parts["test"] = re.sub(r"train\[\d+:\]", "train[20:]", parts["test"])
        number = {"train[20:]": 4, "test[50%:]": 5, "validation": 7, "test": 10}[parts["test"]]
        small = task._replace(splits=parts, num_test=number, side=0)
        monkeypatch.setitem(tasks.TASKS, name, small)


@pytest.mark.parametrize("name", tasks.VTAB)
def test_array_record_and_tfrecord_read_the_same(name, small_tasks, tmp_path):
    """Against tfds's own reader, with the builder's real features; TensorFlow is not there."""
    task = tasks.get(name)
    for stored_as in sources.FORMATS:
        vtab_data.write(tmp_path / stored_as, task, SMALL, stored_as)
    founds = [sources.find(name, tmp_path / stored_as) for stored_as in sources.FORMATS]
    builder = tfds.builder_from_directory(founds[0].path)
    for split in (*SPLITS, "test"):
        a, b = (sources.open_split(name, split, found) for found in founds)
        ours, theirs = a.read(0, a.number), builder.as_data_source(task.splits[split])
        assert ours == b.read(0, b.number) and ours[3:5] == b.read(3, 5)
        assert a.number == b.number == len(theirs) == {**SPLITS, "test": task.num_test}[split]
        place = a.tasks.index(name)
        for (image, labels), example in zip(ours, theirs):
            decoded = np.array(Image.open(io.BytesIO(image)))
            np.testing.assert_array_equal(decoded, example[task.image].squeeze())
            assert labels[place] == task.label(example)
    assert len({bytes(image) for image, _ in ours}) == len(ours)
    assert "tensorflow" not in sys.modules


def test_tasks_that_share_images_bring_each_others_labels(small_tasks, tmp_path):
    vtab_data.write(tmp_path, tasks.get("clevr_count"), SMALL, "tfrecord")
    count, dist = (
        sources.open_split(name, "test", sources.find(name, tmp_path))
        for name in ("clevr_count", "clevr_dist")
    )
    assert count.tasks == dist.tasks == ("clevr_count", "clevr_dist") and count.key == dist.key
    assert count.read(0, 7) == dist.read(0, 7)


KNOWN = {  # examples in the splits of the real datasets (tfds's catalogue)
    "cifar100": {"train": 50000, "test": 10000},
    "caltech101": {"train": 3060, "test": 6084},
    "dtd": {"train": 1880, "validation": 1880, "test": 1880},
    "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "svhn_cropped": {"train": 73257, "test": 26032, "extra": 531131},
    "sun397": {"train": 76127, "validation": 10875, "test": 21750},
    "patch_camelyon": {"train": 262144, "validation": 32768, "test": 32768},
    "eurosat": {"train": 27000},
    "resisc45": {"train": 31500},
    "diabetic_retinopathy_detection": {"train": 35126, "validation": 10906, "test": 42670},
    "clevr": {"train": 70000, "validation": 15000, "test": 15000},
    "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
    "kitti": {"train": 6347, "validation": 423, "test": 711},
    "dsprites": {"train": 737280},
    "smallnorb": {"train": 24300, "test": 24300},
}


@pytest.mark.parametrize("name", tasks.VTAB)
def test_splits_have_the_right_sizes(name):
    """tfds's own arithmetic on the known sizes; and the parts do not overlap."""
    task = tasks.get(name)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path("/nowhere"), dataset_name="x", filetype_suffix="tfrecord"
    )
    infos = [
        tfds.core.SplitInfo(name=split, shard_lengths=[number], num_bytes=0, filename_template=template)
        for split, number in KNOWN[task.tfds.split("/")[0]].items()
    ]
    splits = tfds.core.splits.SplitDict(infos)
    wanted = {"train800": 800, "val200": 200, "train800val200": 1000, "test": task.num_test}
    assert {k: splits[v].num_examples for k, v in task.splits.items()} == wanted
    parts = [splits[task.splits[k]].file_instructions[0] for k in ("train800", "val200", "test")]
    for a, b in itertools.combinations(parts, 2):
        apart = a.skip + a.take <= b.skip or b.skip + b.take <= a.skip
        assert a.filename != b.filename or apart


def test_a_damaged_tfrecord_is_named(small_tasks, tmp_path):
    task = tasks.get("dtd")
    folder = vtab_data.write(tmp_path, task, SMALL, "tfrecord")
    shard = next(folder.glob("*test.tfrecord-00001*"))
    data = shard.read_bytes()
    found = sources.find("dtd", tmp_path)
    for damaged, what in (
        (data[:-1], "is damaged at byte"),
        (b"", "ends after 0 records"),
        (data[:3] + b"\x01" + data[4:], "is damaged at byte 0"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=f"'test': cannot read .*{what}.*prepare it again"):
            sources.open_split("dtd", "test", found).read(0, 10)


# VTAB-1k folders ------------------------------------------------------------------------------


@pytest.fixture
def folder(small_tasks, tmp_path):
    return vtab_data.write_folder(tmp_path, "dtd", {**SPLITS, "test": 10})


@pytest.mark.parametrize("where", ["", "vtab-1k"])
def test_folder_is_read_as_written(where, folder, tmp_path):
    found = sources.find("dtd", tmp_path / where)
    assert (found.kind, found.dataset) == ("folder", "vtab-1k/dtd")
    for split, number in {**SPLITS, "test": 10}.items():
        opened = sources.open_split("dtd", split, found)
        assert opened.number == number
        for i, (image, (label,)) in enumerate(opened.read(0, number)):
            assert image == (folder / "images" / split / f"{i:06d}.jpg").read_bytes()
            assert label == i % 47


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000003.jpg", "is not an image path and a whole number"),
        ("images/test/000003.jpg 3 4", "is not an image path and a whole number"),
        ("images/test/000003.jpg three", "is not an image path and a whole number"),
        ("images/test/000003.jpg 47", "label 47 is not one of the 47 classes 0 to 46"),
        ("images/test/000003.jpg -1", "label -1 is not one of the 47"),
        ("../other/000003.jpg 3", "'../other/000003.jpg' leads out of"),
        ("images/../../x.jpg 3", "leads out of"),
        ("/etc/passwd 3", "leads out of"),
        ("images/test/nowhere.jpg 3", "cannot read .*nowhere.jpg"),
    ],
)
def test_bad_lines_name_file_and_line(line, message, folder, tmp_path):
    path = folder / "test.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(UserError, match=f"test.txt:4: .*{message}"):
        sources.open_split("dtd", "test", sources.find("dtd", tmp_path)).read(0, 10)


def test_a_damaged_image_names_file_and_line(folder, tmp_path):
    (folder / "images/test/000006.jpg").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"test.txt:7: images/test/000006.jpg is damaged \(it is no image\)"
    ):
        store.load_split("dtd", "test", 16, found=sources.find("dtd", tmp_path), cache_dir=tmp_path)


def test_a_list_that_is_no_text_is_named_and_a_mark_at_its_start_ignored(folder, tmp_path):
    path, found = folder / "test.txt", sources.find("dtd", tmp_path)
    good = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert len(sources.open_split("dtd", "test", found).read(0, 10)) == 10
    path.write_bytes(good.replace(b"000002.jpg", b"00\xff002.jpg"))
    with pytest.raises(UserError, match="test.txt:3: this is no UTF-8 text"):
        sources.open_split("dtd", "test", found)


def test_a_shortened_list_is_refused(folder, tmp_path):
    path = folder / "train800.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="dtd has 7 train800 images instead of 8"):
        sources.open_split("dtd", "train800", sources.find("dtd", tmp_path))


def test_two_sources_are_a_choice(folder, tmp_path):
    vtab_data.write(tmp_path, tasks.get("dtd"), SMALL, "array_record")
    with pytest.raises(UserError, match="is in .* twice.*differ in their pixels.*--config.data.source"):
        sources.find("dtd", tmp_path)
    assert sources.find("dtd", tmp_path, "tfds").kind == "tfds"
    assert sources.find("dtd", tmp_path, "folder").kind == "folder"


def test_pixels_of_a_folder_are_recognised(folder, tmp_path):
    found = sources.find("dtd", tmp_path)
    assert sources.pixels("dtd", found)[0] == "jpeg75"
    image = Image.open(folder / "images/test/000000.jpg")
    image.save(folder / "images/test/000000.jpg", quality=90)
    assert sources.pixels("dtd", found)[0] == "stored"
    image.save(folder / "images/test/000000.jpg", quality=75, subsampling="4:4:4")
    assert sources.pixels("dtd", found)[0] == "stored"
