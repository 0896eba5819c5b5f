"""MACL: multiscale appearance contrastive learning on the textual tokens of every layer."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError
from cc_jax.objectives.contrast import NAIVE_BACKEND, ContrastiveBackend, contrast
from cc_jax.objectives.infonce import check_temperature
from cc_jax.objectives.pair_scaling import SCALINGS, PairLoss

POOLINGS = ("mean", "per_token")


def macl(
  anchors: Float[Array, "l n q d"], positives: Float[Array, "l n q d"],
  embed: Float[Array, "n e"], *, temperature: float, scaling: str = "inverse",
  soft_temperature: float = 0.07, symmetric: bool = False, pooling: str = "mean",
  subject_ids: Int[Array, "n"] | None = None, backend: ContrastiveBackend = NAIVE_BACKEND,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """L_MACL = 1/L Σ_l -1/N Σ_j log [e^{p_j} / (e^{p_j} + Σ_{k≠j} e^{n_jk})].

  p_j = cos(z_j, z_j+) / τ and n_jk = scaled(cos(z_j, z_k+), S_jk) / τ, per layer l, with
  S_jk = cos(g(x_j), g(x_k)). The form and that S scales the negatives are the paper's [P]; how it
  does (SCALINGS), the pooling and the direction are our readings [R].

  Args:
    anchors: textual tokens z of the reference frames, the **global** batch.
    positives: textual tokens z+ of the same subjects' other frames, at the same timesteps.
    embed: g(x), the frozen image encoder's embeddings. S, their cosines, is clipped to [0.1, 1]; no
      gradient flows into it.
    temperature: τ; a plain number unless `backend` is naive.
    scaling: one of SCALINGS.
    soft_temperature: τ_S of 'soft_target', whose targets use the clipped S, with S_jj = 1.
    symmetric: the mean of this loss and the one with anchors and positives exchanged.
    pooling: 'mean' contrasts the mean of the Q tokens; 'per_token' contrasts token q with token q
      and averages the losses.
    subject_ids: samples of the same subject are not negatives of each other; -1 for unknown.
    backend: how the loss is computed; its value does not depend on it.

  Returns:
    (loss, {'positive', 'negative': mean cosines before scaling; 'accuracy': of retrieval}).

  Raises:
    UserError: an unknown scaling or pooling, or a temperature that is not positive; see also
      `contrast`.
  """
  if scaling not in SCALINGS:
    raise UserError(f"unknown macl_scaling {scaling!r}; we have {', '.join(SCALINGS)}")
  if pooling not in POOLINGS:
    raise UserError(f"unknown macl_pooling {pooling!r}; we have {', '.join(POOLINGS)}")
  check_temperature(temperature, "macl_temperature")
  check_temperature(soft_temperature, "macl_soft_temperature")
  pair_loss = PairLoss(temperature, scaling, soft_temperature, symmetric=symmetric)
  z_GxNxD, positive_GxNxD = _pool(anchors, pooling), _pool(positives, pooling)
  return contrast(backend, pair_loss, z_GxNxD, positive_GxNxD, embed, subject_ids)


def _pool(tokens_LxNxQxD: Array, pooling: str) -> Array:
  """[G, N, D] groups that are contrasted separately: one per layer, or one per layer and token."""
  tokens = tokens_LxNxQxD.astype(jnp.float32)
  if pooling == "mean":
    return tokens.mean(axis=2)
  layers, n, queries, width = tokens.shape
  return jnp.moveaxis(tokens, 2, 1).reshape(layers * queries, n, width)
