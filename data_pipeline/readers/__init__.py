"""Data sets as their authors publish them: which layout a folder has, and its subjects.

One file a layout; each says where its layout was looked up. A reader lists files and annotations,
opens no picture (but for a header here and there), and names what it leaves out.
"""

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING

from absl import logging
from etils import epath

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.layouts import CHOICES, LAYOUTS
from data_pipeline.manifest import LeftOut, Manifest
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings
from data_pipeline.sources import listing

if TYPE_CHECKING:
  from data_pipeline.sources.rows import SubjectSet


@dataclasses.dataclass(frozen=True)
class Captures:
  """A data set that was read: its layout, its subjects, what was left out, what one should know."""

  layout: str
  subjects: "SubjectSet"
  left_out: tuple[LeftOut, ...] = ()
  notes: tuple[str, ...] = ()


def recognise(root: epath.Path) -> str:
  """The layout of a folder; DataError for one that looks like none."""
  inside = _inside(root)
  if any(path.name == "frames.parquet" for path in inside):
    return "manifest"
  for layout in LAYOUTS:
    if _reader(layout).recognise(root, inside):
      return layout
  if any(name.lower() == "captions.json" for path in inside if path.is_dir()
         for name in texts.names_in(path)):  # fmt: skip
    return "folder"
  raise DataError(
    f"{root} has none of the layouts {', '.join(LAYOUTS)} (docs/data.md describes them); it may "
    "lie a level higher or lower, or set data.layout")


def _inside(root: epath.Path) -> list[epath.Path]:
  """What is in a folder; DataError where there is none, or it cannot be listed."""
  try:
    inside = listing.entries(root) if root.is_dir() else None
  except DataError:
    raise
  except Exception as error:  # a bucket's client raises what it likes
    raise DataError(f"{root} cannot be listed ({error}); check its name and who may read it") \
        from error
  if inside is None:
    raise DataError(f"{root} is not a folder; set data.name to the folder of the data set")
  return inside


def read(
  name: str, layout: str = "auto", *, split: str = "train", max_bad_share: float = 0.0,
  needs_masks: bool = True,
) -> Captures:
  """The data set at `name`, a local folder or one in a bucket.

  Args:
    name: `config.data.name`.
    layout: of `CHOICES`.
    split: 'train'; Open Images has others.
    max_bad_share: of all pictures that may be missing, without mask, alone in their subject ...
    needs_masks: False where masks that are missing in a set of masks are made later.

  Raises:
    DataError: no such folder or layout, annotations that cannot be read, or more bad pictures
      than `max_bad_share` allows, of which the first ten are named.
  """
  if layout not in CHOICES:
    raise DataError(f"data.layout={layout!r} is unknown; choose one of {', '.join(CHOICES)}")
  if not name:
    raise DataError("data.name is empty; set it to the folder of the data set")
  root = listing.data_path(name, "data.name")
  root = root.resolve() if listing.is_local(root) else root
  if layout == "auto":
    layout = recognise(root)
  else:  # what the user knows is not found out again
    _inside(root)
  if layout == "folder":
    from data_pipeline.sources.folder import FolderSubjects

    check_split(split, ("train",), name)
    return Captures(layout, FolderSubjects(name, lenient=max_bad_share > 0))
  if layout == "manifest":
    from data_pipeline.manifest_frames import ManifestSubjects

    check_split(split, ("train",), name)
    manifest = Manifest.read(root)
    return Captures(layout, ManifestSubjects(manifest), manifest.left_out)
  reader = _reader(layout)
  found = Findings(str(root), max_bad_share, needs_masks)
  splits = reader.splits(root) if hasattr(reader, "splits") else ("train",)
  check_split(split, splits, str(root))
  found.notes += getattr(reader, "NOTES", ())
  if hasattr(reader, "open_subjects"):  # pictures inside of files that are no pictures
    subjects = reader.open_subjects(root, found)
    found.check(subjects.pictures, len(subjects.names))
    return Captures(layout, subjects, tuple(found.left_out), tuple(found.notes))
  from data_pipeline.manifest_frames import ManifestSubjects

  rows = reader.subjects(root, found, split) if len(splits) > 1 else reader.subjects(root, found)
  manifest = Manifest.from_subjects(
    found.usable(rows), where=str(root), layout=layout, root=str(root), left_out=found.left_out)
  found.check(manifest.frames.num_rows, manifest.subjects.num_rows)
  if "none" in manifest.frames["mask_kind"].unique().to_pylist():
    found.notes.append("there are no masks: all of a picture counts as the subject; `python -m "
                       "data_pipeline.prepare` makes masks")
  return Captures(layout, ManifestSubjects(manifest), manifest.left_out, tuple(found.notes))


def open_captures(data_config, split: str = "train") -> "SubjectSet":
  """The subjects of `config.data` with source 'captures'; says once what one should know.

  A run asks several times, and listing a large set takes minutes: the last one is kept.
  """
  share = sampling.check_bad_share(data_config.max_bad_share)
  layout = getattr(data_config, "layout", "auto")  # configs of before lack it
  return _read_once(data_config.name, layout, split, share).subjects


@functools.lru_cache(maxsize=1)
def _read_once(name: str, layout: str, split: str, max_bad_share: float) -> Captures:
  captures = read(name, layout, split=split, max_bad_share=max_bad_share)
  for note in captures.notes:
    logging.warning("%s: %s", captures.subjects.where, note)
  if captures.left_out:
    first = captures.left_out[0]
    logging.warning("%s: %d left out, such as %s (%s); `python -m data_pipeline.inspect` says more",
                    captures.subjects.where, len(captures.left_out), first.name, first.reason)
  return captures


def check_split(split: str, splits: tuple[str, ...], where: str) -> None:
  """Raises DataError for a split that the data set does not have."""
  if split not in splits:
    known = ", ".join(map(repr, splits)) or "none"
    raise DataError(f"{where} has no split {split!r}; it has {known}")


def _reader(layout: str):
  return importlib.import_module(f"data_pipeline.readers.{layout}")
