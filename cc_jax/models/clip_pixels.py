"""Preparing images for a CLIP vision tower, on the device (transformers' CLIPImageProcessor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cc_jax.errors import UserError

# OpenAI's statistics; size None leaves the pictures as large as they are.
CLIP_PROCESSOR = {
  "mean": (0.48145466, 0.4578275, 0.40821073),
  "std": (0.26862954, 0.26130258, 0.27577711),
  "size": None,
}

# Keys of preprocessor_config.json with the one value that we implement; 3 is PIL's bicubic.
_ONLY = {"do_resize": True, "resample": 3, "do_center_crop": True, "do_normalize": True}


def clip_pixels(
  images: Float[Array, "b h w 3"], processor: Mapping[str, Any]
) -> Float[Array, "b s s 3"]:
  """Images in [0, 1] as the tower wants them; pure and differentiable.

  The shortest edge is resized (bicubic, antialiased, not rounded to bytes as PIL does), the centre
  cropped, mean and standard deviation taken out.

  Args:
    processor: mean, std, size (after the crop; None neither resizes nor crops) and, if it is not
      the size, shortest_edge.
  """
  size = processor["size"]
  if size is not None:
    batch, height, width, channels = images.shape
    edge = processor.get("shortest_edge") or size
    short = min(height, width)
    shape = (batch, edge * height // short, edge * width // short, channels)
    if shape != images.shape:
      images = jax.image.resize(images, shape, "bicubic", antialias=True)
    top, left = (shape[1] - size) // 2, (shape[2] - size) // 2
    images = images[:, top : top + size, left : left + size]
  return (images - jnp.asarray(processor["mean"])) / jnp.asarray(processor["std"])


def processor_from_dict(values: Mapping[str, Any], image_size: int) -> dict[str, Any]:
  """Reads a `preprocessor_config.json` for a tower of `image_size`.

  Raises:
    UserError: it asks for something that we do not implement, or for another size.
  """
  for key, wanted in _ONLY.items():
    if values.get(key, wanted) != wanted:
      raise UserError(f"{key} is {values[key]!r}; we implement {wanted!r} only")
  edge, crop = values.get("size", image_size), values.get("crop_size", image_size)
  # Older files have a plain number, newer ones {"shortest_edge": n} and {"height": n, "width": n}.
  edge = edge.get("shortest_edge") if isinstance(edge, dict) else edge
  crop = crop.get("height") if isinstance(crop, dict) else crop
  if crop != image_size or not isinstance(edge, int) or edge < crop:
    raise UserError(
      f"size {values.get('size')} and crop_size {values.get('crop_size')} do not give the image "
      f"encoder its {image_size} x {image_size} pixels"
    )
  mean, std = (tuple(values.get(f"image_{key}", CLIP_PROCESSOR[key])) for key in ("mean", "std"))
  return {"mean": mean, "std": std, "size": crop, "shortest_edge": edge}


def processor_to_dict(processor: Mapping[str, Any]) -> dict[str, Any]:
  """The `preprocessor_config.json` of a processor."""
  size = processor["size"]
  return {
    "image_processor_type": "CLIPImageProcessor",
    **_ONLY,
    "size": {"shortest_edge": processor.get("shortest_edge") or size},
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": list(processor["mean"]),
    "image_std": list(processor["std"]),
    "do_convert_rgb": True,
  }
