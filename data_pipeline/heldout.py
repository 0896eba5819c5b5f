"""Subjects that pictures are drawn of while training goes on."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from data_pipeline import sampling
from data_pipeline.sources.rows import BadPictures, SubjectSet


class HeldoutSubject(NamedTuple):
  """A reference with its mask, and a prompt to draw: the caption of another frame of the subject.

  `held_out`: training does not see the subject.
  """

  name: str
  class_noun: str
  image: UInt8[np.ndarray, "h w 3"]
  mask: UInt8[np.ndarray, "h w"]
  caption: str
  held_out: bool


def draw_subjects(
    subjects: SubjectSet, count: int, seed: int, *, holdout: int, has_split: bool,
    max_bad_share: float,
) -> list[HeldoutSubject]:
  """At most `count` subjects in a random order that `seed` gives: see `heldout_subjects`.

  `has_split`: all are of a split that training does not see. Else those that training leaves out
  of them are meant, or, with holdout = 0, any. Neither the choice nor the frames depend on the
  order in which the data set lists its subjects.
  """
  left_out = sampling.choose_heldout(
      subjects.names, subjects.table.family_id, 0 if has_split else holdout, subjects.where
  )
  numbers = np.flatnonzero(left_out if left_out.any() else ~left_out)
  bad = BadPictures(max_bad_share, subjects.pictures)
  by_name = sorted(numbers, key=lambda number: (subjects.names[number], number))
  order = np.random.default_rng(seed % 2**63).permutation(len(by_name))
  held_out = has_split or bool(left_out.any())
  drawn = (_draw(subjects, int(by_name[n]), seed, held_out, bad) for n in order)
  return list(itertools.islice(filter(None, drawn), count))


def _draw(
    subjects: SubjectSet, number: int, seed: int, held_out: bool, bad: BadPictures
) -> HeldoutSubject | None:
  """None when no picture of the subject is good."""
  subject, name = subjects[number], subjects.names[number]
  rng = np.random.default_rng([seed % 2**63, sampling.name_hash(name)])
  _, reference, target = sampling.choose_frames(rng, subject.is_reference())
  others = [f for f in range(len(subject.is_reference())) if f != reference]
  for f in (reference, *others):
    pair = bad.load(subject, number, f)
    if pair is not None:
      return HeldoutSubject(name, subject.noun, *pair, subject.captions(target)[0], held_out)
  return None

