"""Class nouns in English: their article, and whether a text names them."""

import re

_SINGULAR_IN_S = ("christmas", "iris", "chess", "tennis", "lens", "canvas", "gas", "atlas")
_VOWEL_SOUND = re.compile(r"(?!(uni|use|uti|uk|eu|one))[aeiou]|hour", re.IGNORECASE)


def with_article(noun: str) -> str:
  """'a chair', 'an armchair', 'an hourglass', and 'scissors' as it is."""
  last = "".join(noun.lower().split()[-1:])
  is_plural = last.endswith("s") and not last.endswith(("ss", "us"))
  if is_plural and last not in _SINGULAR_IN_S:
    return noun
  return ("an " if _VOWEL_SOUND.match(noun) else "a ") + noun


def find_noun(text: str, noun: str) -> list[re.Match]:
  """Where a text has the noun as words of their own; capitals and the space between do not matter.
  """
  words = noun.split()
  pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
  return list(re.finditer(pattern, text, re.IGNORECASE)) if words else []
