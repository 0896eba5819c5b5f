"""Plain text for people: aligned tables, lists of names."""

from collections.abc import Iterable, Sequence


def align_table(rows: Sequence[Sequence[str]], left: int) -> str:
  """A table in plain text; the first `left` columns are flush left, numbers flush right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def first_names(names: Iterable[str], limit: int = 3) -> str:
  """'a, b, c and 4 more', for errors about many names."""
  names = list(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
