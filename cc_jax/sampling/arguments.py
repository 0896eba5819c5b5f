"""What users hand to the pipeline, brought into one form; each mistake is one line."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cc_jax.errors import UserError, expand_user
from cc_jax.models.params import DTYPES


def as_path(name: str, value: Any) -> str | None:
  """A path, a hub id or None; '~' is the home folder."""
  if value is not None and not isinstance(value, str | os.PathLike):
    raise UserError(f"{name} is {_short(value)}; give a path")
  return expand_user(value)


def as_text(name: str, value: Any) -> str | None:
  """One text, or None."""
  if not isinstance(value, str | None):
    raise UserError(f"{name} is {_short(value)}; give one text")
  return value


def as_loras(lora: Any) -> list[tuple[str, float]]:
  """LoRA files with their scales, from one of either or a list."""
  if isinstance(lora, str | os.PathLike):
    lora = [lora]
  pairs = []
  for entry in lora:
    file, scale = (entry, 1.0) if isinstance(entry, str | os.PathLike) else _pair("lora", entry)
    pairs.append((as_path("lora", file), as_number("the scale of a lora", scale)))
  return pairs


def as_dtype(dtype: Any) -> np.dtype:
  """One of models.params.DTYPES."""
  try:
    found = np.dtype(dtype)
  except TypeError:
    found = None
  if found is None or found.name not in DTYPES:
    raise UserError(f"dtype is {_short(dtype)}; use {' or '.join(DTYPES)}")
  return found


def as_number(name: str, value: Any) -> float:
  """A Python, numpy or JAX number."""
  try:
    if not isinstance(value, str | bytes | bool) and np.ndim(value) == 0:
      return float(value)
  except (TypeError, ValueError):
    pass
  raise UserError(f"{name} is {_short(value)}; give a number")


def as_integer(name: str, value: Any) -> int:
  """A whole number of Python, numpy or JAX."""
  try:
    if not isinstance(value, bool):
      return operator.index(value)
  except TypeError:
    pass
  raise UserError(f"{name} is {_short(value)}; give a whole number")


def as_pixels(name: str, value: Any, least: int = 1) -> tuple[int, int] | None:
  """A pair of pixels, (height, width) or (top, left), each `least` or more, or None."""
  if value is None:
    return None
  first, second = (as_integer(name, side) for side in _pair(name, value))
  if first < least or second < least:
    raise UserError(f"{name} is {(first, second)}; give two numbers from {least} on")
  return first, second


def as_prompts(prompt: Any) -> list[str]:
  """One prompt, or a list of prompts, one for each picture."""
  prompts = [prompt] if prompt is None or isinstance(prompt, str) else _listed("prompt", prompt)
  for text in prompts:
    if text is not None and not isinstance(text, str):
      raise UserError(f"prompt is {_short(text)}; give a sentence, or a list of sentences")
  if not prompts or not all(text and text.strip() for text in prompts):
    raise UserError("there is no prompt; say what to draw with --prompt")
  return prompts


def as_nouns(class_noun: Any) -> list[str]:
  """The class noun of each subject; empty if there is none."""
  if isinstance(class_noun, str):
    return [class_noun]
  nouns = [] if class_noun is None else _listed("class_noun", class_noun)
  for noun in nouns:
    if not isinstance(noun, str):
      raise UserError(f"class_noun is {_short(noun)}; give a word of the prompt")
  return nouns


def as_seeds(seed: Any, num_images: int | None, prompts: int = 1) -> list[int]:
  """A seed for every picture. With several prompts there is a picture for each."""
  count = prompts if num_images is None else as_integer("num_images", num_images)
  if count < 1:
    raise UserError(f"num_images is {count}; draw at least one")
  if isinstance(seed, Iterable) and getattr(seed, "ndim", 1):
    seeds = [as_integer("seed", one) for one in _listed("seed", seed)]
  else:
    first = as_integer("seed", seed)
    seeds = [first + k for k in range(count)]
  if num_images is not None and len(seeds) != count:
    raise UserError(f"{len(seeds)} seeds for {count} pictures; leave num_images out")
  if prompts > 1 and len(seeds) != prompts:
    raise UserError(
      f"{prompts} prompts for {len(seeds)} pictures; a list of prompts draws one picture of each: "
      "leave num_images out and give one seed, or one for each prompt")
  if not seeds or not all(0 <= one < 2**31 for one in seeds):
    raise UserError(f"seed {seed} is out of range; use 0 to {2**31 - count}")
  return seeds


def as_picture(name: str, value: Any) -> str | Image.Image | np.ndarray:
  """A path, a PIL image or an array."""
  if isinstance(value, str | os.PathLike):
    return expand_user(value)
  if isinstance(value, Image.Image | np.ndarray):
    return value
  if hasattr(value, "__array__") and not isinstance(value, type):  # JAX's and PyTorch's
    try:
      return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
      raise UserError(f"{name} cannot be read as an array; give a numpy array") from error
  raise UserError(f"{name} is {_short(value)}; give a path, a PIL image or an array")


def as_pictures(name: str, pictures: Any) -> list[Any]:
  """One picture or several or None, as a list; a mask may be None within it."""
  if pictures is None:
    return []
  if isinstance(pictures, str | os.PathLike | Image.Image) or hasattr(pictures, "__array__"):
    picture = as_picture(name, pictures)
    several = isinstance(picture, np.ndarray) and picture.ndim == 4  # [r, h, w, c]
    return list(picture) if several else [picture]
  items = _listed(name, pictures)
  optional = name == "mask"
  return [None if optional and p is None else as_picture(f"a {name}", p) for p in items]


def pictures_by_subject(
  references: Any, masks: Any, nouns: Sequence[str]
) -> tuple[list[list[Any]], list[list[Any]]]:
  """A list of references and one of masks for each subject; one subject may come without lists."""
  if len(nouns) < 2:
    pairs = [(_inner(references), _inner(masks))]
  else:
    references = [] if references is None else _listed("references", references)
    masks = [None] * len(nouns) if masks is None else _listed("masks", masks)
    if references and not len(nouns) == len(references) == len(masks):
      raise UserError(
        f"{len(references)} lists of references and {len(masks)} of masks for {len(nouns)} class "
        "nouns; give one of each for every subject")
    pairs = list(zip(references, masks)) or [(None, None)]
  references = [as_pictures("reference", pair[0]) for pair in pairs]
  masks = [as_pictures("mask", pair[1]) for pair in pairs]
  if len(pairs) > 1 and not all(references):
    raise UserError("a subject has no reference; give every class noun at least one")
  for shown, cut in zip(references, masks):
    if cut and len(cut) != len(shown):
      raise UserError(
        f"{len(cut)} masks for {len(shown)} references; give one for each, or None where there is "
        "none (--mask=,b.png)")
  return references, masks


def _inner(pictures: Any) -> Any:
  """One subject's pictures, also as the only list in a list, as several subjects have them."""
  if isinstance(pictures, list | tuple) and len(pictures) == 1:
    return pictures[0] if isinstance(pictures[0], list | tuple) else pictures
  return pictures


def _listed(name: str, values: Any) -> list[Any]:
  if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
    raise UserError(f"{name} is {_short(values)}; give one, or a list")
  return list(values)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
  if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != 2:
    raise UserError(f"{name} is {_short(value)}; give a pair")
  return tuple(value)


def _short(value: Any) -> str:
  """A value and its type, in a few words on one line."""
  text = " ".join(repr(value).split())
  return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
