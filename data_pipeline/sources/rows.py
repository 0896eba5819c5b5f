"""Rows of batches from subjects that are at hand: the same for a folder and a TFDS data set."""

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from absl import logging

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.example import Maker
from data_pipeline.sources import tf_data


class Subject(Protocol):
  """One subject's frames. `where` names it, or the file with its captions, in errors."""

  noun: str
  where: str

  def is_reference(self) -> np.ndarray: ...  # bool [frames]
  def captions(self, f: int) -> Sequence[str]: ...  # of frame f one, or several to draw from
  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]: ...  # uint8 [h, w, 3], uint8 [h, w]
  def frame_name(self, f: int) -> str: ...


class SubjectSet(Protocol):
  """The subjects of a data set in its order, and the number of all their pictures."""

  where: str
  names: Sequence[str]
  table: sampling.SubjectTable
  pictures: int

  def __getitem__(self, number: int) -> Subject: ...


def make_batches(
    maker: Maker, subjects: SubjectSet, *, heldout: int = 0, start_step: int, rows: range
) -> Iterator[dict]:
  """Endless batches of the subjects, without the `heldout` that training leaves out."""
  table = subjects.table
  left_out = sampling.choose_heldout(subjects.names, table.family_id, heldout, subjects.where)
  numbers = np.flatnonzero(~left_out)
  table = sampling.SubjectTable(*(column[numbers] for column in table))
  maker.check(table)
  make_row = _RowMaker(maker, subjects, numbers, table)
  return tf_data.batches(make_row, start_step=start_step, rows=rows)


class _RowMaker:
  """make_row(step, row), from several threads. `table` has the subjects that `numbers` names."""

  def __init__(self, maker: Maker, subjects: SubjectSet, numbers: np.ndarray, table):
    self._maker, self._subjects, self._numbers, self._table = maker, subjects, numbers, table
    self._bad = BadPictures(maker.max_bad_share, subjects.pictures)

  def __call__(self, step: int, row: int) -> dict[str, np.ndarray]:
    rng, spare = self._maker.rng(step, row), self._maker.spare_rng(step, row)
    chosen = self._maker.subjects(self._table, step)
    entry, frames, loaded = self._load(rng, spare, chosen, int(chosen[row]))
    subject = self._subjects[self._numbers[entry]]
    pictures, masks = zip(*loaded)
    captions = subject.captions(frames[2])
    caption = captions[int(spare.integers(len(captions)))] if len(captions) > 1 else captions[0]
    try:
      return self._maker.example(rng, self._table, entry, pictures, masks, caption, subject.noun)
    except DataError as error:
      raise DataError(f"{subject.where}: {error}") from None

  def _load(self, rng, spare, in_batch: np.ndarray, entry: int):
    """The row's subject (of `table`), frames (i, j, k), and their pictures with masks.

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
      loaded = {f: self._bad.load(subject, number, f) for f in dict.fromkeys(frames)}
      bad = {(number, f) for f, pair in loaded.items() if pair is None}
      if not bad:
        return entry, frames, [loaded[f] for f in frames]
      failed |= bad


class BadPictures:
  """Loads pictures, and counts the bad ones: up to a share of all they are no error."""

  def __init__(self, max_share: float, pictures: int):
    self._limit, self._share, self._pictures = max_share * pictures, max_share, pictures
    self._known: set[tuple[int, int]] = set()
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
        is_new = (number, f) not in self._known
        self._known.add((number, f))
        count = len(self._known)
      if count > self._limit:
        raise DataError(
            f"{error}; with it {count} of {self._pictures} pictures are bad, more than "
            f"data.max_bad_share={self._share}"
        ) from None
      if is_new:
        logging.warning("left out, others take its place: %s", error)
      return None
