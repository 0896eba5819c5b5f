"""How much of the reference picture itself, not of the subject, is in what was drawn.

Pure functions of features (rows of any length) of the drawn picture, of the reference that the
adapter saw, and of the subject's other real pictures ("views"), in one space (DINO, CLIP ...).
All are 0 in expectation for a drawing that does not know which of a subject's pictures was shown,
if these are alike. LPIPS between results is `Scorer.pair_scores`; its pairs are made here.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

from cc_jax.metrics.scorer import cosine


def angles(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
  """Angles of all pairs of rows, in radians."""
  return np.arccos(np.clip(cosine(a, b), -1, 1))


def copy_score(
  drawn: Float[np.ndarray, "n d"], views: Float[np.ndarray, "m d"], reference: int
) -> Float[np.ndarray, " n"]:
  """WithAnyone's (angle(drawn, true) - angle(drawn, reference)) / angle(true, reference).

  Its bounds are -1 (drawn is the true picture) and 1 (drawn is the reference). Made for faces (ICLR
  2026); `true` is here the mean over the subject's other views. NaN where there is no other, or the
  others are the reference itself (angle below 1e-3).
  """
  to_views = angles(drawn, views)
  apart = angles(views[reference : reference + 1], views)[0]
  true = (np.arange(len(views)) != reference) & (apart > 1e-3)
  if not true.any():
    return np.full(len(drawn), np.nan)
  difference = to_views[:, true] - to_views[:, reference : reference + 1]
  return (difference / apart[true]).mean(1)


def pose_copy(
  drawn: Float[np.ndarray, "n d"], views: Float[np.ndarray, "m d"], reference: int
) -> Float[np.ndarray, " n"]:
  """Cosine with the reference, less that with the nearest of the other views; NaN without others.

  Positive: the reference's view is the nearest one in feature space. By chance it is so for one
  picture in m.
  """
  likeness = cosine(drawn, views)
  others = np.delete(likeness, reference, axis=1)
  if not others.size:
    return np.full(len(drawn), np.nan)
  return likeness[:, reference] - others.max(1)


def background_copy(
  drawn: Float[np.ndarray, "n d"], background: Float[np.ndarray, " d"],
  other_backgrounds: Float[np.ndarray, "k d"],
) -> Float[np.ndarray, " n"]:
  """Cosine with the reference's background, less the mean of that with other subjects' backgrounds.

  A background is the reference with its subject laid over in grey. What any picture shares with any
  background falls out. NaN if there are no others.
  """
  if not len(other_backgrounds):
    return np.full(len(drawn), np.nan)
  own = cosine(drawn, background[None])[:, 0]
  return own - cosine(drawn, other_backgrounds).mean(1)


def pairs_within(groups: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
  """All pairs of places with the same group: the pairs of LPIPS between seeds or references."""
  places: dict[Hashable, list[int]] = {}
  for place, group in enumerate(groups):
    places.setdefault(group, []).append(place)
  for members in places.values():
    yield from combinations(members, 2)
