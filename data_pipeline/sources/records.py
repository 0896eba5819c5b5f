"""Random access to the examples of a prepared TFDS split, in TFRecord or ArrayRecord files.

TFDS itself offers it for ArrayRecord only, and decodes all frames of an example; a triple needs
three of them.
"""

import os
import struct
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

from data_pipeline.errors import DataError
from data_pipeline.sources.listing import is_local

_HEADER, _FOOTER = 12, 4  # of a TFRecord: length uint64, crc uint32; the data; crc uint32


class Records:
  """`records[n]` are the serialized bytes of example n, in the order of the files.

  `places` int64 [n, 3] are each record's file, offset and length, as an earlier object of the same
  files found them: in a bucket, looking for them takes a request for every record. ArrayRecord
  files know them by themselves.
  """

  def __init__(self, files: Sequence[epath.Path], places: np.ndarray | None = None):
    self._array_records, self.places = None, np.zeros((0, 3), np.int64)
    if any("array_record" in file.name for file in files):
      self._array_records = _open_array_records(files)
      return
    self._files = [_LocalFile(f) if is_local(f) else _RemoteFile(f) for f in files]
    if places is None:
      offsets = [_tfrecord_offsets(opened, file) for opened, file in zip(self._files, files)]
      number = np.repeat(np.arange(len(files)), [len(of_file) for of_file in offsets])
      places = np.column_stack([number, np.concatenate(offsets)])
    self.places = places

  def __len__(self) -> int:
    return len(self._array_records if self._array_records is not None else self.places)

  def __getitem__(self, n: int) -> bytes:
    if self._array_records is not None:
      return self._array_records[n]
    file, offset, length = map(int, self.places[n])
    return self._files[file].read(length, offset)


def _open_array_records(files: Sequence[epath.Path]):
  if not all(map(is_local, files)):
    raise DataError(
        f"{files[0].parent}: ArrayRecord files are read from local disks only; copy the data set, "
        "or write it as TFRecord"
    )
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  return ArrayRecordDataSource([str(file) for file in files])


class _LocalFile:
  """os.pread neither moves a shared file position nor holds the GIL."""

  def __init__(self, file: epath.Path):
    self._descriptor = os.open(file, os.O_RDONLY)
    self.size = os.fstat(self._descriptor).st_size

  def read(self, length: int, offset: int) -> bytes:
    return os.pread(self._descriptor, length, offset)

  def __del__(self):
    if hasattr(self, "_descriptor"):
      os.close(self._descriptor)


class _RemoteFile:
  """A file in a bucket: one open file, which threads share in turns."""

  def __init__(self, file: epath.Path):
    self.size = file.stat().length
    self._file, self._lock = file.open("rb"), threading.Lock()

  def read(self, length: int, offset: int) -> bytes:
    with self._lock:
      self._file.seek(offset)
      return self._file.read(length)


def _tfrecord_offsets(opened: _LocalFile | _RemoteFile, file: epath.Path) -> np.ndarray:
  """int64 [n, 2]: offset and length in bytes of the data of each record."""
  offsets, position, end = [], 0, opened.size
  while position < end:
    header = opened.read(_HEADER, position)
    length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else end
    offsets.append((position + _HEADER, length))
    position += _HEADER + length + _FOOTER
  if position > end:
    raise DataError(f"{file} breaks off; delete its folder and build the data set again")
  return np.array(offsets, np.int64).reshape(-1, 2)
