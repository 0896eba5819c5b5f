"""Preparing images for an image encoder, on the device (transformers' CLIPImageProcessor)."""

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

# Keys of preprocessor_config.json with the one value that we implement.
_ONLY = {"do_resize": True, "do_center_crop": True, "do_normalize": True}
_METHODS = {3: "cubic", 2: "linear"}  # PIL's number -> jax.image's name; DINO's first files have 2


def clip_pixels(
  images: Float[Array, "b h w 3"], processor: Mapping[str, Any], *, square: bool = False
) -> Float[Array, "b s s 3"]:
  """Images in [0, 1] as the encoder wants them; pure and differentiable.

  Resized (antialiased, not rounded to bytes as PIL does), mean and standard deviation taken out.

  Args:
    processor: mean, std, size (after the crop; None neither resizes nor crops) and, if they are not
      the size and cubic, shortest_edge and method.
    square: resize both sides to the size and clip what overshoots [0, 1], so that nothing of the
      image is lost; otherwise the shortest edge is resized and the centre cropped.
  """
  size = processor["size"]
  if size is not None:
    batch, height, width, channels = images.shape
    edge = processor.get("shortest_edge") or size
    short = min(height, width)
    shape = (batch, edge * height // short, edge * width // short, channels)
    if square:
      shape = (batch, size, size, channels)
    if shape != images.shape:
      images = jax.image.resize(images, shape, processor.get("method", "cubic"))
      images = jnp.clip(images, 0.0, 1.0) if square else images
    top, left = (shape[1] - size) // 2, (shape[2] - size) // 2
    images = images[:, top : top + size, left : left + size]
  return (images - jnp.asarray(processor["mean"])) / jnp.asarray(processor["std"])


def processor_from_dict(
  values: Mapping[str, Any], default: Mapping[str, Any], *, any_size: bool = False
) -> dict[str, Any]:
  """Reads a `preprocessor_config.json`.

  Args:
    default: mean, std and size where the file does not say them.
    any_size: whether the encoder takes other sizes than the default.

  Raises:
    UserError: it asks for something that we do not implement, or for another size.
  """
  for key, wanted in _ONLY.items():
    if values.get(key, wanted) != wanted:
      raise UserError(f"{key} is {values[key]!r}; we implement {wanted!r} only")
  if values.get("resample", 3) not in _METHODS:
    raise UserError(f"resample is {values['resample']!r}; we implement {list(_METHODS)}")
  size = default["size"]
  edge = values.get("size", size)
  # Older files have a plain number, newer ones {"shortest_edge": n} and {"height": n, "width": n}.
  edge = edge.get("shortest_edge", edge.get("height")) if isinstance(edge, dict) else edge
  crop = values.get("crop_size", edge if any_size else size)
  crop = crop.get("height") if isinstance(crop, dict) else crop
  known = isinstance(edge, int) and isinstance(crop, int) and edge >= crop
  if not known or not (any_size or crop == size):
    wanted = "one size in whole pixels" if any_size else f"{size} x {size} pixels"
    raise UserError(
      f"size {values.get('size')} and crop_size {values.get('crop_size')} do not give the image "
      f"encoder {wanted}"
    )
  mean, std = (tuple(values.get(f"image_{key}", default[key])) for key in ("mean", "std"))
  method = _METHODS[values.get("resample", 3)]
  return {"mean": mean, "std": std, "size": crop, "shortest_edge": edge, "method": method}


def processor_to_dict(processor: Mapping[str, Any]) -> dict[str, Any]:
  """The `preprocessor_config.json` of a processor."""
  size = processor["size"]
  return {
    "image_processor_type": "CLIPImageProcessor",
    **_ONLY,
    "resample": {v: k for k, v in _METHODS.items()}[processor.get("method", "cubic")],
    "size": {"shortest_edge": processor.get("shortest_edge") or size},
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": list(processor["mean"]),
    "image_std": list(processor["std"]),
    "do_convert_rgb": True,
  }
