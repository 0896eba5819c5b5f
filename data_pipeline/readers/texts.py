"""Nouns and captions as data sets have them, made such that a caption contains its noun."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from data_pipeline.errors import DataError
from data_pipeline.tokens import TooLongError
from data_pipeline.words import find_noun, with_article

_PLACEHOLDER = re.compile(r"\b(this|the) (item|object)\b", re.IGNORECASE)


def plain_caption(noun: str) -> str:
  """Of a frame of which nothing is said."""
  return f"a photo of {with_article(noun)}"


def with_noun(caption: str, noun: str) -> str:
  """The caption, which names the noun as a whole word: 'this item' is it, else it comes first."""
  caption = " ".join(caption.split())
  if find_noun(caption, noun):
    return caption
  if _PLACEHOLDER.search(caption):
    return _PLACEHOLDER.sub(lambda match: f"{match[1]} {noun}", caption, count=1)
  return f"{with_article(noun)}: {caption}" if caption else plain_caption(noun)


def clean_noun(text: str) -> str:
  """Of a category's name: lower case, one name of several, no brackets, blanks for underscores."""
  text = re.sub(r"\(.*?\)", " ", text)
  text = re.split(r"[,;/]", text)[0].replace("_", " ")
  text = re.sub(r"^(an?|the)\s+", "", " ".join(text.split()), flags=re.IGNORECASE)
  return text.lower()


def shortened(encode: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
  """encode(caption, noun), where captions that are too long lose their last words.

  Captions of published sets are written for encoders of longer texts. The noun is never cut: where
  no caption with it fits, 'a teapot' has to do.
  """

  @functools.lru_cache(maxsize=1 << 15)
  def encode_shortened(caption: str, noun: str):
    try:
      return encode(caption, noun)
    except TooLongError as error:
      too_long = error
    logging.log_first_n(
      logging.WARNING, "captions that are too long lose their end: %s", 1, too_long)
    words = caption.split()
    shorter = [" ".join(words[:count]).rstrip(" ,;:") for count in range(len(words) - 1, 0, -1)]
    for text in (*shorter, with_article(noun)):
      try:
        return encode(text, noun)
      except DataError:  # still too long, or without the noun
        continue
    raise too_long

  return encode_shortened


def read_json(file: epath.Path, content: bytes | None = None) -> Any:
  """Of a file, or of its content; DataError where it cannot be read."""
  try:
    return json.loads(file.read_bytes() if content is None else content)
  except OSError as error:
    raise DataError(f"{file} cannot be read ({error.strerror or error}); check it") from None
  except ValueError as error:
    raise DataError(f"{file} is not JSON ({error}); fetch it again") from None


def read_text(file: epath.Path) -> str:
  """A file's text, without a byte order mark; DataError where it cannot be read as UTF-8."""
  try:
    return file.read_bytes().decode("utf-8-sig")
  except OSError as error:
    raise DataError(f"{file} cannot be read ({error.strerror or error}); check it") from None
  except UnicodeDecodeError as error:
    raise DataError(f"{file} is not UTF-8 (byte {error.start + 1}: {error.reason}); save it as "
                    "UTF-8") from None


def names_in(folder: epath.Path) -> frozenset[str]:
  """The names of a folder's files; none where there is no folder."""
  try:
    return frozenset(path.name for path in folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return frozenset()
