"""MACL: multiscale appearance contrastive learning on the textual tokens of every layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError
from cc_jax.objectives.infonce import (
  allowed_pairs,
  check_temperature,
  cosine_matrix,
  cross_entropy,
  retrieval_metrics,
)

# How a negative's cosine c becomes its logit, times τ except for log_complement's own term. [R]
SCALINGS = (
  "inverse",  # c / S if c > 0, else c S: a negative cosine must not be amplified
  "complement",  # (1 - S) c
  "two_minus",  # (2 - S) c
  "log_complement",  # c, and log(1 - S + 1e-6) is added to the logit
  "literal",  # S c
  "none",  # c: plain InfoNCE
  "soft_target",  # c, and the target of a row is softmax(S / τ_S) instead of its one positive
)
POOLINGS = ("mean", "per_token")


def cosine_similarity_matrix(embed: Float[Array, "n e"]) -> Float[Array, "n n"]:
  """S_jk = cos(g(x_j), g(x_k)) [P], float32, from the frozen image encoder's embeddings."""
  return cosine_matrix(embed, embed)


def macl(
  anchors: Float[Array, "l n q d"],
  positives: Float[Array, "l n q d"],
  similarity: Float[Array, "n n"],
  *,
  temperature: float,
  scaling: str = "inverse",
  soft_temperature: float = 0.07,
  symmetric: bool = False,
  pooling: str = "mean",
  subject_ids: Int[Array, "n"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """L_MACL = 1/L Σ_l -1/N Σ_j log [e^{p_j} / (e^{p_j} + Σ_{k≠j} e^{n_jk})].

  p_j = cos(z_j, z_j+) / τ and n_jk = scaled(cos(z_j, z_k+), S_jk) / τ, per layer l. The form and
  that S scales the negatives are the paper's [P]; how it does (SCALINGS), the pooling and the
  direction are our readings [R].

  Args:
    anchors: textual tokens z of the reference frames, the **global** batch.
    positives: textual tokens z+ of the same subjects' other frames, at the same timesteps.
    similarity: S, see `cosine_similarity_matrix`. Clipped to [0.1, 1]; no gradient flows into it.
    temperature: τ.
    scaling: one of SCALINGS.
    soft_temperature: τ_S of 'soft_target', whose targets use the clipped S, with S_jj = 1.
    symmetric: the mean of this loss and the one with anchors and positives exchanged.
    pooling: 'mean' contrasts the mean of the Q tokens; 'per_token' contrasts token q with token q
      and averages the losses.
    subject_ids: samples of one subject are no negatives of each other; -1 for unknown.

  Returns:
    (loss, {'positive', 'negative': mean cosines before scaling; 'accuracy': of retrieval}).

  Raises:
    UserError: an unknown scaling or pooling, or a temperature that is not positive.
  """
  if scaling not in SCALINGS:
    raise UserError(f"unknown macl_scaling {scaling!r}; we have {', '.join(SCALINGS)}")
  if pooling not in POOLINGS:
    raise UserError(f"unknown macl_pooling {pooling!r}; we have {', '.join(POOLINGS)}")
  check_temperature(temperature, "macl_temperature")
  check_temperature(soft_temperature, "macl_soft_temperature")

  z_GxNxD, positive_GxNxD = _pool(anchors, pooling), _pool(positives, pooling)
  n = z_GxNxD.shape[1]
  own = jnp.eye(n, dtype=bool)
  allowed = allowed_pairs(subject_ids, n)
  s_NxN = jnp.clip(jax.lax.stop_gradient(similarity.astype(jnp.float32)), 0.1, 1.0)
  targets = None
  if scaling == "soft_target":
    targets = jax.nn.softmax(jnp.where(own, 1.0, s_NxN) / soft_temperature, where=allowed)

  cosines = cosine_matrix(z_GxNxD, positive_GxNxD)
  if symmetric:
    cosines = jnp.stack([cosines, jnp.swapaxes(cosines, -1, -2)])
  logits = jnp.where(own, cosines / temperature, _negative(cosines, s_NxN, scaling, temperature))
  loss = cross_entropy(logits, allowed, targets).mean()
  return loss, retrieval_metrics(cosines, allowed)


def _pool(tokens_LxNxQxD: Array, pooling: str) -> Array:
  """[G, N, D] groups that are contrasted apart: one per layer, or one per layer and token."""
  tokens = tokens_LxNxQxD.astype(jnp.float32)
  if pooling == "mean":
    return tokens.mean(axis=2)
  layers, n, queries, width = tokens.shape
  return jnp.moveaxis(tokens, 2, 1).reshape(layers * queries, n, width)


def _negative(c: Array, s: Array, scaling: str, temperature: float) -> Array:
  """n_jk of method.md's table, from cosines c and clipped similarities s."""
  if scaling == "inverse":
    return jnp.where(c > 0, c / s, c * s) / temperature
  if scaling == "complement":
    return (1.0 - s) * c / temperature
  if scaling == "two_minus":
    return (2.0 - s) * c / temperature
  if scaling == "literal":
    return s * c / temperature
  if scaling == "log_complement":
    return c / temperature + jnp.log(1.0 - s + 1e-6)
  return c / temperature
