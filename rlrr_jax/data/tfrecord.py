"""Reads TFRecord files without TensorFlow.

A file is a sequence of frames: length (uint64), CRC of the length (uint32), data, CRC of the data
(uint32), all little-endian (tensorflow.org/tutorials/load_data/tfrecord). The CRC of each length is
checked, that of the data is not (in Python it would take longer than decoding): a damaged image mostly
fails to decode, but a flipped bit in a label goes unnoticed. array_record checks its data itself.
"""

import itertools
import os
import struct
from typing import Any

_HEADER = struct.Struct("<QI")
_FOOTER = 4


def _table():
    """CRC-32C (Castagnoli) of each byte."""
    out = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        out.append(value)
    return tuple(out)


_TABLE = _table()


def masked_crc(data: bytes) -> int:
    """The masked CRC-32C that frames carry."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def index(path: Any, skip: int, take: int) -> list:
    """`(path, offset, length)` of records `skip` to `skip + take - 1` of a file.

    Raises ValueError if the file is damaged or has too few.
    """
    out, offset = [], 0
    with path.open("rb") as f:
        f.seek(0, os.SEEK_END)
        size = f.tell()  # `seek` of TensorFlow's files returns nothing
        for i in range(skip + take):
            f.seek(offset)
            header = f.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise ValueError(f"{path.name} ends after {i} records")
            length, crc = _HEADER.unpack(header)
            end = offset + _HEADER.size + length + _FOOTER
            if crc != masked_crc(header[:8]) or end > size:
                raise ValueError(f"{path.name} is damaged at byte {offset}")
            if i >= skip:
                out.append((path, offset + _HEADER.size, length))
            offset = end
    return out


def read(records: Any) -> list:
    """The data of records of an `index`; consecutive ones of a file share an open file."""
    out = []
    for path, several in itertools.groupby(records, lambda record: record[0]):
        with path.open("rb") as f:
            for _, offset, length in several:
                f.seek(offset)
                out.append(f.read(length))
    return out
