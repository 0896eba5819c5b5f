"""Rows of batches from subjects that are at hand: the same for a folder and a TFDS data set."""

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from absl import logging
from etils import epath

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.example import Maker
from data_pipeline.graph import loader
from data_pipeline.sources import tf_data

_NAMED = 10  # bad pictures that an error names


class Subject(Protocol):
  """One subject's frames. `where` names it, or the file with its captions, in errors."""

  noun: str
  where: str

  def is_reference(self) -> np.ndarray: ...  # bool [frames]
  def captions(self, f: int) -> Sequence[str]: ...  # of frame f one, or several to draw from
  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]: ...  # uint8 [h, w, 3], uint8 [h, w]


class SubjectSet(Protocol):
  """The subjects of a data set in its order, and the number of all their pictures."""

  where: str
  names: Sequence[str]
  table: sampling.SubjectTable
  pictures: int
  features_folder: epath.Path  # beside the data: `data_pipeline.feature_cache`

  def __getitem__(self, number: int) -> Subject: ...
  def fingerprint(self) -> str: ...  # of names and sizes of the files; no picture is read


def training_subjects(subjects: SubjectSet, heldout: int) -> np.ndarray:
  """The numbers of the subjects without the `heldout` that training leaves out."""
  family_id = subjects.table.family_id
  left_out = sampling.choose_heldout(subjects.names, family_id, heldout, subjects.where)
  return np.flatnonzero(~left_out)


def make_batches(
    maker: Maker, subjects: SubjectSet, *, heldout: int = 0, start_step: int, rows: range
) -> Iterator[dict]:
  """Endless batches of the subjects, without the `heldout` that training leaves out."""
  numbers = training_subjects(subjects, heldout)
  table = sampling.SubjectTable(*(column[numbers] for column in subjects.table))
  maker.check(table)
  if len(numbers) == 1:
    logging.log_first_n(
        logging.WARNING, "%s has one subject to train on: there is nothing to contrast it with", 1,
        subjects.where,
    )  # fmt: skip
  make_row = _RowMaker(maker, subjects, numbers, table)
  if loader.choose(maker.decoder, maker, subjects):
    return loader.batches(
        maker, subjects, numbers, table, make_row, start_step=start_step, rows=rows)
  return tf_data.batches(make_row, maker.signature, start_step=start_step, rows=rows)


class _RowMaker:
  """make_row(step, row), from several threads. `table` has the subjects that `numbers` names."""

  def __init__(self, maker: Maker, subjects: SubjectSet, numbers: np.ndarray, table):
    self._maker, self._subjects, self._numbers, self._table = maker, subjects, numbers, table
    self._bad = BadPictures(maker.max_bad_share, subjects.pictures)

  def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
    rng, spare = self._maker.rng(step, row), self._maker.spare_rng(step, row)
    chosen = self._maker.subjects(self._table, step)
    entry, subject, frames, loaded = self._load(rng, spare, chosen, int(chosen[row]))
    pictures, masks = zip(*loaded)
    ids = [(int(self._numbers[entry]), f) for f in frames]
    captions = subject.captions(frames[2])
    caption = captions[int(spare.integers(len(captions)))] if len(captions) > 1 else captions[0]
    try:
      return self._maker.example(
        rng, self._table, entry, pictures, masks, caption, subject.noun, ids)
    except DataError as error:
      raise DataError(f"{subject.where}: {error}") from None

  def _load(self, rng, spare, in_batch: np.ndarray, entry: int):
    """The row's subject (its row in `table`, and itself), frames (i, j, k), and their pictures.

    In place of a bad picture come other frames of the subject, and then other subjects, those
    first that are not in the batch. Both depend on the row and on which pictures are bad alone.
    """
    failed: set[tuple[int, int]] = set()
    others: list[int] | None = None
    while True:
      number = int(self._numbers[entry])
      subject = self._subjects[number]
      is_reference = subject.is_reference()
      good = [f for f in range(len(is_reference)) if (number, f) not in failed]
      if len(good) < 2:
        if others is None:
          order = spare.permutation(len(self._numbers))
          order = order[np.argsort(np.isin(order, in_batch), kind="stable")]
          others = [int(other) for other in order if other != entry]
        if not others:
          raise DataError(f"no subject of {self._subjects.where} has two good pictures; mend them")
        entry = others.pop(0)
        continue
      drawn = sampling.choose_frames(spare if failed else rng, is_reference[good])
      frames = self._maker.frames(tuple(good[f] for f in drawn))
      loaded = {f: self._load_frame(subject, number, f) for f in dict.fromkeys(frames)}
      bad = {(number, f) for f, pair in loaded.items() if pair is None}
      if not bad:
        return entry, subject, frames, [loaded[f] for f in frames]
      failed |= bad

  def _load_frame(self, subject: Subject, number: int, f: int):
    """Picture and mask, or None if bad. With stored features no picture is read."""
    if self._maker.cache is not None:
      return None if (number, f) in self._maker.cache.bad else (None, None)
    return self._bad.load(subject, number, f)


class BadPictures:
  """Loads pictures, and counts the bad ones: up to a share of all they are no error."""

  def __init__(self, max_share: float, pictures: int):
    self._limit, self._share, self._pictures = max_share * pictures, max_share, pictures
    self._known: dict[tuple[int, int], str] = {}  # and what is wrong
    self._lock = threading.Lock()

  def load(self, subject: Subject, number: int, f: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Picture and mask of frame f of subject `number`; None if bad. DataError beyond the share."""
    if (number, f) in self._known:
      return None
    try:
      return subject.frame(f)
    except DataError as error:
      if not self._limit:
        raise
      with self._lock:
        self._known[number, f] = str(error)
        count, first = len(self._known), list(self._known.values())[:_NAMED]
      if count > self._limit:
        raise DataError(
            f"{error}; with it {count} of {self._pictures} pictures are bad, more than "
            f"data.max_bad_share={self._share}; the first: {'; '.join(first)}"
        ) from None
      _tell(str(error))
      return None


@functools.cache
def _tell(error: str) -> None:
  """Once in a process, which may have several loaders."""
  logging.warning("left out, others take its place: %s", error)
