"""What a batch shows, in numpy: files, places and token ids, a pure function of (seed, step).

The draws are those of `data_pipeline.sources.rows` and `triples.make_triple`, in their order; no
picture is opened.
"""

import functools
import os

import numpy as np

from data_pipeline import sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.example import PICTURES, Maker
from data_pipeline.graph.pictures import ALPHA, FILE, NONE
from data_pipeline.manifest import FrameRow
from data_pipeline.manifest_frames import whole_path

MASK_KINDS = {"file": FILE, "alpha": ALPHA, "none": NONE}
LAYOUTS = ("centred", "random")  # of references, that the operations can make
# Of one frame: key -> (type, shape).
FRAME = {
  "picture": (object, ()), "picture_span": (np.int64, (3,)),
  "mask": (object, ()), "mask_span": (np.int64, (3,)),
  "mask_kind": (np.int32, ()), "threshold": (np.int32, ()),
  "box": (np.int32, (4,)), "rotation": (np.int32, ()),
}  # fmt: skip
# Of one row: those of frames (i, j, k), and of the positive and the reference their places.
ROW = {
  **{key: (kind, (3, *shape)) for key, (kind, shape) in FRAME.items()},
  "ratio": (np.float64, (2,)), "position": (np.float64, (2, 2)),
  "row": (np.int64, ()), "step": (np.int64, ()), "usable": (np.bool_, ()),
}  # fmt: skip


@functools.lru_cache(maxsize=1 << 12)
def _file_size(path: str) -> int:
  """Of a tar file, which many frames share."""
  from etils import epath

  return os.stat(path).st_size if "://" not in path else epath.Path(path).stat().length


def describe(root: str, frame: FrameRow) -> dict:
  """A frame's `FRAME`."""

  def blob(path, offset, length):
    if not path:
      return b"", (0, -1, 0)
    whole = os.fspath(whole_path(root, path)) if root else path
    span = (offset, length, _file_size(whole) if length >= 0 else 0)
    return whole.encode("utf-8", "surrogateescape"), span

  picture, picture_span = blob(frame.picture, frame.picture_offset, frame.picture_length)
  mask, mask_span = blob(frame.mask, frame.mask_offset, frame.mask_length)
  return dict(picture=picture, picture_span=picture_span, mask=mask, mask_span=mask_span,
              mask_kind=MASK_KINDS[frame.mask_kind], threshold=frame.threshold, box=frame.box,
              rotation=frame.rotation)  # fmt: skip


class Planner:
  """plan(step) -> arrays [b, ...] for this host's rows: `ROW` and the integers of the batch.

  Args:
    subjects: a `data_pipeline.sources.rows.SubjectSet` whose subjects have `files`.
    numbers: those of the subjects that training shows.
    table: of these subjects.
    rows: of the global batch, this host's.
  """

  def __init__(self, maker: Maker, subjects, numbers: np.ndarray,
               table: sampling.SubjectTable, rows: range):
    self._maker, self._subjects, self._numbers = maker, subjects, numbers
    self._table, self._rows = table, rows
    self.labels = {key: kind for key, kind in maker.signature.items() if key not in PICTURES}
    self.label_shapes = maker.label_shapes

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    rows = [self.row(int(step), row) for row in self._rows]
    kinds = {**{key: kind for key, (kind, _) in ROW.items()}, **self.labels}
    return {key: np.array([row[key] for row in rows], kind) for key, kind in kinds.items()}

  def row(self, step: int, row: int) -> dict:
    """A row's `ROW` and labels; where something is wrong with it, `usable` is False."""
    plan = dict(step=step, row=row)
    try:
      plan |= self._row(step, row)
      plan["usable"] = True
    except (DataError, OSError):  # Pillow's path says what it is, or shows another subject
      plan |= {key: np.zeros(shape, kind) for key, (kind, shape) in ROW.items()
               if key not in ("step", "row")}  # fmt: skip
      plan |= {key: np.full(shape, b"") for key in ("picture", "mask") for shape in [(3,)]}
      plan |= {key: np.zeros(shape, np.int32) for key, shape in self.label_shapes.items()}
    return plan

  def _row(self, step: int, row: int) -> dict:
    maker = self._maker
    rng, spare = maker.rng(step, row), maker.spare_rng(step, row)
    entry = int(maker.subjects(self._table, step)[row])
    number = int(self._numbers[entry])
    subject = self._subjects[number]
    frames = maker.frames(sampling.choose_frames(rng, subject.is_reference()))
    described = [describe(*subject.files(f)) for f in frames]
    captions = subject.captions(frames[2])
    caption = captions[int(spare.integers(len(captions)))] if len(captions) > 1 else captions[0]
    ids = [(number, f) for f in frames]
    uniform = triples.draw_places(rng, maker.triple, ids)
    places = [triples.positive_place(maker.triple, uniform[0]),
              triples.reference_place(maker.triple, uniform[1])]
    plan = {key: [frame[key] for frame in described] for key in FRAME}
    plan["ratio"], plan["position"] = zip(*places)
    return plan | maker.labels(rng, self._table, entry, caption, subject.noun)
