"""OmniObject3D's renders: blender_renders/CATEGORY/OBJECT/render/images/r_0.png ...

Looked up (omniobject3d/OmniObject3D 043fb60: README, tools/blender_script.py, its pixelNeRF
loader): 100 views a render of 512 x 512 beside transforms.json. The script writes RGB on black
though it renders with a transparent film, and the authors' loader takes what is not black for the
object; releases with alpha exist. So a set with alpha is cut out by it, else by what is not black.
Object numbers have gaps, and renders may be missing. raw/blender_renders_24_views/img/CATEGORY/
OBJECT/*.png (issue threads) is read too; the real videos (videos_processed) are not.
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

_PLACES = ("blender_renders", "raw/blender_renders", "blender_renders_24_views/img",
           "raw/blender_renders_24_views/img")  # fmt: skip


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether it has one of the folders of renders."""
  return any((root / place).is_dir() for place in _PLACES)


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each object; its number is the last part of its name."""
  for place in _PLACES:
    if not (root / place).is_dir():
      continue
    for category in listing.entries(root / place):
      noun = texts.clean_noun(category.name)
      for thing in listing.entries(category):
        inner = "render/images" if (thing / "render" / "images").is_dir() else ""
        folder = thing / inner if inner else thing
        names = sorted((name for name in texts.names_in(folder) if name.endswith(".png")),
                       key=_number)  # fmt: skip
        path = "/".join(filter(None, (place, category.name, thing.name, inner)))
        kind = _has_alpha(folder / names[0]) if names else True
        frames = [_frame(f"{path}/{name}", noun, kind) for name in names]
        yield SubjectRow(f"{category.name}/{thing.name}", noun, frames, licence="CC-BY-4.0",
                         creator="OmniObject3D")  # fmt: skip


def _frame(path: str, noun: str, has_alpha: bool) -> FrameRow:
  # Without alpha the picture is its own mask: the object is where its brightest channel is not 0.
  mask = dict(mask_kind="alpha") if has_alpha else dict(mask=path, mask_kind="file", threshold=1)
  return FrameRow(path, (texts.plain_caption(noun),), **mask)


def _has_alpha(file: epath.Path) -> bool:
  try:
    return images.file_has_alpha(file)
  except DataError:
    return True  # a broken file: reading it will say so


def _number(name: str) -> tuple[int, str]:
  digits = re.findall(r"\d+", name)
  return int(digits[-1]) if digits else -1, name
