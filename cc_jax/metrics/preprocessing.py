"""Pictures as a scorer's network wants them, as its reference prepares them, on the host by Pillow.

References differ in ways that move a score's second digit, so each is said: whether the shorter
side or both sides are resized, by which filter, whether the result is bytes or floats, which way an
odd margin is cropped, and what becomes of transparency.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import CLIP_PROCESSOR

CLIP_STATISTICS = {key: CLIP_PROCESSOR[key] for key in ("mean", "std")}
_FILTERS = {"cubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}
_NAMES = {"cubic": "bicubic", "linear": "bilinear"}
_ALPHA = {"white": "alpha laid on white", "drop": "alpha dropped",
          "drop_last": "alpha dropped after resizing"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Resize, crop the centre, scale to [0, 1], take mean and standard deviation out."""

  size: int  # of the result, pixels a side
  shortest_edge: int | None  # it is resized to this; None: both sides to `size`, not cropped
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: str = "cubic"  # or linear; Pillow's filters, which antialias
  # An odd margin: torchvision's CenterCrop rounds half of it (to even), transformers cuts it off.
  crop: str = "floor"  # or round
  in_floats: bool = False  # resized without rounding to bytes (transformers' DINOv3)
  # Transparency: transformers 5 lays it on white, `convert("RGB")` drops it, some after resizing.
  alpha: str = "white"  # or drop, drop_last

  def __call__(self, pictures: Sequence[Any]) -> Float[np.ndarray, "n s s 3"]:
    """Pixels of uint8 pictures [h, w], [h, w, 1], [h, w, 3], [h, w, 4], or PIL images; float32.

    Raises:
      UserError: a picture is something else; it is named by its place, from 0.
    """
    return np.stack([self._one(to_pil(image, i)) for i, image in enumerate(pictures)])

  def _one(self, image: Image.Image) -> Float[np.ndarray, "s s 3"]:
    if self.alpha != "drop_last":
      image = on_white(image) if self.alpha == "white" else image.convert("RGB")
    width, height = image.size
    if self.shortest_edge is None:
      width = height = self.size
    else:
      edge, short = self.shortest_edge, min(width, height)
      width, height = int(edge * width / short), int(edge * height / short)
    if self.in_floats:
      pixels = _resize_floats(image, (width, height), _FILTERS[self.method])
    else:
      pixels = image if image.size == (width, height) else image.resize(
        (width, height), _FILTERS[self.method])  # fmt: skip
      pixels = self._cropped(pixels).convert("RGB")
    return _normalised(pixels, self.mean, self.std)

  def _cropped(self, image: Image.Image) -> Image.Image:
    margins = [side - self.size for side in image.size]
    halves = [margin // 2 if self.crop == "floor" else round(margin / 2) for margin in margins]
    left, top = halves
    return image.crop((left, top, left + self.size, top + self.size))

  def describe(self) -> str:
    """What is done, in words."""
    filter_name = f"Pillow {_NAMES[self.method]}" + (" on floats" if self.in_floats else "")
    if self.shortest_edge is None:
      resized = f"both sides resized to {self.size} ({filter_name})"
    else:
      margin = "rounded down" if self.crop == "floor" else "rounded half to even"
      resized = (
        f"shorter side resized to {self.shortest_edge} ({filter_name}), centre crop {self.size} "
        f"(margin {margin})"
      )
    mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
    return f"{_ALPHA[self.alpha]}; {resized}, mean {mean}, std {std}"


def to_pil(picture: Any, index: int = 0) -> Image.Image:
  """A PIL image of a uint8 array [h, w], [h, w, 1], [h, w, 3], [h, w, 4], or itself."""
  check_picture(picture, index)
  if isinstance(picture, Image.Image):
    return picture
  array = np.asarray(picture)
  return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def check_picture(picture: Any, index: int) -> None:
  """Raises UserError for what is no picture; `index` is its place, from 0."""
  if isinstance(picture, Image.Image):
    return
  array = np.asarray(picture)
  shape = array.shape
  if array.dtype != np.uint8 or not (array.ndim == 2 or shape[2:] in ((1,), (3,), (4,))):
    raise UserError(
      f"picture {index} is {array.dtype} of shape {shape}; give uint8 [h, w], [h, w, 3 or 4]"
    )
  if 0 in shape:
    raise UserError(f"picture {index} has no pixels (shape {shape}); leave it out")


def on_white(image: Image.Image) -> Image.Image:
  """RGB, transparency laid on white: transformers 5's `convert_to_rgb`."""
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
  return image.convert("RGB")


def _resize_floats(
  image: Image.Image, size: tuple[int, int], method: Image.Resampling
) -> Float[np.ndarray, "h w 3"]:
  """In [0, 255] without rounding; torch's antialiased interpolation has the same weights."""
  channels = np.asarray(image, np.float32).transpose(2, 0, 1)
  resized = [np.asarray(Image.fromarray(channel).resize(size, method)) for channel in channels]
  return np.stack(resized, axis=-1)


def _normalised(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  pixels = np.asarray(pixels, np.float32) / np.float32(255)
  return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
