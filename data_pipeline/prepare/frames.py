"""One frame: mask, caption, crop, size, bucket, and its encoded bytes."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipeline import triples
from data_pipeline.errors import DataError
from data_pipeline.images import OPAQUE
from data_pipeline.manifest import FrameRow
from data_pipeline.prepare.copies import picture_hash
from data_pipeline.prepare.settings import Settings
from data_pipeline.readers import texts
from data_pipeline.segment import Segmenter
from data_pipeline.words import find_noun

# Why frames are left out. Those of BAD count for max_bad_share; the others are choices.
UNUSABLE, NO_SUBJECT, ONE_FRAME = "unusable", "no subject found", "subject with one frame"
TINY, COPY, TOO_FEW = "tiny subject", "copy", "too few frames are left of its subject"
BAD = (UNUSABLE, NO_SUBJECT, ONE_FRAME)


class LeftOutError(Exception):
  """A frame that is not written: `args` are the kind and the reason."""


@dataclasses.dataclass(frozen=True)
class PreparedFrame:
  """What is written of a frame.

  `size` (height, width) of the upright frame before cropping, `crop` (x0, y0, x1, y1) of it,
  `bucket` (height, width); `hash` and `thumb` as of `copies.picture_hash`.
  """

  picture: bytes
  mask: bytes
  captions: tuple[str, ...]
  size: tuple[int, int]
  crop: tuple[int, int, int, int]
  bucket: tuple[int, int]
  hash: bytes
  thumb: bytes
  mask_from: str
  caption_from: str


class FramePreparer:
  """preparer(load, frame, noun) -> PreparedFrame; raises LeftOutError for what is not written.

  load() gives the frame's picture uint8 [h, w, 3] and mask uint8 [h, w], or raises DataError.
  """

  def __init__(self, settings: Settings):
    self._settings = settings
    # One thread: the mask of a picture must not depend on the machine's cores.
    self._segmenter = Segmenter(settings.segmenter, threads=1) if settings.segmenter else None
    self._captioner = settings.load_captioner()

  def __call__(self, load: Callable, frame: FrameRow, noun: str) -> PreparedFrame:
    picture, mask, mask_from = self._load(load, frame)
    height, width = mask.shape
    digest, thumb = picture_hash(picture)
    box = triples.bounding_box(mask)
    crop = crop_box(box, (height, width), self._settings.margin)
    longer = max(crop[2] - crop[0], crop[3] - crop[1])
    scale = min(1.0, self._settings.max_side / longer)
    subject = max(box[2] - box[0], box[3] - box[1]) * scale
    if subject < self._settings.min_subject:
      raise LeftOutError(TINY, f"its subject is {subject:.0f} pixels long")
    captions, caption_from = self._captions(frame, picture, noun)
    size = [max(1, round((crop[n + 2] - crop[n]) * scale)) for n in (0, 1)]
    shown = Image.fromarray(picture).crop(crop)
    cut = Image.fromarray(mask).crop(crop)
    if scale < 1:  # as `triples.square` resizes
      shown = shown.resize(size, Image.Resampling.BICUBIC)
      cut = cut.resize(size, Image.Resampling.BILINEAR)
    if np.asarray(cut).max() < OPAQUE:
      raise LeftOutError(TINY, "nothing of its subject is left in the smaller picture")
    return PreparedFrame(
      self._encode(shown), _encoded(cut, "PNG"), captions, (height, width), crop,
      nearest_bucket(size[1], size[0], self._settings.max_side), digest, thumb, mask_from,
      caption_from)

  def _load(self, load: Callable, frame: FrameRow):
    """Picture uint8 [h, w, 3], mask uint8 [h, w], and where the mask is from."""
    try:
      picture, mask = load()
    except DataError as error:
      raise LeftOutError(UNUSABLE, str(error)) from error
    opaque = frame.mask_kind == "alpha" and mask.min() == 255
    if frame.mask_kind != "none" and not opaque:
      return picture, mask, frame.mask_kind
    if self._segmenter is None:  # what only reading the picture can tell
      raise LeftOutError(UNUSABLE, "its alpha channel, or mask, is opaque everywhere; name a "
                                   "--segmenter, or give it a mask")
    mask = self._segmenter(picture)
    if mask.max() < OPAQUE:
      raise LeftOutError(NO_SUBJECT, f"the largest value of the mask is {mask.max()} of 255")
    return picture, mask, "segmenter"

  def _captions(self, frame: FrameRow, picture, noun: str) -> tuple[tuple[str, ...], str]:
    """The captions, each with the class noun in it, and where they are from."""
    captions, source = [text for text in frame.captions if text.strip()], "given"
    if all(text == texts.plain_caption(noun) for text in captions):  # what readers fill in
      captions = []
    if not captions and self._captioner:
      captions, source = [" ".join(str(self._captioner(picture, noun)).split())], "captioner"
    elif not captions:
      captions, source = [self._settings.template_caption(noun)], "template"
    with_noun = tuple(text if find_noun(text, noun) else f"{noun}, {text}" for text in captions)
    return with_noun, source if with_noun == tuple(captions) else f"{source}, noun added"

  def _encode(self, image: Image.Image) -> bytes:
    if self._settings.encoding == "png":
      return _encoded(image, "PNG")
    return _encoded(image, "JPEG", quality=95, subsampling=0)


def crop_box(
  box: tuple[int, int, int, int], sides: tuple[int, int], margin: float
) -> tuple[int, int, int, int]:
  """The subject's `box` (x0, y0, x1, y1) with a margin, inside a picture of (height, width)."""
  height, width = sides
  if np.isinf(margin):
    return 0, 0, width, height
  x0, y0, x1, y1 = box
  pad = round(margin * max(x1 - x0, y1 - y0))
  return max(x0 - pad, 0), max(y0 - pad, 0), min(x1 + pad, width), min(y1 + pad, height)


def nearest_bucket(height: int, width: int, side: int) -> tuple[int, int]:
  """(height, width) of the bucket with the nearest proportions.

  Buckets have at most side * side pixels, and sides that are multiples of side / 16 (8 at least)
  from side / 2 to 2 side: at 1024 nearly those of SDXL (arXiv 2307.01952, appendix I).
  """
  step = max(8, side // 16)
  heights = range(max(step, side // 2 // step * step), 2 * side + 1, step)
  buckets = [(h, min(side * side // h // step * step, 2 * side)) for h in heights]
  buckets = [bucket for bucket in buckets if bucket[1]]
  return min(buckets, key=lambda b: (abs(np.log(b[0] * width / (b[1] * height))), b))


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()
