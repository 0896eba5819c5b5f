"""CLIP whole: image and text, each projected into one space (transformers' CLIPModel)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel

# The temperature of training: cosines are compared without it.
_NO_PARAMETERS = ("logit_scale",)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """The configs of both towers, with their projections."""

  text: CLIPTextConfig
  vision: CLIPVisionConfig

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
    """Reads a `config.json`; raises UserError for a value that we do not implement."""
    width = values.get("projection_dim", 512)  # of both, whatever the towers' own sections say
    towers = {}
    for name, config, architecture in (
      ("text", CLIPTextConfig, "CLIPTextModelWithProjection"),
      ("vision", CLIPVisionConfig, "CLIPVisionModelWithProjection"),
    ):
      # Files of 2022 have the values under `text_config_dict`, which then count.
      section = values.get(f"{name}_config_dict") or values.get(f"{name}_config")
      if not isinstance(section, Mapping):
        raise UserError(f"CLIP config: {name}_config is missing; take the whole model's")
      section = {**section, "architectures": [architecture], "projection_dim": width}
      towers[name] = config.from_dict(section)
    return cls(**towers)


class CLIPModel(nnx.Module):
  """Both towers; the parameters are those of one file of transformers."""

  def __init__(
    self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.text = CLIPTextModel(config.text, **kwargs)
    self.vision = CLIPVisionModel(config.vision, **kwargs)

  def image_features(self, pixel_values: Float[Array, "b s s 3"]) -> Float[Array, "b e"]:
    """Projected, not normalised: transformers' `get_image_features`."""
    return self.vision(pixel_values).image_embeds

  def text_features(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b e"]:
    """Projected, not normalised: transformers' `get_text_features`."""
    return self.text(input_ids).pooled

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor in a weight file of the whole model."""
    if name in _NO_PARAMETERS or name.endswith(".position_ids"):
      return None
    part = "text" if name.startswith("text_") else "vision"
    return f"{part}.{name}"
