"""The class noun of a model's name: 'Wooden desk 2' is a desk."""

import re

# What a name begins with and a reference shows: colours, materials, sizes, ages, counts.
_ADJECTIVES = frozenset((
  "black white red green blue yellow brown grey gray orange pink purple golden silver beige clear "
  "dark light wooden wood oak teak teck alder pine iron metal steel plastic glass leather rattan "
  "concrete stone burlap painted cardboard small little large big high low mini tall long short "
  "round square rectangle rectangular oval rounded vertical horizontal lower upper double single "
  "old new modern classic contemporary antique vintage retro folded folding open opened full "
  "locked rigged free lowpoly low poly simple basic generic my the a an"
).split())  # fmt: skip
# Of these the last word alone says too little: 'washing machine', 'trash can', 'bread box'.
_NEED_COMPANY = frozenset((
  "machine maker box can holder player control board stand rack brush bag game unit set station "
  "heater dispenser bat ball net horse light fan reel hanger device tree plant house car dog stick "
  "conditioner shaker ladder cup glass cube train press measure detector hydrant guitar "
  "bear pool living room projector scale cake tower lift pin paper towel"
).split())  # fmt: skip
_CUT = re.compile(r"\b(with|without|for|of|in|on|at|by|under|from|and)\b|[,:;(\[/]|\s[-–]\s")


def spaced(name: str) -> str:
  """A file's name as words: 'redArm_chair-02' is 'red Arm chair 02'."""
  name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
  return " ".join(re.sub(r"[_\-.+]+", " ", name).split())


def class_noun(name: str) -> str:
  """The noun of the class, in small letters, of one or two words; 'object' where none is left.

  Colours, materials, sizes and numbers go: captions must not say what the reference shows.
  """
  text = re.sub(r"\\u[0-9a-fA-F]{4}|[^\w\s',:;()\[\]/–-]", " ", name)
  head = next((part for part in _CUT.split(text.lower()) if part and part.strip()), "")
  words: list[str] = []
  for word in head.split():
    if re.search(r"\d", word):
      if words:
        break  # 'Sofa 2 seats'
      continue
    words += [word.strip("'-")] if word.strip("'-") else []
  while len(words) > 1 and words[0] in _ADJECTIVES:
    words = words[1:]
  if not words or (len(words) == 1 and len(words[0]) < 2):
    return "object"
  if len(words) > 1 and words[-1] in _NEED_COMPANY and words[-2] not in _ADJECTIVES:
    return " ".join(words[-2:])
  return words[-1]
