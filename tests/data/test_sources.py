"""Real tfds datasets written into a temporary folder, read back without TensorFlow."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rlrr_jax.data import sources, store, tasks
from rlrr_jax.errors import UserError

TRAIN, TEST = 45_200, 10_000  # cifar's val200 is train[45000:45200]


def picture(i, size=8):
    """A small image whose first pixel tells its number."""
    image = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
    image[0, 0] = (i // 65536, i // 256 % 256, i % 256)
    return image


def png(i):
    out = io.BytesIO()
    Image.fromarray(picture(i)).save(out, "PNG")
    return out.getvalue()


class Cifar100(tfds.core.GeneratorBasedBuilder):
    """The real one's features, with images of 8 x 8 handed over encoded."""

    VERSION = tfds.core.Version("3.0.2")
    name = "cifar100"

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
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


def test_splits_are_those_tfds_gives(data_dir):
    builder = tfds.builder_from_directory(data_dir / "cifar100" / "3.0.2")
    task = tasks.get("cifar")
    for split, number in (("train800", 800), ("val200", 200), ("train800val200", 1000), ("test", TEST)):
        read, found = sources.open_split("cifar", task, split, data_dir)
        assert found == number
        theirs = builder.as_data_source(task.splits[split])
        ours = read(0, number)
        assert [label for _, label in ours] == [e["label"] for e in theirs]
        for (image, _), example in list(zip(ours, theirs))[:20]:
            np.testing.assert_array_equal(Image.open(io.BytesIO(image)), example["image"])
    train, val, both = (
        store.load_split("cifar", task, s, 8, data_dir)
        for s in ("train800", "val200", "train800val200")
    )
    np.testing.assert_array_equal(both[0], np.concatenate([train[0], val[0]]))
    np.testing.assert_array_equal(both[1], np.concatenate([train[1], val[1]]))


def test_whole_split_is_decoded_in_order(data_dir):
    images, labels = store.load_split("cifar", tasks.get("cifar"), "test", 8, data_dir)
    assert len(labels) == TEST and np.bincount(labels).tolist() == [100] * 100
    numbers = images[:, 0, 0].astype(int) @ [65536, 256, 1]
    own = np.flatnonzero(numbers)  # the others are blank
    assert sorted(numbers[own]) == list(range(TRAIN, TRAIN + TEST, 50))
    np.testing.assert_array_equal(labels[own], numbers[own] % 100)
    for i in own[:5]:
        np.testing.assert_array_equal(images[i], picture(int(numbers[i])))


def test_unprepared_dataset(tmp_path):
    with pytest.raises(
        UserError, match=r"no prepared tfds dataset at .*cifar100/3\.0\.2.*config\.data\.dir"
    ):
        sources.open_split("cifar", tasks.get("cifar"), "test", tmp_path)


def test_dataset_that_is_too_short(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TRAIN", 900)
    Cifar100(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match=r"has no readable split 'train\[45000:45200\]'"):
        sources.open_split("cifar", tasks.get("cifar"), "val200", tmp_path)


def test_labels_outside_the_task(data_dir):
    task = tasks.get("cifar")._replace(classes=20)
    with pytest.raises(UserError, match="labels of cifar test go from 0 to 99, but the task has 20"):
        store.load_split("cifar", task, "test", 8, data_dir)


def test_bundled_tasks_are_what_they_say():
    for name in tasks.BUNDLED:
        task = tasks.get(name)
        for split, number in (("train800", 800), ("val200", 200), ("test", task.num_test)):
            images, labels = store.load_split(name, task, split, 32)
            assert images.shape == (number, 32, 32, 3) and images.dtype == np.uint8
            assert set(labels) == set(range(task.classes))
        whole = store.load_split(name, task, "train800val200", 32)
        np.testing.assert_array_equal(whole[0][800:], store.load_split(name, task, "val200", 32)[0])


def test_a_cifar_run_from_the_command(data_dir, tmp_path):
    """The command of the README for a tfds task, with the bundled weights in place of a download."""
    command = [sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:cifar"]
    command += [f"--config.data.dir={data_dir}", "--config.pretrained.name=bundled"]
    command += ["--config.model.variant=bundled", "--config.epochs=2", f"--workdir={tmp_path}"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert "| cifar | rlrr" in out.stdout and "source tfds" in out.stdout
    assert "protocol official" in out.stdout and "No task was named" not in out.stdout


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
        store.load_split("cifar", tasks.get("cifar"), "test", 8, folder)


def test_tfrecord_is_named_as_what_cannot_be_read(data_dir, tmp_path):
    folder = copy_of(data_dir, tmp_path)
    info = folder / "cifar100" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="stored as tfrecord.*file_format='array_record'"):
        sources.open_split("cifar", tasks.get("cifar"), "test", folder)


def test_test_split_of_another_length(data_dir):
    task = tasks.get("cifar")._replace(num_test=9_999)
    with pytest.raises(UserError, match="10000 test images instead of 9999"):
        sources.open_split("cifar", task, "test", data_dir)
