"""A part: the prepared frames of a group of subjects, in files that a restart finds again.

A part has two Arrow files: its good frames with their bytes, and a report of all its frames, which
is written last. Each is whole or not there, so whoever is killed leaves nothing that is half.
"""

import contextlib
import dataclasses
import functools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, Manifest
from data_pipeline.prepare import inputs
from data_pipeline.prepare.frames import FramePreparer, LeftOutError
from data_pipeline.prepare.settings import Settings

_FRAMES = pa.schema([
  ("row", pa.int64()), ("picture", pa.binary()), ("mask", pa.binary()),
  ("captions", pa.list_(pa.string())), ("size", pa.list_(pa.int32(), 2)),
  ("crop", pa.list_(pa.int32(), 4)), ("bucket", pa.list_(pa.int32(), 2)),
])  # fmt: skip
_REPORT = pa.schema([
  ("row", pa.int64()), ("kind", pa.string()), ("reason", pa.string()), ("mask_from", pa.string()),
  ("caption_from", pa.string()), ("bucket", pa.string()), ("hash", pa.binary(32)),
  ("thumb", pa.binary(192)),
])  # fmt: skip


def group_subjects(counts: np.ndarray, frames: int) -> list[range]:
  """Subjects in their order, in groups of about so many frames; `counts` [subjects]."""
  before = np.cumsum(counts) - counts
  first = np.flatnonzero(np.diff(before // frames, prepend=-1))
  return [range(a, b) for a, b in zip(first.tolist(), [*first[1:].tolist(), len(counts)])]


@dataclasses.dataclass(frozen=True)
class Work:
  """The folder in which a preparation is under way, as every worker sees it.

  `fingerprint`: of manifest and settings; another one is another preparation.
  """

  folder: str
  fingerprint: str

  @functools.cached_property
  def manifest(self) -> Manifest:
    return Manifest.read(epath.Path(self.folder) / "manifest")

  @functools.cached_property
  def settings(self) -> Settings:
    values = json.loads((epath.Path(self.folder) / "plan.json").read_text())
    return Settings(**values["settings"])

  @functools.cached_property
  def table(self) -> sampling.SubjectTable:
    return self.manifest.subject_table()

  @functools.cached_property
  def groups(self) -> list[range]:
    counts = self.manifest.subjects["count"].to_numpy()
    return group_subjects(counts, self.settings.frames_per_shard)

  @functools.cached_property
  def preparer(self) -> FramePreparer:
    return FramePreparer(self.settings)

  def part(self, number: int, kind: str) -> epath.Path:
    """The file of a part; `kind`: 'frames' or 'report'."""
    return epath.Path(self.folder) / "parts" / f"{number:06d}.{kind}.arrow"

  @property
  def failure(self) -> epath.Path:
    """The file in which a worker says why it cannot go on."""
    return epath.Path(self.folder) / "failure.txt"

  def complete(self) -> set[int]:
    """The numbers of the parts that are done, by one look into their folder."""
    names = [path.name for path in (epath.Path(self.folder) / "parts").iterdir()]
    return {int(name.split(".")[0]) for name in names
            if name.endswith(".report.arrow") and not name.startswith(".")}

  def shards(self) -> epath.Path:
    """The folder that becomes the data set."""
    return epath.Path(self.folder) / "shards"


@functools.lru_cache(2)
def open_work(folder: str, fingerprint: str) -> Work:
  """The same object for all calls in a process: it holds a loaded segmenter."""
  return Work(folder, fingerprint)


def guarded(task: Callable, folder: str, fingerprint: str, item: Any) -> None:
  """task(folder, fingerprint, item), unless a worker has failed; see `raise_failure`.

  Raised errors would come back through Beam as tracebacks of several processes.
  """
  failure = open_work(folder, fingerprint).failure
  if failure.exists():
    return
  try:
    task(folder, fingerprint, item)
  except DataError as error:
    write_whole(failure, str(error).encode())
  except OSError as error:
    write_whole(failure, f"a worker has stopped ({error}); mend it, what is done is kept and the "
                         "same command goes on".encode())


def raise_failure(work: Work) -> None:
  """Raises DataError with what a worker has said, once."""
  if work.failure.exists():
    text = work.failure.read_text()
    work.failure.unlink()
    raise DataError(text)


def make_part(folder: str, fingerprint: str, number: int) -> None:
  """Prepares group `number` and writes its files, unless they are there."""
  work = open_work(folder, fingerprint)
  if work.part(number, "report").exists():
    return
  subjects = work.manifest.subjects
  report = {name: [] for name in _REPORT.names}
  with _written_whole(work.part(number, "frames")) as file:
    with pa.ipc.new_file(file, _FRAMES) as writer:
      for subject in work.groups[number]:
        first, count = (subjects[key][subject].as_py() for key in ("first", "count"))
        noun = subjects["noun"][subject].as_py()
        for row in range(first, first + count):
          frame = work.manifest.frame(row)
          load = inputs.loader(work.manifest, frame, subject, row - first)
          _make_frame(work, row, load, frame, noun, writer, report)
  table = pa.table(report, schema=_REPORT)
  with _written_whole(work.part(number, "report")) as file:
    with pa.ipc.new_file(file, _REPORT) as writer:
      writer.write_table(table)


def _make_frame(work: Work, row: int, load, frame: FrameRow, noun: str, writer, report) -> None:
  line = dict.fromkeys(_REPORT.names, "") | dict(row=row, hash=bytes(32), thumb=bytes(192))
  try:
    made = work.preparer(load, frame, noun)
  except LeftOutError as error:
    line["kind"], line["reason"] = error.args
  else:
    values = dataclasses.asdict(made) | dict(row=row)
    writer.write_batch(pa.RecordBatch.from_pylist(
      [{key: values[key] for key in _FRAMES.names}], schema=_FRAMES))
    line |= {key: values[key] for key in ("mask_from", "caption_from", "hash", "thumb")}
    line["bucket"] = "x".join(map(str, made.bucket))
  for key, value in line.items():
    report[key].append(value)


def read_report(work: Work, number: int) -> pa.Table:
  """The report of a part."""
  return _read_whole(work.part(number, "report"))


def read_frames(work: Work, number: int) -> Iterator[dict]:
  """The good frames of a part, one after the other."""
  with work.part(number, "frames").open("rb") as file:
    reader = pa.ipc.open_file(file)
    for n in range(reader.num_record_batches):
      yield from reader.get_batch(n).to_pylist()


def _read_whole(path: epath.Path) -> pa.Table:
  with path.open("rb") as file:
    return pa.ipc.open_file(file).read_all()


@contextlib.contextmanager
def _written_whole(path: epath.Path):
  """A file that is written under another name, and gets its own when it is complete."""
  temporary = temporary_name(path)
  try:
    with temporary.open("wb") as file:
      yield file
    temporary.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def write_whole(path: epath.Path, data: bytes) -> None:
  """Writes a file that is there whole or not at all."""
  with _written_whole(path) as file:
    file.write(data)


def temporary_name(path: epath.Path) -> epath.Path:
  """A name beside `path` that no other worker uses."""
  return path.parent / f".{uuid.uuid4().hex[:12]}.{os.path.basename(path)}"
