"""What a reader finds on its way: what it leaves out and why, and what the user should know."""

from collections.abc import Iterable, Iterator

from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, LeftOut, SubjectRow

_NAMED = 10  # bad ones that an error names


class Findings:
  """Collects; `bad` counts against data.max_bad_share, `unwanted` does not.

  `needs_masks`: whether a picture without a mask, in a set that has masks, is of no use.
  """

  def __init__(self, where: str, max_bad_share: float = 0.0, needs_masks: bool = True):
    self.where, self._max_bad_share, self.needs_masks = where, max_bad_share, needs_masks
    self.left_out: list[LeftOut] = []
    self.notes: list[str] = []
    self._bad: list[LeftOut] = []
    self._pictures = 0

  def unwanted(self, name: str, reason: str) -> None:
    """Something sound that is not meant for us: a poor pair, a scene of several objects."""
    self.left_out.append(LeftOut(name, reason))

  def bad(self, name: str, reason: str, pictures: int = 1) -> None:
    """Something broken: a picture without its mask, a subject with one picture, a tar cut off."""
    item = LeftOut(name, reason)
    self.left_out.append(item)
    self._bad.append(item)
    self._pictures += pictures

  def masked(self, frames: Iterable[FrameRow], set_has_masks: bool) -> list[FrameRow]:
    """The frames; where the set has masks and they are needed, those that have one."""
    kept = []
    for frame in frames:
      if frame.mask_kind == "none" and set_has_masks and self.needs_masks:
        place = f", byte {frame.picture_offset}" if frame.picture_offset else ""
        self.bad(f"{frame.picture}{place}", "it has no mask")
      else:
        kept.append(frame)
    return kept

  def usable(self, rows: Iterable[SubjectRow]) -> Iterator[SubjectRow]:
    """The subjects of which a triple can be made."""
    for row in rows:
      if len(row.frames) >= 2:
        yield row
      elif row.frames:
        self.bad(row.name, f"{len(row.frames)} usable picture(s); a triple needs 2 or more")
      else:  # nothing was there, or each of its pictures is counted already
        self.unwanted(row.name, "no usable pictures")

  def check(self, pictures: int, subjects: int) -> None:
    """Raises DataError when too much is bad, or nothing is left."""
    total = pictures + self._pictures
    if self._pictures > self._max_bad_share * total:
      named = "; ".join(f"{item.name}: {item.reason}" for item in self._bad[:_NAMED])
      more = f" (and {len(self._bad) - _NAMED} more)" if len(self._bad) > _NAMED else ""
      raise DataError(
        f"{self.where}: {self._pictures} of {total} pictures are bad, more than "
        f"data.max_bad_share={self._max_bad_share}; mend them or raise it: {named}{more}")
    if not subjects:
      why = f"; {self.left_out[0].name}: {self.left_out[0].reason}" if self.left_out else ""
      raise DataError(f"{self.where} has no subjects of two usable pictures{why}")
