"""A manifest: all frames of a data set as a table, without one picture opened.

Readers of the layouts that data sets are published in write it; the training's input, the
preparation and `python -m data_pipeline.inspect` start from it. Columns lie in Arrow tables, so
that a million frames of a hundred thousand subjects are loaded in a second. `manifest_frames.py`
reads the frames.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from data_pipeline import sampling
from data_pipeline.errors import DataError

MASK_KINDS = ("file", "alpha", "none")
SUBJECTS = pa.schema([
  ("name", pa.string()),
  ("noun", pa.string()),
  ("family", pa.string()),  # '' where nothing is known
  ("licence", pa.string()),
  ("creator", pa.string()),
  ("first", pa.int64()),  # its frames are the rows first ... first + count - 1 of the frames
  ("count", pa.int32()),
])
FRAMES = pa.schema([
  ("picture", pa.string()),  # relative to the manifest's root, or a whole path
  ("picture_offset", pa.int64()),  # a member of a tar file; else 0 and -1, all of the file
  ("picture_length", pa.int64()),
  ("mask", pa.string()),
  ("mask_offset", pa.int64()),
  ("mask_length", pa.int64()),
  ("mask_kind", pa.string()),  # one of MASK_KINDS
  ("threshold", pa.int16()),  # the subject is where the mask is at least this; 0 = soft alpha
  ("x0", pa.int32()),  # the part of the turned picture that is the frame; all 0 = all of it
  ("y0", pa.int32()),
  ("x1", pa.int32()),
  ("y1", pa.int32()),
  ("rotation", pa.int16()),  # degrees clockwise by which the picture is turned, beyond its EXIF
  ("captions", pa.list_(pa.string())),
  ("is_reference", pa.bool_()),
  ("height", pa.int32()),  # of the stored picture; 0 = unknown
  ("width", pa.int32()),
])
_FILES = ("subjects.parquet", "frames.parquet", "manifest.json")
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Something of a data set that is not used: a frame or a subject, and why."""

  name: str
  reason: str


@dataclasses.dataclass(frozen=True)
class FrameRow:
  """A frame as readers describe it; see `FRAMES` for what the fields mean."""

  picture: str
  captions: Sequence[str]
  mask: str = ""
  mask_kind: str = "none"
  threshold: int = 0
  picture_offset: int = 0
  picture_length: int = -1
  mask_offset: int = 0
  mask_length: int = -1
  box: tuple[int, int, int, int] = (0, 0, 0, 0)  # x0, y0, x1, y1
  rotation: int = 0
  is_reference: bool = True
  height: int = 0
  width: int = 0


@dataclasses.dataclass(frozen=True)
class SubjectRow:
  """A subject and its frames as readers describe them."""

  name: str
  noun: str
  frames: Sequence[FrameRow]
  family: str = ""
  licence: str = ""
  creator: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The frames of a data set.

  Attributes:
    where: names the data set in errors.
    layout: the reader that made it.
    root: what the paths of `frames` are relative to.
    subjects: a table of schema `SUBJECTS`.
    frames: a table of schema `FRAMES`.
    left_out: what the reader did not take.
  """

  where: str
  layout: str
  root: str
  subjects: pa.Table
  frames: pa.Table
  left_out: tuple[LeftOut, ...] = ()

  @classmethod
  def from_subjects(
    cls, subjects: Iterable[SubjectRow], *, where: str, layout: str, root: str,
    left_out: Iterable[LeftOut] = (),
  ) -> "Manifest":
    """The manifest of subjects that a reader yields, in their order."""
    columns = {field.name: [] for field in SUBJECTS}
    frames = {field.name: [] for field in FRAMES}
    simple = [name for name in frames if name not in ("x0", "y0", "x1", "y1", "captions")]
    for subject in subjects:
      columns["first"].append(len(frames["picture"]))
      columns["count"].append(len(subject.frames))
      for name in ("name", "noun", "family", "licence", "creator"):
        columns[name].append(getattr(subject, name))
      for frame in subject.frames:
        for name in simple:
          frames[name].append(getattr(frame, name))
        for name, value in zip(("x0", "y0", "x1", "y1"), frame.box, strict=True):
          frames[name].append(value)
        frames["captions"].append(list(frame.captions))
    return cls(where, layout, root, pa.table(columns, schema=SUBJECTS),
               pa.table(frames, schema=FRAMES), tuple(left_out))

  def write(self, folder: epath.PathLike) -> None:
    """Writes it into a folder, as two Parquet files and a manifest.json, which comes last."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in zip(_FILES, (self.subjects, self.frames)):
      with (folder / name).open("wb") as file:
        pa.parquet.write_table(table, file)
    notes = dict(version=_VERSION, where=self.where, layout=self.layout, root=self.root,
                 left_out=[dataclasses.asdict(item) for item in self.left_out])
    (folder / _FILES[-1]).write_text(json.dumps(notes, indent=1))

  @classmethod
  def read(cls, folder: epath.PathLike) -> "Manifest":
    """What `write` wrote; raises DataError for a folder without one or of another version."""
    folder = epath.Path(folder)
    try:
      notes = json.loads((folder / _FILES[-1]).read_text())
      tables = []
      for name in _FILES[:-1]:
        with (folder / name).open("rb") as file:
          tables.append(pa.parquet.read_table(file))
    except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
      raise DataError(f"{folder} is no manifest ({error}); write it anew") from error
    if notes["version"] != _VERSION:
      raise DataError(f"{folder} is a manifest of version {notes['version']}, and this program "
                      f"reads version {_VERSION}; write it anew")
    left_out = tuple(LeftOut(**item) for item in notes["left_out"])
    return cls(notes["where"], notes["layout"], notes["root"], *tables, left_out)

  def fingerprint(self) -> str:
    """A hash of all that it says of subjects and frames; no file is read."""
    digest = hashlib.sha256()
    for table in (self.subjects, self.frames):
      for column in table.columns:
        _hash_column(digest, column.combine_chunks())
    return digest.hexdigest()

  def subject_table(self) -> sampling.SubjectTable:
    """Ids of subjects, families and classes; spellings of one noun or family have one number."""
    key = functools.cache(sampling.spelling_key)
    nouns = [key(noun) for noun in self.subjects["noun"].to_pylist()]
    families = [name and key(name)
                for name in self.subjects["family"].to_pylist()]
    number = {family: n for n, family in enumerate(sorted({*families} - {""}))}
    return sampling.SubjectTable(
      subject_id=np.arange(len(nouns)),
      family_id=np.array([number.get(family, -1) for family in families], int),
      class_id=np.unique(nouns, return_inverse=True)[1])

  def frame(self, row: int) -> FrameRow:
    """Row `row` of the frames."""
    values = {name: self.frames[name][row].as_py() for name in FRAMES.names}
    box = tuple(values.pop(name) for name in ("x0", "y0", "x1", "y1"))
    return FrameRow(box=box, **values)


def _hash_column(digest, column: pa.Array) -> None:
  """Values and lengths: Arrow's own bytes differ with how a table came about."""
  if pa.types.is_list(column.type):
    digest.update(column.value_lengths().to_numpy().tobytes())
    _hash_column(digest, column.flatten())
  elif pa.types.is_string(column.type):
    texts = [text.encode() for text in column.to_pylist()]
    digest.update(np.array([len(text) for text in texts], np.int64).tobytes())
    digest.update(b"".join(texts))
  else:
    digest.update(column.to_numpy(zero_copy_only=False).tobytes())
