"""Random access to the examples of a prepared TFDS split, in TFRecord or ArrayRecord files.

TFDS itself offers it for ArrayRecord only, and decodes all frames of an example; a triple needs
three of them.
"""

import os
import struct
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError

_HEADER, _FOOTER = 12, 4  # of a TFRecord: length uint64, crc uint32; the data; crc uint32


class Records:
  """`records[n]` are the serialized bytes of example n, in the order of the files."""

  def __init__(self, files: list[Path]):
    self._array_records = None
    if any("array_record" in file.name for file in files):
      from array_record.python.array_record_data_source import ArrayRecordDataSource

      self._array_records = ArrayRecordDataSource([str(file) for file in files])
      return
    # os.pread neither moves a shared file position nor holds the GIL.
    self._descriptors = [os.open(file, os.O_RDONLY) for file in files]
    offsets = [_tfrecord_offsets(d, f) for d, f in zip(self._descriptors, files, strict=True)]
    self._file = np.repeat(np.arange(len(files)), [len(of_file) for of_file in offsets])
    self._offset, self._length = np.concatenate(offsets).T

  def __len__(self) -> int:
    return len(self._array_records if self._array_records is not None else self._file)

  def __getitem__(self, n: int) -> bytes:
    if self._array_records is not None:
      return self._array_records[n]
    length, offset = int(self._length[n]), int(self._offset[n])
    return os.pread(self._descriptors[self._file[n]], length, offset)

  def __del__(self):
    for descriptor in getattr(self, "_descriptors", ()):
      os.close(descriptor)


def _tfrecord_offsets(descriptor: int, file: Path) -> np.ndarray:
  """int64 [n, 2]: offset and length in bytes of the data of each record."""
  offsets, position, end = [], 0, os.fstat(descriptor).st_size
  while position < end:
    header = os.pread(descriptor, _HEADER, position)
    length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else end
    offsets.append((position + _HEADER, length))
    position += _HEADER + length + _FOOTER
  if position > end:
    raise DataError(f"{file} breaks off; delete its folder and build the data set again")
  return np.array(offsets, np.int64).reshape(-1, 2)
