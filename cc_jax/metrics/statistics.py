"""Intervals of paired differences, and curves compared at equal identity."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
  """A mean with its 95 % interval."""

  mean: float
  low: float
  high: float

  @property
  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0


def hierarchical_bootstrap(
  values: Float[np.ndarray, "seeds subjects"], *, draws: int = 4000, seed: int = 0
) -> Interval:
  """Mean over seeds and subjects, and its interval: both are drawn anew, with replacement.

  The spread between trainings and the spread between subjects both count. All seeds are scored on
  the same subjects, so that a draw has the same subjects in each of its seeds (Owen 2007, the
  pigeonhole bootstrap); drawn anew for each seed, a subject's own effect would seem to average out
  over seeds, and the interval would be too narrow. For a paired comparison give differences: the
  same seed, subject, prompt and noise in both arms. NaN (a subject that says nothing) is left out.
  """
  values = np.asarray(values, np.float64)
  seeds, subjects = values.shape
  rng = np.random.default_rng(seed)
  of_seed = rng.integers(seeds, size=(draws, seeds, 1))
  of_subject = rng.integers(subjects, size=(draws, 1, subjects))
  resampled = values[of_seed, of_subject]
  all_known = not np.isnan(values).any()  # then the same mean takes a third of the time
  means = resampled.mean((1, 2)) if all_known else mean_of_known(resampled, (1, 2))
  means = means[~np.isnan(means)]
  low, high = np.percentile(means, [2.5, 97.5]) if len(means) else (np.nan, np.nan)
  return Interval(float(mean_of_known(values, (0, 1))), float(low), float(high))


def nan_for_none(values: Sequence[float | None]) -> Float[np.ndarray, " n"]:
  """Numbers as JSON has them, where None is an unknown one, as an array with NaN."""
  return np.asarray([np.nan if value is None else value for value in values], float)


def mean_of_known(
  values: Float[np.ndarray, "..."], axis: int | tuple[int, ...] = 0
) -> Float[np.ndarray, "..."]:
  """The mean over `axis` of what is known (not NaN); NaN where nothing is."""
  known = ~np.isnan(values)
  count = known.sum(axis)
  total = np.where(known, values, 0).sum(axis)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def at_equal(
  identity: Float[np.ndarray, " steps"], value: Float[np.ndarray, " steps"], level: float
) -> float:
  """`value` where a training first reaches identity `level`: linear between two checkpoints.

  NaN if it never does. Before the first checkpoint the training has nothing to say: identity that
  is higher there already gives the first value.
  """
  identity, value = np.asarray(identity, float), np.asarray(value, float)
  reached = np.flatnonzero(identity >= level)
  if len(reached) == 0:
    return float("nan")
  i = reached[0]
  if i == 0:
    return float(value[0])
  share = (level - identity[i - 1]) / (identity[i] - identity[i - 1])
  return float(value[i - 1] + share * (value[i] - value[i - 1]))
