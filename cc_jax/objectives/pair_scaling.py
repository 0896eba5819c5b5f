"""What one pair of samples contributes to a contrastive loss: formulas that all backends share."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


@dataclasses.dataclass(frozen=True)
class PairLoss:
  """The loss of a row: cross-entropy of its logits with its targets.

  Hashable if `temperature` is a plain number, which all kinds but 'naive' need.
  """

  temperature: float  # τ
  scaling: str = "none"  # one of SCALINGS
  soft_temperature: float = 0.07  # τ_S of 'soft_target'
  symmetric: bool = False  # the mean of this loss and the one with rows and columns exchanged

  @property
  def needs_similarity(self) -> bool:
    return self.scaling != "none"

  @property
  def soft(self) -> bool:
    """Whether a row has more than one target."""
    return self.scaling == "soft_target"

  def logits(
    self, c: Float[Array, "*l n m"], s: Float[Array, "n m"] | None, is_positive: Bool[Array, "n m"]
  ) -> Float[Array, "*l n m"]:
    """p_j of a positive, else n_jk of docs/method.md, "MACL"; from cosines c and clipped S."""
    return jnp.where(is_positive, c / self.temperature, self._negative(c, s))

  def targets(
    self, s: Float[Array, "n m"] | None, is_positive: Bool[Array, "n m"],
    allowed: Bool[Array, "n m"],
  ) -> Float[Array, "n m"]:
    """Targets before they are normalised over a row: 1 for the positive and at most 1 for others,
    so that their sum needs no running maximum."""
    if not self.soft:
      return is_positive.astype(jnp.float32)
    s = jnp.where(is_positive, 1.0, s)
    return jnp.where(allowed, jnp.exp((s - 1.0) / self.soft_temperature), 0.0)

  def _negative(self, c: Array, s: Array | None) -> Array:
    if self.scaling == "inverse":
      return jnp.where(c > 0, c / s, c * s) / self.temperature
    if self.scaling == "complement":
      return (1.0 - s) * c / self.temperature
    if self.scaling == "two_minus":
      return (2.0 - s) * c / self.temperature
    if self.scaling == "literal":
      return s * c / self.temperature
    if self.scaling == "log_complement":
      return c / self.temperature + jnp.log(1.0 - s + 1e-6)
    return c / self.temperature


def clipped(similarity: Float[Array, "n m"]) -> Float[Array, "n m"]:
  """S in [0.1, 1]: it divides. A measurement, not something to learn: no gradient."""
  return jnp.clip(jax.lax.stop_gradient(similarity), 0.1, 1.0)
