"""CSCL: crossmodal semantic contrastive learning between the two Q-Formers' CLS tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cc_jax.objectives.infonce import (
  allowed_pairs,
  check_temperature,
  cosine_matrix,
  cross_entropy,
  retrieval_metrics,
)


def cscl(
  visual: Float[Array, "n d"],
  textual: Float[Array, "n d"],
  *,
  temperature: float,
  subject_ids: Int[Array, "n"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """L_CSCL = -1/2N Σ_i [log softmax_j(<V_i, T_j>/τ)_i + log softmax_j(<V_j, T_i>/τ)_i].

  CLS tokens, an N x N matrix over the batch and positives on its diagonal are the paper's [P]; that
  it is symmetric, and τ, are our reading [R].

  Args:
    visual, textual: CLS tokens of the **global** batch; they are L2-normalised here.
    temperature: τ.
    subject_ids: samples of one subject are no negatives of each other, in either direction;
      -1 where a data set does not know the subject.

  Returns:
    (loss, {'positive', 'negative': mean cosines; 'accuracy': of retrieval, mean of both ways}).

  Raises:
    UserError: a temperature that is not positive.
  """
  check_temperature(temperature, "cscl_temperature")
  cosines_NxN = cosine_matrix(visual, textual)
  both_2xNxN = jnp.stack([cosines_NxN, cosines_NxN.T])  # rows: visual, then textual
  allowed = allowed_pairs(subject_ids, visual.shape[0])
  loss = cross_entropy(both_2xNxN / temperature, allowed).mean()
  return loss, retrieval_metrics(both_2xNxN, allowed)
