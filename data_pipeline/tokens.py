"""Captions as token ids, with the position where the pseudo-word S+ is inserted."""

import re
import threading
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import DataError

_LOCK = threading.Lock()  # fast tokenizers refuse to be used by two threads at once


def encode_prompt(
    tokenizer: Callable, prompt: str, class_noun: str, s_words: int, max_length: int | None = None,
    *, occurrence: int = 0,
) -> tuple[Int[np.ndarray, " t"], int, Int[np.ndarray, " 2"]]:
  """Token ids of the prompt without S+, the slot of S+, and the class noun's tokens.

  Args:
    tokenizer: a CLIPTokenizer of transformers or an object that behaves like it.
    prompt: an English sentence that contains the class noun.
    class_noun: one or several words; matched as whole words, upper or lower case.
    occurrence: which of the noun's occurrences is meant; the first by default.
    s_words: number of pseudo-words that must fit in besides the prompt.
    max_length: T; the tokenizer's `model_max_length` by default.

  Returns:
    `input_ids` int32 [T] (BOS ... EOS, then padding), `slot` (the index right after the noun's
    last token, where S+ is inserted), `noun_span` int32 [2] = (start, end), end == slot.

  Raises:
    DataError: the prompt does not contain the noun (so often), or has more than T - s_words tokens.
  """
  length = max_length or tokenizer.model_max_length
  words = class_noun.split()
  pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
  matches = list(re.finditer(pattern, prompt, re.IGNORECASE)) if words else []
  match = matches[occurrence] if len(matches) > occurrence else None
  if matches and not match:
    raise DataError(
        f"the prompt {prompt!r} contains the class noun {class_noun!r} {len(matches)} times, not "
        f"{occurrence + 1}; name every subject once"
    )
  if not match:
    raise DataError(
        f"the prompt {prompt!r} does not contain the class noun {class_noun!r}; "
        "write the noun as a whole word where the subject is meant"
    )
  with _LOCK:
    ids = _ids(tokenizer, prompt)
    if len(ids) > length - s_words:
      raise DataError(
          f"the prompt {prompt!r} has {len(ids)} tokens; the limit is {length - s_words} "
          f"({length} of the tokenizer less {s_words} for S+); shorten the prompt"
      )
    start, end = _span(tokenizer, prompt, match.span(), ids)
  padded = np.full(length, tokenizer.pad_token_id, np.int32)
  padded[: len(ids)] = ids
  return padded, end, np.array([start, end], np.int32)


def empty_prompt(tokenizer: Callable, max_length: int | None = None) -> Int[np.ndarray, " t"]:
  """Token ids int32 [T] of the empty prompt: the unconditional half of guidance."""
  length = max_length or tokenizer.model_max_length
  padded = np.full(length, tokenizer.pad_token_id, np.int32)
  with _LOCK:
    ids = _ids(tokenizer, "")
  padded[: len(ids)] = ids
  return padded


def _ids(tokenizer: Callable, text: str) -> list[int]:
  return list(tokenizer(text)["input_ids"])


def _span(
    tokenizer: Callable, prompt: str, chars: tuple[int, int], ids: list[int]
) -> tuple[int, int]:
  """Token indices [start, end) of the characters `chars` of the prompt."""
  noun = _letters(prompt[slice(*chars)])
  is_noun = lambda a, b: _letters(tokenizer.decode(ids[a:b])) == noun  # noqa: E731
  # CLIP's tokens never span words, so the text before the noun has the same tokens by itself; the
  # last of `_ids` is EOS.
  start = len(_ids(tokenizer, prompt[: chars[0]])) - 1
  end = len(_ids(tokenizer, prompt[: chars[1]])) - 1
  if is_noun(start, end):
    return start, end
  # Another kind of vocabulary: search all short runs of tokens for the noun.
  for start in range(len(ids)):
    for end in range(start + 1, min(start + len(noun), len(ids)) + 1):
      if is_noun(start, end):
        return start, end
  raise DataError(
      f"the tokenizer cannot tell the class noun {prompt[slice(*chars)]!r} from its neighbours "
      f"in {prompt!r}; put spaces around it"
  )


def _letters(text: str) -> str:
  return "".join(text.lower().split())
