"""Pictures from files or encoded bytes, with errors that name the file."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import DataError

# Where a PNG may say which way is up, by Pillow's names.
_ORIENTATION = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}


def open_image(source: str | Path | bytes, name: str = "") -> Image.Image:
  """The decoded picture, upright (EXIF), in the file's own mode; `name` is for the error.

  Raises DataError, with Pillow's error as its cause, when the file is missing, is no picture, or
  breaks off.
  """
  source_file = io.BytesIO(source) if isinstance(source, bytes) else source
  with _pillow_errors(name or str(source)), Image.open(source_file) as image:
    image.load()
    # Asking a PNG without metadata costs a fifth of its decoding.
    if image.format != "PNG" or image.info.keys() & _ORIENTATION:
      ImageOps.exif_transpose(image, in_place=True)
  return image


def read_image(
    source: str | Path | bytes, name: str = "", *, grey: bool = False
) -> UInt8[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w"]:
  """`open_image` as RGB, or as RGBA where the file has transparency.

  With `grey`, a picture of grey values stays one [h, w].
  """
  image = open_image(source, name)
  with _pillow_errors(name or str(source)):
    return np.array(image if grey and image.mode == "L" else to_rgb_or_rgba(image))


def to_rgb_or_rgba(image: Image.Image) -> Image.Image:
  """RGBA where the picture has transparency, else RGB."""
  return image.convert("RGBA" if has_alpha(image) else "RGB")


def read_mask(source: str | Path | bytes, name: str = "") -> UInt8[np.ndarray, "h w"]:
  """A mask file as grey values, or its alpha channel where it has one that is not opaque."""
  image = read_image(source, name, grey=True)
  if image.ndim == 2:
    return image
  if image.shape[-1] == 4 and np.any(image[..., 3] < 255):
    return image[..., 3]
  # Masks are grey; of a coloured one the brightest channel counts.
  return image[..., :3].max(-1)


def has_alpha(image: Image.Image) -> bool:
  """Whether the picture's mode can hold transparency (its header suffices)."""
  return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


@contextlib.contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
  """Turns what Pillow raises for the picture `name` into a DataError."""
  try:
    yield
  except FileNotFoundError as error:
    raise DataError(f"{name} does not exist; check the path") from error
  except UnidentifiedImageError as error:
    raise DataError(f"{name} is not a picture that can be read; give a PNG or JPEG") from error
  except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
    reason = " ".join(str(error).split())
    raise DataError(f"{name} cannot be read ({reason}); save it again as PNG or JPEG") from error
