"""The largest batch that fits on a chip."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Search(NamedTuple):
  """Result of the search after the requested batch did not fit."""

  largest: int  # images a chip, compiled and known to fit; 0 = none
  tried: dict[int, float]  # images a chip -> bytes needed


def largest_batch(
  requested: int, needed: float, limit: float, need: Callable[[int], float]
) -> Search:
  """The largest batch a chip that fits: by a straight line through two compiles, and a third.

  Where the third does not fit, the line is drawn again.

  Args:
    requested: images a chip, which do not fit.
    needed: bytes that they need; NaN where the compiler does not report it.
    limit: bytes of a chip.
    need: compiles for a number of images a chip and returns the bytes that these need.
  """
  tried, batch = {requested: needed}, requested // 2
  while batch:
    tried[batch] = need(batch)
    floor = max((b for b, n in tried.items() if n <= limit), default=0)
    ceiling = min(b for b, n in tried.items() if not n <= limit) - 1
    if floor == batch and len(tried) > 2 or floor >= ceiling:
      return Search(floor, tried)
    (low, low_need), (high, high_need) = sorted(tried.items())[:2]
    slope = (high_need - low_need) / (high - low)
    middle = (floor + ceiling + 1) // 2
    guess = math.floor(low + (limit - low_need) / slope) if slope > 0 else middle
    batch = min(max(guess, floor, 1), ceiling)
    if batch in tried:
      return Search(floor, tried)
  return Search(0, tried)
