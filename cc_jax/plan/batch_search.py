"""The largest batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

# How many images.


class Search(NamedTuple):
  """What was found when the batch that was asked for did not fit."""

  largest: int  # images a chip, compiled and seen to fit; 0 = none
  tried: dict[int, float]  # images a chip -> bytes needed


def largest_batch(
  asked: int, needed: float, limit: float, need: Callable[[int], float]
) -> Search:
  """The largest batch a chip that fits: by a straight line through two compiles, and a third.

  Where the third does not fit, the line is drawn again.

  Args:
    asked: images a chip, which do not fit.
    needed: bytes that they need; NaN where the compiler does not say.
    limit: bytes that there are.
    need: compiles for a number of images a chip and returns the bytes that these need.
  """
  tried, batch = {asked: needed}, asked // 2
  while batch:
    tried[batch] = need(batch)
    floor = max((b for b, n in tried.items() if n <= limit), default=0)
    ceiling = min(b for b, n in tried.items() if not n <= limit) - 1
    if floor == batch and len(tried) > 2 or floor >= ceiling:
      return Search(floor, tried)
    (one, at_one), (two, at_two) = sorted(tried.items())[:2]
    slope = (at_two - at_one) / (two - one)
    middle = (floor + ceiling + 1) // 2
    guess = math.floor(one + (limit - at_one) / slope) if slope > 0 else middle
    batch = min(max(guess, floor, 1), ceiling)
    if batch in tried:
      return Search(floor, tried)
  return Search(0, tried)
