"""Errors that a user can mend, and the wrapper that prints them without a traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from data_pipeline.errors import DataError


class UserError(Exception):
  """A user's mistake. The message is one line: what is wrong, and the remedy."""


def run(main: Callable[[Sequence[str]], None], define: Callable[[], None] = lambda: None) -> None:
  """Runs `main(argv)` under absl; a user's mistake becomes one line on stderr and exit code 1.

  Everything else keeps its traceback: it is our mistake, and the traceback is how it gets fixed.

  Args:
    main: the program.
    define: defines its flags. Do it here: a config flag with a default file reads the overrides
      on the command line as soon as it is defined.
  """

  def wrapped(argv: Sequence[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax tells its every step at INFO
    if len(argv) > 1:
      _stop(f"unexpected argument {argv[1]!r}; flags are written --name=value")
    try:
      main(argv)
    except (UserError, DataError) as error:
      _stop(str(error))
    except KeyboardInterrupt:
      _stop("interrupted; the same command goes on from the last save")

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      define()
      rest = flags.FLAGS(list(argv))
      if "config" in flags.FLAGS:
        _ = flags.FLAGS.config.items  # a file that cannot be read fails when one looks into it
      return rest
    except (AttributeError, KeyError) as error:
      # ml_collections' error for an unknown key, quoted twice: 'stepz' Did you mean "steps" ...?
      text = one_line(error).replace("\\n", " ")
      key, _, hint = text.replace("\\", "").replace("'", "").partition(" ")
      _stop(f"the config has no key {key}. {hint or 'The config file lists all keys.'}")
    except (flags.Error, TypeError, ValueError, OSError, SyntaxError) as error:
      _stop(one_line(error))

  app.run(wrapped, flags_parser=parse)


def one_line(error: Exception) -> str:
  """The error's text without line breaks, or its type where it has none."""
  return " ".join(str(error).split()) or type(error).__name__


def _stop(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)
