"""The pictures of a triple in TensorFlow operations, as `data_pipeline.triples` makes them.

Backgrounds are white there; here pictures are inverted, so that white is 0: what lies outside of
the subject is then nothing to be added, and need not be decoded.
"""

from typing import NamedTuple

from data_pipeline.graph import files
from data_pipeline.graph import resize as resizing
from data_pipeline.images import OPAQUE
from data_pipeline.sources.tf_data import import_tensorflow

FILE, ALPHA, NONE = range(3)  # kinds of masks
_HALVINGS = 5


class Frame(NamedTuple):
  """A frame of which the mask is decoded, and of the picture only the header."""

  picture: files.Picture
  code: object  # the orientation in which the stored picture is shown
  height: object  # of the shown picture, int32
  width: object
  origin: object  # int32 [2], (x, y) of the frame in the shown picture
  mask: object  # uint8 [h, w] of the frame
  box: object  # int32 [4], (x0, y0, x1, y1) of its opaque pixels
  visible: object  # the same of those that are not 0


def open_frame(description) -> Frame:
  """Reads what `plan.describe` describes; an error where Pillow has to."""
  tf = import_tensorflow()
  kind, rotation, box = (description[key] for key in ("mask_kind", "rotation", "box"))
  blob = files.read_blob(description["picture"], description["picture_span"])
  picture = files.read_header(blob, alpha=kind == ALPHA)
  code, height, width = files.shown_as(picture, rotation)

  def from_file():
    mask = files.decode_mask(files.read_blob(description["mask"], description["mask_span"]))
    # A mask that was drawn on the picture as it is stored, lying on its side, is turned like it.
    stored, shown = tf.shape(mask), tf.stack([picture.height, picture.width])
    sideways = (picture.orientation >= 5) & (picture.height != picture.width)
    own = tf.where(sideways & tf.reduce_all(stored == shown), picture.orientation, 1)
    turned = tf.gather_nd(files.TURNED, tf.stack([own - 1, rotation // 90 % 4]))
    return files.resize_nearest(files.turn(mask, turned), height, width)

  mask = tf.switch_case(kind, {
    FILE: from_file,
    ALPHA: lambda: files.turn(files.decode_alpha(picture), code),
    NONE: lambda: tf.fill([height, width], tf.constant(255, tf.uint8)),
  })  # fmt: skip
  threshold = description["threshold"]
  hard = lambda: tf.cast(tf.cast(mask, tf.int32) >= threshold, tf.uint8) * 255  # noqa: E731
  mask = tf.cond(threshold > 0, hard, lambda: mask)
  box = tf.where(tf.reduce_any(box != 0), box, tf.stack([0, 0, width, height]))
  files.refuse_unless((box[2] <= width) & (box[3] <= height), "a box outside of the picture")
  mask = mask[box[1] : box[3], box[0] : box[2]]
  visible, opaque = _boxes(tf, mask)
  return Frame(picture, code, height, width, box[:2], mask, opaque, visible)


def _boxes(tf, mask):
  """(x0, y0, x1, y1) of what is not 0, and of what is opaque; an error where nothing is."""
  rows = tf.reduce_max(mask, 1)
  # Maxima over columns are slow in TensorFlow, and those of two halves fast.
  halves = mask
  for _ in range(_HALVINGS):
    half = (tf.shape(halves)[0] + 1) // 2
    halves = tf.maximum(halves[:half], halves[tf.shape(halves)[0] - half :])
  columns = tf.reduce_max(halves, 0)

  def extent(values, least):
    places = tf.cast(tf.where(values >= least)[:, 0], tf.int32)
    files.refuse_unless(tf.size(places) > 0, "an empty mask")
    return places[0], places[-1] + 1

  boxes = []
  for least in (1, OPAQUE):
    (x0, x1), (y0, y1) = extent(columns, least), extent(rows, least)
    boxes.append(tf.stack([x0, y0, x1, y1]))
  return boxes


def place(frame: Frame, size: int, ratio, position):
  """`triples._place_at`: the subject on white, uint8 [size, size, 3].

  ratio: float64, the longer side of the subject / the canvas. position: float64 [2], where in the
  room that is left, x and y.
  """
  tf = import_tensorflow()
  first, last = tf.unstack(tf.cast(tf.reshape(frame.box, [2, 2]), tf.float64))
  longer = tf.reduce_max(last - first)
  extent = ratio * (last - first) / longer
  centre = extent / 2 + position * (1 - extent)
  side = longer / ratio  # of the canvas, in pixels of the picture
  corner = (first + last) / 2 - centre * side
  margin = _margin(tf, side, size)
  more = files.JPEG_MARGIN
  limits = tf.concat([tf.maximum(frame.visible[:2] - more, 0), tf.minimum(
    frame.visible[2:] + more, tf.reverse(tf.shape(frame.mask), [0]))], 0)  # fmt: skip
  part = _part(tf, corner, side, margin, limits)
  planes, alpha = _decode(tf, frame, part)
  planes = _times_alpha(tf, tf.bitwise.invert(planes), alpha)
  planes = tf.pad(planes, [[0, 0], [margin, margin], [margin, margin]])
  start = corner - tf.cast(part[:2] - margin, tf.float64)
  placed = resizing.resize(planes, tf.concat([start, start + side], 0), size)
  return tf.ensure_shape(tf.bitwise.invert(placed), [size, size, 3])


def square(frame: Frame, size: int):
  """`triples.square`: the largest square around the subject; picture and mask."""
  tf = import_tensorflow()
  shape = tf.reverse(tf.shape(frame.mask), [0])  # width, height
  side = tf.reduce_min(shape)
  middle = tf.cast(frame.box[:2] + frame.box[2:] - side, tf.float64) / 2
  corner = tf.clip_by_value(middle, tf.zeros([2], tf.float64), tf.cast(shape - side, tf.float64))
  side = tf.cast(side, tf.float64)
  part = _part(tf, corner, side, _margin(tf, side, size), tf.concat([[0, 0], shape], 0))
  planes, alpha = _decode(tf, frame, part)
  start = corner - tf.cast(part[:2], tf.float64)
  box = tf.concat([start, start + side], 0)
  target = resizing.resize(planes, box, size)
  mask = resizing.resize(alpha[None], box, size, resizing.BILINEAR)[..., 0]
  return tf.ensure_shape(target, [size, size, 3]), tf.ensure_shape(mask, [size, size])


def _margin(tf, side, size: int):
  """Pixels around the canvas that the kernel reaches, and those in which a crop may be wrong."""
  reach = tf.cast(tf.math.ceil(resizing.SUPPORT * tf.maximum(side / size, 1.0)), tf.int32)
  return reach + files.JPEG_MARGIN


def _part(tf, corner, side, margin, limits):
  """int32 [4]: the pixels under a canvas and its margin, inside the limits."""
  low = tf.cast(tf.floor(corner), tf.int32) - margin
  high = tf.cast(tf.math.ceil(corner + side), tf.int32) + margin
  return tf.concat([tf.maximum(low, limits[:2]), tf.minimum(high, limits[2:])], 0)


def _decode(tf, frame: Frame, part):
  """Picture uint8 [3, w, h] and mask uint8 [w, h] of a part of the frame."""
  shown = part + tf.concat([frame.origin, frame.origin], 0)
  # Where the frame ends inside of the picture, its last column needs the neighbour behind it.
  size = tf.stack([frame.width, frame.height])
  is_part = tf.reduce_any(tf.reverse(tf.shape(frame.mask), [0]) != size)
  more = tf.where(is_part, files.JPEG_MARGIN, 0)
  low, high = tf.maximum(shown[:2] - more, 0), tf.minimum(shown[2:] + more, size)
  planes = files.decode_part(
    frame.picture, frame.code, frame.height, frame.width, tf.concat([low, high], 0))
  planes = tf.slice(planes, tf.concat([[0], shown[:2] - low], 0),
                    tf.concat([[3], shown[2:] - shown[:2]], 0))  # fmt: skip
  return planes, tf.transpose(frame.mask[part[1] : part[3], part[0] : part[2]])


def _times_alpha(tf, planes, alpha):
  """round(planes * alpha / 255), uint8 [3, w, h]."""

  def soft():
    # x / 255 is never halfway between two integers; 16 bits hold all that comes up.
    x = tf.cast(planes, tf.uint16) * tf.cast(alpha, tf.uint16) + 128
    eight = tf.constant(8, tf.uint16)
    x += tf.bitwise.right_shift(x, eight)
    return tf.cast(tf.bitwise.right_shift(x, eight), tf.uint8)

  is_hard = tf.reduce_max(tf.reshape(alpha, [-1]) + 1) <= 1  # in 8 bits 255 + 1 is 0
  return tf.cond(is_hard, lambda: tf.bitwise.bitwise_and(planes, alpha), soft)
