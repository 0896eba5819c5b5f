"""Plain text for people: aligned tables."""

from collections.abc import Sequence


def align_table(rows: Sequence[Sequence[str]], left: int) -> str:
  """A table in plain text; the first `left` columns are flush left, numbers flush right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
