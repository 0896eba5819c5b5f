"""Triples from any TFDS data set whose examples are subjects with several frames.

Features of an example: `frames` Sequence(Image), `masks` Sequence(Image), `captions`
Sequence(Text), `class_noun` Text, `subject_id` (number or text); optional `family_id`, `class_id`
(by default, subjects with the same noun form a class) and `is_reference` Sequence(bool). Frames and
masks may also be uint8 tensors, captions a list for each frame, the noun a ClassLabel
(`features.py`). Only the three frames of a triple are decoded. The files may be TFRecord, also in a
bucket, or ArrayRecord.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import uuid
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from data_pipeline import images, sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.sources import tf_data
from data_pipeline.sources.features import Schema
from data_pipeline.sources.listing import data_path, is_local
from data_pipeline.sources.records import Records

_IDS = ("subject_id", "family_id", "class_id")
_INDEX = (*_IDS, "name", "frames", "places")  # columns of the index file


def check_holdout(builder, split: str, holdout: int) -> int:
  """How many subjects of the split training leaves out: 0 where others have a split of their own.
  """
  if split != "train":
    return 0
  if holdout and heldout_split(builder):
    logging.log_first_n(
        logging.WARNING, "data.holdout_subjects=%d has no effect: %s has the split %r", 1,
        holdout, builder.info.full_name, heldout_split(builder),
    )  # fmt: skip
    return 0
  return holdout


def heldout_split(builder) -> str | None:
  """The split of subjects that training does not see, if the data set has one."""
  return next((split for split in ("validation", "test") if split in builder.info.splits), None)


def open_builder(name: str, data_dir: str = ""):
  """The TFDS builder of a data set that is on disk. Raises DataError where there is none."""
  tfds = tf_data.import_tfds()
  folder = os.fspath(data_path(data_dir, "data.data_dir")) if data_dir else None
  try:
    builder = tfds.builder(name, data_dir=folder)
  except (tfds.core.DatasetNotFoundError, ValueError, KeyError):
    root = data_dir or tfds.core.constants.DATA_DIR
    raise DataError(
        f"TFDS knows no data set {name!r}, nor is it in {root}; check data.name and data.data_dir"
    ) from None
  if not builder.is_prepared():
    raise DataError(
        f"data set {name!r} is not in {builder.data_path}; run `tfds build` for it, "
        "or set data.data_dir to where it is"
    )
  return builder


class SubjectRecords:
  """The subjects of a split: `len`, `records[n]` -> SubjectRecord, and the `table` of their ids.

  Raises DataError for a missing split, a feature that is missing or of another type, and a subject
  with fewer than two frames.
  """

  def __init__(self, builder, split: str):
    name = builder.info.full_name
    if split not in builder.info.splits:
      known = ", ".join(builder.info.splits)
      raise DataError(f"data set {name} has no split {split!r}; it has {known}")
    self._schema = Schema(builder.info.features, name)
    self.features_folder = epath.Path(builder.data_path) / "features"
    self.where = f"{name} ({split})"
    self._parse = tf_data.import_tensorflow().train.Example.FromString
    files = [epath.Path(file) for file in builder.info.splits[split].filepaths]
    self._files = files
    index_file = _index_file(epath.Path(builder.data_path), split, files)
    index = _read_index(index_file)
    self._records = Records(files, index.get("places"))
    if not len(self):
      raise DataError(f"{self.where} has no examples; build the data set again")
    if not index:
      index = self._make_index()
      _write_atomically(index_file, index)
    self.names = [str(name) for name in index["name"]]
    self.pictures = int(index["frames"].sum())
    self.table = sampling.SubjectTable(*(index[key] for key in _IDS))

  def __len__(self) -> int:
    return len(self._records)

  def fingerprint(self) -> str:
    """A hash of the split's files and their sizes."""
    lines = [f"{file.name} {_size_and_time(file)[0]}\n" for file in self._files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

  def __getitem__(self, number: int) -> SubjectRecord:
    data = self._records[number]
    return SubjectRecord(self._parse(data), data, self._schema, f"{self.where}, example {number}")

  def _make_index(self) -> dict[str, np.ndarray]:
    """The columns of the index file, in one pass over the data."""
    columns: dict[str, list] = {key: [] for key in (*_IDS, "noun", "name", "frames")}
    for number in range(len(self)):
      subject = self[number]
      subject.check()
      columns["noun"].append(subject.noun)
      columns["frames"].append(subject.frames)
      for key in _IDS:
        columns[key].extend(subject.ids(key)[:1])
    columns["name"] = [str(name) for name in columns["subject_id"]]
    if not columns["class_id"]:
      columns["class_id"] = columns["noun"]
    for key in ("class_id", "family_id"):
      columns[key] = [sampling.spelling_key(v) if isinstance(v, str) else v for v in columns[key]]
    index = {key: _numbers(columns[key], len(self), key) for key in _IDS}
    index["name"] = np.array(columns["name"], np.str_)
    index["frames"] = np.array(columns["frames"], np.int32)
    index["places"] = self._records.places
    return index


class SubjectRecord:
  """One subject, parsed but not decoded; `data` are its serialized bytes. `where` is for errors."""

  def __init__(self, example, data: bytes, schema: Schema, where: str):
    self._features = example.features.feature
    self._data, self._schema = data, schema
    self.where = where

  def values(self, key: str) -> list:
    """The numbers or byte strings of a feature, flat; [] if the example lacks it."""
    feature = self._features[key] if key in self._features else None
    kind = feature.WhichOneof("kind") if feature is not None else None
    return list(getattr(feature, kind).value) if kind else []

  def texts(self, key: str) -> list[str]:
    return [self._text(value, key) for value in self.values(key)]

  def _text(self, value: bytes, key: str) -> str:
    try:
      return value.decode()
    except UnicodeDecodeError:
      raise DataError(f"{self.where}: {key!r} holds {value[:40]!r}, which is not UTF-8") from None

  def ids(self, key: str) -> list[str] | list[int]:
    """The values of an id: texts or numbers."""
    return [self._text(v, key) if isinstance(v, bytes) else v for v in self.values(key)]

  @property
  def noun(self) -> str:
    values = self.ids("class_noun")
    noun = " ".join(self._schema.noun(values[0]).split()) if values else ""
    if not noun:
      raise DataError(f"{self.where} has no class noun; give it to all examples")
    return noun

  def captions(self, f: int) -> Sequence[str]:
    """Frame f's captions."""
    return self._captions[f]

  @functools.cached_property
  def _captions(self) -> list[list[str]]:
    """Of each frame one caption, or several."""
    lengths = self.values("captions/ragged_row_lengths_0")  # TFDS' names for lists of lists
    if not lengths:
      return [[caption] for caption in self.texts("captions")]
    texts = self.texts("captions/ragged_flat_values")
    ends = np.cumsum(lengths)
    return [texts[end - length : end] for end, length in zip(ends, lengths)]

  def is_reference(self) -> np.ndarray:
    """bool [frames]: can frame f serve as a reference? By default all can."""
    flags = self.values("is_reference")
    return np.array(flags, bool) if flags else np.ones(self.frames, bool)

  @property
  def frames(self) -> int:
    return len(self._stored("frames"))

  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [h, w, 3] and mask uint8 [h, w]."""
    name = f"{self.where}, frame {f}"
    image, mask = images.read_pair(
        self._stored("frames")[f], self._stored("masks")[f], name, f"{name}, mask"
    )
    image = image[..., :3]
    triples.check_frame(image, mask, name)
    return image, mask

  def _stored(self, key: str) -> Sequence[bytes] | np.ndarray:
    """The frames or masks as they are stored: encoded pictures, or an array."""
    if key not in self._arrays:
      self._arrays[key] = self._schema.tensor(key, self._data)
    array = self._arrays[key]
    return self._features[key].bytes_list.value if array is None else array

  @functools.cached_property
  def _arrays(self) -> dict[str, np.ndarray | None]:
    return {}

  def check(self) -> None:
    """Raises DataError unless there are two frames, and a mask and a caption for each."""
    if self.frames < 2:
      raise DataError(
          f"{self.where} has {self.frames} encoded frame(s); a triple needs 2 or more of a subject"
      )
    counts = dict(masks=len(self._stored("masks")), captions=len(self._captions))
    for key, count in (counts | {"is_reference": len(self.is_reference())}).items():
      if count != self.frames:
        raise DataError(f"{self.where} has {self.frames} frames, but {count} {key}; give one each")
    for f, captions in enumerate(self._captions):
      if not all(caption.strip() for caption in captions or [""]):
        raise DataError(f"{self.where}, frame {f} has an empty caption; give it one")


def _numbers(values: list, subjects: int, key: str) -> np.ndarray:
  """int32 [subjects]; texts and too large numbers are replaced by their ranks."""
  if not values:
    return np.full(subjects, -1, np.int32)
  if len(values) != subjects:
    raise DataError(f"only {len(values)} of {subjects} examples have {key!r}; give it to all")
  array = np.asarray(values)
  if array.dtype.kind in "iu" and np.all(np.abs(array.astype(np.int64)) < 2**31):
    return array.astype(np.int32)
  return np.unique(array, return_inverse=True)[1].astype(np.int32)


def _index_file(folder: epath.Path, split: str, files: Sequence[epath.Path]) -> epath.Path:
  # Sizes and times of the files are in the name: data that is rebuilt gets another index.
  stamp = hash(tuple(map(_size_and_time, files))) % 2**32
  return folder / f"subjects_{split}_{stamp:08x}.npz"


def _size_and_time(file: epath.Path) -> tuple[int, int]:
  if is_local(file):
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
  status = file.stat()
  return status.length, int(status.mtime or 0)


def _read_index(file: epath.Path) -> dict[str, np.ndarray]:
  """What the first use of the data set has written; {} if there is none of this version."""
  if not file.exists():
    return {}
  with np.load(io.BytesIO(file.read_bytes())) as stored:
    return {key: stored[key] for key in _INDEX} if set(_INDEX) <= set(stored) else {}


def _write_atomically(file: epath.Path, index: dict[str, np.ndarray]) -> None:
  # Hosts may write to one bucket at the same time.
  temporary = file.parent / f".{uuid.uuid4().hex[:12]}_{file.name}"
  content = io.BytesIO()
  np.savez(content, **index)
  unwritable = (OSError, tf_data.import_tensorflow().errors.OpError)
  try:
    temporary.write_bytes(content.getvalue())
    temporary.replace(file)
  except unwritable:  # the data set is read-only: the next start makes another pass
    with contextlib.suppress(*unwritable):
      temporary.unlink(missing_ok=True)
