"""TV Fusion: textual tokens pick, from the visual tokens, what belongs to the subject."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class TVFusion(nnx.Module):
  """A = softmax(W_q textual · (W_k visual)ᵀ / √d); fused = A · visual [P].

  One head, d = D, and no W_v: the values are the visual tokens themselves, as the formula says.
  """

  def __init__(self, width: int, **kinds):
    self.to_q = nnx.Linear(width, width, use_bias=False, **kinds)
    self.to_k = nnx.Linear(width, width, use_bias=False, **kinds)

  def __call__(
    self, textual: Float[Array, "l b q d"], visual: Float[Array, "b v d"]
  ) -> Float[Array, "l b q d"]:
    """Returns fused [L, B, Q, D]; softmax in float32."""
    logits = jnp.einsum("lbqd,bvd->lbqv", self.to_q(textual), self.to_k(visual))
    scale = textual.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits.astype(jnp.float32) * scale, axis=-1)
    return jnp.einsum("lbqv,bvd->lbqd", weights.astype(visual.dtype), visual)
