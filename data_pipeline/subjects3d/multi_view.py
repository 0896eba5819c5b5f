"""The finite data sets of subjects3d: which subjects, in which views, with which captions.

Plain numpy decides all of it, so that the TFDS builder and an evaluation without tensorflow show
the very same pictures.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.subjects3d.factors import (
  CLASSES,
  SPLITS,
  Factors,
  Subjects,
  sample_factors,
  subjects,
)

# (subjects, frames of each) by configuration and split.
CONFIGS = {
  "tiny": {"train": (12, 5), "validation": (3, 4), "test": (3, 4)},  # for tests
  "small": {"train": (600, 8), "validation": (100, 4), "test": (150, 4)},
  "full": {"train": (3520, 16), "validation": (360, 8), "test": (520, 8)},
}
RESOLUTION = 64
# The first frames of a subject can serve as a reference: photo style, no hat. There are three, so
# that two remain whichever frame is the target.
REFERENCES = 3
_SEED = 20261123


class MultiView(NamedTuple):
  """n subjects in f frames each, in the order of `plan`.

  frames uint8 [n, f, h, w, 3]; masks uint8 [n, f, h, w]; captions, a tuple of f texts for each
  subject; class_noun, n texts; is_reference bool [n, f]; factors, each column [n, f].
  """

  frames: np.ndarray
  masks: np.ndarray
  captions: tuple[tuple[str, ...], ...]
  class_noun: tuple[str, ...]
  is_reference: np.ndarray
  factors: Factors


def plan(config: str, split: str) -> Factors:
  """Factors of every frame, columns [n, f]: a pure function of its arguments.

  Raises DataError for an unknown configuration or split.
  """
  if config not in CONFIGS:
    raise DataError(f"unknown subjects3d/{config}; choose one of {', '.join(CONFIGS)}")
  if split not in SPLITS:
    raise DataError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
  count, frames = CONFIGS[config][split]
  chosen = _choose_subjects(split, count)
  rng = np.random.Generator(np.random.Philox(key=[_SEED, SPLITS.index(split)]))
  factors = sample_factors(rng, chosen.take(np.repeat(np.arange(count), frames)))
  factors = Factors(*(column.reshape(count, frames) for column in factors))
  factors.style[:, :REFERENCES] = 0
  factors.hat[:, :REFERENCES] = 0
  return factors


def is_reference(factors: Factors) -> np.ndarray:
  """bool, the columns' shape: photo style and no hat."""
  return (factors.style == 0) & (factors.hat == 0)


def write_captions(factors: Factors, split: str) -> list[list[str]]:
  """A caption for each of the [n, f] frames; it mentions class, scene, hat and style only."""
  from data_pipeline.subjects3d.captions import caption

  rng = np.random.Generator(np.random.Philox(key=[_SEED, len(SPLITS) + SPLITS.index(split)]))
  count, frames = factors.class_id.shape
  return [[caption(rng, factors.take((n, f))).text for f in range(frames)] for n in range(count)]


def render_subjects(name: str, split: str, count: int | None = None) -> MultiView:
  """The first `count` subjects of a split, newly rendered; needs no tensorflow."""
  from data_pipeline.subjects3d.bulk import render_many

  factors = plan(name.removeprefix("subjects3d/"), split)
  texts = write_captions(factors, split)
  factors, texts = factors.take(slice(count)), texts[:count]
  rendered = render_many(flat(factors), resolution=RESOLUTION, progress=False)
  return MultiView(
    frames=rendered.image.reshape(*factors.class_id.shape, *rendered.image.shape[1:]),
    masks=rendered.mask.reshape(*factors.class_id.shape, *rendered.mask.shape[1:]),
    captions=tuple(tuple(row) for row in texts),
    class_noun=tuple(CLASSES[c] for c in factors.class_id[:, 0]),
    is_reference=is_reference(factors),
    factors=factors,
  )


def flat(factors: Factors) -> Factors:
  """Columns [n, f] to [n * f], the frames of a subject one after another."""
  return Factors(*(column.reshape(-1) for column in factors))


def checksum(factors: Factors) -> str:
  """sha256 over all columns [n, f], the subjects in the order of their ids.

  The same on any machine: little-endian bytes of the columns in the order of `Factors`.
  """
  order = np.argsort(factors.subject_id[:, 0], kind="stable")
  digest = hashlib.sha256()
  for name, column in zip(Factors._fields, factors, strict=True):
    column = column[order]
    little = np.ascontiguousarray(column, column.dtype.newbyteorder("<"))
    digest.update(f"{name} {little.dtype.str} {list(little.shape)}".encode())
    digest.update(little.tobytes())
  return digest.hexdigest()


def _choose_subjects(split: str, count: int) -> Subjects:
  """`count` subjects of a split, with the classes as equally frequent as possible.

  Training gets complete families, whose members are hard negatives of each other; the other splits
  get first one member of each family, for as many different colours as possible.
  """
  table = subjects(split)
  rng = np.random.Generator(np.random.Philox(key=[_SEED, 2 * len(SPLITS) + SPLITS.index(split)]))
  family_rank, member = np.zeros_like(table.family_id), np.zeros_like(table.family_id)
  for class_id in range(len(CLASSES)):
    families = np.unique(table.family_id[table.class_id == class_id])
    for rank, family in enumerate(rng.permutation(families)):
      members = np.flatnonzero(table.family_id == family)
      family_rank[members] = rank
      member[members] = np.arange(len(members))
  keys = (member, table.class_id, family_rank)  # the last one is the first to sort by
  if split != "train":
    keys = (table.class_id, family_rank, member)
  return table.take(np.lexsort(keys)[:count])
