"""Prompts as token ids, with the positions where the pseudo-words S+ are inserted.

Training and drawing both come here, once for each text encoder with that encoder's own tokenizer:
SDXL's two pad differently, and the same text may have other tokens for each.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import DataError
from data_pipeline.words import find_noun

LONG_PROMPTS = ("cut", "chunk", "error")
_LOCK = threading.Lock()  # fast tokenizers refuse to be used by two threads at once


class TooLongError(DataError):
  """A prompt that does not fit into the text encoder."""


class PromptTokens(NamedTuple):
  """A prompt without S+ for one text encoder, in P pieces of T tokens; P is 1 if it fits in one."""

  ids: Int[np.ndarray, "p t"]  # each piece BOS ... EOS, then padding
  # For each subject, counted through all pieces: its class noun's tokens [start, end), and the
  # index right after them, where S+ is inserted.
  slots: Int[np.ndarray, " n"]
  noun_spans: Int[np.ndarray, "n 2"]
  cut_off: str = ""  # the text that was left out


def prompt_keys(text_encoders: int) -> list[tuple[str, str, str]]:
  """The keys of a batch's token ids, slot and noun span, for each text encoder."""
  names = ("input_ids", "slot", "noun_span")
  return [tuple(name + suffix for name in names) for suffix in ("", "_2")[:text_encoders]]


def encode_prompt(
    tokenizer: Callable, prompt: str, class_noun: str, s_words: int
) -> tuple[Int[np.ndarray, " t"], int, Int[np.ndarray, " 2"]]:
  """(ids, slot, noun span) of a prompt of one subject, which must fit; see `tokenize`."""
  tokens = tokenize(tokenizer, prompt, (class_noun,), s_words)
  return tokens.ids[0], int(tokens.slots[0]), tokens.noun_spans[0]


def tokenize(
    tokenizer: Callable, prompt: str, class_nouns: Sequence[str] = (), s_words: int = 0, *,
    long_prompts: str = "error",
) -> PromptTokens:
  """A prompt for one text encoder.

  Args:
    tokenizer: a CLIPTokenizer of transformers or an object that behaves like it; T is its
      `model_max_length`.
    prompt: an English sentence that contains the class nouns; "" is the empty prompt.
    class_nouns: of the subjects, in the order in which the prompt names them; each is one or
      several words, matched as whole words, upper or lower case. A noun that comes twice means its
      second occurrence the second time.
    s_words: number of pseudo-words that must fit in behind each noun.
    long_prompts: what happens to a prompt that does not fit in T tokens: 'error'; 'cut' leaves out
      its end, as diffusers does; 'chunk' goes on in another piece, each with a BOS and EOS of its
      own (T - 2 tokens of the prompt each), as most user interfaces do.

  Raises:
    DataError: the prompt lacks a noun, names the nouns in another order, is too long (a
      TooLongError), or is cut before a noun.
  """
  if long_prompts not in LONG_PROMPTS:
    raise DataError(f"long_prompts={long_prompts!r} is unknown; use {', '.join(LONG_PROMPTS)}")
  places = [
      _find(prompt, noun, class_nouns[:index].count(noun))
      for index, noun in enumerate(class_nouns)
  ]
  for index in range(1, len(places)):
    if places[index] <= places[index - 1]:
      raise DataError(
          f"the prompt {prompt!r} names {class_nouns[index]!r} before {class_nouns[index - 1]!r}; "
          "give the class nouns, and their references, in the order of the prompt"
      )
  length = tokenizer.model_max_length
  with _LOCK:
    ids = _ids(tokenizer, prompt)
    spans = [_span(tokenizer, prompt, place, ids) for place in places]
    limit = length - s_words * len(spans)
    cut_off = ""
    if len(ids) > limit and long_prompts == "error":
      raise TooLongError(
          f"the prompt {prompt!r} has {len(ids)} tokens; the limit is {limit} "
          f"({length} of the tokenizer less {length - limit} for S+); shorten the prompt"
      )
    if len(ids) > limit and long_prompts == "cut":
      ids, rest = [*ids[: limit - 1], ids[-1]], ids[limit - 1 : -1]
      cut_off = tokenizer.decode(rest).strip()
  for noun, (_, end) in zip(class_nouns, spans):
    if end > len(ids) - 1:
      raise DataError(
          f"the prompt {prompt!r} is cut after {limit} tokens, before its class noun {noun!r}; "
          "name the subject earlier, or shorten the prompt"
      )
  return _in_pieces(ids, spans, s_words, length, tokenizer.pad_token_id)._replace(cut_off=cut_off)


def _find(prompt: str, class_noun: str, occurrence: int) -> tuple[int, int]:
  """The characters [start, end) of the noun's occurrence number `occurrence`, from 0."""
  matches = find_noun(prompt, class_noun)
  if not matches:
    raise DataError(
        f"the prompt {prompt!r} does not contain the class noun {class_noun!r}; "
        "write the noun as a whole word where the subject is meant"
    )
  if len(matches) <= occurrence:
    raise DataError(
        f"the prompt {prompt!r} contains the class noun {class_noun!r} {len(matches)} times, not "
        f"{occurrence + 1}; name every subject once"
    )
  return matches[occurrence].span()


def _in_pieces(
    ids: list[int], spans: Sequence[tuple[int, int]], s_words: int, length: int, pad: int
) -> PromptTokens:
  """BOS ... EOS -> pieces of `length` tokens; a noun and the S+ behind it stay in one piece."""
  room = {start: end - start + s_words for start, end in spans}
  ends = dict(spans)
  starts, used, index = [1], 2, 1  # 2: BOS and EOS
  while index < len(ids) - 1:
    needed = room.get(index, 1)
    if used + needed > length and used > 2:
      starts.append(index)
      used = 2
    used += needed
    index = ends.get(index, index + 1)
  pieces = np.full((len(starts), length), pad, np.int32)
  for row, start, end in zip(pieces, starts, [*starts[1:], len(ids) - 1]):
    row[: end - start + 2] = [ids[0], *ids[start:end], ids[-1]]
  # The piece of a noun's first token, and how far its tokens have moved there.
  piece = np.searchsorted(starts, [start for start, _ in spans], side="right") - 1
  moved = piece * length + 1 - np.asarray(starts)[piece]
  noun_spans = np.asarray(spans, np.int32).reshape(-1, 2) + moved[:, None]
  return PromptTokens(pieces, noun_spans[:, 1].astype(np.int32), noun_spans.astype(np.int32))


def _ids(tokenizer: Callable, text: str) -> list[int]:
  # Otherwise transformers warns of indexing errors where a prompt is long, which we see to.
  return list(tokenizer(text, verbose=False)["input_ids"])


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
