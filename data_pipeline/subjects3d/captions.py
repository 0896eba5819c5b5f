"""English captions of a picture, from a small grammar with several phrasings (numpy only)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import DataError
from data_pipeline.subjects3d import factors as F

MENTIONS = ("scene", "hat", "style", "color1", "color2", "pattern", "size")
# How often a caption of pretraining mentions what it could: enough to learn each word, and enough
# silence that a prompt without colour is nothing unusual.
MENTION_PROBS = dict(
  scene=0.95, color1=0.8, color2=0.3, pattern=0.5, hat=0.85, style=0.95, size=0.1
)
# The same for a subject cut out on white.
CUTOUT_MENTION_PROBS = {name: 0.0 if name in F.CUTOUT_HIDES else 0.9 for name in MENTION_PROBS}
MAX_WORDS = 22
SMALL, LARGE = 0.85, 1.3  # only sizes below and above are mentioned

_SCENES = (
  ("on the grass", "on green grass", "standing on the grass"),
  ("on the beach", "at the beach", "standing on a sandy beach"),
  ("in the snow", "on the snow", "standing in the snow"),
  ("in the desert", "in a sandy desert", "standing in the desert"),
  ("in the sea", "on the sea", "floating on the sea"),
  ("at night", "in the night", "under the moon at night"),
  ("by a brick wall", "in front of a brick wall", "next to a brick wall"),
  ("on a wooden floor", "on the wooden floor", "standing on a wooden floor"),
  ("on a road", "on the road", "standing on the road"),
  ("in a flower meadow", "in a meadow of flowers", "standing in a flower meadow"),
)
# Only photos have an empty prefix.
_STYLES = (
  ("", "", "a photo of", "a picture of"),
  ("a sketch of", "a pencil sketch of"),
  ("a watercolour of", "a watercolour painting of"),
)
_PATTERNED = (None, "striped", "dotted", "checked", "swirled")
_WITH_PATTERN = (None, "with {} stripes", "with {} dots", "with {} checks", "with a {} swirl")
_PARTS = ("with {} parts", "with {} details")
_HATS = ("wearing {} hat", "in {} hat", "with {} hat")


class Caption(NamedTuple):
  """A sentence without capital or full stop; `text[noun_start:]` begins with the class noun."""

  text: str
  noun: str
  noun_start: int


def _a(words: str) -> str:
  return ("an " if words[0] in "aeiou" else "a ") + words


def _pick(rng, choices):
  return choices[rng.integers(len(choices))]


def _phrase(rng, f, mention) -> tuple[str, str, str]:
  """(text before the noun, noun, text after it)."""
  noun = F.CLASSES[f.class_id]
  color1, pattern_color = F.COLORS[f.color1], F.COLORS[f.pattern_color]
  adjectives, after = [], []
  if "size" in mention and not SMALL <= f.size <= LARGE:
    adjectives.append("small" if f.size < SMALL else _pick(rng, ("large", "big")))
  if "pattern" in mention and f.pattern:
    if "color1" in mention and rng.random() < 0.5:
      adjectives += [color1, "and", pattern_color, _PATTERNED[f.pattern]]
    else:
      adjectives += [color1] if "color1" in mention else []
      after.append(_WITH_PATTERN[f.pattern].format(pattern_color))
  else:
    adjectives += ["plain"] if "pattern" in mention else []
    adjectives += [color1] if "color1" in mention else []
  if "color2" in mention:
    parts = _pick(rng, _PARTS).format(F.COLORS[f.color2])
    after.append(parts.replace("with", "and") if after else parts)
  if "hat" in mention and f.hat:
    hats = _HATS[:2] if after else _HATS
    after.append(_pick(rng, hats).format(_a(F.COLORS[f.hat - 1])))
  before = ""
  if "style" in mention:
    before = _pick(rng, _STYLES[f.style])
  if "scene" in mention:
    scene = _pick(rng, _SCENES[f.scene])
    if not before and rng.random() < 0.15:
      before = scene.removeprefix("standing ").removeprefix("floating ") + ","
    else:
      after.append(scene)
  words = _a(" ".join([*adjectives, noun]))
  head = words[: len(words) - len(noun)]
  before = f"{before} {head}" if before else head
  return before, noun, "".join(" " + part for part in after)


def caption(
  rng: np.random.Generator, factors_row: F.Factors, *, mention=("scene", "hat", "style")
) -> Caption:
  """Describes one picture.

  Args:
    factors_row: `Factors` of scalars, e.g. `factors.take(i)`.
    mention: which of `MENTIONS` the caption mentions, besides the class noun. A missing hat and a
      medium size are never mentioned, the style of a photo not always.

  Returns:
    A caption of at most 22 words: longer ones are drawn again.

  Raises:
    DataError: unknown name in `mention`.
  """
  unknown = set(mention) - set(MENTIONS)
  if unknown:
    raise DataError(
      f"captions cannot mention {sorted(unknown)[0]!r}: use any of {', '.join(MENTIONS)}"
    )
  while True:
    before, noun, after = _phrase(rng, factors_row, mention)
    text = before + noun + after
    if len(text.split()) <= MAX_WORDS:
      return Caption(text, noun, len(before))


def write_captions(
  rng: np.random.Generator, factors: F.Factors, mention_probs: Mapping[str, float]
) -> list[str]:
  """One caption per row of `factors`; each name in `mention_probs` has its own probability."""
  rows = len(factors.class_id)
  mentioned = {name: rng.random(rows) < prob for name, prob in mention_probs.items()}
  texts = []
  for i in range(rows):
    mention = tuple(name for name in mentioned if mentioned[name][i])
    texts.append(caption(rng, factors.take(i), mention=mention).text)
  return texts


def wrong_word_captions(
  factors: F.Factors, shifts: Int[np.ndarray, " n"], seed: int
) -> dict[str, list[str]]:
  """Captions of class, main colour and scene, and the same with one of these words wrong.

  Args:
    factors: of n pictures.
    shifts: which of the other values is named instead, counted from the true one.
    seed: of the phrasing, which is the same with and without a wrong word.

  Returns:
    n captions for each wrong word: 'none', 'class', 'colour', 'scene'.
  """

  def another(column, count):
    return ((column + 1 + shifts % (count - 1)) % count).astype(column.dtype)

  variants = {
    "none": factors,
    "class": factors._replace(class_id=another(factors.class_id, len(F.CLASSES))),
    "colour": factors._replace(color1=another(factors.color1, len(F.COLORS))),
    "scene": factors._replace(scene=another(factors.scene, len(F.SCENES))),
  }
  mention_probs = dict(scene=1.0, color1=1.0)
  return {
    word: write_captions(np.random.default_rng(seed), variant, mention_probs)
    for word, variant in variants.items()
  }


def all_words() -> list[str]:
  """Every word that a caption may contain, sorted."""
  texts = [*F.CLASSES, *F.COLORS, *(p for row in _SCENES + _STYLES for p in row), *_PARTS, *_HATS]
  texts += [p for p in _PATTERNED + _WITH_PATTERN if p]
  texts.append("a an and plain small large big")
  return sorted({w for text in texts for w in text.replace("{}", "").split()})


def corpus(n: int, rng: np.random.Generator) -> list[str]:
  """n captions of random pictures, each mentioning every one of `MENTIONS` with probability 1/2."""
  table = F.subjects("train")
  ranges = F.Ranges(hat=0.5, photo=0.4)  # every phrase often enough for a tokenizer
  subjects = table.take(rng.integers(len(table.class_id), size=n))
  drawn = F.sample_factors(rng, subjects, ranges=ranges)
  texts = []
  for i in range(n):
    mention = [name for name in MENTIONS if rng.random() < 0.5]
    texts.append(caption(rng, drawn.take(i), mention=mention).text)
  return texts
