"""Prompts as token ids, and where the pseudo-words S+ go in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from cc_jax.errors import UserError
from data_pipeline.tokens import encode_prompt


class Prompts(NamedTuple):
  """Tokenized prompts; one id array per text encoder (SDXL has two)."""

  ids: tuple[Int[np.ndarray, "b t"], ...]
  slot: Int[np.ndarray, " b"]  # where S+ goes
  noun_span: Int[np.ndarray, "b 2"]  # the class noun's tokens
  # Of the further subjects in the same prompts, in the order of their slots.
  more: tuple[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b 2"]], ...] = ()


def encode_prompts(
  tokenizers: Sequence[Any], prompts: Sequence[str],
  nouns: Sequence[str | Sequence[str]] | None = None,
  *, s_words: int = 0,
) -> Prompts:
  """Token ids of prompts and, with `nouns`, where S+ goes (else at the end: no S+ may be used).

  A prompt of several subjects has a sequence of nouns, in the order in which the prompt names them,
  and as many as the others; a noun that comes twice means its second occurrence the second time.

  Raises:
    UserError, DataError: a prompt is too long (with S+'s `s_words` tokens), lacks its noun, or
      names its subjects in another order.
  """
  first = tokenizers[0]
  places = [(np.zeros(len(prompts), np.int32), np.zeros((len(prompts), 2), np.int32))]
  if nouns is None:
    ids = np.stack([_plain_ids(first, prompt) for prompt in prompts])
  else:
    nouns = [(noun,) if isinstance(noun, str) else tuple(noun) for noun in nouns]
    rows = [_encode_subjects(first, *row, s_words) for row in zip(prompts, nouns, strict=True)]
    ids = np.stack([row[0] for row in rows])
    places = [
      (np.asarray([slot for slot, _ in place], np.int32), np.stack([span for _, span in place]))
      for place in zip(*(row[1] for row in rows), strict=True)
    ]
  others = [np.stack([_plain_ids(t, p) for p in prompts]) for t in tokenizers[1:]]
  return Prompts((ids, *others), *places[0], more=tuple(places[1:]))


def _encode_subjects(tokenizer: Any, prompt: str, nouns: tuple[str, ...], s_words: int):
  """(ids, (slot, span) of each noun's subject)."""
  places = []
  for number, noun in enumerate(nouns):
    ids, slot, span = encode_prompt(
      tokenizer, prompt, noun, s_words * len(nouns), occurrence=nouns[:number].count(noun)
    )
    if places and slot <= places[-1][0]:
      raise UserError(
        f"the prompt {prompt!r} names {noun!r} before {nouns[number - 1]!r}; give the class nouns, "
        "and their references, in the order of the prompt"
      )
    places.append((slot, span))
  return ids, places


def _plain_ids(tokenizer: Any, prompt: str) -> Int[np.ndarray, " t"]:
  limit = tokenizer.model_max_length
  found = tokenizer(prompt)["input_ids"]
  if len(found) > limit:
    raise UserError(
      f"the prompt {prompt!r} has {len(found)} tokens and the tokenizer's limit is {limit}; "
      f"shorten it by {len(found) - limit} tokens"
    )
  padded = np.full(limit, tokenizer.pad_token_id, np.int32)
  padded[: len(found)] = found
  return padded
