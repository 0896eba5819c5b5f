"""What feature vectors say of subjects: distances, retrieval, linear probes, likeness, a map.

Plain numpy on [n, d] features of n pictures; `subject` [n] says whose they are. Nothing here knows
where the features come from.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

FOLDS = 5
_RIDGES = np.logspace(-3, 4, 8)  # per picture, for features of unit variance


def unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Every row of length 1; float64."""
  features = np.asarray(features, np.float64)
  return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def distances(features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"]) -> dict:
  """Mean cosine distance `within` a subject's views and `between` subjects, and their `ratio`."""
  apart = 1 - unit(features) @ unit(features).T
  same = subject[:, None] == subject[None]
  others = ~np.eye(len(subject), dtype=bool)
  within, between = apart[same & others].mean(), apart[~same].mean()
  return dict(within=within, between=between, ratio=within / max(between, 1e-12))


def recall_at_1(features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"]) -> float:
  """Share of pictures whose nearest other picture (cosine) is another view of the same subject."""
  alike = unit(features) @ unit(features).T
  np.fill_diagonal(alike, -np.inf)
  return float(np.mean(subject[alike.argmax(1)] == subject))


def subject_means(
  features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "s d"]:
  """Each subject's mean of unit vectors, of unit length, in the order of `np.unique(subject)`."""
  return unit(np.stack([unit(features)[subject == s].mean(0) for s in np.unique(subject)]))


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
  """Rank correlation; ties share their mean rank. 0 where one of them is constant."""
  a, b = _ranks(a), _ranks(b)
  a, b = a - a.mean(), b - b.mean()
  norm = np.sqrt((a @ a) * (b @ b))
  return float(a @ b / norm) if norm > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
  _, place, count = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(count)
  return (last - (count - 1) / 2)[place]


def likeness(
  features: Float[np.ndarray, "n d"],
  subject: Int[np.ndarray, " n"],
  real: Float[np.ndarray, "s s"],
) -> float:
  """Spearman correlation, over pairs of subjects, of learned similarity with `real` similarity."""
  means = subject_means(features, subject)
  pairs = np.triu_indices(len(means), 1)
  return spearman((means @ means.T)[pairs], np.asarray(real)[pairs])


def folds(groups: Int[np.ndarray, " n"], count: int = FOLDS, seed: int = 0) -> np.ndarray:
  """A fold for every picture; a group (all pictures of a subject) is never cut."""
  names, place = np.unique(groups, return_inverse=True)
  count = min(count, len(names))
  order = np.random.default_rng(seed).permutation(len(names)) % count
  return order[place]


def ridge_predictions(
  features: Float[np.ndarray, "n d"], targets: Float[np.ndarray, "n k"], fold: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n k"]:
  """Each picture's targets, predicted by a ridge regression that saw the other folds alone.

  How strong the ridge is, of `_RIDGES`, the other folds decide among themselves, per target: each
  is predicted from the rest. So a choice, too, is never made on views of a subject that was fitted,
  as generalised cross-validation would (it takes pictures for independent, and overfits what the
  views of a subject have in common).

  Raises:
    ValueError: fewer than three folds.
  """
  features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
  names = np.unique(fold)
  if len(names) < 3:
    raise ValueError(f"{len(names)} folds; one is predicted, and two or more must choose the ridge")
  predicted = np.zeros_like(targets)
  for here in names:
    scale = features[fold != here].std(0)
    scale = np.where(scale > 1e-8 * max(scale.max(), 1e-12), scale, np.inf)
    gram = (features / scale) @ (features / scale).T  # all that ridges need, and n is less than d
    error = 0.0
    for inner in names[names != here]:
      tried = _ridges(gram, targets, (fold != here) & (fold != inner), fold == inner)
      error = error + np.sum((tried - targets[fold == inner]) ** 2, axis=1)
    outer = _ridges(gram, targets, fold != here, fold == here)
    best = np.argmin(error, axis=0)  # [k]
    predicted[fold == here] = np.take_along_axis(outer, best[None, None], axis=0)[0]
  return predicted


def _ridges(gram, targets, train, test) -> Float[np.ndarray, "r t k"]:
  """What each of `_RIDGES`, fitted to the rows `train`, predicts of the rows `test`.

  By `gram` [n, n], the inner products of the features, which are centred here by the mean of
  `train`; so are the targets.
  """
  fitted, asked = gram[np.ix_(train, train)], gram[np.ix_(test, train)]
  middle = fitted.mean(0)
  fitted, asked = (k - middle - k.mean(1, keepdims=True) + middle.mean() for k in (fitted, asked))
  values, vectors = np.linalg.eigh(fitted)
  offset = targets[train].mean(0)
  inside = vectors.T @ (targets[train] - offset)
  ridges = _RIDGES[:, None, None] * len(fitted)
  return asked @ vectors @ (inside / (np.maximum(values, 0)[:, None] + ridges)) + offset


def probes(
  features: Float[np.ndarray, "n d"],
  labels: Mapping[str, Int[np.ndarray, " n"]],
  numbers: Mapping[str, Float[np.ndarray, " n"]],
  fold: Int[np.ndarray, " n"],
) -> dict[str, dict[str, float]]:
  """Linear probes, all from one regression: {name: {score, chance}}.

  Of labels (one-hot targets) the score is the share that is named rightly and chance that of the
  commonest label; of numbers it is R², and chance the 0 of a probe that knows the mean only.
  """
  columns, parts = [], {}
  for name, values in {**labels, **numbers}.items():
    values = np.asarray(values)
    if name in labels:
      target = np.eye(len(np.unique(values)))[np.unique(values, return_inverse=True)[1]]
    else:
      target = values[:, None].astype(np.float64)
    start = sum(column.shape[1] for column in columns)
    parts[name] = slice(start, start + target.shape[1])
    columns.append(target)
  truth = np.concatenate(columns, axis=1)
  predicted = ridge_predictions(features, truth, fold)
  found = {}
  for name, part in parts.items():
    if name in labels:
      right = predicted[:, part].argmax(1) == truth[:, part].argmax(1)
      found[name] = dict(score=float(right.mean()), chance=float(truth[:, part].mean(0).max()))
    else:
      error = np.mean((predicted[:, part] - truth[:, part]) ** 2)
      spread = max(truth[:, part].var(), 1e-12)
      found[name] = dict(score=float(1 - error / spread), chance=0.0)
  return found


def tsne(
  features: Float[np.ndarray, "n d"],
  *,
  perplexity: float = 15.0,
  steps: int = 500,
  seed: int = 0,
) -> Float[np.ndarray, "n 2"]:
  """Exact t-SNE (van der Maaten & Hinton 2008) of unit vectors, for up to a thousand pictures.

  Binary search of each row's bandwidth, early exaggeration 4 for the first fifth of the steps,
  momentum 0.5 and then 0.8, started from the first two principal components.
  """
  x = unit(features)
  n = len(x)
  square = np.maximum(2 - 2 * x @ x.T, 0)
  p = _affinities(square, min(perplexity, (n - 1) / 3))
  p = np.maximum((p + p.T) / (2 * n), 1e-12)
  u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
  y = np.zeros((n, 2))
  y[:, : min(2, u.shape[1])] = (u * s)[:, :2]
  y = 1e-2 * y / max(y.std(), 1e-12) + 1e-4 * np.random.default_rng(seed).standard_normal((n, 2))
  rate, velocity, gains = max(n / 16, 20.0), np.zeros_like(y), np.ones_like(y)
  for step in range(steps):
    early = step < steps // 5
    apart = y[:, None] - y[None]
    near = 1 / (1 + np.sum(apart**2, -1))
    np.fill_diagonal(near, 0)
    q = np.maximum(near / near.sum(), 1e-12)
    gradient = 4 * np.einsum("ij,ijk->ik", ((4 if early else 1) * p - q) * near, apart)
    gains = np.where(gradient * velocity < 0, gains + 0.2, np.maximum(gains * 0.8, 0.01))
    velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
    y = y + velocity
    y = y - y.mean(0)
  return y


def _affinities(square: np.ndarray, perplexity: float) -> np.ndarray:
  """Rows p(j|i) whose entropy is log(perplexity)."""
  n = len(square)
  square = square + np.diag(np.full(n, np.inf))
  low, high, beta = np.zeros(n), np.full(n, np.inf), np.ones(n)
  for _ in range(60):
    shifted = square - square.min(1, keepdims=True)
    weights = np.exp(-shifted * beta[:, None])
    p = weights / weights.sum(1, keepdims=True)
    entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), 1)
    wide = entropy > np.log(perplexity)  # too many neighbours: a narrower bell
    low, high = np.where(wide, beta, low), np.where(wide, high, beta)
    beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
  return p
