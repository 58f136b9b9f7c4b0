"""Small datasets in the real formats, written without TensorFlow."""

import io
import struct

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from rlrr_jax.data import tasks

TABLE = []  # of CRC-32C, by polynomial division
for byte in range(256):
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 * (byte & 1))
    TABLE.append(byte)


def masked_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) % 256] ^ (crc // 256)
    crc = crc ^ 0xFFFFFFFF
    return ((crc >> 15) + (crc << 17) + 0xA282EAD8) % 2**32


def frame(record):
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(record))
    crc = lambda data: struct.pack("<I", masked_crc32c(data))
    return length + crc(length) + record + crc(record)


def features(task):
    """The feature spec of the real builder; nothing is downloaded."""
    return tfds.builder(f"{task.tfds}:{task.version}", data_dir="/nowhere").info.features


def encoded(array, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def example(spec, rng):
    """A random example of a feature spec, its images encoded."""
    if isinstance(spec, tfds.features.Image):
        height, width, channels = (s or int(rng.integers(8, 20)) for s in spec.shape)
        array = rng.integers(0, 256, (height, width, channels), np.uint8)
        kind = spec._image_encoder.encoding_format or "png"
        return io.BytesIO(encoded(array.squeeze(-1) if channels == 1 else array, kind.upper()))
    if isinstance(spec, tfds.features.BBoxFeature):
        return tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
    if isinstance(spec, tfds.features.ClassLabel):
        return int(rng.integers(spec.num_classes))
    if isinstance(spec, tfds.features.Text):
        return f"text {rng.integers(1000)}"
    if isinstance(spec, tfds.features.Sequence):
        return [example(spec.feature, rng) for _ in range(rng.integers(3, 11))]
    if isinstance(spec, tfds.features.FeaturesDict):
        return {key: example(inner, rng) for key, inner in spec.items()}
    values = rng.uniform(5, 30, spec.shape)
    return values.astype(spec.np_dtype)


def write(root, task, numbers, stored_as, make=example, seed=0, shards=2, spec=None):
    """A prepared dataset of a task's builder: `<root>/<name>/<version>/`.

    Args:
      numbers: tfds split -> number of examples.
      stored_as: "array_record" or "tfrecord".
      make: `(spec, rng) -> example`.
      spec: features of the examples; None is those of the real builder.
    """
    spec, rng = spec or features(task), np.random.default_rng(seed)
    folder = epath.Path(root) / task.tfds / task.version
    folder.mkdir(parents=True)
    name = task.tfds.split("/")[0]
    infos = []
    for split, number in numbers.items():
        lengths = [len(part) for part in np.array_split(np.arange(number), shards)]
        for i, length in enumerate(lengths):
            path = folder / f"{name}-{split}.{stored_as}-{i:05d}-of-{shards:05d}"
            records = [
                spec.serialize_example(spec.encode_example(make(spec, rng))) for _ in range(length)
            ]
            if stored_as == "tfrecord":
                path.write_bytes(b"".join(map(frame, records)))
            else:
                writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
                for record in records:
                    writer.write(record)
                writer.close()
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=1))
    file_format = tfds.core.FileFormat(stored_as)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix=file_format.file_suffix
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(task.version),
        data_dir=str(folder),
        module_name="",
        config_name=(task.tfds.split("/") + [None])[1],
    )
    info = tfds.core.DatasetInfo(builder=identity, features=spec)
    info.set_file_format(file_format)
    infos = [i.replace(filename_template=template) for i in infos]
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
    return folder


def write_folder(root, name, numbers, seed=0, side=16):
    """A `vtab-1k/<task>` folder in NOAH's format."""
    task, rng = tasks.get(name), np.random.default_rng(seed)
    folder = root / "vtab-1k" / name
    for split, number in numbers.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(number):
            image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image.save(folder / f"images/{split}/{i:06d}.jpg")
            lines.append(f"images/{split}/{i:06d}.jpg {i % task.classes}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder
