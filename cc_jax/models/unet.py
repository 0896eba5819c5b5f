"""The denoising UNet of Stable Diffusion 1.x, 2.x, XL and of our mini base, one class for all.

diffusers: models/unets/unet_2d_condition.py. Attribute names are PyTorch's; images are NHWC.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cc_jax.models.attention import TransformerBlock, multi_head_attention
from cc_jax.models.attention_kernels import WithAttention
from cc_jax.models.layers import (
  GroupNorm,
  LayerNorm,
  TimestepEmbedding,
  conv3x3,
  sinusoidal_embedding,
)
from cc_jax.models.unet_blocks import BlockSizes, Contexts, DownBlock, MidBlock, UpBlock
from cc_jax.models.unet_config import UNetConfig

__all__ = ["UNet2DCondition", "UNetConfig", "cross_attention_layers"]


class UNet2DCondition(nnx.Module):
  """Predicts noise, velocity or sample (whatever its scheduler says) from a noisy latent image."""

  def __init__(
    self, config: UNetConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    """Parameters are kept in `param_dtype`; the network computes, and answers, in `dtype`."""
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.dtype = dtype
    channels = config.block_out_channels
    blocks = range(len(channels))

    def sizes(i: int, *, attention: bool) -> BlockSizes:
      return BlockSizes(
        channels=channels[i], temb_channels=config.time_embed_dim, groups=config.norm_num_groups,
        epsilon=config.norm_eps, depth=config.transformer_layers_per_block[i] if attention else 0,
        heads=config.attention_head_dim[i], context_width=config.cross_attention_dim[i],
        linear_projection=config.use_linear_projection,
      )

    self.conv_in = conv3x3(config.in_channels, channels[0], **kw)
    self.time_embedding = TimestepEmbedding(channels[0], config.time_embed_dim, **kw)
    if config.addition_embed_type == "text":
      self.add_embedding = TextTimeEmbedding(
        config.cross_attention_dim[0], config.time_embed_dim,
        heads=config.addition_embed_type_num_heads, **kw,
      )
    elif config.addition_embed_type == "text_time":
      self.add_embedding = TimestepEmbedding(
        config.projection_class_embeddings_input_dim, config.time_embed_dim, **kw
      )

    # Channels of every skip, in the order in which the way down leaves them.
    skips = [channels[0]]
    down_blocks = []
    for i in blocks:
      layers, last = config.layers_per_block[i], i == blocks[-1]
      attention = config.down_block_types[i].startswith("CrossAttn")
      down_blocks.append(
        DownBlock(
          skips[-1], sizes(i, attention=attention), layers=layers, downsample=not last, **kw
        )
      )
      skips += [channels[i]] * (layers + (not last))
    self.down_blocks = nnx.List(down_blocks)

    self.mid_block = MidBlock(sizes(blocks[-1], attention=True), **kw)

    width = channels[-1]
    up_blocks = []
    for i, block_type in zip(reversed(blocks), config.up_block_types):
      used = [skips.pop() for _ in range(config.layers_per_block[i] + 1)]
      up_blocks.append(
        UpBlock(
          width, used, sizes(i, attention=block_type.startswith("CrossAttn")), upsample=i > 0, **kw
        )
      )
      width = channels[i]
    self.up_blocks = nnx.List(up_blocks)

    self.conv_norm_out = GroupNorm(
      channels[0], groups=config.norm_num_groups, epsilon=config.norm_eps, **kw
    )
    self.conv_out = conv3x3(channels[0], config.out_channels, **kw)

  def __call__(
    self, sample: Float[Array, "b h w c"], timesteps: Float[Array, " b"] | Int[Array, " b"],
    context: Float[Array, "b t d"] | Sequence[Any], *, text: Float[Array, "b t d"] | None = None,
    text_embeds: Float[Array, "b p"] | None = None, time_ids: Float[Array, "b n"] | None = None,
  ) -> Float[Array, "b h w c_out"]:
    """Runs the network; height and width may be odd.

    Args:
      sample: the noisy latents.
      timesteps: 0 ... 999.
      context: the text that all cross-attention layers see, or L objects, one for each layer in
        execution order, which reach that layer's `attn2` untouched.
      text: what `addition_embed_type='text'` pools; by default the context, if that is an array.
      text_embeds, time_ids: pooled text and the six sizes of SDXL's `'text_time'`.

    Raises:
      ValueError: a condition that the config asks for is missing, or L does not fit.
    """
    layers = len(cross_attention_layers(self))
    shared = hasattr(context, "shape")
    per_layer = (context,) * layers if shared else tuple(context)
    if len(per_layer) != layers:
      raise ValueError(f"{len(per_layer)} contexts for {layers} cross-attention layers")
    contexts = Contexts(per_layer)
    if text is None and shared:
      text = context

    temb = self._time_embedding(timesteps, text, text_embeds, time_ids)
    x = self.conv_in(sample.astype(self.dtype))
    skips = [x]
    for block in self.down_blocks:
      x, more = block(x, temb, contexts)
      skips += more
    x = self.mid_block(x, temb, contexts)
    for block in self.up_blocks:
      x = block(x, skips, temb, contexts)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

  def _time_embedding(self, timesteps, text, text_embeds, time_ids) -> Float[Array, "b e"]:
    config = self.config
    waves = dict(flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)
    t = sinusoidal_embedding(timesteps, config.block_out_channels[0], **waves)
    temb = self.time_embedding(t.astype(self.dtype))
    if config.addition_embed_type == "text":
      if text is None:
        raise ValueError("addition_embed_type='text' with a context per layer needs `text`")
      temb = temb + self.add_embedding(text)
    elif config.addition_embed_type == "text_time":
      if text_embeds is None or time_ids is None:
        raise ValueError("addition_embed_type='text_time' needs `text_embeds` and `time_ids`")
      ids = sinusoidal_embedding(time_ids, config.addition_time_embed_dim, **waves)
      ids = ids.reshape(len(ids), -1).astype(self.dtype)
      added = jnp.concatenate([text_embeds.astype(self.dtype), ids], axis=-1)
      temb = temb + self.add_embedding(added)
    return temb


class TextTimeEmbedding(nnx.Module):
  """The text, pooled by attention, as an addition to the time embedding.

  diffusers: models/embeddings.py, TextTimeEmbedding.
  """

  def __init__(self, text_width: int, time_embed_dim: int, *, heads: int, **kw):
    self.norm1 = LayerNorm(text_width, **kw)
    self.pool = AttentionPooling(text_width, heads=heads, **kw)
    self.proj = nnx.Linear(text_width, time_embed_dim, **kw)
    self.norm2 = LayerNorm(time_embed_dim, **kw)

  def __call__(self, text: Float[Array, "b t d"]) -> Float[Array, "b e"]:
    return self.norm2(self.proj(self.pool(self.norm1(text))))


class AttentionPooling(WithAttention):
  """One query, the mean token plus a learnt vector, attends to itself and to all tokens.

  diffusers: models/embeddings.py, AttentionPooling (from DeepFloyd IF).
  """

  def __init__(self, width: int, *, heads: int, dtype, param_dtype, rngs):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.heads = heads
    noise = jax.random.normal(rngs.params(), (1, width), param_dtype)
    self.positional_embedding = nnx.Param(noise / width**0.5)
    self.k_proj = nnx.Linear(width, width, **kw)
    self.q_proj = nnx.Linear(width, width, **kw)
    self.v_proj = nnx.Linear(width, width, **kw)

  def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b d"]:
    query = x.mean(axis=1, keepdims=True) + self.positional_embedding.astype(x.dtype)
    x = jnp.concatenate([query, x], axis=1)
    pooled = multi_head_attention(
      self.q_proj(query), self.k_proj(x), self.v_proj(x), heads=self.heads, kernels=self.kernels
    )
    return pooled[:, 0]


def cross_attention_layers(unet: UNet2DCondition) -> list[tuple[str, TransformerBlock]]:
  """The L transformer blocks and their PyTorch paths, in the order in which they run.

  `block.attn2 = Wrapper(block.attn2)` replaces a cross-attention in place.
  """
  stages = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
  stages += [("mid_block", unet.mid_block)]
  stages += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
  return [
    (f"{stage}.attentions.{i}.transformer_blocks.{j}", block)
    for stage, module in stages
    for i, transformer in enumerate(getattr(module, "attentions", ()))
    for j, block in enumerate(transformer.transformer_blocks)
  ]
