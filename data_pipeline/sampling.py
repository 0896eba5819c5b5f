"""Which subjects and which frames a batch shows: a pure function of (seed, step)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from data_pipeline.errors import DataError

_SUBJECTS, _TRIPLE = 0, 1  # domains of the random streams: the batch's subjects, one row's triple
_GROUPS = ("class", "family")
# 'multi_view': the target is not the reference's frame (docs/method.md). 'self': the reference is
# cut out of the target's own frame, which is how earlier encoders were trained; positives, targets,
# captions and all randomness are those of 'multi_view', so that the two can be compared in pairs.
FRAMES = ("multi_view", "self")


class SubjectTable(NamedTuple):
  """What the plan of a batch must know about the S subjects of a data set."""

  subject_id: Int[np.ndarray, " s"]
  family_id: Int[np.ndarray, " s"]  # -1 where the data set does not know
  class_id: Int[np.ndarray, " s"]  # -1 where the data set does not know


def row_rng(seed: int, step: int, row: int) -> np.random.Generator:
  """The random stream of row `row` of the GLOBAL batch: frames, sizes, places, factors.

  Philox is a counter-based generator, so that no row needs its neighbours' draws, and any host
  can make any row of any step.
  """
  return _rng(seed, step, _TRIPLE, row)


def _rng(seed: int, step: int, domain: int, row: int = 0) -> np.random.Generator:
  # Draws advance the lowest word of the counter, so streams of other words never meet.
  counter = np.array([0, 0, row, domain], np.uint64)
  key = np.array([seed % 2**64, step], np.uint64)
  return np.random.Generator(np.random.Philox(counter=counter, key=key))


def choose_subjects(
    seed: int, step: int, table: SubjectTable, batch_size: int, *, group: str, group_share: float
) -> Int[np.ndarray, " b"]:
  """Rows of `table` for the whole global batch, in the batch's order.

  No subject comes twice unless the data set has fewer subjects than the batch; then each comes
  once more before any comes a third time. Of the batch, round(group_share * batch_size) rows are
  hard negatives of each other: one family (or class) is drawn with a chance proportional to its
  size, so that every subject is as likely as any other; when it is too small, the rest of its
  class follows, family by family, and only then other subjects.
  """
  rng = _rng(seed, step, _SUBJECTS)
  everyone = rng.permutation(len(table.subject_id))
  wanted = round(group_share * batch_size)
  if wanted > 0:
    everyone = _group_first(rng, table, everyone, wanted, group)
  if batch_size <= len(everyone):
    chosen = everyone[:batch_size]
  else:
    rounds = -(-batch_size // len(everyone))
    more = [rng.permutation(len(everyone)) for _ in range(rounds - 1)]
    chosen = np.concatenate([everyone, *more])[:batch_size]
  # The group's rows must not all land on the first host.
  return rng.permutation(chosen)


def _group_first(
    rng: np.random.Generator, table: SubjectTable, everyone: np.ndarray, wanted: int, group: str
) -> np.ndarray:
  """Moves `wanted` members of one group to the front of the permutation `everyone`."""
  centre = everyone[0]
  same_class = table.class_id[everyone] == table.class_id[centre]
  if group == "class":
    near = everyone[same_class]
  else:
    family = table.family_id[everyone]
    own = family == table.family_id[centre]
    siblings = np.flatnonzero(same_class & ~own)
    # Whole families of the class, in the order in which their first member was drawn.
    _, first, inverse = np.unique(family[siblings], return_index=True, return_inverse=True)
    siblings = siblings[np.argsort(first[inverse], kind="stable")]
    near = np.concatenate([everyone[own], everyone[siblings]])
  near = near[:wanted]
  return np.concatenate([near, everyone[~np.isin(everyone, near)]])


def check_group(table: SubjectTable, group: str, group_share: float) -> None:
  """Raises DataError when the batches that the config asks for cannot be drawn from `table`."""
  if group not in _GROUPS:
    raise DataError(f"data.group={group!r} is unknown; choose one of {', '.join(_GROUPS)}")
  if not 0 <= group_share <= 1:
    raise DataError(f"data.group_share={group_share} must lie between 0 and 1")
  ids = table.class_id if group == "class" else table.family_id
  if group_share > 0 and np.any(ids < 0):
    raise DataError(
        f"the data set does not know the {group} of its subjects; set data.group_share=0"
        + (" or data.group='class'" if group == "family" else "")
    )


def check_frames(frames: str) -> None:
  """Raises DataError for an unknown `data.frames`."""
  if frames not in FRAMES:
    raise DataError(f"data.frames={frames!r} is unknown; choose one of {', '.join(FRAMES)}")


def choose_frames(
    rng: np.random.Generator, is_reference: Bool[np.ndarray, " f"]
) -> tuple[int, int, int]:
  """Frames (i positive, j reference, k target) of a subject with at least two frames.

  k is any frame. i and j are two other frames, drawn from those that can serve as a reference
  when at least two such frames remain beside k. With exactly two frames i = k: the positive must
  differ from the reference it is contrasted with, and so must the target.
  """
  frames = len(is_reference)
  if frames < 2:
    raise DataError("a triple needs at least 2 frames of a subject")
  k = int(rng.integers(frames))
  others = np.array([f for f in rng.permutation(frames) if f != k])
  if frames == 2:
    return k, int(others[0]), k
  # Frames that can be references first, in their random order.
  others = others[np.argsort(~np.asarray(is_reference)[others], kind="stable")]
  return int(others[1]), int(others[0]), k
