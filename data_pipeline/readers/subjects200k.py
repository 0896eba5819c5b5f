"""Subjects200K: Parquet files of pairs, two pictures of one subject in one wide picture.

Looked up (the data sets' cards Yuanshi/Subjects200K and _collection3; Yuanshi9815/Subjects200K,
README; Yuanshi9815/OminiControl b16330c, src/train/data.py): data/train-*.parquet with image
{bytes, path}, collection, quality_assessment {compositeStructure, objectConsistency, imageQuality}
(5 is best; may be null), description {item, description_0 (left), description_1, category,
description_valid}. 16 pixels of padding are left of and above each half: of 1056 x 528 pixels the
halves of 512 begin at x = 16 and 544, y = 16. The authors train on pairs with 5 in all three.
Licence: Apache-2.0.

Pictures lie inside of the Parquet files, so this is a SubjectSet of its own: rows are read by row
group, of which the last few stay in memory. A drawn pair costs the reading of a row group.
"""

import collections
import hashlib
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from data_pipeline import images, sampling
from data_pipeline.errors import DataError
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings

_BEST = 5
_PADDING, _STEP = 16, 64  # a half's side is a multiple of _STEP
_SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
_KEPT_GROUPS = 4
LICENCE = "Apache-2.0"
NOTES = ("there are no masks: all of a half counts as the subject; `python -m "
         "data_pipeline.prepare` makes masks",)  # fmt: skip


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether it, or data/ in it, has Parquet files with images and their assessment."""
  for file in _files(root)[:1]:
    try:
      with file.open("rb") as opened:
        return {"image", "quality_assessment"} <= set(pq.read_schema(opened).names)
    except (pa.ArrowInvalid, OSError):
      return file.parent.name == "data" and file.name.startswith("train-")
  return False


def _files(root: epath.Path) -> list[epath.Path]:
  return [folder / name for folder in (root / "data", root)
          for name in sorted(texts.names_in(folder)) if name.endswith(".parquet")]  # fmt: skip


def open_subjects(root: epath.Path, found: Findings) -> "Pairs":
  """Reads all columns but the pictures'."""
  pairs, broken = [], []
  for file in _files(root):
    try:
      with file.open("rb") as opened:
        parquet = pq.ParquetFile(opened)
        for group in range(parquet.num_row_groups):
          table = parquet.read_row_group(group, ["quality_assessment", "description"])
          for row, values in enumerate(table.to_pylist()):
            pair = _pair(file, group, row, values, found)
            pairs += [pair] if pair else []
    except (pa.ArrowInvalid, OSError) as error:
      broken.append((file.name, " ".join(str(error).split())))
  for name, reason in broken:
    found.bad(name, f"it cannot be read ({reason}); fetch it again",
              pictures=max(2, 2 * len(pairs) // max(1, len(_files(root)) - len(broken))))
  return Pairs(root, pairs)


Place = collections.namedtuple("Place", "file group row noun captions")


def _pair(file: epath.Path, group: int, row: int, values: dict, found: Findings) -> Place | None:
  name, said = f"{file.stem} {group} {row}", values["description"] or {}
  scores = [(values["quality_assessment"] or {}).get(key) for key in _SCORES]
  noun = texts.clean_noun(said.get("item") or "")
  captions = [said.get("description_0"), said.get("description_1")]
  if not noun or not all(captions) or said.get("description_valid") is False:
    found.unwanted(name, "it has no valid description")
  elif any(score is None or score < _BEST for score in scores):
    found.unwanted(name, f"its assessment is {scores}, not {_BEST} in all")
  else:
    return Place(file, group, row, noun, tuple(texts.with_noun(text, noun) for text in captions))
  return None


class Pairs:
  """The pairs, a `data_pipeline.sources.rows.SubjectSet`."""

  def __init__(self, root: epath.Path, places: list[Place]):
    self.where, self._places, self._rows = str(root), places, RowGroups()
    self.names = [f"{place.file.stem} {place.group} {place.row}" for place in places]
    nouns = [sampling.spelling_key(place.noun) for place in places]
    self.table = sampling.SubjectTable(
      np.arange(len(places)), np.full(len(places), -1), np.unique(nouns, return_inverse=True)[1])
    self.pictures = 2 * len(places)
    self.features_folder = root.parent / f"{root.name}_features"

  def __getitem__(self, number: int) -> "Pair":
    return Pair(self.where, self._places[number], self._rows)

  def fingerprint(self) -> str:
    """A hash of the files' names and sizes, and of the rows that are used."""
    digest, sizes = hashlib.sha256(), {}
    for place in self._places:
      if place.file not in sizes:
        sizes[place.file] = place.file.stat().length
      line = place.file.name, sizes[place.file], *place[1:]
      digest.update(f"{line}\n".encode())
    return digest.hexdigest()


class Pair:
  """One pair, a `data_pipeline.sources.rows.Subject` of two frames."""

  def __init__(self, where: str, place: Place, rows: "RowGroups"):
    self.noun, self._place, self._rows = place.noun, place, rows
    self.where = f"{where}, subject {place.file.stem} {place.group} {place.row}"

  def is_reference(self) -> np.ndarray:
    """bool [2]: either half may be."""
    return np.ones(2, bool)

  def captions(self, f: int) -> list[str]:
    """Of the left half (0) or the right one (1)."""
    return [self._place.captions[f]]

  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]:
    """A half uint8 [s, s, 3], and the mask of all of it."""
    content = self._rows.image(self._place)
    name = f"{self._place.file}, row {self._place.row} of group {self._place.group}"
    pixels = images.read_image(content, name)[..., :3]
    height, width = pixels.shape[:2]
    padding = _PADDING if (height - _PADDING) % _STEP == 0 else 0
    side = min(height - padding, width // 2 - padding)
    if side < 1:
      raise DataError(f"{name} has {width} x {height} pixels: no two pictures side by side")
    x = padding + f * (side + padding)
    half = np.ascontiguousarray(pixels[padding : padding + side, x : x + side])
    return half, np.full(half.shape[:2], 255, np.uint8)


class RowGroups:
  """The encoded pictures of the row groups that were read last."""

  def __init__(self):
    self._kept: collections.OrderedDict = collections.OrderedDict()
    self._lock = threading.Lock()

  def image(self, place: Place) -> bytes:
    """A row's picture, as it is encoded; DataError where it cannot be read."""
    key = os.fspath(place.file), place.group
    with self._lock:  # threads that want one group wait for it, and do not read it twice
      if key not in self._kept:
        try:
          with place.file.open("rb") as file:
            column = pq.ParquetFile(file).read_row_group(place.group, ["image"])["image"]
        except (pa.ArrowInvalid, OSError) as error:
          raise DataError(f"{place.file} cannot be read ({error}); fetch it again") from error
        self._kept[key] = column
        if len(self._kept) > _KEPT_GROUPS:
          self._kept.popitem(last=False)
      self._kept.move_to_end(key)
      value = self._kept[key][place.row].as_py()
    if not value or not value.get("bytes"):
      raise DataError(f"{place.file}, row {place.row} of group {place.group} has no picture")
    return value["bytes"]
