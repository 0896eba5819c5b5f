"""Pictures from files or encoded bytes, with errors that name the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import DataError


def read_image(
    source: str | Path | bytes, name: str = "", *, grey: bool = False
) -> UInt8[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w"]:
  """RGB, or RGBA where the file has transparency, upright (EXIF); `name` is for the error.

  With `grey`, a picture of grey values stays one [h, w].

  Raises DataError when the file is missing, is no picture, or breaks off.
  """
  name = name or str(source)
  try:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
      if grey and image.mode == "L":
        return np.array(_upright(image))
      return np.array(_upright(image).convert("RGBA" if has_alpha(image) else "RGB"))
  except FileNotFoundError:
    raise DataError(f"{name} does not exist; check the path") from None
  except UnidentifiedImageError:
    raise DataError(f"{name} is not a picture that can be read; give a PNG or JPEG") from None
  except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
    reason = " ".join(str(error).split())
    raise DataError(f"{name} cannot be read ({reason}); save it again as PNG or JPEG") from None


def read_mask(source: str | Path | bytes, name: str = "") -> UInt8[np.ndarray, "h w"]:
  """A mask file as grey values, or its alpha channel where it has one that is not opaque."""
  image = read_image(source, name, grey=True)
  if image.ndim == 2:
    return image
  if image.shape[-1] == 4 and np.any(image[..., 3] < 255):
    return image[..., 3]
  # Masks are grey; for coloured ones the brightest channel says "subject".
  return image[..., :3].max(-1)


def has_alpha(image: Image.Image) -> bool:
  """Whether the picture's mode can hold transparency (its header suffices)."""
  return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _upright(image: Image.Image) -> Image.Image:
  # Asking a PNG without EXIF takes a fifth of the time of decoding it.
  return ImageOps.exif_transpose(image) if image.info.get("exif") else image
