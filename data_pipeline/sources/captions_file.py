"""captions.json, which people write by hand: read with errors that name the file and the place."""

import json
import unicodedata
from typing import Any, NamedTuple

from etils import epath

from data_pipeline.errors import DataError
from data_pipeline.sources.listing import nearest

_KEYS = ("captions", "class_noun", "family", "references")


class Listing(NamedTuple):
  """What captions.json says of a subject."""

  class_noun: str
  captions: dict[str, tuple[str, ...]]  # of each picture one, or several to draw from
  references: tuple[str, ...] | None  # names of pictures
  family: str | None


def read_listing(file: epath.Path) -> Listing:
  """Reads a captions.json; raises DataError, one line with its name, for one that is not valid.

  Texts are brought into Unicode's composed form (NFC), which CLIP's tokenizer uses anyhow.
  """
  values = _read_json(file)
  if not isinstance(values, dict):
    raise DataError(
        f'{file} holds {_kind(values)}; write {{"class_noun": "...", "captions": {{...}}}}'
    )
  for key in values:
    if key not in _KEYS:
      raise DataError(
          f"{file} has the unknown key {key!r}; it may have {', '.join(_KEYS)}{nearest(key, _KEYS)}"
      )
  noun, captions = values.get("class_noun"), values.get("captions")
  if not _is_text(noun) or not isinstance(captions, dict):
    raise DataError(f'{file} needs "class_noun" (a text) and "captions" (picture -> text)')
  return Listing(
      _nfc(noun),
      {name: _captions(file, name, caption) for name, caption in captions.items()},
      _references(file, values.get("references")),
      _family(file, values.get("family")),
  )


def _read_json(file: epath.Path) -> Any:
  if not file.exists():
    raise DataError(
        f'{file} is missing; write {{"class_noun": "...", "captions": {{"picture.png": "..."}}}}'
    )

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
      if key in seen:
        raise DataError(f"{file} has {key!r} twice; keep one of them")
      seen[key] = value
    return seen

  try:
    # Editors on Windows write a byte order mark.
    return json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise DataError(
        f"{file} is not UTF-8 (byte {error.start + 1}: {error.reason}); save it as UTF-8"
    ) from None
  except (ValueError, RecursionError) as error:
    raise DataError(f"{file} is not JSON ({error}); mend it") from None
  except OSError as error:
    raise DataError(f"{file} cannot be read ({error.strerror or error}); check it") from None


def _captions(file: epath.Path, name: str, value: Any) -> tuple[str, ...]:
  texts = value if isinstance(value, list) else [value]
  if not texts or not all(map(_is_text, texts)):
    found = next((text for text in texts if not _is_text(text)), value)
    raise DataError(
        f"{file}: the caption of {name!r} is {_kind(found)}; write a text, or a list of texts"
    )
  return tuple(map(_nfc, texts))


def _references(file: epath.Path, value: Any) -> tuple[str, ...] | None:
  if value is None:
    return None
  wrong = [v for v in value if not _is_text(v)] if isinstance(value, list) else [value]
  if wrong:
    raise DataError(f'{file}: "references" has {_kind(wrong[0])}; write a list of picture names')
  return tuple(value) or None  # of an empty list nothing can be drawn: all may be references


def _family(file: epath.Path, value: Any) -> str | None:
  if value is None:
    return None
  if isinstance(value, bool) or not (_is_text(value) or isinstance(value, int)):
    raise DataError(f'{file}: "family" is {_kind(value)}; write a text or a whole number')
  return str(value)


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _nfc(text: str) -> str:
  return unicodedata.normalize("NFC", text)


def _kind(value: Any) -> str:
  """A JSON value in words."""
  if isinstance(value, list):
    return f"a list of {len(value)}"
  if isinstance(value, dict):
    return "an object {...}"
  if isinstance(value, str):
    return f"the text {value!r}" if value.strip() else "an empty text"
  return json.dumps(value)
