"""The pictures of a triple: segmented positive, segmented reference, target with background.

All sources, the command line and the notebooks use this implementation in numpy and Pillow. Pillow
releases the GIL while it resizes, so threads make use of all cores.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.images import OPAQUE

# How a reference is shown: cut out on white and centred; cut out, at its size and position in the
# frame; cut out, at a random size and position like positives; or the complete frame with its
# background. The last three are for the laboratory: they decide whether the encoder learns of size,
# position and scene.
LAYOUTS = ("centred", "in_place", "random", "frame")


@dataclasses.dataclass(frozen=True)
class TripleConfig:
  """Sizes and positions as fractions of the canvas (see `configs/subjects3d.py`)."""

  image_size: int = 64
  reference_ratio: float = 0.8
  reference_jitter: float = 0.0
  positive_ratio: tuple[float, float] = (0.4, 0.9)
  reference_layout: str = "centred"
  placements: int = 0  # fixed ones of each frame; 0 = a fresh one each time

  @property
  def reference_placements(self) -> int:
    """How many of the fixed placements show different references: 1 where nothing is random."""
    jitters = self.reference_layout == "centred" and self.reference_jitter > 0
    return self.placements if jitters or self.reference_layout == "random" else 1

  @classmethod
  def from_config(cls, data) -> TripleConfig:
    """From `config.data`; raises DataError that names an invalid value."""
    config = cls(*(getattr(data, field.name) for field in dataclasses.fields(cls)))
    low, high = config.positive_ratio
    if config.image_size < 8:
      raise DataError(f"data.image_size={config.image_size} must be at least 8")
    if not 0 < config.reference_ratio <= 1:
      raise DataError(f"data.reference_ratio={config.reference_ratio} must lie in (0, 1]")
    if not 0 <= config.reference_jitter < 1:
      raise DataError(f"data.reference_jitter={config.reference_jitter} must lie in [0, 1)")
    if not 0 < low <= high <= 1:
      raise DataError(f"data.positive_ratio={(low, high)} must be a range inside (0, 1]")
    if config.reference_layout not in LAYOUTS:
      raise DataError(
          f"data.reference_layout={config.reference_layout!r} is unknown; use one of "
          f"{', '.join(LAYOUTS)}"
      )
    if config.placements < 0:
      raise DataError(f"data.placements={config.placements} must be 0 (always a fresh one) or more")
    return config


def make_triple(
    rng: np.random.Generator,
    images: tuple[np.ndarray, np.ndarray, np.ndarray],
    masks: tuple[np.ndarray, np.ndarray, np.ndarray],
    config: TripleConfig,
    ids: tuple[tuple[int, int], ...] = (),
) -> dict[str, np.ndarray]:
  """The pictures of frames (i, j, k), each `uint8 [h, w, 3]` with a mask `uint8 [h, w]`.

  `ids`: each frame's (subject, frame) in the data set, needed if config.placements > 0.
  Returns `positive`, `reference`, `target` `uint8 [s, s, 3]` and `target_mask` `uint8 [s, s]`,
  s = config.image_size. Raises DataError for an empty mask or shapes that do not fit.
  """
  positive_u, reference_u = draw_places(rng, config, ids)
  positive = show_positive(images[0], masks[0], config, positive_u)
  reference = show_reference(images[1], masks[1], config, reference_u)
  target, target_mask = square(images[2], masks[2], config.image_size)
  return dict(positive=positive, reference=reference, target=target, target_mask=target_mask)


def draw_places(
    rng: np.random.Generator, config: TripleConfig, ids: tuple[tuple[int, int], ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
  """The uniform numbers [3] that place the positive and the reference; `ids` of `make_triple`."""
  # Both are always drawn, so that options of one do not change the random numbers of the other.
  positive_u, reference_u = rng.random(3), rng.random(3)
  if config.placements:
    positive_k, reference_k = (choose_placement(u, config) for u in (positive_u, reference_u))
    positive_u, _ = placement(*ids[0], positive_k)
    _, reference_u = placement(*ids[1], reference_k)
  return positive_u, reference_u


def choose_placement(u: np.ndarray, config: TripleConfig) -> int:
  """Which of the fixed placements the uniform numbers that would have placed the frame choose."""
  return int(u[0] * config.placements)


def placement(subject: int, frame: int, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The uniform numbers [3] of a frame's fixed placement k, as a positive and as a reference."""
  rng = sampling.placement_rng(subject, frame, k)
  return rng.random(3), rng.random(3)


def show_positive(
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    config: TripleConfig,
    u: np.ndarray,
) -> UInt8[np.ndarray, "s s 3"]:
  """A frame as a positive: on white, at the size and place that three uniform numbers say."""
  return _place_at(image, mask, config.image_size, *positive_place(config, u))


def positive_place(config: TripleConfig, u: np.ndarray) -> tuple[float, np.ndarray]:
  """A positive's longer side / the canvas, and where it is in the room that is left, [2]."""
  low, high = config.positive_ratio
  return low + (high - low) * u[0], u[1:]


def show_reference(
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    config: TripleConfig,
    u: np.ndarray,
) -> UInt8[np.ndarray, "s s 3"]:
  """A frame as the encoder sees it: config.reference_layout says how (`LAYOUTS`).

  `u` are three uniform numbers in [0, 1) for size, x and y where these are random; 0.5 each is the
  middle. Raises DataError for an empty mask or shapes that do not fit.
  """
  size, layout = config.image_size, config.reference_layout
  if layout in ("in_place", "frame"):
    mask = _checked_mask(image, mask)
    if layout == "in_place":
      alpha = mask[..., None].astype(np.uint32)
      image = ((image * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return square(image, mask, size)[0]
  if layout == "random":
    return show_positive(image, mask, config, u)
  return _place_at(image, mask, size, *reference_place(config, u))


def reference_place(config: TripleConfig, u: np.ndarray) -> tuple[float, np.ndarray]:
  """`positive_place` of a reference of the layouts 'centred' and 'random'."""
  if config.reference_layout == "random":
    return positive_place(config, u)
  jitter = config.reference_jitter
  ratio = min(1.0, config.reference_ratio * (1 + jitter * (2 * u[0] - 1)))
  return ratio, 0.5 + jitter * (u[1:] - 0.5)


def segment_reference(
    image: UInt8[np.ndarray, "h w c"],
    mask: UInt8[np.ndarray, "h w"] | None = None,
    ratio: float = 0.8,
    size: int = 64,
    layout: str = "centred",
) -> UInt8[np.ndarray, "s s 3"]:
  """A reference as training shows it: on white, centred, longer side = `ratio` of the canvas.

  `image` is RGB or RGBA; `mask` takes precedence over the alpha channel. Without either (a fully
  opaque alpha channel does not count) the uncut picture is fitted into the canvas. For adapters
  trained with another `layout` (of `LAYOUTS`) the result is the picture's largest square: cut out
  ('in_place', and 'random' too, without randomness) or with its background ('frame').
  Raises DataError for an empty mask, a fully transparent picture, or shapes that do not fit.
  """
  image, alpha = split_alpha(image)
  mask = alpha if mask is None else mask
  if layout != "centred":
    # Where there is an alpha channel, the background's colours mean nothing.
    with_background = mask is None or (layout == "frame" and alpha is None)
    config = TripleConfig(size, reference_layout="frame" if with_background else "in_place")
    mask = np.full(image.shape[:2], 255, np.uint8) if mask is None else mask
    return show_reference(image, mask, config, np.full(3, 0.5))
  if mask is None:
    return place_on_white(image, np.full(image.shape[:2], 255, np.uint8), size, ratio=1.0)
  return place_on_white(image, mask, size, ratio)


def split_alpha(
    image: UInt8[np.ndarray, "h w c"],
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"] | None]:
  """RGB and the alpha channel; None when there is none or it is opaque everywhere."""
  if image.ndim != 3 or image.shape[-1] not in (3, 4) or image.dtype != np.uint8:
    raise DataError(
        f"an image must be uint8 [height, width, 3 or 4], got {image.dtype} {list(image.shape)}"
    )
  if image.shape[-1] == 3 or np.all(image[..., 3] == 255):
    return image[..., :3], None
  return image[..., :3], image[..., 3]


def place_on_white(
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    size: int,
    ratio: float,
    centre: tuple[float, float] = (0.5, 0.5),
) -> UInt8[np.ndarray, "s s 3"]:
  """Composes the subject, by its soft alpha `mask`, onto a white square canvas.

  The longer side of the mask's bounding box becomes `ratio` of the canvas and its centre is placed
  at `centre` (x, y as fractions of the canvas), both with subpixel accuracy. Raises DataError for
  an empty mask or shapes that do not fit.
  """
  mask = _checked_mask(image, mask)
  return _place(image, mask, bounding_box(mask), size, ratio, centre)


def _place(image, mask, box: tuple[int, int, int, int], size: int, ratio: float, centre):
  """`place_on_white` with a checked mask and its bounding box."""
  x0, y0, x1, y1 = box
  side = max(x1 - x0, y1 - y0) / ratio  # of the canvas, in pixels of the picture
  left = (x0 + x1) / 2 - centre[0] * side
  top = (y0 + y1) / 2 - centre[1] * side
  # Only the part under the canvas is composed, with a margin for the support of the filter.
  margin = math.ceil(2 * max(1.0, side / size))
  west, north = math.floor(left) - margin, math.floor(top) - margin
  east, south = math.ceil(left + side) + margin, math.ceil(top + side) + margin
  patch = np.full((south - north, east - west, 3), 255, np.uint8)
  height, width = mask.shape
  ys = slice(max(north, 0), min(south, height))
  xs = slice(max(west, 0), min(east, width))
  alpha = mask[ys, xs, None].astype(np.uint32)
  composed = (image[ys, xs] * alpha + 255 * (255 - alpha) + 127) // 255
  patch[ys.start - north : ys.stop - north, xs.start - west : xs.stop - west] = composed
  box = (left - west, top - north, left - west + side, top - north + side)
  return np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BICUBIC, box))


def square(
    image: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"], size: int
) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
  """The picture's largest square, centred on the subject as far as possible, resized."""
  mask = _checked_mask(image, mask)
  x0, y0, x1, y1 = bounding_box(mask)
  height, width = mask.shape
  if height == width == size:
    return image, mask
  side = min(height, width)
  left = min(max((x0 + x1 - side) / 2, 0), width - side)
  top = min(max((y0 + y1 - side) / 2, 0), height - side)
  box = (left, top, left + side, top + side)
  resize = lambda a, how: np.asarray(Image.fromarray(a).resize((size, size), how, box))  # noqa: E731
  return resize(image, Image.Resampling.BICUBIC), resize(mask, Image.Resampling.BILINEAR)


def check_frame(image: np.ndarray, mask: np.ndarray, name: str) -> None:
  """Raises DataError, with the frame's name, for a picture or mask that a triple cannot use."""
  try:
    bounding_box(_checked_mask(image, mask))
  except DataError as error:
    raise DataError(f"{name}: {error}") from None


def bounding_box(mask: UInt8[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
  """(x0, y0, x1, y1) of the opaque pixels, ends exclusive; raises DataError when there are none."""
  opaque = mask >= OPAQUE
  xs, ys = np.flatnonzero(opaque.any(0)), np.flatnonzero(opaque.any(1))
  if len(xs) == 0:
    raise DataError(
        "the mask (or alpha channel) is empty: no pixel of the subject is opaque (its values are "
        f"{mask.min(initial=255)} to {mask.max(initial=0)}, the subject's are {OPAQUE} to 255); "
        "give one that is white, or opaque, on the subject"
    )
  return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _place_at(image, mask, size: int, ratio: float, position: np.ndarray) -> np.ndarray:
  """`position` (x, y) in [0, 1] moves the subject from one edge of the canvas to the other."""
  mask = _checked_mask(image, mask)
  x0, y0, x1, y1 = box = bounding_box(mask)
  extent = ratio * np.array([x1 - x0, y1 - y0]) / max(x1 - x0, y1 - y0)
  x, y = extent / 2 + position * (1 - extent)
  return _place(image, mask, box, size, ratio, (x, y))


def _checked_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The mask as uint8 [h, w] with 255 = subject; accepts masks of 0 and 1, which are common."""
  if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
    raise DataError(
        f"an image must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
    )
  if mask.ndim == 3 and mask.shape[-1] == 1:
    mask = mask[..., 0]
  if mask.shape != image.shape[:2]:
    raise DataError(
        f"the mask has shape {list(mask.shape)}, its image {list(image.shape[:2])}; "
        "both need the same height and width"
    )
  if mask.dtype not in (np.uint8, np.bool_):
    raise DataError(f"a mask must be uint8 or bool, got {mask.dtype}")
  if mask.dtype == np.bool_ or mask.max(initial=0) == 1:
    mask = mask.astype(np.uint8) * 255
  return mask
