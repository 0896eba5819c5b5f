"""WildRGB-D: CATEGORY/scenes/scenes_ID/{rgb,masks}/00000.png, a video of one object each.

Looked up (wildrgbd/wildrgbd 2689f57, README; naver/dust3r, preprocess_wildrgbd.py): names have five
digits, masks are PNG of the picture's size with values of 0 and 255. CATEGORY/types.json says which
scenes show a "single" object, "multi" or "hand"; whether by type or by scene is not said, so both
are read. The licence is MIT.
"""

from collections.abc import Iterator

from etils import epath

from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings
from data_pipeline.sources import listing


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether a folder in it has scenes of frames."""
  categories = [path for path in inside if (path / "scenes").is_dir()]
  return any((scene / "rgb").is_dir() for path in categories[:1]
             for scene in listing.entries(path / "scenes")[:3])  # fmt: skip


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each scene with a single object."""
  for category in listing.entries(root):
    if not (category / "scenes").is_dir():
      continue
    kinds = _kinds(category / "types.json")
    noun = texts.clean_noun(category.name)
    for scene in listing.entries(category / "scenes"):
      name = f"{category.name}/scenes/{scene.name}"
      kind = kinds.get(scene.name, "single")
      if kind != "single":
        found.unwanted(name, f"a scene of the type {kind!r}: several objects, or a hand")
        continue
      masks, frames = texts.names_in(scene / "masks"), []
      for picture in sorted(texts.names_in(scene / "rgb")):
        mask = dict(mask=f"{name}/masks/{picture}", mask_kind="file") if picture in masks else {}
        frames.append(FrameRow(f"{name}/rgb/{picture}", (texts.plain_caption(noun),), **mask))
      yield SubjectRow(name, noun, found.masked(frames, True), licence="MIT")


def _kinds(file: epath.Path) -> dict[str, str]:
  """Scene -> its type."""
  if not file.exists():
    return {}
  kinds: dict[str, str] = {}
  for key, value in texts.read_json(file).items():
    if isinstance(value, str):
      kinds[key.rsplit("/", 1)[-1]] = value
    else:
      kinds |= {scene.rsplit("/", 1)[-1]: key for scene in value}
  return kinds
