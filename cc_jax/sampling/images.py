"""Pictures in and out: references and starting images, PNG files, labelled grids."""

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from cc_jax.errors import UserError
from data_pipeline.errors import DataError
from data_pipeline.images import OPAQUE, read_image, read_pair
from data_pipeline.triples import segment_reference, split_alpha

METADATA = "cc_jax"  # the PNG text entry with a picture's settings, as JSON
FONT_SIZE, _LINE_HEIGHT = 12, 15
_GAP = 6
_PAPER, _INK = "white", "black"


def to_image(picture: Any) -> Image.Image:
  """A PIL image, uint8 [h, w, 3 or 4] or float [h, w, 3] in [0, 1] (clipped), as an RGB image.

  An alpha channel is laid on white, a PIL image turned as its metadata says.

  Raises:
    ValueError: an array of another shape.
    DataError: a PIL image whose values have no known scale.
  """
  if isinstance(picture, Image.Image):
    return _on_white(read_image(picture))
  pixels = np.asarray(picture)
  if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4):
    raise ValueError(f"a picture has the shape [h, w, 3 or 4], not {list(pixels.shape)}")
  return _on_white(pixels if pixels.dtype == np.uint8 else to_uint8(pixels))


def _on_white(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
  picture = Image.fromarray(pixels)
  if picture.mode == "RGBA":
    paper = Image.new("RGBA", picture.size, _PAPER)
    picture = Image.alpha_composite(paper, picture)
  return picture.convert("RGB")


def to_uint8(pixels: Any) -> np.ndarray:
  """Pixels in [0, 1], clipped and rounded to uint8 as diffusers' VaeImageProcessor does."""
  return (np.clip(np.asarray(pixels, np.float32), 0.0, 1.0) * 255.0).round().astype(np.uint8)


def grid(
  images: Sequence[Any], captions: Sequence[str] | None = None, *, columns: int | None = None,
  scale: float = 1.0, column_headings: Sequence[str] | None = None,
  row_headings: Sequence[str] | None = None, title: str = "",
) -> Image.Image:
  """Lays pictures out row by row, each with its caption beneath.

  Args:
    images: what `to_image` takes; None leaves a cell empty. Cells are as large as the largest.
    captions: one per picture; wrapped to the picture's width, a line break is kept.
    columns: pictures per row; by default about as many as rows.
    scale: enlargement of every picture (bicubic), text stays as it is.
    column_headings, row_headings: text above each column and to the left of each row.
    title: a line above everything.

  Raises:
    ValueError: no picture at all, or headings or captions of another number than they name.
  """
  pictures = [None if image is None else to_image(image) for image in images]
  if not any(pictures):
    raise ValueError("a grid needs at least one picture")
  columns = columns or math.ceil(math.sqrt(len(pictures)))
  rows = math.ceil(len(pictures) / columns)
  for what, texts, count in (
    ("captions", captions, len(pictures)),
    ("column headings", column_headings, columns),
    ("row headings", row_headings, rows),
  ):
    if texts is not None and len(texts) != count:
      raise ValueError(f"{len(texts)} {what} for {count}")

  width = max(round(p.width * scale) for p in pictures if p)
  height = max(round(p.height * scale) for p in pictures if p)
  captions = [_wrap(text, width) for text in captions or [""] * len(pictures)]
  heads = [_wrap(text, width) for text in column_headings or [""] * columns]
  sides = [_wrap(text, max(width, 90)) for text in row_headings or [""] * rows]
  top = _wrap(title, columns * (width + _GAP))

  left = _GAP + max((_width(text) + _GAP for side in sides for text in side), default=0)
  above_heads = _GAP + _LINE_HEIGHT * len(top)
  y = above_heads + _LINE_HEIGHT * max(map(len, heads)) + (_GAP // 2 if any(heads) else 0)
  row_tops = []
  for row in range(rows):
    row_tops.append(y)
    under = max(map(len, captions[row * columns : (row + 1) * columns]))
    y += height + _LINE_HEIGHT * under + _GAP

  sheet = Image.new("RGB", (left + columns * (width + _GAP), y), _PAPER)
  draw = ImageDraw.Draw(sheet)
  _write(draw, top, left, _GAP)
  for column, head in enumerate(heads):
    _write(draw, head, left + column * (width + _GAP), above_heads)
  for row, side in enumerate(sides):
    _write(draw, side, _GAP, row_tops[row] + (height - _LINE_HEIGHT * len(side)) // 2)
  for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
    row, column = divmod(index, columns)
    x, y = left + column * (width + _GAP), row_tops[row]
    if picture:
      size = round(picture.width * scale), round(picture.height * scale)
      if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
      sheet.paste(picture, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))
    _write(draw, caption, x, y + height)
  return sheet


def make_folder(path: Any) -> None:
  """Makes the folder of pictures, perhaps in a bucket. UserError: it cannot be written to."""
  folder = epath.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    writable = "://" in os.fspath(folder) or os.access(folder, os.W_OK)
    reason = "no permission"
  except OSError as error:
    writable, reason = False, error.strerror or error
  if not writable:
    raise UserError(f"cannot write to the folder {path} ({reason}); choose another one")


def save(image: Image.Image, path: Any, settings: Mapping[str, Any] | None = None) -> None:
  """Writes a PNG, whole or not at all, to a file or a bucket's URL; makes its folder if need be.

  The PNG carries `settings`: `json.loads(Image.open(path).text['cc_jax'])`.

  Raises:
    UserError: it cannot be written.
  """
  text = PngImagePlugin.PngInfo()
  if settings is not None:
    text.add_text(METADATA, json.dumps(settings))
  file = epath.Path(path)
  part = file.parent / f"{file.name}.part"
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as out:
      image.save(out, format="PNG", pnginfo=text)
    part.replace(file)
  except OSError as error:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    raise UserError(f"cannot write the picture {path}: {error}; choose another path") from error


def read_reference(
  reference: Any, mask: Any = None, *, ratio: float = 0.8, size: int = 64, layout: str = "centred"
) -> UInt8[np.ndarray, "s s 3"]:
  """A reference as training shows it: cut out, on white, centred, its longer side `ratio` of it.

  `reference` and `mask`: what `data_pipeline.images.read_pair` takes. Warns, with what would help,
  if neither a mask nor an alpha channel says where the subject is. `layout`: see
  `data_pipeline.triples.segment_reference`.

  Raises:
    UserError: a file is missing, empty or no picture; values of no known scale; nothing of the
      subject is opaque; the mask has another size.
  """
  name = _name(reference, "the reference")
  pixels, mask = _read(reference, name, mask)
  if mask is not None:
    if layout != "frame" and mask.min() >= OPAQUE:
      warnings.warn(
        f"{name} is used whole, background included: its mask has the values {mask.min()} to "
        f"{mask.max()}, which is the subject everywhere; make it black where the subject is not",
        stacklevel=2,
      )
  elif layout != "frame" and split_alpha(pixels)[1] is None:
    warnings.warn(
      f"{name} is used whole, background included, which the drawing may copy: a PNG with a "
      "transparent background, or a --mask that is white on the subject, would help",
      stacklevel=2,
    )
  try:
    return segment_reference(pixels, mask, ratio=ratio, size=size, layout=layout)
  except DataError as error:
    raise UserError(f"{name}: {error}") from error


def reference_display(settings: Mapping[str, Any], size: int | None = None) -> dict[str, Any]:
  """How a training shows its references: arguments of `read_reference`.

  `settings`: config.data; with `size`, the notes of an adapter file, which name none, lack what is
  as by default, and keep the names of the first version.
  """
  if size is None:
    ratio, layout, size = (settings[key] for key in
                           ("reference_ratio", "reference_layout", "image_size"))
  else:
    ratio = float(settings.get("reference_share", 0.8))
    layout = settings.get("reference_place", "centred")
  return dict(ratio=ratio, size=size, layout=layout)


def read_start(
  image: Any, *, width: int, height: int, name: str = "the image"
) -> UInt8[np.ndarray, "h w 3"]:
  """A picture to start drawing from: its largest centred part of that shape, resized; on white.

  `image`: what `data_pipeline.images.read_image` takes.

  Raises:
    UserError: a file is missing, empty or no picture; values of no known scale.
  """
  pixels, _ = _read(image, _name(image, name))
  return np.asarray(ImageOps.fit(_on_white(pixels), (width, height), Image.Resampling.LANCZOS))


def _read(
  picture: Any, name: str, mask: Any = None
) -> tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w"] | None]:
  """`data_pipeline.images.read_pair`, with its errors as UserErrors."""
  mask_name = _name(mask, "the mask")
  for source, what in ((picture, name), (mask, mask_name)):
    if isinstance(source, str | os.PathLike) and not Path(source).exists():
      raise UserError(f"{what} is missing; check the path")
  try:
    return read_pair(picture, mask, name, mask_name)
  except DataError as error:
    raise UserError(str(error)) from error


def _name(picture: Any, default: str) -> str:
  return str(picture) if isinstance(picture, str | os.PathLike) else default


@functools.cache
def _font():
  # Pillow's own scalable font (it falls back to a bitmap if FreeType is missing).
  return ImageFont.load_default(FONT_SIZE)


def _width(text: str) -> int:
  return math.ceil(_font().getlength(text))


def _wrap(text: str, width: int) -> list[str]:
  """Lines no wider than `width` pixels, where a single word permits it."""
  lines = []
  for paragraph in text.splitlines():
    current = ""
    for word in paragraph.split():
      longer = f"{current} {word}" if current else word
      if current and _width(longer) > width:
        lines.append(current)
        longer = word
      current = longer
    lines.append(current)
  return lines


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int) -> None:
  for index, text in enumerate(lines):
    draw.text((x, y + index * _LINE_HEIGHT), text, fill=_INK, font=_font())
