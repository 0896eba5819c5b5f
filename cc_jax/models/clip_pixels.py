"""Preparing images for an image encoder, on the device (transformers' CLIPImageProcessor)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from cc_jax.errors import UserError

# OpenAI's statistics; size None leaves the pictures as large as they are.
CLIP_PROCESSOR = {
  "mean": (0.48145466, 0.4578275, 0.40821073),
  "std": (0.26862954, 0.26130258, 0.27577711),
  "size": None,
}

# Keys of preprocessor_config.json with the one value that we implement.
_ONLY = {"do_resize": True, "do_center_crop": True, "do_normalize": True}
_METHODS = {3: "cubic", 2: "linear"}  # PIL's number -> our name; DINO's first files have 2
_FILTERS = {"cubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}
_BITS = 22  # PRECISION_BITS in Pillow's Resample.c


def clip_pixels(
  images: Float[Array, "b h w 3"], processor: Mapping[str, Any], *, square: bool = False
) -> Float[Array, "b s s 3"]:
  """Images in [0, 1] as the encoder wants them; pure, and differentiable but for the resizing.

  Resized as Pillow does 8-bit pictures (no gradient passes that), mean and standard deviation taken
  out: `pixel_values` of transformers' CLIPImageProcessorPil and BitImageProcessorPil.

  Args:
    processor: mean, std, size (after the crop; None neither resizes nor crops) and, if they are not
      the size and cubic, shortest_edge and method.
    square: resize both sides to the size, so that nothing of the image is lost; otherwise the
      shortest edge is resized and the centre cropped, as transformers does.
  """
  size = processor["size"]
  if size is not None:
    height, width = images.shape[1:3]
    edge = processor.get("shortest_edge") or size
    short = min(height, width)
    if square:
      height, width = size, size
    else:
      height, width = edge * height // short, edge * width // short
    images = _resize(images, height, width, processor.get("method", "cubic"))
    top, left = (height - size) // 2, (width - size) // 2
    images = images[:, top : top + size, left : left + size]
  return (images - jnp.asarray(processor["mean"])) / jnp.asarray(processor["std"])


def _resize(
  images: Float[Array, "b h w c"], height: int, width: int, method: str
) -> Float[Array, "b height width c"]:
  """Pillow's `Image.resize` of 8-bit pictures, to the bit: width first, bytes after each pass.

  Without the bytes in between a bicubic filter leaves [0, 1] at hard edges, and the second pass
  makes more of it: up to 62 of 255 off on a checkerboard.
  """
  for equation, old, new in (
    ("bhwc,wv->bhvc", images.shape[2], width), ("bhwc,hv->bvwc", images.shape[1], height)
  ):
    if old == new:
      continue
    weights = _pillow_weights(old, new, method)
    # Products of bytes and 22 bits are too long for float32; in two halves all sums are exact.
    high = np.rint(weights / 2**11).astype(np.int32)
    high, low = (
      jnp.einsum(equation, jnp.rint(images * 255), part.astype(np.float32), precision="highest")
      for part in (high, weights - high * 2**11)
    )
    sums = high.astype(jnp.int32) * 2**11 + low.astype(jnp.int32)
    levels = (sums + 2 ** (_BITS - 1)) >> _BITS
    images = jnp.clip(levels, 0, 255).astype(images.dtype) / 255
  return images


@functools.lru_cache(16)
def _pillow_weights(old: int, new: int, method: str) -> Int[np.ndarray, "old new"]:
  """By what Pillow multiplies bytes to resize a row, in units of 2**-_BITS.

  They are its answer to rows with a single pixel; it rounds pictures of int32 as these factors.
  """
  rows = Image.fromarray(np.eye(old, dtype=np.int32) << _BITS)
  return np.asarray(rows.resize((new, old), _FILTERS[method]))


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
