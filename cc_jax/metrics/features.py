"""What feature vectors say of subjects: distances, retrieval, linear probes, likeness, a map.

Plain numpy on [n, d] features of n pictures; `subject` [n] says whose they are. Nothing here knows
where the features come from.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

FOLDS = 5
_RIDGES = np.logspace(-3, 4, 8)  # per picture, for features of unit variance


def unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Every row of length 1; float64."""
  features = np.asarray(features, np.float64)
  return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def distances(features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"]) -> dict:
  """Mean cosine distance `within` a subject's views and `between` subjects, and their `ratio`."""
  distance = 1 - unit(features) @ unit(features).T
  same = subject[:, None] == subject[None]
  others = ~np.eye(len(subject), dtype=bool)
  within, between = distance[same & others].mean(), distance[~same].mean()
  return dict(within=within, between=between, ratio=within / max(between, 1e-12))


def recall_at_1(features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"]) -> float:
  """Share of pictures whose nearest other picture (cosine) is another view of the same subject."""
  similarity = unit(features) @ unit(features).T
  np.fill_diagonal(similarity, -np.inf)
  return float(np.mean(subject[similarity.argmax(1)] == subject))


def subject_means(
  features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "s d"]:
  """Each subject's mean of unit vectors, of unit length, in the order of `np.unique(subject)`."""
  return unit(np.stack([unit(features)[subject == s].mean(0) for s in np.unique(subject)]))


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
  """Rank correlation; ties share their mean rank. 0 where one of them is constant."""
  a, b = rankdata(a), rankdata(b)
  a, b = a - a.mean(), b - b.mean()
  norm = np.sqrt((a @ a) * (b @ b))
  return float(a @ b / norm) if norm > 0 else 0.0


def likeness(
  features: Float[np.ndarray, "n d"], subject: Int[np.ndarray, " n"], real: Float[np.ndarray, "s s"]
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
  """Each picture's targets, predicted by a ridge regression that was fitted to the other folds.

  The strength of the ridge, of `_RIDGES`, is chosen per target by predicting each of the other
  folds from the rest, so never on views of a subject that was fitted. Generalised cross-validation
  takes pictures for independent, and overfits what the views of a subject have in common.

  Raises:
    ValueError: fewer than three folds.
  """
  features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
  names = np.unique(fold)
  if len(names) < 3:
    raise ValueError(f"{len(names)} folds; one is predicted, and two or more must choose the ridge")
  predicted = np.zeros_like(targets)
  for test in names:
    scale = features[fold != test].std(0)
    scale = np.where(scale > 1e-8 * max(scale.max(), 1e-12), scale, np.inf)
    gram = (features / scale) @ (features / scale).T  # all that ridges need, and n is less than d
    error = 0.0
    for inner in names[names != test]:
      tried = _ridges(gram, targets, (fold != test) & (fold != inner), fold == inner)
      error = error + np.sum((tried - targets[fold == inner]) ** 2, axis=1)
    outer = _ridges(gram, targets, fold != test, fold == test)
    best = np.argmin(error, axis=0)  # [k]
    predicted[fold == test] = np.take_along_axis(outer, best[None, None], axis=0)[0]
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
  features: Float[np.ndarray, "n d"], labels: Mapping[str, Int[np.ndarray, " n"]],
  numbers: Mapping[str, Float[np.ndarray, " n"]], fold: Int[np.ndarray, " n"],
) -> dict[str, dict[str, float]]:
  """Linear probes, all from one regression: {name: {score, chance}}.

  Of labels (one-hot targets) the score is the share that is named rightly and chance that of the
  commonest label; of numbers it is R², and chance the 0 of a probe that knows the mean only.
  """
  targets = {}
  for name, values in labels.items():
    classes, number = np.unique(values, return_inverse=True)
    targets[name] = np.eye(len(classes))[number]
  for name, values in numbers.items():
    targets[name] = np.asarray(values)[:, None].astype(np.float64)
  ends = np.cumsum([target.shape[1] for target in targets.values()])
  predicted = ridge_predictions(features, np.concatenate(list(targets.values()), axis=1), fold)
  scores = {}
  for (name, target), guess in zip(targets.items(), np.split(predicted, ends[:-1], axis=1)):
    if name in labels:
      right = guess.argmax(1) == target.argmax(1)
      scores[name] = dict(score=float(right.mean()), chance=float(target.mean(0).max()))
    else:
      error, spread = np.mean((guess - target) ** 2), max(target.var(), 1e-12)
      scores[name] = dict(score=float(1 - error / spread), chance=0.0)
  return scores


def tsne(
  features: Float[np.ndarray, "n d"], *, perplexity: float = 15.0, steps: int = 500, seed: int = 0
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
    difference = y[:, None] - y[None]
    near = 1 / (1 + np.sum(difference**2, -1))
    np.fill_diagonal(near, 0)
    q = np.maximum(near / near.sum(), 1e-12)
    gradient = 4 * np.einsum("ij,ijk->ik", ((4 if early else 1) * p - q) * near, difference)
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
