"""Any folder: ROOT/SUBJECT/*.jpg, without the captions.json of data_pipeline/sources/folder.py.

The class noun is the folder's name without its number (blue_mug_02 is a blue mug). A caption is the
text file of the picture's name (on_desk.txt beside on_desk.jpg), as trainers of LoRAs write it,
else 'a photo of a blue mug'. A mask is STEM_mask.png beside the picture, STEM.png in the folder
masks, or the picture's alpha.
"""

import re
from collections.abc import Iterator

from etils import epath

from data_pipeline import images
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings
from data_pipeline.sources import listing

_ALPHA = (".png", ".webp", ".tif", ".tiff", ".gif", ".avif")


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether a folder in it has two pictures, and none has a captions.json: that is 'folder'."""
  has_pictures = False
  for folder in (path for path in inside if path.is_dir()):
    names = texts.names_in(folder)
    if any(name.lower() == "captions.json" for name in names):
      return False
    has_pictures |= sum(listing.is_picture(epath.Path(name)) for name in names) >= 2
  return has_pictures


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each folder that has a name."""
  rows = []
  for folder in listing.entries(root):
    if not folder.is_dir():
      continue
    noun = texts.clean_noun(re.sub(r"[\W_\d]+$", "", folder.name).replace("-", " "))
    if noun:
      rows.append((folder, noun, list(_frames(root, folder, noun, found))))
    else:
      found.unwanted(folder.name, "its name is no class noun")
  masked = any(frame.mask_kind != "none" for _, _, frames in rows for frame in frames)
  for folder, noun, frames in rows:
    yield SubjectRow(folder.name, noun, found.masked(frames, masked))


def _frames(
  root: epath.Path, folder: epath.Path, noun: str, found: Findings
) -> Iterator[FrameRow]:
  names, masks = texts.names_in(folder), texts.names_in(folder / "masks")
  for name in sorted(names):
    stem = name.rsplit(".", 1)[0]
    if name.startswith(".") or not listing.is_picture(epath.Path(name)) or stem.endswith("_mask"):
      continue
    place = dict(mask_kind="none")
    if f"{stem}_mask.png" in names:
      place = dict(mask=f"{folder.name}/{stem}_mask.png", mask_kind="file")
    elif f"{stem}.png" in masks:
      place = dict(mask=f"{folder.name}/masks/{stem}.png", mask_kind="file")
    elif _has_alpha(folder / name):
      place = dict(mask_kind="alpha")
    try:
      text = texts.read_text(folder / f"{stem}.txt").strip() if f"{stem}.txt" in names else ""
    except DataError as error:
      found.bad(f"{folder.name}/{name}", str(error))
      continue
    yield FrameRow(f"{folder.name}/{name}", (texts.with_noun(text, noun),), **place)


def _has_alpha(file: epath.Path) -> bool:
  try:
    return file.suffix.lower() in _ALPHA and images.file_has_alpha(file)
  except DataError:
    return True  # a broken file: reading it will say so
