'''Triples from a plain folder: a folder per subject.

    my_subjects/
      blue_mug/
        captions.json
        on_desk.png          transparency marks what is not the subject
        in_garden.jpg        a picture without transparency has its mask beside it:
        in_garden_mask.png   white (or opaque) = subject
      old_teapot/
        ...

captions.json:

    {
      "class_noun": "mug",
      "captions": {"on_desk.png": "a mug on a desk", "in_garden.jpg": "a mug in a garden"},
      "references": ["on_desk.png"],
      "family": "mugs of the blue set"
    }

Every picture has a caption that contains the class noun and does not describe what the reference
shows (colours, patterns). Optional: "references" lists the pictures that may serve as reference (by
default all), "family" is shared by subjects that are hard to distinguish. A subject needs at least
two pictures. Subjects with the same noun form a class; they are numbered in the order of their
folders' names.
'''

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline import images, sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.example import Maker
from data_pipeline.sources import tf_data

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Frame:
  """The files of a picture and its mask (None: the alpha channel is the mask), and its caption."""

  picture: Path
  mask: Path | None
  caption: str
  is_reference: bool

  def load(self) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [h, w, 3] and mask uint8 [h, w]; raises DataError naming the file."""
    picture, mask = images.read_pair(self.picture, self.mask)
    if mask is None:
      if np.all(picture[..., 3:] == 255):
        raise _no_mask(self.picture)
      mask = picture[..., 3]
    picture = picture[..., :3]
    triples.check_frame(picture, mask, str(self.picture))
    return picture, mask


@dataclasses.dataclass(frozen=True)
class Subject:
  """A subject's folder."""

  noun: str
  family: str | None
  frames: tuple[Frame, ...]


def batches(maker: Maker, *, folder: str, start_step: int, rows: range) -> Iterator[dict]:
  """Endless batches of the subjects in `folder`."""
  subjects = read_folder(Path(folder).expanduser())
  for subject in subjects:
    for frame in subject.frames:
      try:
        maker.encode(frame.caption, subject.noun)
      except DataError as error:
        raise DataError(f"{frame.picture.parent / 'captions.json'}: {error}") from None
  table = _table(subjects)
  maker.check(table)
  flags = [np.array([frame.is_reference for frame in subject.frames]) for subject in subjects]

  def make_row(step: int, row: int) -> dict[str, np.ndarray]:
    rng = maker.rng(step, row)
    number = maker.subjects(table, step)[row]
    subject = subjects[number]
    chosen = maker.frames(sampling.choose_frames(rng, flags[number]))
    frames = [subject.frames[f] for f in chosen]
    pictures, masks = zip(*(frame.load() for frame in frames))
    return maker.example(rng, table, number, pictures, masks, frames[2].caption, subject.noun)

  return tf_data.batches(make_row, maker.signature, start_step=start_step, rows=rows)


def read_folder(folder: Path) -> list[Subject]:
  """The subjects of a folder in the layout above; reads the pictures' headers only.

  Raises DataError that names the file and the remedy: no folder, no subjects, no or invalid
  captions.json, a picture without caption or mask, a caption without picture, a file that is no
  picture, fewer than two pictures.
  """
  if not folder.is_dir():
    raise DataError(f"{folder} is not a folder; set data.name to the folder of your subjects")
  subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
  if not subfolders:
    raise DataError(f"{folder} has no folders in it; put the pictures of each subject into one")
  return [_read_subject(subfolder) for subfolder in subfolders]


def _read_subject(folder: Path) -> Subject:
  metadata = _read_captions(folder / "captions.json")
  captions, references = metadata["captions"], metadata.get("references")
  files = {p.name: p for p in sorted(folder.iterdir()) if p.suffix.lower() in _SUFFIXES}
  masks = {name for name in files if Path(name).stem.endswith("_mask")}
  for name in [*captions, *(references or ())]:
    if name not in files:
      raise DataError(f"{folder / 'captions.json'} names {name!r}, which is not in its folder")
  frames = []
  for name, file in files.items():
    if name in masks:
      continue
    if name not in captions:
      raise DataError(f"{file} has no caption; add one to {folder / 'captions.json'}")
    mask = next((files[m] for m in masks if Path(m).stem == f"{file.stem}_mask"), None)
    if mask is None and not images.file_has_alpha(file):
      raise _no_mask(file)
    is_reference = references is None or name in references
    frames.append(Frame(file, mask, captions[name], is_reference))
  if len(frames) < 2:
    raise DataError(
        f"{folder} has {len(frames)} picture(s); a triple needs 2 or more of a subject: "
        "add some, or move the folder away"
    )
  return Subject(metadata["class_noun"], metadata.get("family"), tuple(frames))


def _read_captions(file: Path) -> dict:
  if not file.exists():
    raise DataError(
        f'{file} is missing; write {{"class_noun": "...", "captions": {{"picture.png": "..."}}}}'
    )
  try:
    metadata = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise DataError(f"{file} is not JSON ({error}); mend it") from None
  captions = metadata.get("captions") if isinstance(metadata, dict) else None
  if not isinstance(captions, dict) or not isinstance(metadata.get("class_noun"), str):
    raise DataError(f'{file} needs "class_noun" (a text) and "captions" (picture -> text)')
  known = {"class_noun", "captions", "references", "family"}
  unknown = sorted(set(metadata) - known)
  if unknown:
    raise DataError(f"{file} has the unknown key {unknown[0]!r}; it may have {sorted(known)}")
  return metadata


def _no_mask(file: Path) -> DataError:
  return DataError(
      f"{file} has no mask, so the subject cannot be cut out; save it as PNG with a transparent "
      f"background, or put {file.stem}_mask.png (white = subject) beside it"
  )


def _table(subjects: list[Subject]) -> sampling.SubjectTable:
  nouns = [subject.noun for subject in subjects]
  families = sorted({subject.family for subject in subjects if subject.family is not None})
  number = {None: -1} | {family: n for n, family in enumerate(families)}
  return sampling.SubjectTable(
      subject_id=np.arange(len(subjects)),
      family_id=np.array([number[subject.family] for subject in subjects]),
      class_id=np.unique(nouns, return_inverse=True)[1],
  )
