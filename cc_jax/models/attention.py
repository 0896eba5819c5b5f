"""Transformer blocks of the UNet: self-attention, cross-attention, gated feed-forward.

The UNet never looks into what cross-attention is conditioned on: `TransformerBlock` hands `attn2`
its layer's context, the time embedding and the picture's size, and any module with the call
signature of `Attention` can stand there.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.models.attention_kernels import WithAttention, dot_product_attention
from cc_jax.models.attention_kinds import XLA_ONLY, AttentionKernels
from cc_jax.models.layers import GroupNorm, Identity, LayerNorm, conv1x1

_TRANSFORMER_GROUP_NORM_EPSILON = 1e-6  # unlike the 1e-5 of the resnets around it


def multi_head_attention(
  query: Float[Array, "b s c"], key: Float[Array, "b t c"], value: Float[Array, "b t c"], *,
  heads: int, kernels: AttentionKernels = XLA_ONLY,
) -> Float[Array, "b s c"]:
  """softmax(q kᵀ / √d) v for each head, heads merged again; see `dot_product_attention`."""
  by_head = (x.reshape(*x.shape[:-1], heads, -1) for x in (query, key, value))
  return dot_product_attention(*by_head, kernels).reshape(query.shape)


class Attention(WithAttention):
  """Multi-head attention of [B, S, C] on itself or on a context [B, T, D].

  diffusers: models/attention_processor.py, Attention with AttnProcessor.
  """

  def __init__(self, width: int, *, heads: int, context_width: int | None = None, **kw):
    """`context_width=None` means self-attention. `heads` must divide `width`."""
    context_width = width if context_width is None else context_width
    self.heads = heads
    self.dim_head = width // heads
    self.to_q = nnx.Linear(width, width, use_bias=False, **kw)
    self.to_k = nnx.Linear(context_width, width, use_bias=False, **kw)
    self.to_v = nnx.Linear(context_width, width, use_bias=False, **kw)
    self.to_out = nnx.List([nnx.Linear(width, width, **kw)])

  def __call__(
    self, hidden: Float[Array, "b s c"], context: Float[Array, "b t d"] | None = None,
    temb: Float[Array, "b e"] | None = None, hw: tuple[int, int] | None = None,
  ) -> Float[Array, "b s c"]:
    """`temb` and `hw` are for modules that take this one's place; plain attention needs neither."""
    del temb, hw
    context = hidden if context is None else context
    merged = self.attend(self.to_q(hidden), self.to_k(context), self.to_v(context))
    return self.to_out[0](merged)

  def attend(
    self, query: Float[Array, "b s c"], key: Float[Array, "b t c"], value: Float[Array, "b t c"]
  ) -> Float[Array, "b s c"]:
    """Attention proper on projected inputs; the result has not gone through `to_out`."""
    return multi_head_attention(query, key, value, heads=self.heads, kernels=self.kernels)


class GEGLU(nnx.Module):
  """Half of a projection, gated by the exact (erf) gelu of the other half."""

  def __init__(self, width: int, inner: int, **kw):
    self.proj = nnx.Linear(width, 2 * inner, **kw)

  def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s inner"]:
    x, gate = jnp.split(self.proj(x), 2, axis=-1)
    return x * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
  """GEGLU to four times the width, and back (PyTorch's `net.1` is its dropout)."""

  def __init__(self, width: int, **kw):
    self.net = nnx.List(
      [GEGLU(width, 4 * width, **kw), Identity(), nnx.Linear(4 * width, width, **kw)]
    )

  def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
    for layer in self.net:
      x = layer(x)
    return x


class TransformerBlock(nnx.Module):
  """Self-attention, cross-attention, feed-forward, each normalised before and added after.

  diffusers: models/attention.py, BasicTransformerBlock with layer norms.
  `attn2` may be replaced: it is called as `attn2(hidden, context, temb, hw=(h, w))`.
  """

  def __init__(self, width: int, *, heads: int, context_width: int, **kw):
    norm = partial(LayerNorm, width, **kw)
    self.norm1 = norm()
    self.attn1 = Attention(width, heads=heads, **kw)
    self.norm2 = norm()
    self.attn2 = Attention(width, heads=heads, context_width=context_width, **kw)
    self.norm3 = norm()
    self.ff = FeedForward(width, **kw)

  def __call__(
    self, hidden: Float[Array, "b s c"], context: Any, temb: Float[Array, "b e"],
    hw: tuple[int, int],
  ) -> Float[Array, "b s c"]:
    hidden = hidden + self.attn1(self.norm1(hidden))
    hidden = hidden + self.attn2(self.norm2(hidden), context, temb, hw=hw)
    return hidden + self.ff(self.norm3(hidden))


class Transformer2D(nnx.Module):
  """A stack of transformer blocks over the pixels of an image, between two projections.

  diffusers: models/transformers/transformer_2d.py. The projections are 1x1 convolutions (SD 1.x)
  or linear layers (`linear_projection`, SD 2.x and SDXL); the arithmetic is the same.
  """

  def __init__(
    self, channels: int, *, depth: int, heads: int, context_width: int, groups: int,
    linear_projection: bool, **kw,
  ):
    projection = nnx.Linear if linear_projection else conv1x1
    self.norm = GroupNorm(channels, groups=groups, epsilon=_TRANSFORMER_GROUP_NORM_EPSILON, **kw)
    self.proj_in = projection(channels, channels, **kw)
    self.transformer_blocks = nnx.List(
      TransformerBlock(channels, heads=heads, context_width=context_width, **kw)
      for _ in range(depth)
    )
    self.proj_out = projection(channels, channels, **kw)

  def __call__(
    self, x: Float[Array, "b h w c"], contexts: tuple[Any, ...], temb: Float[Array, "b e"]
  ) -> Float[Array, "b h w c"]:
    """`contexts` holds one object for each transformer block."""
    b, h, w, c = x.shape
    hidden = self.proj_in(self.norm(x)).reshape(b, h * w, c)
    for block, context in zip(self.transformer_blocks, contexts, strict=True):
      hidden = block(hidden, context, temb, (h, w))
    return x + self.proj_out(hidden.reshape(b, h, w, c))
