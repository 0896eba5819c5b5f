"""All factors of subjects3d, i.e. which individuals are rendered and how, in plain numpy.

Three kinds of factors: the *intrinsic* ones define the individual (`Subjects`), the *irrelevant*
ones differ between its pictures (pose, position, size, light), the *context* is what a prompt asks
for (scene, hat, style). `Factors` holds all of them, one row per picture.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError

CLASSES = (
  "teapot", "snowman", "mushroom", "robot", "rocket", "tree", "duck", "house", "car", "teddy bear",
)  # fmt: skip
# Mushroom and tree look the same from all sides, so scores of the azimuth exclude them.
CLASSES_WITH_FRONT = tuple(c for c in CLASSES if c not in ("mushroom", "tree"))
COLOR_RGB = {
  "red": (218, 24, 30), "orange": (255, 132, 8), "yellow": (255, 226, 28), "green": (24, 150, 44),
  "cyan": (50, 218, 236), "blue": (22, 58, 222), "purple": (126, 28, 182), "pink": (255, 126, 186),
  "brown": (118, 62, 22), "black": (20, 20, 24), "white": (248, 248, 248),
}  # fmt: skip
COLORS = tuple(COLOR_RGB)
PATTERNS = ("plain", "stripes", "dots", "checks", "swirl")
SCENES = (
  "grass", "beach", "snow", "desert", "sea", "night", "brick wall", "wooden floor", "road",
  "flower meadow",
)  # fmt: skip
STYLES = ("photo", "sketch", "watercolour")
VERSION = "1.1.0"  # of the world: increase it when the same factors give another picture
SPLITS = ("train", "validation", "test")
MIRRORED = ("azimuth", "x")  # factors whose sign a mirror image changes
CUTOUT_HIDES = ("scene", "size", "x", "y")  # what a subject cut out on white does not show
MEMBERS = 4  # individuals per family

_FAMILIES_PER_CLASS = len(COLORS) * (len(COLORS) - 1)
_HALF_EXTENT = 0.295  # of nearly all silhouettes at size 1, in canvas widths: see shapes.FIT
_TEST_EXTRA, _VALIDATION = 2, 9  # of 110 families per class: 13 test, 9 validation, 88 train


class Subjects(NamedTuple):
  """Individuals, arrays [n]: int32, the three proportions float32 in [-1, 1]."""

  subject_id: np.ndarray
  family_id: np.ndarray
  class_id: np.ndarray
  color1: np.ndarray
  color2: np.ndarray
  pattern: np.ndarray
  pattern_color: np.ndarray
  wide: np.ndarray
  tall: np.ndarray
  ratio: np.ndarray

  def take(self, index) -> Subjects:
    """Rows of the table, e.g. `take(rng.integers(len(s.class_id), size=64))`."""
    return Subjects(*(column[index] for column in self))


class Factors(NamedTuple):
  """One row per picture, arrays [n]. Angles in radians.

  azimuth in [-pi, pi], 0 = the front faces the camera, positive = it turns to the picture's right;
  elevation of the camera; roll of the subject in the picture, positive = clockwise; x, y = offset
  of the subject's centre from the picture's, in canvas widths, x to the right and y **down**; size
  relative to the nominal one; light_azimuth relative to the camera, positive = from the picture's
  right; background_seed uint32; hat 0 = none, 1 + colour otherwise.
  """

  subject_id: np.ndarray
  family_id: np.ndarray
  class_id: np.ndarray
  color1: np.ndarray
  color2: np.ndarray
  pattern: np.ndarray
  pattern_color: np.ndarray
  wide: np.ndarray
  tall: np.ndarray
  ratio: np.ndarray
  azimuth: np.ndarray
  elevation: np.ndarray
  roll: np.ndarray
  x: np.ndarray
  y: np.ndarray
  size: np.ndarray
  light_azimuth: np.ndarray
  light_elevation: np.ndarray
  background_seed: np.ndarray
  scene: np.ndarray
  hat: np.ndarray
  style: np.ndarray

  def take(self, index) -> Factors:
    """Rows of the table."""
    return Factors(*(column[index] for column in self))

  @property
  def subjects(self) -> Subjects:
    return Subjects(*self[: len(Subjects._fields)])


@dataclasses.dataclass(frozen=True)
class Ranges:
  """What `sample_factors` draws from: (low, high) of uniform distributions, except where noted."""

  azimuth: tuple[float, float] = (-np.pi, np.pi)
  elevation: tuple[float, float] = (0.1, 0.6)
  roll: tuple[float, float] = (-0.3, 0.3)
  x: tuple[float, float] = (-0.1, 0.1)
  y: tuple[float, float] = (-0.1, 0.1)
  size: tuple[float, float] = (0.64, 1.6)  # the *area* is uniform: large subjects show more detail
  light_azimuth: tuple[float, float] = (-1.2, 1.2)
  light_elevation: tuple[float, float] = (0.4, 1.2)
  hat: float = 0.25  # probability
  photo: float = 0.85  # probability; the other styles share the rest equally


RANGES = {
  "world": Ranges(),
  # The first half of a curriculum, with which the lab's base was trained.
  "calm": Ranges(azimuth=(-1.6, 1.6), roll=(-0.15, 0.15), size=(0.8, 1.2), hat=0.3, photo=1.0),
}


@functools.cache
def _world() -> tuple[Subjects, np.ndarray]:
  """All subjects in the order of subject_id, and the index into SPLITS of each."""
  rng = np.random.Generator(np.random.PCG64(20261123))
  others = np.array([[b for b in range(len(COLORS)) if b != a] for a in range(len(COLORS))])
  rows, split = [], []
  for class_id in range(len(CLASSES)):
    # One test family for each main colour, so that none is missing there; the others at random.
    family_split = np.zeros((len(COLORS), len(COLORS) - 1), np.int32)
    family_split[np.arange(len(COLORS)), rng.integers(len(COLORS) - 1, size=len(COLORS))] = 2
    rest = rng.permutation(np.flatnonzero(family_split.ravel() == 0))
    family_split.ravel()[rest[:_TEST_EXTRA]] = 2
    family_split.ravel()[rest[_TEST_EXTRA : _TEST_EXTRA + _VALIDATION]] = 1
    for family in range(_FAMILIES_PER_CLASS):
      color1, nth = divmod(family, len(COLORS) - 1)
      color2 = others[color1, nth]
      unused = [c for c in range(len(COLORS)) if c not in (color1, color2)]
      # Four different patterns of five: a fifth of all subjects is plain.
      patterns, colors = rng.permutation(len(PATTERNS)), rng.permutation(unused)
      for pattern_and_color in zip(patterns[:MEMBERS], colors[:MEMBERS], strict=True):
        proportions = rng.uniform(-1, 1, size=3)
        family_id = class_id * _FAMILIES_PER_CLASS + family
        rows.append(
          (len(rows), family_id, class_id, color1, color2, *pattern_and_color, *proportions)
        )
        split.append(family_split[color1, nth])
  columns = list(zip(*rows, strict=True))
  integers = [np.array(c, np.int32) for c in columns[:7]]
  table = Subjects(*integers, *(np.array(c, np.float32) for c in columns[7:]))
  return table, np.array(split)


def subjects(split: str) -> Subjects:
  """All subjects of a split, always the same: 'train' (3520), 'validation' (360) or 'test' (520).

  The members of a family have the same (class, color1, color2) and differ in pattern, pattern
  colour and proportions. Families, not subjects, are assigned to the splits, so no (class, color1,
  color2) of test or validation occurs in train; every class occurs in each split, and every main
  colour of a class in test.

  Raises:
    DataError: unknown split.
  """
  if split not in SPLITS:
    raise DataError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
  table, of_split = _world()
  return table.take(of_split == SPLITS.index(split))


def concatenate(parts: list[Factors]) -> Factors:
  """The rows of several tables in one."""
  return Factors(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def real_similarity(subjects: Subjects | Factors) -> np.ndarray:
  """Similarity of the individuals, [n,n] in [0,1], from their intrinsic factors alone.

  The mean of six: same class; nearness of the two part colours (1 - RGB distance over the largest);
  same pattern; nearness of the pattern colours (1 if both are plain, 0 if one is); nearness of the
  proportions (1 - mean absolute difference over the range).
  """
  rgb = np.asarray(list(COLOR_RGB.values()), float)
  distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1)
  color_similarity = 1 - distance / distance.max()

  def equal(column):
    column = np.asarray(column)
    return (column[:, None] == column[None]).astype(float)

  def color_pairs(column):
    column = np.asarray(column)
    return color_similarity[column[:, None], column[None]]

  plain = np.asarray(subjects.pattern) == PATTERNS.index("plain")
  both_plain, none_plain = plain[:, None] & plain[None], ~plain[:, None] & ~plain[None]
  pattern_color = np.where(none_plain, color_pairs(subjects.pattern_color), both_plain)
  shape = np.stack([subjects.wide, subjects.tall, subjects.ratio], -1).astype(float)
  proportions = 1 - np.abs(shape[:, None] - shape[None]).mean(-1) / 2
  parts = (equal(subjects.class_id), color_pairs(subjects.color1), color_pairs(subjects.color2),
           equal(subjects.pattern), pattern_color, proportions)
  return np.mean(parts, axis=0)


def sample_factors(
  rng: np.random.Generator, subjects: Subjects, *, ranges: str | Ranges | None = None, **overrides
) -> Factors:
  """Draws pose, light and context for each subject.

  Args:
    ranges: 'world' (default), 'calm', or a `Ranges`. Large subjects are placed closer to the
      centre, so that the border cuts few of them.
    overrides: fields with given values, each a scalar or [n].

  Raises:
    DataError: unknown ranges or field.
  """
  if isinstance(ranges, str) and ranges not in RANGES:
    raise DataError(f"unknown ranges {ranges!r}: use one of {', '.join(RANGES)}, or a Ranges")
  r = RANGES[ranges or "world"] if not isinstance(ranges, Ranges) else ranges
  unknown = set(overrides) - set(Factors._fields)
  if unknown:
    raise DataError(
      f"unknown factor {sorted(unknown)[0]!r}: use one of {', '.join(Factors._fields)}"
    )
  n = len(subjects.class_id)

  def uniform(low_high):
    return rng.uniform(*low_high, size=n).astype(np.float32)

  drawn = dict(zip(Subjects._fields, subjects, strict=True))
  drawn |= {name: uniform(getattr(r, name)) for name in ("azimuth", "elevation", "roll", "x", "y")}
  drawn["size"] = np.sqrt(uniform((r.size[0] ** 2, r.size[1] ** 2)))
  # A large subject is closer to the centre, or the border would cut it.
  margin = np.clip(0.5 - _HALF_EXTENT * drawn["size"], 0.02, None)
  for name, (low, high) in (("x", r.x), ("y", r.y)):
    scale = np.minimum(1.0, margin / max(abs(low), abs(high), 1e-6))
    drawn[name] = drawn[name] * scale.astype(np.float32)
  drawn["light_azimuth"] = uniform(r.light_azimuth)
  drawn["light_elevation"] = uniform(r.light_elevation)
  drawn["background_seed"] = rng.integers(2**32, size=n, dtype=np.uint32)
  drawn["scene"] = rng.integers(len(SCENES), size=n, dtype=np.int32)
  # A hat of the main colour would be hard to see: draw from the other ten.
  hat_color = (subjects.color1 + rng.integers(1, len(COLORS), size=n)) % len(COLORS)
  drawn["hat"] = np.where(rng.random(n) < r.hat, 1 + hat_color, 0).astype(np.int32)
  other_style = rng.integers(1, len(STYLES), size=n)
  drawn["style"] = np.where(rng.random(n) < r.photo, 0, other_style).astype(np.int32)
  for name, value in overrides.items():
    drawn[name] = np.broadcast_to(np.asarray(value, drawn[name].dtype), (n,)).copy()
  return Factors(**drawn)
