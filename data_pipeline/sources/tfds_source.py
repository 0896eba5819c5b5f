"""Triples from any TFDS data set whose examples are subjects with several frames.

Features of an example: `frames` Sequence(Image), `masks` Sequence(Image), `captions`
Sequence(Text), `class_noun` Text, `subject_id` (number or text); optional `family_id`, `class_id`
(by default, subjects with the same noun form a class) and `is_reference` Sequence(bool). Only the
three frames of a triple are decoded. The files may be TFRecord or ArrayRecord.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from data_pipeline import images, sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.example import Maker
from data_pipeline.sources import tf_data
from data_pipeline.sources.records import Records
from data_pipeline.sources.rows import make_batches

_NEEDED = ("frames", "masks", "captions", "class_noun", "subject_id")
_IDS = ("subject_id", "family_id", "class_id")
_INDEX = (*_IDS, "name", "frames")  # columns of the index file


def batches(maker: Maker, builder, *, split: str, start_step: int, rows: range) -> Iterator[dict]:
  """Endless batches of the data set of a TFDS builder, see `open_builder`."""
  subjects = SubjectRecords(builder, split)
  holdout = maker.holdout if split == "train" else 0
  if holdout and heldout_split(builder):
    logging.warning(
        "data.holdout_subjects=%d has no effect: %s has the split %r",
        holdout, builder.info.full_name, heldout_split(builder),
    )  # fmt: skip
    holdout = 0
  return make_batches(maker, subjects, heldout=holdout, start_step=start_step, rows=rows)


def heldout_split(builder) -> str | None:
  """The split of subjects that training does not see, if the data set has one."""
  return next((split for split in ("validation", "test") if split in builder.info.splits), None)


def open_builder(name: str, data_dir: str = ""):
  """The TFDS builder of a data set that is on disk. Raises DataError where there is none."""
  tfds = tf_data.import_tfds()
  try:
    builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
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

  Raises DataError for a missing split or feature and for a subject with fewer than two frames.
  """

  def __init__(self, builder, split: str):
    name = builder.info.full_name
    if split not in builder.info.splits:
      known = ", ".join(builder.info.splits)
      raise DataError(f"data set {name} has no split {split!r}; it has {known}")
    missing = [key for key in _NEEDED if key not in builder.info.features]
    if missing:
      raise DataError(
          f"data set {name} has no feature {missing[0]!r}; needed are {', '.join(_NEEDED)}"
      )
    self.where = f"{name} ({split})"
    self._parse = tf_data.import_tensorflow().train.Example.FromString
    files = [Path(file) for file in builder.info.splits[split].filepaths]
    self._records = Records(files)
    index = self._read_index(_index_file(builder, split, files))
    self.names = [str(name) for name in index["name"]]
    self.pictures = int(index["frames"].sum())
    self.table = sampling.SubjectTable(*(index[key] for key in _IDS))

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, number: int) -> SubjectRecord:
    example = self._parse(self._records[number])
    return SubjectRecord(example, f"{self.where}, example {number}")

  def _read_index(self, file: Path) -> dict[str, np.ndarray]:
    """Columns of the index file, which the first use writes in one pass over the data."""
    if file.exists():
      with np.load(file) as stored:
        if set(_INDEX) <= set(stored):  # it is not of an earlier version
          return {key: stored[key] for key in _INDEX}
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
    _write_atomically(file, index)
    return index


class SubjectRecord:
  """One subject, parsed but not decoded. `name` is for errors."""

  def __init__(self, example, name: str):
    self._features = example.features.feature
    self.where = name

  def values(self, key: str) -> list:
    """The numbers or byte strings of a feature, flat; [] if the example lacks it."""
    feature = self._features[key] if key in self._features else None
    kind = feature.WhichOneof("kind") if feature is not None else None
    return list(getattr(feature, kind).value) if kind else []

  def texts(self, key: str) -> list[str]:
    return [value.decode() for value in self.values(key)]

  def ids(self, key: str) -> list[str] | list[int]:
    """The values of an id: texts or numbers."""
    return [v.decode() if isinstance(v, bytes) else v for v in self.values(key)]

  @property
  def noun(self) -> str:
    return self.texts("class_noun")[0]

  def captions(self, f: int) -> tuple[str, ...]:
    """Frame f's captions."""
    return (self.texts("captions")[f],)

  def frame_name(self, f: int) -> str:
    """Names frame f in errors."""
    return f"{self.where}, frame {f}"

  def is_reference(self) -> np.ndarray:
    """bool [frames]: can frame f serve as a reference? By default all can."""
    flags = self.values("is_reference")
    return np.array(flags, bool) if flags else np.ones(self.frames, bool)

  @property
  def frames(self) -> int:
    return len(self._features["frames"].bytes_list.value)

  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [h, w, 3] and mask uint8 [h, w]."""
    name = f"{self.where}, frame {f}"
    image = images.read_image(self._features["frames"].bytes_list.value[f], name)[..., :3]
    mask = images.read_mask(self._features["masks"].bytes_list.value[f], f"{name}, mask")
    triples.check_frame(image, mask, name)
    return image, mask

  def check(self) -> None:
    """Raises DataError unless there are two frames, and a mask and a caption for each."""
    if self.frames < 2:
      raise DataError(
          f"{self.where} has {self.frames} encoded frame(s); a triple needs 2 or more of a subject"
      )
    for key in ("masks", "captions", "is_reference"):
      count = len(self.values(key))
      if count != self.frames and not (key == "is_reference" and count == 0):
        raise DataError(f"{self.where} has {self.frames} frames, but {count} {key}; give one each")


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


def _index_file(builder, split: str, files: list[Path]) -> Path:
  # Sizes and times of the files are in the name: data that is rebuilt gets another index.
  stats = [file.stat() for file in files]
  stamp = hash(tuple((s.st_size, s.st_mtime_ns) for s in stats)) % 2**32
  return Path(builder.data_path) / f"subjects_{split}_{stamp:08x}.npz"


def _write_atomically(file: Path, index: dict[str, np.ndarray]) -> None:
  temporary = file.with_name(f".{os.getpid()}_{file.name}")
  try:
    with temporary.open("wb") as out:
      np.savez(out, **index)
    temporary.replace(file)
  except OSError:  # the data set is read-only: the next start makes another pass
    temporary.unlink(missing_ok=True)
