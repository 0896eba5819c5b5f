"""The one exception of this package that is meant for the user's eyes."""


class DataError(Exception):
  """Input data that cannot be used. The message is one line: what is wrong, and the remedy."""
