"""Pillow's resizing in TensorFlow operations: in two passes, with 8 bits between them.

Pillow (src/libImaging/Resample.c) resizes along x, rounds and clips to 8 bits, then along y.
Resizing in float, as `tf.image.resize` does, differs from it by up to 24 levels beside hard edges,
and the other order of passes by up to 5. `ScaleAndTranslate` has Pillow's kernels ('keyscubic' with
a = -0.5, 'triangle') and its antialiasing, and takes boxes in fractions of a pixel.

Pictures are planar and transposed here, [c, w, h]: then each pass is a weighted sum of long rows,
which the operation computes several times as fast as sums over neighbours in a row.
"""

from data_pipeline.sources.tf_data import import_tensorflow

BICUBIC, BILINEAR = "keyscubic", "triangle"
SUPPORT = 2  # of the wider kernel, in pixels of the coarser of both pictures


def resize(planes, box, size: int, kernel: str = BICUBIC):
  """The part of a picture under a box, as a square: `Image.resize((size, size), kernel, box)`.

  Args:
    planes: uint8 [c, w, h].
    box: float64 [4], (x0, y0, x1, y1) in pixels. What lies outside the picture counts as 0, so far
      as whole pixels of the result are concerned; a caller to whom the edge matters pads.
    size: side of the result.
    kernel: `BICUBIC` or `BILINEAR`.

  Returns:
    uint8 [size, size, c].
  """
  tf = import_tensorflow()
  x0, y0, x1, y1 = tf.unstack(box)
  narrow = _pass(tf, planes, x0, x1, size, kernel)
  flat = _pass(tf, tf.transpose(narrow, [0, 2, 1]), y0, y1, size, kernel)
  return tf.transpose(flat, [1, 2, 0])


def _pass(tf, planes, start, end, size: int, kernel: str):
  """uint8 [c, n, m] -> uint8 [c, size, m]: the interval [start, end) of the middle axis."""
  scale = size / (end - start)
  both = lambda value, other: tf.cast(tf.stack([value, other]), tf.float32)  # noqa: E731
  one, zero = tf.ones_like(scale), tf.zeros_like(scale)
  out = tf.raw_ops.ScaleAndTranslate(
    images=planes[:, :, None, :], size=[size, 1], scale=both(scale, one),
    translation=both(-start * scale, zero), kernel_type=kernel, antialias=True)
  return tf.cast(tf.clip_by_value(out[:, :, 0, :], 0.0, 255.0) + 0.5, tf.uint8)
