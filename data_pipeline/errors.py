"""The exception whose message is meant for the user."""


class DataError(Exception):
  """Input data that cannot be used. The message is one line: what is wrong, and the remedy."""
