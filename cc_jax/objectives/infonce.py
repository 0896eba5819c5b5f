"""InfoNCE over the global batch in its readable form, shared by CSCL and MACL.

It holds the [N, N] matrices in memory. Tests compare tiled.py with it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cc_jax.errors import UserError
from cc_jax.objectives.pair_scaling import PairLoss, clipped


def l2_normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
  """Unit vectors in float32. A zero vector has no direction: it stays zero, and so does its
  gradient (the derivative of sqrt would be infinite there). NaN stays NaN."""
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  nonzero = ~(square <= 1e-24)
  return jnp.where(nonzero, x * jax.lax.rsqrt(jnp.where(nonzero, square, 1.0)), 0.0)


def cosine_matrix(a: Float[Array, "*l n d"], b: Float[Array, "*l m d"]) -> Float[Array, "*l n m"]:
  """Cosines of every row of `a` with every row of `b`.

  Highest precision, because a low temperature multiplies the error that TPUs and recent GPUs make
  in their default float32 products.
  """
  return jnp.einsum(
    "...nd,...md->...nm", l2_normalize(a), l2_normalize(b), precision=jax.lax.Precision.HIGHEST
  )


def allowed_pairs(subject_ids: Int[Array, "n"] | None, n: int) -> Bool[Array, "n n"]:
  """Whether pair (j, k) counts in row j's denominator: its positive, and samples of other subjects.

  Samples of the same subject are not negatives of each other. A negative id means that the data set
  does not know the subject; such a sample counts as the only one of its subject.
  """
  is_positive = jnp.eye(n, dtype=bool)
  if subject_ids is None:
    return jnp.ones((n, n), bool)
  same = (subject_ids[:, None] == subject_ids[None, :]) & (subject_ids >= 0)[:, None]
  return is_positive | ~same


def cross_entropy(
  logits: Float[Array, "*l n n"], allowed: Bool[Array, "n n"],
  targets: Float[Array, "n n"] | None = None,
) -> Float[Array, "*l n"]:
  """-Σ_k targets_jk log softmax_k(logits_jk) over the allowed k, for every row j.

  `targets` sum to 1 over the allowed pairs of a row and are 0 elsewhere; without them the
  positive is the target, which is InfoNCE (arXiv 1807.03748).
  """
  normaliser = jax.nn.logsumexp(logits, axis=-1, where=allowed)
  if targets is None:
    return normaliser - jnp.diagonal(logits, axis1=-2, axis2=-1)
  return normaliser - jnp.sum(targets * logits, axis=-1)


def retrieval_metrics(
  cosines: Float[Array, "*l n n"], allowed: Bool[Array, "n n"]
) -> dict[str, Float[Array, ""]]:
  """Means over all leading axes: `positive` and `negative` cosine, and `accuracy`, the share of
  rows whose positive is strictly nearer than every negative (so collapse counts as wrong)."""
  n = cosines.shape[-1]
  negative = allowed & ~jnp.eye(n, dtype=bool)
  positive = jnp.diagonal(cosines, axis1=-2, axis2=-1)
  hardest_negative = jnp.max(cosines, axis=-1, where=negative, initial=-jnp.inf)
  count = jnp.maximum(negative.sum(), 1)
  return {
    "positive": positive.mean(),
    "negative": (jnp.where(negative, cosines, 0.0).sum(axis=(-2, -1)) / count).mean(),
    "accuracy": (positive > hardest_negative).mean(dtype=jnp.float32),
  }


def naive(
  pair_loss: PairLoss, x: Float[Array, "g n d"], y: Float[Array, "g n d"],
  embed: Float[Array, "n e"] | None, subject_ids: Int[Array, "n"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """(loss, metrics) of G groups that are contrasted separately; see `contrast.contrast`."""
  n = x.shape[1]
  is_positive = jnp.eye(n, dtype=bool)
  allowed = allowed_pairs(subject_ids, n)
  s_NxN = targets_NxN = None
  if pair_loss.needs_similarity:
    s_NxN = clipped(cosine_matrix(embed, embed))
  if pair_loss.soft:
    logits_NxN = jnp.where(is_positive, 1.0, s_NxN) / pair_loss.soft_temperature
    targets_NxN = jax.nn.softmax(logits_NxN, where=allowed)
  cosines = cosine_matrix(x, y)
  if pair_loss.symmetric:
    cosines = jnp.stack([cosines, jnp.swapaxes(cosines, -1, -2)])  # S and `allowed` are symmetric
  logits = pair_loss.logits(cosines, s_NxN, is_positive)
  return cross_entropy(logits, allowed, targets_NxN).mean(), retrieval_metrics(cosines, allowed)


def check_temperature(temperature: float, key: str) -> None:
  """Raises UserError unless a temperature that is a plain number is positive."""
  if isinstance(temperature, int | float) and not temperature > 0:
    raise UserError(f"{key}={temperature}: a temperature must be positive")
