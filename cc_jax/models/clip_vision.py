"""CLIP's vision tower, with or without projection (transformers' modeling_clip.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.models.clip_layers import (
  CLIPEncoder,
  config_from_dict,
  config_to_dict,
  embedding,
  layer_norm,
  tower_name,
)
from cc_jax.models.clip_pixels import CLIP_PROCESSOR
from cc_jax.models.image_encoder import ImageEncoder

# Class names in config.json, and whether they have a projection.
_ARCHITECTURES = {"CLIPVisionModel": False, "CLIPVisionModelWithProjection": True}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """The fields of a vision tower's `config.json` that matter; defaults are transformers'."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  with_projection: bool = False

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
    """Reads a `config.json`; raises UserError for a value that we do not implement."""
    return config_from_dict(cls, values, architectures=_ARCHITECTURES)

  def to_dict(self) -> dict[str, Any]:
    """The fields as transformers writes them into `config.json`."""
    return config_to_dict(self, model_type="clip_vision_model", architectures=_ARCHITECTURES)


class CLIPVisionOutput(NamedTuple):
  """CLS is token 0, then the patches row by row; `hidden_states[0]` is the encoder's input."""

  last_hidden_state: Float[Array, "b s d"]  # no final norm, as in transformers
  hidden_states: tuple[Float[Array, "b s d"], ...]
  pooled: Float[Array, "b d"]  # CLS after post_layernorm
  image_embeds: Float[Array, "b e"] | None  # pooled through visual_projection, if there is one

  @property
  def embedding(self) -> Float[Array, "b e"]:
    """The image's embedding, projected if the tower has a projection."""
    return self.pooled if self.image_embeds is None else self.image_embeds


class CLIPVisionEmbeddings(nnx.Module):
  """Patches, the class token and positions."""

  def __init__(self, config: CLIPVisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    width, patch = config.hidden_size, config.patch_size
    self.class_embedding = nnx.Param(
      jax.random.normal(rngs.params(), (width,), param_dtype) * width**-0.5
    )
    self.patch_embedding = nnx.Conv(
      config.num_channels, width, (patch, patch), strides=patch, padding="VALID", use_bias=False,
      **kwargs,
    )
    patches = (config.image_size // patch) ** 2
    self.position_embedding = embedding(patches + 1, width, **kwargs)

  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
    patches = self.patch_embedding(pixels)  # [B, h, w, D]
    batch, _, _, width = patches.shape
    cls = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (batch, 1, width))
    tokens = jnp.concatenate([cls, patches.reshape(batch, -1, width)], axis=1)
    return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionTransformer(nnx.Module):
  """What transformers calls `vision_model`; the typo in `pre_layrnorm` is in every weight file."""

  def __init__(self, config: CLIPVisionConfig, **kwargs):
    self.embeddings = CLIPVisionEmbeddings(config, **kwargs)
    self.pre_layrnorm = layer_norm(config.hidden_size, config.layer_norm_eps, **kwargs)
    self.encoder = CLIPEncoder(config, **kwargs)
    self.post_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, **kwargs)


class CLIPVisionModel(ImageEncoder):
  """The image encoder; see `cc_jax.models.clip_pixels` for its preprocessing."""

  normalisation = CLIP_PROCESSOR
  model_types = ("clip_vision_model",)

  def __init__(
    self, config: CLIPVisionConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.vision_model = CLIPVisionTransformer(config, **kwargs)
    if config.with_projection:
      self.visual_projection = nnx.Linear(
        config.hidden_size, config.projection_dim, use_bias=False, **kwargs
      )

  @property
  def embedding_width(self) -> int:
    """E of the embedding, which has its own width if there is a projection."""
    return self.config.projection_dim if self.config.with_projection else self.width

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor in a weight file; transformers 5 leaves the `vision_model.` out."""
    return tower_name(name, "vision_model")

  def __call__(self, pixel_values: Float[Array, "b h w c"]) -> CLIPVisionOutput:
    """Encodes images that are already resized and normalised."""
    size = self.config.image_size
    if pixel_values.shape[1:3] != (size, size):
      raise ValueError(f"pixels {pixel_values.shape}, but the image encoder takes {size}x{size}")
    tower = self.vision_model
    states = tower.encoder(tower.pre_layrnorm(tower.embeddings(pixel_values)))
    pooled = tower.post_layernorm(states[-1][:, 0])
    embeds = self.visual_projection(pooled) if self.config.with_projection else None
    return CLIPVisionOutput(states[-1], states, pooled, embeds)
