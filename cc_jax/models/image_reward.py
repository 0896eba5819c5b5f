"""ImageReward (Xu et al. 2023): BLIP on a prompt and a picture, and an MLP on its first token.

THUDM/ImageReward: ImageReward/ImageReward.py. Its file has two projections of BLIP's pretraining
(`vision_proj`, `text_proj`) that no score reads.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cc_jax.models.blip import (
  BlipTextConfig,
  BlipTextEncoder,
  BlipVisionConfig,
  BlipVisionTransformer,
)
from cc_jax.models.layers import Identity

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards of its training
TOKENS = 35
_WIDTHS = (1024, 128, 64, 16, 1)
_HAS_DROPOUT = (True, True, True, False, False)  # behind each: they count in the numbering
_NO_PARAMETERS = ("blip.vision_proj.", "blip.text_proj.")


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
  """Of both encoders."""

  vision: BlipVisionConfig
  text: BlipTextConfig


class Blip(nnx.Module):
  """The two encoders."""

  def __init__(self, config: ImageRewardConfig, **kw):
    self.visual_encoder = BlipVisionTransformer(config.vision, **kw)
    self.text_encoder = BlipTextEncoder(config.text, config.vision.hidden_size, **kw)


class RewardMLP(nnx.Module):
  """Five linear layers with nothing between them but (in training) dropout."""

  def __init__(self, inputs: int, **kw):
    layers: list[nnx.Module] = []
    for width, dropout in zip(_WIDTHS, _HAS_DROPOUT, strict=True):
      layers += [nnx.Linear(inputs, width, **kw)] + ([Identity()] if dropout else [])
      inputs = width
    self.layers = nnx.List(layers)

  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b 1"]:
    for layer in self.layers:
      x = layer(x)
    return x


class ImageReward(nnx.Module):
  """The reward of pictures for prompts."""

  def __init__(
    self, config: ImageRewardConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.blip = Blip(config, **kw)
    self.mlp = RewardMLP(config.text.hidden_size, **kw)

  def image_features(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
    """The image encoder's CLS, after its last norm."""
    return self.blip.visual_encoder(pixels)[:, 0]

  def __call__(
    self, pixels: Float[Array, "b s s 3"], ids: Int[Array, "b t"], mask: Int[Array, "b t"]
  ) -> Float[Array, " b"]:
    """Standardised rewards, around 0; `mask` is 1 at tokens, 0 at padding."""
    image = self.blip.visual_encoder(pixels)
    text = self.blip.text_encoder(ids, mask, image)
    return (self.mlp(text[:, 0])[:, 0] - MEAN) / STD

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor of ImageReward.pt; None for what no score reads."""
    if name.startswith(_NO_PARAMETERS) or name.endswith(".position_ids"):
      return None
    return name
