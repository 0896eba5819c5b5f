"""Where in the source an instruction of a compiled program is from: tables at its text's head."""

import re

_DEEPEST = 1000  # frames; a circle, if another version writes them otherwise, must end
_ROW = re.compile(r"(\d+) (.*)")


class StackFrames:
  """Frame id -> [(file, function)], the innermost first."""

  def __init__(self, text: str):
    """`text` is `compiled.as_text()`; without the tables every stack is empty."""
    titles = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    files, names, places, frames = (_table(text, title) for title in titles)
    self._places = {
      key: (files.get(_number(row, "file_name_id"), "").strip('"'),
            names.get(_number(row, "function_name_id"), "").strip('"'))
      for key, row in places.items()
    }  # fmt: skip
    self._frames = {
      key: (_number(row, "file_location_id"), _number(row, "parent_frame_id"))
      for key, row in frames.items()
    }
    # jaxlib 0.10.2 prints a parent's id plus one, so that the first frame seems to be its own.
    self._offset = int(any(key == parent for key, (_, parent) in self._frames.items()))

  def stack(self, frame: int | None) -> list[tuple[str, str]]:
    """[(file, function)] of a frame and its callers; [] for one that is not in the tables."""
    found = []
    while frame in self._frames and len(found) < _DEEPEST:
      place, parent = self._frames[frame]
      found.append(self._places.get(place, ("", "")))
      frame = parent - self._offset
    return found


def _table(text: str, title: str) -> dict[int, str]:
  start = text.find(f"\n{title}\n")
  rows = {}
  if start >= 0:
    position = start + len(title) + 2
    while match := _ROW.match(text, position):
      rows[int(match[1])] = match[2]
      position = match.end() + 1
  return rows


def _number(row: str, key: str) -> int:
  match = re.search(rf"{key}=(\d+)", row)
  return int(match[1]) if match else 0
