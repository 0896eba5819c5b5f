"""What stays of all prepared frames, decided with all of them in view."""

import collections
import dataclasses

import numpy as np
import pyarrow as pa

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import copies
from data_pipeline.prepare.frames import BAD, COPY, ONE_FRAME, TOO_FEW

_NAMED = 10  # left-out frames that an error lists


@dataclasses.dataclass(frozen=True)
class Selection:
  """Attributes:
    keep: bool [frames]: which frames of the manifest are written.
    left_out: of the others (name, kind, reason), in the manifest's order.
    counts: what is in the data set and what is not, in numbers, for manifest.json.
  """

  keep: np.ndarray
  left_out: list[dict[str, str]]
  counts: dict


def select(manifest: Manifest, report: pa.Table, copy_bits: int) -> Selection:
  """Leaves out what the parts' reports say, copies, and subjects with less than two frames.

  `report`: a line for each frame of the manifest, in its order.
  """
  assert report["row"].to_pylist() == list(range(manifest.frames.num_rows))
  kinds = np.array(report["kind"].to_pylist(), object)
  reasons = np.array(report["reason"].to_pylist(), object)
  count = manifest.subjects["count"].to_numpy()
  subject = np.repeat(np.arange(len(count)), count)
  pictures = manifest.frames["picture"].to_pylist()
  for row in np.flatnonzero((count[subject] < 2) & (kinds == "")):
    kinds[row], reasons[row] = ONE_FRAME, "a triple needs two or more frames"
  if copy_bits >= 0:
    for row, original in _find_copies(manifest, report, subject, kinds == "", copy_bits):
      kinds[row], reasons[row] = COPY, f"of {pictures[original]}"
  kept = np.bincount(subject[kinds == ""], minlength=len(count))
  for row in np.flatnonzero((kept[subject] < 2) & (kinds == "")):
    kinds[row], reasons[row] = TOO_FEW, f"{kept[subject[row]]} of {count[subject[row]]}"
  keep = kinds == ""
  left_out = [dict(name=pictures[row], kind=kinds[row], reason=reasons[row])
              for row in np.flatnonzero(~keep)]
  return Selection(keep, left_out, _counts(manifest, report, subject, keep, left_out))


def _find_copies(manifest, report, subject, good, bits: int) -> list[tuple[int, int]]:
  """(row, row of the original) of copies among the good frames.

  A subject that has a picture twice, as a set of one view does, has it so that triples can be made;
  subjects that share a picture, each with a mask or box of its own, are what is seen in it.
  """
  rows = np.flatnonzero(good)
  pictures, masks = (
    manifest.frames[key].combine_chunks().dictionary_encode().indices.to_numpy()
    for key in ("picture", "mask"))
  numbers = lambda *keys: [manifest.frames[key].to_numpy() for key in keys]  # noqa: E731
  files = np.column_stack([pictures, *numbers("picture_offset")])
  shown = np.column_stack([masks, *numbers("mask_offset", "x0", "y0", "x1", "y1")])
  places = tuple(array.astype(np.int64)[rows] for array in (subject, files, shown))
  arrays = []
  for key, width in (("hash", copies.HASH_BYTES), ("thumb", copies.THUMB_BYTES)):
    data = b"".join(report[key].to_pylist())
    arrays.append(np.frombuffer(data, np.uint8).reshape(-1, width)[rows])
  copy_of = copies.find_copies(*arrays, places, bits)
  return [(int(rows[n]), int(rows[copy_of[n]])) for n in np.flatnonzero(copy_of >= 0)]


def _counts(manifest: Manifest, report: pa.Table, subject, keep, left_out) -> dict:
  tally = lambda values: dict(sorted(collections.Counter(values).items()))  # noqa: E731
  kept = np.flatnonzero(keep)
  subjects = np.unique(subject[kept])
  column = lambda key: report[key].take(pa.array(kept)).to_pylist()  # noqa: E731
  licences = manifest.subjects["licence"].take(pa.array(subjects)).to_pylist()
  return dict(
    subjects=len(subjects), frames=len(kept), subjects_read=manifest.subjects.num_rows,
    frames_read=manifest.frames.num_rows, masks=tally(column("mask_from")),
    captions=tally(column("caption_from")), buckets_height_x_width=tally(column("bucket")),
    licences=tally(licence or "unknown" for licence in licences),
    left_out=tally(item["kind"] for item in left_out))


def check_bad(selection: Selection, max_bad_share: float) -> None:
  """Raises DataError if more of the frames are bad than that, and if nothing is left."""
  share = sampling.check_bad_share(max_bad_share)
  bad = [item for item in selection.left_out if item["kind"] in BAD]
  total = selection.counts["frames_read"]
  if len(bad) > share * total:
    first = "; ".join(f"{item['name']}: {item['kind']}, {item['reason']}" for item in bad[:_NAMED])
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    raise DataError(
      f"{len(bad)} of {total} frames are bad, more than max_bad_share={share}: {first}{more}. Mend "
      "them or take them away, or raise --max_bad_share")
  if not selection.counts["frames"]:
    kinds = ", ".join(f"{n} {kind}" for kind, n in selection.counts["left_out"].items())
    raise DataError(f"no frame is left of {total} ({kinds}); nothing is written")
