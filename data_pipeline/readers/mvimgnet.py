"""MVImgNet and MVImgNet 2.0: ROOT/class_label/instance_id/images/*.jpg, a video of one object each.

Looked up: class_label is a number, names in mvimgnet_category.txt ("17,mug") or
mvimgnet2_category.json ({"17": "mug"}), which lie in the repositories and not in the data
(GAP-LAB-CUHK-SZ/MVImgNet 01aaa44, luyues/MVImgNet2.0 291fe95: README and those files). 2.0 has
instance_id/masks/. The masks of 1.0 are a download of their own (MVImgNet_mask): a loader that
reads them finds 001.jpg.png for 001.jpg, soft from 0 to 255 (a public data loader; the form that
the data need was not filled in). That 2.0 names masks like 1.0, or 001.png, is not known: both
are read. So are masks beside `images`, in `mask` or `masks`, and in ROOT/masks/class_label/....
"""

from collections.abc import Iterator

from etils import epath

from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings
from data_pipeline.sources import listing

_TABLES = ("mvimgnet_category.txt", "mvimgnet2_category.json")
_TOP_MASKS = ("masks", "mask", "MVImgNet_mask")
LICENCE = "MVImgNet Terms of Use, non-commercial"
NOTES = ("MVImgNet's terms of use allow research and no commercial use",)
# Names of the published tables that are misspelt, or no noun of a caption.
_NOUNS = {
  "wahser": "washer", "caninet": "cabinet", "swin ring": "swim ring", "bbowknot": "bow knot",
  "shakyamuni": "sugar apple", "toy chook": "toy chicken", "besom": "broom", "strings": "guitar",
  "percussion": "drum", "pipe pvc metal pipe": "pipe", "soccer": "soccer ball",
  "momordica charantia": "bitter melon", "the starfruit": "star fruit",
  "che lizi": "cherry", "eleocharis dulcis": "water chestnut", "illicium verum": "star anise",
}  # fmt: skip


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether a folder named by a number has one of instances with images."""
  numbers = [path for path in inside if path.name.isdigit() and path.is_dir()]
  return any((instance / "images").is_dir() for label in numbers[:3]
             for instance in listing.entries(label)[:3])  # fmt: skip


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each instance, in the order of class numbers."""
  nouns = _nouns(root)
  labels = [path for path in listing.entries(root) if path.name.isdigit() and path.is_dir()]
  rows, has_masks = [], False
  for label in sorted(labels, key=lambda path: int(path.name)):
    noun = nouns.get(label.name)
    if noun is None:
      found.unwanted(label.name, f"no class has the number {label.name} in the table of names")
      continue
    for instance in listing.entries(label):
      images = sorted(name for name in texts.names_in(instance / "images")
                      if listing.is_picture(epath.Path(name)))  # fmt: skip
      masks = _masks(root, f"{label.name}/{instance.name}")
      has_masks |= bool(masks)
      rows.append((f"{label.name}/{instance.name}", noun, images, masks))
  for name, noun, images, masks in rows:
    frames = []
    for image in images:
      mask = masks.get(f"{image}.png") or masks.get(f"{image.rsplit('.', 1)[0]}.png")
      kind = dict(mask=mask, mask_kind="file") if mask else {}
      frames.append(FrameRow(f"{name}/images/{image}", (texts.plain_caption(noun),), **kind))
    yield SubjectRow(name, noun, found.masked(frames, has_masks), licence=LICENCE)


def _masks(root: epath.Path, instance: str) -> dict[str, str]:
  """File name -> path below the root."""
  places = [f"{instance}/masks", f"{instance}/mask", instance]
  places += [f"{top}/{instance}" for top in _TOP_MASKS]
  found: dict[str, str] = {}
  for place in places:
    for name in texts.names_in(root / place):
      if name.endswith(".png"):
        found.setdefault(name, f"{place}/{name}")
  return found


def _nouns(root: epath.Path) -> dict[str, str]:
  """Class number -> noun."""
  table: dict[str, str] = {}
  files = [root / name for name in _TABLES if (root / name).exists()]
  for file in files:
    if file.suffix == ".json":
      table |= {number: name.strip() for number, name in texts.read_json(file).items()}
    else:
      lines = texts.read_text(file).splitlines()
      table |= {number.strip(): name for number, _, name in (line.partition(",") for line in lines)}
  if not table:
    raise DataError(
      f"{root} has no table of class names; put {_TABLES[0]} of "
      f"github.com/GAP-LAB-CUHK-SZ/MVImgNet or {_TABLES[1]} of github.com/luyues/MVImgNet2.0 there")
  nouns = {number: texts.clean_noun(name) for number, name in table.items()}
  return {number: _NOUNS.get(noun, noun) for number, noun in nouns.items() if noun}
