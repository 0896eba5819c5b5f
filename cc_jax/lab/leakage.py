"""Leakage by intervention: one irrelevant factor of the reference moves, what moves in the picture?

Every subject is shown in a fixed start and then again with one factor moved to its other end,
everything else, prompt and noise included, equal. Leakage is the change in the drawn picture over
the change in the reference: 0 = not copied, 1 = copied. Raw correlations would mislead, since class
alone correlates with size. The base without adapter sees no reference: its leakage is 0 exactly.
"""

from collections.abc import Mapping

import numpy as np

from cc_jax.lab import judge as judge_lib
from data_pipeline.subjects3d import factors as world

# Per factor its columns with (start, end). Ends stay inside the canvas for the largest subjects.
MOVES: dict[str, dict[str, tuple[float, float]]] = {
  "size": {"size": (0.8, 1.4)},
  "place": {"x": (-0.07, 0.08), "y": (-0.06, 0.06)},
  "azimuth": {"azimuth": (-0.6, 0.6)},
  "light": {"light_azimuth": (-1.1, 1.1)},
  "scene": {},  # `start` draws it: the reference's scene, another one after the move
}
_LUMA = np.array([0.299, 0.587, 0.114])


def start(rng: np.random.Generator, subjects: world.Subjects) -> world.Factors:
  """The factors of the references before any move: photo, no hat, every column at its start."""
  fixed = {column: ends[0] for move in MOVES.values() for column, ends in move.items()}
  return world.sample_factors(rng, subjects, hat=0, style=0, roll=0.0, elevation=0.3,
                              light_elevation=0.8, **fixed)


def moved(factors: world.Factors, name: str) -> world.Factors:
  """`factors` with one of `MOVES` made; the scene goes one further in the list of scenes."""
  if name == "scene":
    return factors._replace(scene=(factors.scene + 1) % len(world.SCENES))
  ends = {column: ends[1] for column, ends in MOVES[name].items()}
  return factors._replace(**{column: np.full_like(getattr(factors, column), value)
                             for column, value in ends.items()})


def asked_scene(rng: np.random.Generator, factors: world.Factors) -> np.ndarray:
  """A scene for each prompt that neither the reference before nor the one after its move shows."""
  count = len(world.SCENES)
  return (factors.scene + rng.integers(2, count, len(factors.scene))) % count


def changes(name: str, before: Mapping[str, np.ndarray],
            after: Mapping[str, np.ndarray]) -> np.ndarray:
  """How far each picture moved, [n, d], by two readings or two `Factors._asdict()`.

  'scene' is not a number: see `leak_of_scene`.
  """
  change = np.stack([after[c].astype(float) - before[c].astype(float) for c in MOVES[name]], -1)
  return np.angle(np.exp(1j * change)) if name == "azimuth" else change


def leak(drawn: np.ndarray, asked: np.ndarray) -> np.ndarray:
  """Leakage of each subject, [n], from the changes [n, d] in the picture and in the reference.

  The picture's change is projected on the reference's: (drawn . asked) / (asked . asked). The mean
  over subjects is the slope through the origin, when all references move alike.
  """
  return np.sum(drawn * asked, -1) / np.sum(asked * asked, -1)


def leak_of_scene(before: np.ndarray, after: np.ndarray, scenes: np.ndarray,
                  scenes_after: np.ndarray) -> np.ndarray:
  """Leakage of the reference's scene, [n]: read where the reference has it, less where it has not.

  `before`, `after`: the scenes read in both pictures; `scenes`, `scenes_after`: the references'.
  """
  kept = (before == scenes).astype(float) + (after == scenes_after)
  swapped = (after == scenes).astype(float) + (before == scenes_after)
  return (kept - swapped) / 2


def light_side(images: np.ndarray, reading: Mapping[str, np.ndarray]) -> np.ndarray:
  """Brightness of the subject's right half less that of its left, [n] in [-1, 1].

  The judge reads no light. The subject is taken for a disc at the place and of the size that the
  judge reads; of a reference both are known.
  """
  n, height, width = images.shape[:3]
  y, x = (np.arange(height)[:, None] + 0.5) / height - 0.5, (np.arange(width) + 0.5) / width - 0.5
  x = x - np.asarray(reading["x"])[:, None, None]
  y = y - np.asarray(reading["y"])[:, None, None]
  radius = 0.2 * np.clip(np.asarray(reading["size"]), 0.4, 2)[:, None, None]
  disc = (x**2 + y**2) < radius**2
  luma = images.astype(float) @ _LUMA / 255

  def mean(mask):
    return np.sum(luma * mask, (1, 2)) / np.maximum(np.sum(mask, (1, 2)), 1)

  return mean(disc & (x > 0)) - mean(disc & (x < 0))


def measure(judge, pictures: Mapping[str, np.ndarray], references: Mapping[str, np.ndarray],
            factors: world.Factors) -> dict[str, np.ndarray]:
  """Leakage per factor and subject, [n]; NaN for the azimuth of a class without a front.

  Args:
    pictures: drawn, uint8 [n,h,w,3]: 'start' and one entry for each of `MOVES`.
    references: the same, as they were shown: the light is measured in both alike.
    factors: of the references at the start.
  """
  rows = judge_lib.read(judge, np.concatenate(list(pictures.values())))
  parts = {key: np.split(values, len(pictures)) for key, values in rows.items()}
  readings = {name: {key: part[i] for key, part in parts.items()}
              for i, name in enumerate(pictures)}
  start_reading, before = readings.pop("start"), factors._asdict()
  leaks = {}
  for name, reading in readings.items():
    after = moved(factors, name)._asdict()
    if name == "scene":
      leaks[name] = leak_of_scene(start_reading["scene"], reading["scene"], before["scene"],
                                  after["scene"])
    elif name == "light":
      drawn = light_side(pictures[name], reading) - light_side(pictures["start"], start_reading)
      # References are measured where they are known to stand: the judge has seen no white ground.
      asked = light_side(references[name], after) - light_side(references["start"], before)
      asked = np.full_like(asked, asked.mean())  # one slope for all: single ones may be near 0
      leaks[name] = drawn / asked
    else:
      leaks[name] = leak(changes(name, start_reading, reading), changes(name, before, after))
  if "azimuth" in leaks:
    leaks["azimuth"] = np.where(judge_lib.has_front(factors), leaks["azimuth"], np.nan)
  return leaks
