"""Where in the picture, and when, the subject's visual features act."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.models.layers import Linear


class TimestepLocation(nnx.Module):
  """m = sigmoid(f(h, t)) per pixel of one cross-attention layer [P: the map; R: f].

  [R] f = w·silu(A·h + C·silu(temb)): a pixel's hidden state (already layer-normed by the
  transformer block) and the UNet's time embedding, added. w starts at zero, and so m at 1/2.
  """

  def __init__(self, hidden_width: int, temb_width: int, width: int, **kinds):
    self.hidden = Linear(hidden_width, width, **kinds)
    self.time = Linear(temb_width, width, use_bias=False, **kinds)
    self.out = Linear(width, 1, kernel_init=nnx.initializers.zeros_init(), **kinds)

  def __call__(
    self, hidden: Float[Array, "b s c"], temb: Float[Array, "b e"]
  ) -> Float[Array, "b s 1"]:
    """Returns m in (0, 1), float32."""
    x = jax.nn.silu(self.hidden(hidden) + self.time(jax.nn.silu(temb))[:, None])
    return jax.nn.sigmoid(self.out(x).astype(jnp.float32))
