"""Pictures and masks from files, encoded bytes, PIL images and arrays: one reader for all doors.

A picture becomes uint8 RGB, or RGBA where it has transparency, turned as its metadata says, that of
a PIL image too. Greys of 16 bits and floats in [0, 1] are scaled to 8 bits; what has no known scale
is refused. A mask becomes uint8 [h, w], 255 = subject. Of several frames the first one counts.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from data_pipeline.errors import DataError

# Where files say which way is up, by Pillow's names in `Image.info`; TIFF has it among its tags.
_RAW_PROFILES = tuple(f"Raw profile type {kind}" for kind in ("exif", "APP1", "xmp"))
_METADATA = {"exif", "xmp", "XML:com.adobe.xmp", *_RAW_PROFILES}
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")

OPAQUE = 128  # a pixel belongs to the subject from this alpha on
# A coloured mask has its subjects in a few flat colours; with more it was compressed or softened.
_FLAT_COLORS = 32
_GREY_SPREAD = 8  # channels of a grey picture that JPEG has stored as colours differ by less


def read_image(source: Any, name: str = "") -> UInt8[np.ndarray, "h w c"]:
  """A picture as RGB, or as RGBA where it has transparency.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array [h, w], [h, w, 1], [h, w, 3] or
      [h, w, 4] of integers from 0 to 255 (uint16: to 65535), bool, or floats in [0, 1].
    name: for errors; by default the path.

  Raises DataError, with Pillow's error as its cause, when the file is missing, is no picture,
  breaks off or is too large, and when the values have no known scale.
  """
  return read_pair(source, None, name)[0]


def read_mask(source: Any, name: str = "") -> UInt8[np.ndarray, "h w"]:
  """A mask, 255 = subject, of what `read_image` takes and masks are kept in.

  The alpha channel, if it says anything; else a grey picture's values, where 0 and 1 mean 0 and
  255; of palettes (Pascal VOC) what is not entry 0; of coloured masks what is not black. Raises
  DataError as `read_image` does, and for a coloured mask without black.
  """
  return _decode_mask(source, _name(source, name, "the mask"))[0]


def read_pair(
    picture: Any, mask: Any = None, name: str = "", mask_name: str = ""
) -> tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w"] | None]:
  """`read_image` and, unless it is None, `read_mask` of its mask.

  Each is turned by its own metadata. A mask without any, which was drawn on the picture as it is
  stored (its sides are the other way round), is turned like the picture.
  """
  name = _name(picture, name, "the picture")
  image = _decode(picture, name)
  stored = _pixels(image, name)
  if stored.ndim == 2:
    stored = np.repeat(stored[..., None], 3, axis=-1)
  orientation = _orientation(image)
  pixels = _turn(stored, orientation)
  if mask is None:
    return pixels, None
  values, own_orientation = _decode_mask(mask, _name(mask, mask_name, "the mask"))
  if own_orientation == 1 and values.shape == stored.shape[:2] != pixels.shape[:2]:
    values = _turn(values, orientation)
  return pixels, values


def has_alpha(image: Image.Image) -> bool:
  """Whether the picture's mode can hold transparency (its header suffices)."""
  with_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
  return with_alpha or (image.mode == "P" and image.palette.mode == "RGBA")


def file_has_alpha(file: Path) -> bool:
  """`has_alpha` of a file, also in a bucket, by its header. Raises DataError as `read_image`."""
  with _pillow_errors(None, str(file)), file.open("rb") as data, Image.open(data) as image:
    return has_alpha(image)


def header_has_alpha(data: BinaryIO, name: str) -> bool:
  """`file_has_alpha` of a file that is open, or of a part of it; `name` for errors."""
  with _pillow_errors(None, name), Image.open(data) as image:
    return has_alpha(image)


def _name(source: Any, name: str, default: str) -> str:
  return name or (str(source) if isinstance(source, str | os.PathLike) else default)


def _decode(source: Any, name: str) -> Image.Image | np.ndarray:
  """The picture as it is stored: a loaded PIL image, or an array."""
  if isinstance(source, Image.Image):
    with _pillow_errors(source, name):
      source.load()
    return source
  if isinstance(source, bytes | str | os.PathLike):
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _pillow_errors(source, name), Image.open(file) as image:
      image.load()
    return image
  if hasattr(source, "__array__"):
    return np.asarray(source)
  raise DataError(
      f"{name} is of the type {type(source).__name__}; give a path, a PIL image or an array"
  )


def _decode_mask(source: Any, name: str) -> tuple[UInt8[np.ndarray, "h w"], int]:
  """The mask, upright, and by which orientation it was turned."""
  image = _decode(source, name)
  pixels = _pixels(image, name)
  if pixels.shape[2:] == (4,) and _says_something(pixels[..., 3]):
    mask = pixels[..., 3]
  elif isinstance(image, Image.Image) and image.mode == "P":
    mask = _palette_mask(image)
  else:
    mask = _mask_of_colors(pixels[..., :3], name) if pixels.ndim == 3 else pixels
  if mask.max(initial=0) == 1:
    mask = mask * np.uint8(255)
  orientation = _orientation(image)
  return _turn(mask, orientation), orientation


def _says_something(alpha: np.ndarray) -> bool:
  return bool(alpha.min() < OPAQUE and alpha.min() < alpha.max())


def _mask_of_colors(pixels: np.ndarray, name: str) -> UInt8[np.ndarray, "h w"]:
  brightest = pixels.max(-1)
  if np.max(brightest - pixels.min(-1)) < _GREY_SPREAD:
    return brightest
  if Image.fromarray(pixels).getcolors(_FLAT_COLORS):  # None if there are more
    mask = np.where(brightest > 0, np.uint8(255), np.uint8(0))
  else:
    mask = (brightest.astype(np.uint32) * 255 // brightest.max()).astype(np.uint8)
  if mask.min() >= OPAQUE:
    raise DataError(
        f"{name} has colours and no black (the brightest channel is {brightest.min()} to "
        f"{brightest.max()}), so what is not the subject is unknown; save it white on the subject, "
        "black elsewhere"
    )
  return mask


def _palette_mask(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
  index = np.asarray(image)
  palette = np.zeros((256, 3), np.uint8)
  colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
  palette[: len(colors)] = colors
  used = np.unique(index)
  colors = palette[used]
  if np.ptp(colors, axis=1).max() == 0 and colors.max() == 255:
    return palette[index, 0]  # a grey mask that was saved with a palette, in any order
  black = used[~colors.any(1)]
  if len(black) and 0 not in black:
    return np.where(palette[index].any(-1), np.uint8(255), np.uint8(0))
  return np.where(index != 0, np.uint8(255), np.uint8(0))


def _pixels(image: Image.Image | np.ndarray, name: str) -> np.ndarray:
  """uint8 [h, w] where the picture is grey, else [h, w, 3 or 4]."""
  if isinstance(image, np.ndarray):
    channels = image.shape[2:] or (1,)
    if image.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or image.size == 0:
      raise _unusable(image, name)
    pixels = _to_8_bits(image, name)
    return pixels[..., 0] if image.shape[2:] == (1,) else pixels
  if image.mode in ("I", "F") or image.mode.startswith("I;16"):
    values = np.asarray(image)
    # Pillow opens 16 bits as I;16, but 16-bit PGM files as I.
    pixels = _to_8_bits(values, name, sixteen_bits=True)
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
      return pixels
    return np.dstack([pixels] * 3 + [np.where(values == clear, np.uint8(0), np.uint8(255))])
  with _pillow_errors(image, name):
    if image.mode == "La":
      image = image.convert("LA")
    mode = "RGBA" if has_alpha(image) else "L" if image.mode in ("1", "L") else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def _to_8_bits(values: np.ndarray, name: str, sixteen_bits: bool = False) -> np.ndarray:
  """uint8: integers up to 255 as they are, of 16 bits divided by 257; floats times 255."""
  if values.dtype == np.uint8:
    return values
  kind = values.dtype.kind
  if kind == "b":
    return values.astype(np.uint8) * np.uint8(255)
  low, high = (values.min(), values.max()) if kind in "iuf" else (np.nan, np.nan)
  if kind in "iu" and low >= 0:
    if high <= 255:
      return values.astype(np.uint8)
    if high <= 65535 and (sixteen_bits or values.dtype == np.uint16):
      return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
  half = 0.5 / 255  # of a level: what resizing and rounding leave
  if kind == "f" and low >= -half and high <= 1 + half:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
  raise _unusable(values, name)


def _unusable(values: np.ndarray, name: str) -> DataError:
  if values.size and values.dtype.kind in "biuf":
    span = f"values from {float(values.min()):g} to {float(values.max()):g}"
  else:
    span = "no values"
  return DataError(
      f"{name} has the shape {list(values.shape)}, the type {values.dtype} and {span}; give "
      "[height, width] or [height, width, 1, 3 or 4] in 8 bits (0 to 255), in 16 bits without a "
      "sign, or as floats from 0 to 1"
  )


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """As a viewer shows what is stored with that orientation (EXIF 2.3, tag 274)."""
  if orientation == 1:
    return pixels
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  return np.ascontiguousarray(pixels)


def _orientation(image: Image.Image | np.ndarray) -> int:
  """1 to 8, as EXIF's tag 274 counts: of EXIF, else of XMP; broken metadata turns nothing."""
  # Asking a PNG without metadata costs a fifth of its decoding.
  if isinstance(image, np.ndarray) or not (
      image.info.keys() & _METADATA or hasattr(image, "tag_v2")
  ):
    return 1
  profiles = [_raw_profile(image.info.get(key)) for key in _RAW_PROFILES]
  # Pillow knows EXIF in its own places, and in a raw profile of that name.
  for exif in (None, *(p for p in profiles if p.startswith(b"Exif"))):
    orientation = _exif_orientation(image, exif)
    if orientation:
      return orientation
  for xmp in (*(image.info.get(key, b"") for key in ("xmp", "XML:com.adobe.xmp")), *profiles):
    found = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
    if found:
      return int(found[1])
  return 1


def _exif_orientation(image: Image.Image, data: bytes | None) -> int | None:
  """Of the EXIF block `data`, or of what Pillow finds by itself."""
  try:
    exif = image.getexif() if data is None else Image.Exif()
    if data is not None:
      exif.load(data)
    value = exif.get(ExifTags.Base.Orientation)
  except Exception:  # Pillow raises what its parsers run into
    return None
  return value if value in range(1, 9) else None


def _raw_profile(text: Any) -> bytes:
  """The bytes of a PNG's text chunk as ImageMagick writes it: a name, a length, hexadecimals."""
  try:
    return bytes.fromhex("".join(text.split("\n")[3:]))
  except (AttributeError, ValueError):
    return b""


@contextlib.contextmanager
def _pillow_errors(source: Any, name: str) -> Iterator[None]:
  """Turns what Pillow raises for the picture `name` into a DataError."""
  try:
    yield
  except FileNotFoundError as error:
    raise DataError(f"{name} does not exist; check the path") from error
  except IsADirectoryError as error:
    raise DataError(f"{name} is a folder; name a picture in it") from error
  except UnidentifiedImageError as error:
    if source == b"" or (isinstance(source, str | os.PathLike) and not os.path.getsize(source)):
      raise DataError(f"{name} is an empty file; save the picture again") from error
    raise DataError(f"{name} is not a picture that can be read; give a PNG or JPEG") from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise DataError(
        f"{name} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, the most that Pillow opens; "
        "make it smaller, a few thousand pixels a side are plenty"
    ) from error
  except (OSError, ValueError, SyntaxError, EOFError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    raise DataError(f"{name} cannot be read ({reason}); save it again as PNG or JPEG") from error
