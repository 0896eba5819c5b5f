"""Errors that a user can mend, and the wrapper that prints them without a traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from data_pipeline.errors import DataError


class UserError(Exception):
  """A user's mistake. The message is one line: what is wrong, and the remedy."""


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs `main(argv)` under absl; a user's mistake becomes one line on stderr and exit code 1.

  Everything else keeps its traceback: it is our mistake, and the traceback is how it gets fixed.
  """

  def wrapped(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      _stop(f"unexpected argument {argv[1]!r}; flags are written --name=value")
    try:
      main(argv)
    except (UserError, DataError) as error:
      _stop(str(error))

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
      # ml_collections raises its own kinds for an unknown key or a wrong type.
      _stop(" ".join(str(error).split()) or type(error).__name__)

  app.run(wrapped, flags_parser=parse)


def _stop(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)
