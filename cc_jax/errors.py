"""Errors that a user can mend."""

import os
from collections.abc import Iterable


class UserError(Exception):
  """A user's mistake. The message is one line: what is wrong, and the remedy."""


def one_line(error: Exception) -> str:
  """The error's text without line breaks, or its type where it has none."""
  return " ".join(str(error).split()) or type(error).__name__


def expand_user(path: str | os.PathLike | None) -> str | None:
  """'~/x' with the home folder for '~'; other paths, URLs (gs://...) and None as they are.

  A shell does it only at the beginning of a word: not in --workdir=~/x.
  """
  return None if path is None else os.path.expanduser(path)


def first_names(names: Iterable[str], limit: int = 3) -> str:
  """'a, b, c and 4 more', for errors about many names."""
  names = list(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
