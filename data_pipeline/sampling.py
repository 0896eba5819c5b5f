"""Which subjects and which frames a batch shows: a pure function of (seed, step)."""

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from data_pipeline.errors import DataError

_SUBJECTS, _TRIPLE = 0, 1  # domains of the random streams: the batch's subjects, one row's triple
GROUPS = ("class", "family")
# 'multi_view': target and reference are different frames (docs/method.md). 'self': the reference
# is cut out of the target's frame, as in the training of earlier encoders; positives, targets,
# captions and random numbers are those of 'multi_view', so that runs can be compared in pairs.
FRAMES = ("multi_view", "self")
# What reads pictures in files (`data.decoder`); see `data_pipeline.graph.loader.choose`.
DECODERS = ("auto", "tensorflow", "pillow")
_SPARE = 2  # another domain: what only few rows draw
_PLACEMENT = 3  # a frame's fixed placements (`data.placements`)


class SubjectTable(NamedTuple):
  """What choosing a batch needs to know about the S subjects of a data set."""

  subject_id: Int[np.ndarray, " s"]
  family_id: Int[np.ndarray, " s"]  # -1 where unknown
  class_id: Int[np.ndarray, " s"]  # -1 where unknown


def row_rng(seed: int, step: int, row: int) -> np.random.Generator:
  """The random stream of row `row` of the GLOBAL batch: frames, sizes, positions, factors.

  Philox is a counter-based generator: a row needs no other row's draws, so any host can make any
  row of any step.
  """
  return _rng(seed, step, _TRIPLE, row)


def spare_rng(seed: int, step: int, row: int) -> np.random.Generator:
  """A second stream of a row, for what only some rows draw, so that no other draw is disturbed.

  It decides which of several captions is used, and what takes the place of a bad picture.
  """
  return _rng(seed, step, _SPARE, row)


def placement_rng(subject: int, frame: int, k: int) -> np.random.Generator:
  """The random stream of a frame's fixed placement k, the same in every run (`data.placements`).

  `subject` is its number in the data set, held-out ones counted.
  """
  return _rng(subject, frame, _PLACEMENT, k)


def _rng(seed: int, step: int, domain: int, row: int = 0) -> np.random.Generator:
  # Draws advance the lowest word of the counter; streams that differ in other words never overlap.
  counter = np.array([0, 0, row, domain], np.uint64)
  key = np.array([seed % 2**64, step], np.uint64)
  return np.random.Generator(np.random.Philox(counter=counter, key=key))


def choose_subjects(
    seed: int, step: int, table: SubjectTable, batch_size: int, *, group: str, group_ratio: float
) -> Int[np.ndarray, " b"]:
  """Rows of `table` for the global batch, in the batch's order.

  No subject is repeated unless the batch is larger than the data set; then the numbers of
  repetitions differ by at most one. Of the batch, round(group_ratio * batch_size) rows are hard
  negatives of each other: one family (or class) is drawn with a probability proportional to its
  size, so that all subjects are equally likely; if it is too small, it is filled up with the other
  families of its class, one after another, and only then with other subjects.
  """
  rng = _rng(seed, step, _SUBJECTS)
  order = rng.permutation(len(table.subject_id))
  group_size = round(group_ratio * batch_size)
  if group_size > 0:
    order = _group_first(rng, table, order, group_size, group)
  if batch_size <= len(order):
    chosen = order[:batch_size]
  else:
    epochs = -(-batch_size // len(order))
    repeated = [rng.permutation(len(order)) for _ in range(epochs - 1)]
    chosen = np.concatenate([order, *repeated])[:batch_size]
  # The group's rows must not all land on the first host.
  return rng.permutation(chosen)


def _group_first(
    rng: np.random.Generator, table: SubjectTable, order: np.ndarray, group_size: int, group: str
) -> np.ndarray:
  """Moves `group_size` members of one group to the front of the permutation `order`."""
  anchor = order[0]
  same_class = table.class_id[order] == table.class_id[anchor]
  if group == "class":
    members = order[same_class]
  else:
    family = table.family_id[order]
    same_family = family == table.family_id[anchor]
    rest = np.flatnonzero(same_class & ~same_family)
    # Complete families of the class, in the order in which their first member was drawn.
    _, first, inverse = np.unique(family[rest], return_index=True, return_inverse=True)
    rest = rest[np.argsort(first[inverse], kind="stable")]
    members = np.concatenate([order[same_family], order[rest]])
  members = members[:group_size]
  return np.concatenate([members, order[~np.isin(order, members)]])


def spelling_key(text: str) -> str:
  """What spellings of one name share: upper and lower case, accents in one or two characters."""
  folded = unicodedata.normalize("NFC", text).casefold()
  return " ".join(unicodedata.normalize("NFC", folded).split())


def name_hash(name: str) -> int:
  """64 bits of the name's SHA-256, the same on every machine and for all spellings of the name."""
  return int.from_bytes(hashlib.sha256(spelling_key(name).encode()).digest()[:8])


def choose_heldout(
    names: Sequence[str], family_id: Int[np.ndarray, " s"], count: int, where: str
) -> Bool[np.ndarray, " s"]:
  """Which subjects training leaves out: at least `count` of them, whole families at a time.

  A function of the names and families alone: neither of a seed nor of the order of listing.
  Raises DataError, which names the data set `where`, when no subject is left to train on.
  """
  if not count and len(names):
    return np.zeros(len(names), bool)
  hashes = np.array([name_hash(name) for name in names], np.uint64)
  # A subject without family is a family of its own.
  unit = np.where(family_id >= 0, family_id, -1 - np.arange(len(hashes)))
  ids, inverse = np.unique(unit, return_inverse=True)
  rank = np.full(len(ids), np.iinfo(np.uint64).max, np.uint64)
  np.minimum.at(rank, inverse, hashes)
  heldout = np.zeros(len(hashes), bool)
  for family in np.argsort(rank, kind="stable"):
    if heldout.sum() >= count:
      break
    heldout |= inverse == family
  if heldout.all():
    raise DataError(
        f"data.holdout_subjects={count} leaves nothing to train on: {where} has {len(hashes)} "
        f"subject(s) in {len(ids)} family(s), which stay together; lower it, or add subjects"
    )
  return heldout


def check_group(table: SubjectTable, group: str, group_ratio: float) -> None:
  """Raises DataError when the batches that the config asks for cannot be drawn from `table`."""
  if group not in GROUPS:
    raise DataError(f"data.group={group!r} is unknown; choose one of {', '.join(GROUPS)}")
  if not 0 <= group_ratio <= 1:
    raise DataError(f"data.group_ratio={group_ratio} must lie between 0 and 1")
  ids = table.class_id if group == "class" else table.family_id
  if group_ratio > 0 and np.any(ids < 0):
    raise DataError(
        f"the data set does not know the {group} of its subjects; set data.group_ratio=0"
        + (" or data.group='class'" if group == "family" else "")
    )


def check_frames(frames: str) -> None:
  """Raises DataError for an unknown `data.frames`."""
  if frames not in FRAMES:
    raise DataError(f"data.frames={frames!r} is unknown; choose one of {', '.join(FRAMES)}")


def check_holdout(count: int) -> int:
  """`data.holdout_subjects`; raises DataError unless it is a count."""
  if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
    raise DataError(f"data.holdout_subjects={count!r} must be a whole number, 0 or more")
  return int(count)


def check_bad_share(share: float) -> float:
  """`data.max_bad_share`; raises DataError unless it is a share below 1."""
  if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
    raise DataError(f"data.max_bad_share={share!r} must be a number, at least 0 and below 1")
  return float(share)


def choose_frames(
    rng: np.random.Generator, is_reference: Bool[np.ndarray, " f"]
) -> tuple[int, int, int]:
  """Frames (i positive, j reference, k target) of a subject with at least two frames.

  k is any frame. i and j are two other frames, drawn from those that can serve as a reference if
  at least two of these are left without k. With exactly two frames i = k: positive and target must
  both differ from the reference.
  """
  frames = len(is_reference)
  if frames < 2:
    raise DataError("a triple needs at least 2 frames of a subject")
  k = int(rng.integers(frames))
  others = np.array([f for f in rng.permutation(frames) if f != k])
  if frames == 2:
    return k, int(others[0]), k
  # First the frames that can serve as a reference, in their random order.
  others = others[np.argsort(~np.asarray(is_reference)[others], kind="stable")]
  return int(others[1]), int(others[0]), k


def can_be_drawn(is_reference: Bool[np.ndarray, " f"]) -> Bool[np.ndarray, " f"]:
  """Which frames of a subject `choose_frames` can choose as positive or reference."""
  # With two that can serve as a reference, one of them may be the target, and another steps in.
  if np.count_nonzero(is_reference) >= 3:
    return np.asarray(is_reference, bool)
  return np.ones(len(is_reference), bool)
