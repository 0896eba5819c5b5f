"""A picture of what was prepared, for somebody to look at before training on it."""

import io
import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.prepare.parts import Work, read_frames

_ROWS, _COLUMNS = 12, 6  # subjects, and frames of each
_CELL, _LABEL = 128, 150
_PALE = 0.75  # how much of white lies on what is not the subject


def contact_sheet(work: Work, keep: np.ndarray) -> bytes:
  """A JPEG: a row for each of some subjects, their frames paler where their masks are black.

  `keep`: bool [frames] of the manifest. Subjects are taken evenly from all, frames likewise.
  """
  first, count = (work.manifest.subjects[key].to_numpy() for key in ("first", "count"))
  kept = np.flatnonzero(np.add.reduceat(keep, first) > 0)
  subjects = kept[_evenly(len(kept), _ROWS)]
  sheet = Image.new("RGB", (_LABEL + _COLUMNS * _CELL, len(subjects) * _CELL), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
  starts = [group.start for group in work.groups]
  row = 0
  parts = itertools.groupby(subjects, lambda s: int(np.searchsorted(starts, s, "right")) - 1)
  for part, inside in parts:
    frames = [frame for frame in read_frames(work, part) if keep[frame["row"]]]
    for subject in inside:
      own = [f for f in frames if 0 <= f["row"] - first[subject] < count[subject]]
      texts = [work.manifest.subjects[key][int(subject)].as_py() for key in ("name", "noun")]
      for line, text in enumerate([*texts, own[0]["captions"][0]]):
        draw.text((4, row * _CELL + 8 + 18 * line), text[:24], "black", font)
      for column, n in enumerate(_evenly(len(own), _COLUMNS)):
        sheet.paste(_cell(own[n]), (_LABEL + column * _CELL, row * _CELL))
      row += 1
  out = io.BytesIO()
  sheet.save(out, "JPEG", quality=85)
  return out.getvalue()


def _evenly(count: int, most: int) -> np.ndarray:
  """At most `most` of the numbers below `count`, evenly spaced."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _cell(frame: dict) -> Image.Image:
  """A frame in a white square."""
  picture = np.asarray(Image.open(io.BytesIO(frame["picture"])), float)
  alpha = np.asarray(Image.open(io.BytesIO(frame["mask"])), float)[..., None] / 255
  shown = picture + (255 - picture) * _PALE * (1 - alpha)
  image = Image.fromarray(np.rint(shown).astype(np.uint8))
  image.thumbnail((_CELL - 4, _CELL - 4), Image.Resampling.BICUBIC)
  cell = Image.new("RGB", (_CELL, _CELL), "white")
  cell.paste(image, ((_CELL - image.width) // 2, (_CELL - image.height) // 2))
  return cell
