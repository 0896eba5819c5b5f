"""The Fréchet distance of two sets of pictures in any feature space; numpy in float64."""

import numpy as np
from jaxtyping import Float


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
  """Between the Gaussians of two sets of features (Heusel et al. 2017): >= 0, 0 for equal sets.

  |mean_a - mean_b|² + tr(A + B - 2 (A B)^(1/2)) with covariances of n - 1. With A = X'X, B = Y'Y
  the trace of the root is the sum of the singular values of X Y' [n, m]: real and >= 0 also where a
  covariance has no full rank, so no offset on the diagonal is needed, as it is for `sqrtm`.

  Say with the number: which features (Scorer.describe, `raw=True`) and how many pictures. With
  fewer pictures than channels it is biased upwards by much: compare equal numbers of pictures.

  Raises:
    ValueError: less than two rows, or other numbers of columns.
  """
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
    raise ValueError(f"features {a.shape} and {b.shape}; give two or more rows of equal length")
  means = a.mean(0), b.mean(0)
  centred = [(x - mean) / np.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True)]
  shared = _trace_of_root(*centred)
  distance = np.sum((means[0] - means[1]) ** 2)
  distance += sum(np.sum(x * x) for x in centred) - 2 * shared
  return float(max(distance, 0.0))


def _trace_of_root(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
  """tr((X'X Y'Y)^(1/2)), by the smaller of two equal problems: n x m, or d x d."""
  if max(len(x), len(y)) > x.shape[1]:
    x, y = (np.linalg.qr(z, mode="r") for z in (x, y))  # the same X'X, from at most d rows
  return float(np.linalg.svd(x @ y.T, compute_uv=False).sum())
