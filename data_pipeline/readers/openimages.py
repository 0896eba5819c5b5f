"""Open Images V5 to V7: pictures by id, objects in SPLIT-annotations-object-segmentation.csv.

Looked up (TFDS's open_images_v4 builder 1aceae8; datumaro's open_images format; public loaders):
MaskPath, ImageID, LabelName, BoxID, BoxXMin, BoxXMax, BoxYMin, BoxYMax (XMax before YMin, all
0 to 1), PredictedIoU, Clicks; masks ImageID_LABEL_BoxID.png, whose size is not their picture's,
from 16 zips by the id's first digit. SPLIT-annotations-bbox.csv, whose flags IsGroupOf, IsDepiction
and IsInside are 1, 0 or -1 (unknown); class-descriptions*.csv, with a header line in V7 and
without one before; *-images-with-rotation.csv has Rotation, License and Author. Which way Rotation
turns could not be looked up here: counter-clockwise, as people who used it remember.

Without a table of segments the boxes are the frames, all of which counts as the subject.

The data have one picture of an object: positive, reference and target are that one, the positive at
another size and place.
"""

import csv
import io
from collections.abc import Iterator

from etils import epath
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings

_SEGMENTS = "-annotations-object-segmentation.csv"
_BOXES = ("{}-annotations-bbox.csv", "oidv6-{}-annotations-bbox.csv")
_NEAR = 0.02  # by which a segment's and its box's coordinates may differ
_LEAST = 0.01  # of the picture's area that a box covers
_FLAGS = {"IsGroupOf": "a group of objects", "IsDepiction": "a drawing of the object",
          "IsInside": "a view from inside"}  # fmt: skip
NOTES = ("one picture of each object: positive and reference are the target's own picture, cut "
         "out, the positive at another size and place",)  # fmt: skip


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether it has a table of segments or boxes."""
  return bool(splits(root))


def splits(root: epath.Path) -> tuple[str, ...]:
  """Those that have a table of segments or boxes; 'train' first."""
  tables = (_SEGMENTS, "-annotations-bbox.csv")
  files = texts.names_in(root) | texts.names_in(root / "annotations")
  names = {file.removesuffix(table).removeprefix("oidv6-")
           for file in files for table in tables if file.endswith(table)}
  return tuple(sorted(names, key=lambda name: (name != "train", name)))


def subjects(root: epath.Path, found: Findings, split: str = "train") -> Iterator[SubjectRow]:
  """One for each segment (or box, where there are none); its two frames are one picture."""
  split = split if split in splits(root) else splits(root)[0]
  nouns, flags = _nouns(root), _flags(root, split)
  about = {row["ImageID"]: row for row in _rows(_find(root, f"{split}-images-with-rotation.csv",
                                                      f"{split}-images-boxable-with-rotation.csv",
                                                      "image_ids_and_rotation.csv"))}
  pictures, masks = _files(root, split, ("images", ""), ".jpg"), _files(root, split, ("masks",), "")
  segments = _find(root, split + _SEGMENTS)
  table = _rows(segments) if segments else _boxes(root, split)
  for row in table:
    name, noun = row["MaskPath"].removesuffix(".png"), nouns.get(row["LabelName"])
    box = tuple(float(row[key]) for key in ("BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax"))
    picture = pictures.get(f"{row['ImageID']}.jpg")
    mask = masks.get(row["MaskPath"]) if segments else ""
    kinds = _kinds(flags.get((row["ImageID"], row["LabelName"]), ()), box)
    if noun is None:
      found.unwanted(name, f"no class is named {row['LabelName']}")
    elif kinds:
      found.unwanted(name, ", ".join(kinds))
    elif (box[1] - box[0]) * (box[3] - box[2]) < _LEAST:
      found.unwanted(name, f"its box covers less than {_LEAST:.0%} of the picture")
    elif picture is None or mask is None:
      missing = f"{row['ImageID']}.jpg" if picture is None else row["MaskPath"]
      found.bad(name, f"{missing} is missing")
    else:
      extra = about.get(row["ImageID"], {})
      turn = -round(float(extra.get("Rotation") or 0)) % 360
      place = dict(mask=mask, mask_kind="file") if segments else None
      if place is None:
        try:
          place = dict(box=_pixels(root / picture, box, turn))
        except DataError as error:
          found.bad(name, str(error))
          continue
      frame = FrameRow(picture, (texts.plain_caption(noun),), rotation=turn, **place)
      yield SubjectRow(name, noun, [frame, frame], licence=extra.get("License") or "CC-BY",
                       creator=extra.get("Author") or "")  # fmt: skip


def _kinds(boxes, segment: tuple[float, ...]) -> list[str]:
  """What the flags of the segment's box say against it."""
  for box, kinds in boxes:
    if max(abs(a - b) for a, b in zip(box, segment)) <= _NEAR:
      return kinds
  return []


def _flags(root: epath.Path, split: str) -> dict[tuple[str, str], list]:
  """(image, label) -> its boxes (x0, x1, y0, y1) that have flags, and these in words."""
  flags: dict[tuple[str, str], list] = {}
  for row in _rows(_find(root, *(name.format(split) for name in _BOXES))):
    kinds = [text for key, text in _FLAGS.items() if row.get(key) == "1"]
    if kinds:
      box = tuple(float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax"))
      flags.setdefault((row["ImageID"], row["LabelName"]), []).append((box, kinds))
  return flags


def _boxes(root: epath.Path, split: str) -> Iterator[dict[str, str]]:
  """Rows of boxes with the names that segments have."""
  table = _rows(_find(root, *(name.format(split) for name in _BOXES)))
  for number, row in enumerate(table):
    sides = {f"Box{key}": row[key] for key in ("XMin", "XMax", "YMin", "YMax")}
    yield row | sides | {"MaskPath": f"{row['ImageID']} box {number}"}


def _pixels(file: epath.Path, box: tuple[float, ...], turn: int) -> tuple[int, int, int, int]:
  """(x0, y0, x1, y1) in the picture that was turned clockwise by `turn`, of shares of the stored.

  Raises DataError for a file that is no picture.
  """
  try:
    with file.open("rb") as opened, Image.open(opened) as image:
      width, height = image.size
  except (OSError, Image.DecompressionBombError) as error:  # Pillow's others are OSErrors
    raise DataError(f"{file} cannot be read ({error})") from None
  x0, x1, y0, y1 = (round(share * side) for share, side in zip(box, (width, width, height, height)))
  for _ in range(turn // 90):
    x0, y0, x1, y1, width, height = height - y1, x0, height - y0, x1, height, width
  return x0, y0, x1, y1


def _nouns(root: epath.Path) -> dict[str, str]:
  """Label -> noun."""
  names = [path for folder in (root, root / "annotations", root / "metadata")
           for path in (folder / name for name in sorted(texts.names_in(folder)))
           if "class-descriptions" in path.name and path.suffix == ".csv"]  # fmt: skip
  if not names:
    raise DataError(f"{root} has no class-descriptions-boxable.csv, the names of labels; fetch it "
                    "from the page of Open Images")
  rows = (row for file in names for row in csv.reader(io.StringIO(texts.read_text(file))))
  return {row[0]: texts.clean_noun(row[1]) for row in rows if row and row[0].startswith("/")}


def _files(root: epath.Path, split: str, tops: tuple[str, ...], suffix: str) -> dict[str, str]:
  """Name -> path below the root, of files in TOP, TOP/SPLIT, and folders of one digit there."""
  digits = [f"{digit:x}" for digit in range(16)]
  files: dict[str, str] = {}
  for top in tops:
    for place in (f"{top}/{split}", top):
      for folder in (place, *(f"{place}/{digit}" for digit in digits),
                     *(f"{place}/{split}-masks-{digit}" for digit in digits)):  # fmt: skip
        folder = folder.strip("/")
        for name in texts.names_in(root / folder) if folder else ():
          if name.endswith(suffix):
            files.setdefault(name, f"{folder}/{name}")
  return files


def _find(root: epath.Path, *names: str) -> epath.Path | None:
  """The first of the tables that is there."""
  places = [root / inner / name if inner else root / name
            for name in names for inner in ("", "annotations", "metadata")]  # fmt: skip
  return next((path for path in places if path.exists()), None)


def _rows(file: epath.Path | None) -> Iterator[dict[str, str]]:
  if file is not None:
    with file.open("r") as lines:
      yield from csv.DictReader(lines)
