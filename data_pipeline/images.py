"""Pictures from files or encoded bytes, with errors that name the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import DataError


def read_image(source: str | Path | bytes, name: str = "") -> UInt8[np.ndarray, "h w c"]:
  """RGB, or RGBA where the file has transparency, upright (EXIF); `name` is for the error.

  Raises DataError when the file is missing, is no picture, or breaks off.
  """
  name = name or str(source)
  try:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
      image = ImageOps.exif_transpose(image)
      return np.array(image.convert("RGBA" if has_alpha(image) else "RGB"))
  except FileNotFoundError:
    raise DataError(f"{name} does not exist; check the path") from None
  except UnidentifiedImageError:
    raise DataError(f"{name} is not a picture that can be read; give a PNG or JPEG") from None
  except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
    reason = " ".join(str(error).split())
    raise DataError(f"{name} cannot be read ({reason}); save it again as PNG or JPEG") from None


def read_mask(source: str | Path | bytes, name: str = "") -> UInt8[np.ndarray, "h w"]:
  """A mask file as grey values, or its alpha channel where it has one that is not opaque."""
  image = read_image(source, name)
  if image.shape[-1] == 4 and np.any(image[..., 3] < 255):
    return image[..., 3]
  # Masks are grey; for coloured ones the brightest channel says "subject".
  return image[..., :3].max(-1)


def has_alpha(image: Image.Image) -> bool:
  """Whether the picture's mode can hold transparency (its header suffices)."""
  return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
