"""CSCL: crossmodal semantic contrastive learning between the two Q-Formers' CLS tokens."""

from jaxtyping import Array, Float, Int

from cc_jax.objectives.contrast import NAIVE_BACKEND, ContrastiveBackend, contrast
from cc_jax.objectives.infonce import check_temperature
from cc_jax.objectives.pair_scaling import PairLoss


def cscl(
  visual: Float[Array, "n d"], textual: Float[Array, "n d"], *, temperature: float,
  subject_ids: Int[Array, "n"] | None = None, backend: ContrastiveBackend = NAIVE_BACKEND,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """L_CSCL = -1/2N Σ_i [log softmax_j(<V_i, T_j>/τ)_i + log softmax_j(<V_j, T_i>/τ)_i].

  CLS tokens, an N x N matrix over the batch and positives on its diagonal are the paper's [P]; that
  it is symmetric, and τ, are our reading [R].

  Args:
    visual, textual: CLS tokens of the **global** batch; they are L2-normalised here.
    temperature: τ; a plain number unless `backend` is naive.
    subject_ids: samples of the same subject are not negatives of each other, in either direction;
      -1 where a data set does not know the subject.
    backend: how the loss is computed; its value does not depend on it.

  Returns:
    (loss, {'positive', 'negative': mean cosines; 'accuracy': of retrieval, mean of both ways}).

  Raises:
    UserError: a temperature that is not positive; see also `contrast`.
  """
  check_temperature(temperature, "cscl_temperature")
  pair_loss = PairLoss(temperature, symmetric=True)
  return contrast(backend, pair_loss, visual[None], textual[None], None, subject_ids)
