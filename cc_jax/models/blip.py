"""BLIP's image and text encoders, as ImageReward has them (salesforce/BLIP: vit.py, med.py).

The image encoder is timm's ViT; the text encoder is BERT, whose every layer also looks at the image
(`crossattention`). Attribute names are PyTorch's, so a weight's path is its key in the file, as
`text_encoder.encoder.layer.0.attention.self.query.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cc_jax.errors import UserError
from cc_jax.models.clip_layers import ACTIVATIONS, CLIPMLP, checked_config, embedding, layer_norm

_HEAD = 64  # channels of a head of the image encoder, base and large alike


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig:
  """The image encoder; the published large one by default."""

  hidden_size: int = 1024
  num_hidden_layers: int = 24
  image_size: int = 224
  patch_size: int = 16
  layer_norm_eps: float = 1e-6

  @classmethod
  def from_shapes(
    cls, shapes: Mapping[str, tuple[int, ...]], prefix: str
  ) -> BlipVisionConfig:
    """Reads it off a checkpoint's tensors, since no config file has it.

    Raises:
      UserError: the tensors are of no such encoder.
    """
    try:
      width, _, patch, _ = shapes[f"{prefix}patch_embed.proj.weight"]
      _, tokens, _ = shapes[f"{prefix}pos_embed"]
    except (KeyError, ValueError) as error:
      raise UserError(
        f"the weights have no image encoder of BLIP ({prefix}patch_embed, {prefix}pos_embed)"
      ) from error
    blocks = {name.removeprefix(f"{prefix}blocks.").split(".")[0] for name in shapes
              if name.startswith(f"{prefix}blocks.")}  # fmt: skip
    side = round((tokens - 1) ** 0.5)
    if width % _HEAD or side**2 != tokens - 1:
      raise UserError(f"the image encoder has {width} channels, {tokens} positions: none of BLIP's")
    return cls(width, len(blocks), side * patch, patch)


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
  """The fields of `med_config.json` that matter; defaults are BERT base's with two more tokens."""

  vocab_size: int = 30524
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12
  max_position_embeddings: int = 512

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> BlipTextConfig:
    """Reads a `med_config.json`; raises UserError for a value that we do not implement."""
    kind = values.get("position_embedding_type", "absolute")
    if kind != "absolute":
      raise UserError(f"BLIP text config: position_embedding_type {kind!r} is not implemented")
    if not values.get("add_cross_attention", True):
      raise UserError("BLIP text config: add_cross_attention is false: no model of image and text")
    return checked_config(cls, values, what="BLIP text config")


class VisionAttention(nnx.Module):
  """Multi-head self-attention with one projection for queries, keys and values."""

  def __init__(self, width: int, **kw):
    self.qkv = nnx.Linear(width, 3 * width, **kw)
    self.proj = nnx.Linear(width, width, **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, -1, _HEAD), 2, 0)
    return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class Block(nnx.Module):
  """Pre-norm attention and MLP, each with a residual."""

  def __init__(self, config: BlipVisionConfig, **kw):
    width, eps = config.hidden_size, config.layer_norm_eps
    self.norm1 = layer_norm(width, eps, **kw)
    self.attn = VisionAttention(width, **kw)
    self.norm2 = layer_norm(width, eps, **kw)
    self.mlp = CLIPMLP(width, 4 * width, "gelu", **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
  """A linear map of each patch."""

  def __init__(self, config: BlipVisionConfig, **kw):
    side = config.patch_size
    window = dict(kernel_size=(side, side), strides=side, padding="VALID")
    self.proj = nnx.Conv(3, config.hidden_size, **window, **kw)

  def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
    patches = self.proj(pixels)
    return patches.reshape(len(patches), -1, patches.shape[-1])


class BlipVisionTransformer(nnx.Module):
  """Token 0 is CLS, then the patches row by row, after the last norm."""

  def __init__(self, config: BlipVisionConfig, *, param_dtype, rngs, **kw):
    def table(rows: int) -> nnx.Param:
      noise = jax.random.normal(rngs.params(), (1, rows, config.hidden_size), param_dtype)
      return nnx.Param(0.02 * noise)

    kw = dict(param_dtype=param_dtype, rngs=rngs, **kw)
    self.cls_token = table(1)
    self.pos_embed = table(1 + (config.image_size // config.patch_size) ** 2)
    self.patch_embed = PatchEmbed(config, **kw)
    self.blocks = nnx.List(Block(config, **kw) for _ in range(config.num_hidden_layers))
    self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
    patches = self.patch_embed(pixels)
    cls = jnp.broadcast_to(self.cls_token[...], (len(patches), 1, patches.shape[-1]))
    x = jnp.concatenate([cls, patches], axis=1) + self.pos_embed[...]
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


class BertEmbeddings(nnx.Module):
  """Words and positions, normalised; there are no token types."""

  def __init__(self, config: BlipTextConfig, **kw):
    width = config.hidden_size
    self.word_embeddings = embedding(config.vocab_size, width, **kw)
    self.position_embeddings = embedding(config.max_position_embeddings, width, **kw)
    self.LayerNorm = layer_norm(width, config.layer_norm_eps, **kw)

  def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    positions = self.position_embeddings(jnp.arange(ids.shape[1]))
    return self.LayerNorm(self.word_embeddings(ids) + positions)


class BertSelfAttention(nnx.Module):
  """Multi-head attention on the text itself, or on the image."""

  def __init__(self, config: BlipTextConfig, context_width: int, **kw):
    width = config.hidden_size
    self.heads = config.num_attention_heads
    self.query = nnx.Linear(width, width, **kw)
    self.key = nnx.Linear(context_width, width, **kw)
    self.value = nnx.Linear(context_width, width, **kw)

  def __call__(
    self, x: Float[Array, "b t d"], context: Float[Array, "b s c"],
    mask: Bool[Array, "b 1 1 s"] | None,
  ) -> Float[Array, "b t d"]:
    def by_head(y):
      return y.reshape(*y.shape[:2], self.heads, -1)

    q, k, v = by_head(self.query(x)), by_head(self.key(context)), by_head(self.value(context))
    return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)


class BertOutput(nnx.Module):
  """A linear layer, the residual, and a norm behind it."""

  def __init__(self, inputs: int, config: BlipTextConfig, **kw):
    self.dense = nnx.Linear(inputs, config.hidden_size, **kw)
    self.LayerNorm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(
    self, x: Float[Array, "b t e"], residual: Float[Array, "b t d"]
  ) -> Float[Array, "b t d"]:
    return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nnx.Module):
  """Attention with its output; the file calls the first of them `self`."""

  def __init__(self, config: BlipTextConfig, context_width: int, **kw):
    self.self = BertSelfAttention(config, context_width, **kw)
    self.output = BertOutput(config.hidden_size, config, **kw)

  def __call__(self, x, context, mask=None):
    return self.output(self.self(x, context, mask), x)


class BertIntermediate(nnx.Module):
  """The widening half of the MLP."""

  def __init__(self, config: BlipTextConfig, **kw):
    self.activation = config.hidden_act
    self.dense = nnx.Linear(config.hidden_size, config.intermediate_size, **kw)

  def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
    return ACTIVATIONS[self.activation](self.dense(x))


class BertLayer(nnx.Module):
  """Attention on the text, attention on the image, MLP; norms behind each."""

  def __init__(self, config: BlipTextConfig, image_width: int, **kw):
    self.attention = BertAttention(config, config.hidden_size, **kw)
    self.crossattention = BertAttention(config, image_width, **kw)
    self.intermediate = BertIntermediate(config, **kw)
    self.output = BertOutput(config.intermediate_size, config, **kw)

  def __call__(self, x, image, mask):
    x = self.attention(x, x, mask)
    x = self.crossattention(x, image)
    return self.output(self.intermediate(x), x)


class BertEncoder(nnx.Module):
  """The layers in a row."""

  def __init__(self, config: BlipTextConfig, image_width: int, **kw):
    layers = range(config.num_hidden_layers)
    self.layer = nnx.List(BertLayer(config, image_width, **kw) for _ in layers)

  def __call__(self, x, image, mask):
    for layer in self.layer:
      x = layer(x, image, mask)
    return x


class BlipTextEncoder(nnx.Module):
  """BERT that looks at an image; the text sees all of itself but its padding."""

  def __init__(self, config: BlipTextConfig, image_width: int, **kw):
    self.embeddings = BertEmbeddings(config, **kw)
    self.encoder = BertEncoder(config, image_width, **kw)

  def __call__(
    self, ids: Int[Array, "b t"], mask: Int[Array, "b t"], image: Float[Array, "b s c"]
  ) -> Float[Array, "b t d"]:
    """`mask`: 1 = a token, 0 = padding. The result is after the last layer's norm."""
    return self.encoder(self.embeddings(ids), image, mask[:, None, None].astype(bool))
