"""Encoded pictures and masks in TensorFlow operations: only the part of a JPEG that is needed.

What these operations would read otherwise than `data_pipeline.images` does, they refuse by an
error: pictures with a palette, of 16 bits, in CMYK, of other kinds than JPEG and PNG, PNGs with
metadata that may turn them, files that break off. `loader` has Pillow read those.

Sources: EXIF 2.3 (JEITA CP-3451C) 4.5.4 and 4.6.2 (TIFF header, IFD, tag 274); PNG 1.2,
11.2.2 (IHDR) and 11.3; for JPEG's markers ITU-T T.81, annex B.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline.sources.tf_data import import_tensorflow

# libjpeg-turbo interpolates colours of a part's last column without the neighbour that is cut off:
# by so many pixels a part must be larger than what matters.
JPEG_MARGIN = 8
_HEAD = 1 << 17  # metadata of a JPEG lies in front; a segment has at most 65,535 bytes
# In which orders of pixels a picture is stored (EXIF's 1 to 8), and what turning it further by
# 0, 90, 180 or 270 degrees clockwise makes of that.
_SHOWN = {1: "", 2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}


def _turned() -> np.ndarray:
  """int32 [8, 4]: orientation (less 1), quarter turns -> the orientation that does both."""
  corner = np.arange(6).reshape(2, 3)
  shown = {key: _turn_array(corner, ops) for key, ops in _SHOWN.items()}
  table = np.zeros((8, 4), np.int32)
  for key, pixels in shown.items():
    for quarter in range(4):
      both = np.rot90(pixels, -quarter)
      table[key - 1, quarter] = next(k for k, other in shown.items() if np.array_equal(both, other))
  return table


def _turn_array(pixels: np.ndarray, ops: str) -> np.ndarray:
  pixels = pixels.T if "t" in ops else pixels
  pixels = pixels[:, ::-1] if "x" in ops else pixels
  return pixels[::-1] if "y" in ops else pixels


TURNED = _turned()


class Picture(NamedTuple):
  """An encoded picture of which the header is known."""

  blob: object  # scalar string
  is_jpeg: object  # bool
  height: object  # int32, as stored
  width: object
  orientation: object  # int32, by its metadata


def read_blob(path, span):
  """The bytes of a file; span is int64 [3]: (offset, length or -1, bytes in the whole file)."""
  tf = import_tensorflow()

  def part():
    record = tf.data.FixedLengthRecordDataset(
      path, span[1], header_bytes=span[0], footer_bytes=span[2] - span[0] - span[1])
    return record.take(1).get_single_element()

  return tf.cond(span[1] < 0, lambda: tf.io.read_file(path), part)


def refuse_unless(condition, reason: str):
  """An error that hands the row over to Pillow."""
  tf = import_tensorflow()
  tf.debugging.Assert(condition, [reason])


def read_header(blob, *, alpha=None) -> Picture:
  """Looks at the header of a JPEG or PNG; refuses what is to be read by Pillow.

  alpha: bool; where true, only a PNG with an alpha channel will do.
  """
  tf = import_tensorflow()
  is_jpeg = tf.strings.substr(blob, 0, 3) == b"\xff\xd8\xff"
  alpha = tf.constant(False) if alpha is None else alpha
  refuse_unless(tf.logical_not(is_jpeg & alpha), "a JPEG has no alpha channel")
  size, orientation = tf.cond(is_jpeg, lambda: _jpeg_header(blob), lambda: _png_header(blob, alpha))
  return Picture(blob, is_jpeg, size[0], size[1], orientation)


def _jpeg_header(blob):
  tf = import_tensorflow()
  head = tf.strings.substr(blob, 0, _HEAD)
  shape = tf.io.extract_jpeg_shape(head)  # [h, w, components]
  refuse_unless(shape[2] <= 3, "CMYK")
  end = tf.strings.length(blob)
  refuse_unless(tf.strings.substr(blob, end - 2, 2) == b"\xff\xd9", "breaks off, or more follows")
  data = tf.io.decode_raw(head, tf.uint8)
  start = _find(tf, data, b"Exif\0\0")
  orientation = tf.cond(start >= 0, lambda: _exif(tf, data[start + 6 :]), lambda: 0)
  in_xmp = lambda: _find(tf, data, b"tiff:Orientation") >= 0  # noqa: E731
  unknown = tf.cond(orientation == 0, in_xmp, lambda: False)
  refuse_unless(tf.logical_not(unknown), "turned by XMP")
  return shape[:2], tf.maximum(orientation, 1)


def _find(tf, data, text: bytes):
  """Index of the first occurrence of text in uint8 [n], or -1."""
  count = tf.maximum(tf.size(data) - len(text) + 1, 0)
  places = tf.where(data[:count] == text[0])  # [places, 1]
  letters = tf.gather(data, places + tf.range(len(text), dtype=tf.int64))
  found = tf.reduce_all(letters == tf.constant(list(text), tf.uint8), 1)
  first = lambda: tf.cast(places[tf.argmax(found), 0], tf.int32)  # noqa: E731
  return tf.cond(tf.reduce_any(found), first, lambda: -1)


def _exif(tf, tiff):
  """Orientation 1 to 8 in the IFD 0 of a TIFF header uint8 [n], or 0."""
  values = tf.cast(tiff, tf.int32)
  little = values[0] == ord("I")
  refuse_unless(little | (values[0] == ord("M")), "broken EXIF")

  def number(digits):  # [..., n] bytes in the file's order
    digits = tf.cond(little, lambda: tf.reverse(digits, [-1]), lambda: digits)
    return tf.reduce_sum(digits * 256 ** tf.range(digits.shape[-1] - 1, -1, -1), -1)

  first = number(tf.ensure_shape(values[4:8], [4]))
  count = number(tf.ensure_shape(values[first : first + 2], [2]))
  entries = tf.reshape(values[first + 2 : first + 2 + 12 * count], [count, 12])
  is_short = number(entries[:, 2:4]) == 3
  found = (number(entries[:, :2]) == 274) & is_short
  value = tf.reduce_max(tf.where(found, number(entries[:, 8:10]), 0))
  refuse_unless(tf.reduce_sum(tf.cast(number(entries[:, :2]) == 274, tf.int32))
                == tf.reduce_sum(tf.cast(found, tf.int32)), "unusual EXIF")  # fmt: skip
  return tf.where((value >= 1) & (value <= 8), value, 0)


def _png_header(blob, alpha):
  """8 bits of grey, RGB or RGBA, and nothing that may turn it or make it transparent."""
  tf = import_tensorflow()
  refuse_unless(tf.strings.substr(blob, 0, 8) == b"\x89PNG\r\n\x1a\n", "neither JPEG nor PNG")
  head = tf.cast(tf.io.decode_raw(tf.strings.substr(blob, 0, 33), tf.uint8), tf.int32)
  depth, kind = head[24], head[25]
  refuse_unless((depth == 8) | ((kind == 0) & (depth < 8)), "16 bits")
  refuse_unless(tf.where(alpha, kind == 6, (kind == 0) | (kind == 2) | (kind == 6)), "a palette")
  chunks = r"(?s)\C*(?:tRNS|eXIf|acTL|Raw profile type|XML:com\.adobe\.xmp)\C*"
  refuse_unless(tf.logical_not(tf.strings.regex_full_match(blob, chunks)), "metadata")
  size = tf.reduce_sum(tf.reshape(head[16:24], [2, 4]) * [1 << 24, 1 << 16, 1 << 8, 1], 1)
  return tf.reverse(size, [0]), 1  # stored as width, height


def shown_as(picture: Picture, rotation):
  """(orientation 1 to 8 with `rotation` degrees clockwise on top, shown height, shown width)."""
  tf = import_tensorflow()
  code = tf.gather_nd(TURNED, tf.stack([picture.orientation - 1, rotation // 90 % 4]))
  swapped = code >= 5
  height = tf.where(swapped, picture.width, picture.height)
  width = tf.where(swapped, picture.height, picture.width)
  return code, height, width


def _flips(code):
  """(transposed, then x mirrored, then y mirrored) of an orientation, bools."""
  tf = import_tensorflow()
  among = lambda *codes: tf.reduce_any(code == tf.constant(codes))  # noqa: E731
  return code >= 5, among(2, 3, 6, 7), among(3, 4, 7, 8)


def turn(pixels, code):
  """uint8 [h, w] as a viewer shows what is stored with that orientation."""
  tf = import_tensorflow()

  def turned():
    swap, mirror_x, mirror_y = _flips(code)
    out = tf.cond(swap, lambda: tf.transpose(pixels), lambda: pixels)
    return tf.raw_ops.Reverse(tensor=out, dims=tf.stack([mirror_y, mirror_x]))

  return tf.cond(code == 1, lambda: pixels, turned)


def decode_part(picture: Picture, code, height, width, part):
  """A part of the shown picture, planar and transposed: uint8 [3, w, h].

  Args:
    picture: of `read_header`.
    code, height, width: of `shown_as`.
    part: int32 [4], (x0, y0, x1, y1) inside the shown picture.
  """
  tf = import_tensorflow()
  swap, mirror_x, mirror_y = _flips(code)
  x0, y0, x1, y1 = tf.unstack(part)
  x0, x1 = tf.where(mirror_x, width - x1, x0), tf.where(mirror_x, width - x0, x1)
  y0, y1 = tf.where(mirror_y, height - y1, y0), tf.where(mirror_y, height - y0, y1)
  x0, y0, x1, y1 = tf.unstack(tf.where(swap, [y0, x0, y1, x1], [x0, y0, x1, y1]))

  from_jpeg = lambda: tf.io.decode_and_crop_jpeg(  # noqa: E731
    picture.blob, [y0, x0, y1 - y0, x1 - x0], 3, dct_method="INTEGER_ACCURATE")
  from_png = lambda: tf.io.decode_png(picture.blob, 3)[y0:y1, x0:x1]  # noqa: E731
  pixels = tf.cond(picture.is_jpeg, from_jpeg, from_png)
  planes = tf.transpose(pixels, tf.where(swap, [2, 0, 1], [2, 1, 0]))
  dims = tf.stack([tf.constant(False), mirror_x, mirror_y])
  reverse = lambda: tf.raw_ops.Reverse(tensor=planes, dims=dims)  # noqa: E731
  return tf.ensure_shape(tf.cond(mirror_x | mirror_y, reverse, lambda: planes), [3, None, None])


def decode_alpha(picture: Picture):
  """The alpha channel uint8 [h, w] of a PNG that has one; refuses one that is opaque throughout."""
  tf = import_tensorflow()
  alpha = tf.io.decode_png(picture.blob, 4)[..., 3]
  refuse_unless(tf.reduce_min(alpha) < 255, "opaque throughout")
  return alpha


def decode_mask(blob):
  """A grey PNG (or one of three equal channels) as uint8 [h, w], 255 = subject."""
  tf = import_tensorflow()
  header = read_header(blob)
  refuse_unless(tf.logical_not(header.is_jpeg), "a mask as JPEG")
  kind = tf.io.decode_raw(tf.strings.substr(blob, 25, 1), tf.uint8)[0]
  refuse_unless(kind == 0, "a mask with colours")
  mask = tf.io.decode_png(blob, 1)[..., 0]
  ones = tf.reduce_max(mask) == 1
  return tf.cond(ones, lambda: mask * tf.constant(255, tf.uint8), lambda: mask)


def resize_nearest(mask, height, width):
  """A mask of another size in the picture's proportions, as `manifest_frames.resize_mask` does."""
  tf = import_tensorflow()
  rows, columns = tf.unstack(tf.shape(mask))
  most = tf.reduce_max(tf.stack([height, width, rows, columns]))
  refuse_unless(tf.abs(rows * width - columns * height) <= most, "a mask of other proportions")
  index = lambda count, old: (2 * tf.range(count) + 1) * old // (2 * count)  # noqa: E731
  resized = lambda: tf.gather(  # noqa: E731
    tf.gather(mask, index(height, rows)), index(width, columns), axis=1)
  same = (rows == height) & (columns == width)
  return tf.cond(same, lambda: mask, resized)
