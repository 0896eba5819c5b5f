"""TV Fusion: textual tokens pick, from the visual tokens, what belongs to the subject."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.models.layers import Linear


class TVFusion(nnx.Module):
  """A = softmax(W_q textual · (W_k visual)ᵀ / √d); fused = A · visual [P].

  One head, d = D, and no W_v: the values are the visual tokens themselves, as the formula says.
  """

  def __init__(self, width: int, **kinds):
    self.to_q = Linear(width, width, use_bias=False, **kinds)
    self.to_k = Linear(width, width, use_bias=False, **kinds)

  def __call__(
    self, textual: Float[Array, "l b q d"], visual: Float[Array, "b v d"]
  ) -> Float[Array, "l b q d"]:
    """Returns fused [L, B, Q, D]; logits and softmax in float32."""
    q, k = self.to_q(jnp.moveaxis(textual, 0, 1)), self.to_k(visual)
    logits = jnp.einsum("blqd,bvd->blqv", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * textual.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("blqv,bvd->lbqd", weights.astype(visual.dtype), visual)
