"""Prompts as token ids, and where the pseudo-words S+ go in them."""

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
  # (slot, noun_span) of every further subject in the same prompts, in the order of their slots.
  extra_subjects: tuple[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b 2"]], ...] = ()


def encode_prompts(
  tokenizers: Sequence[Any], prompts: Sequence[str],
  nouns: Sequence[str | Sequence[str]] | None = None, *, s_words: int = 0,
) -> Prompts:
  """Token ids of prompts and, with `nouns`, where S+ goes (without them there is no S+).

  A prompt of several subjects has a sequence of nouns, in the order in which the prompt names them,
  and as many as the other prompts; a noun that comes twice means its second occurrence the second
  time.

  Raises:
    UserError, DataError: a prompt is too long (with S+'s `s_words` tokens), lacks its noun, or
      names its subjects in another order.
  """
  first = tokenizers[0]
  if nouns is None:
    ids = np.stack([_pad_ids(first, prompt) for prompt in prompts])
    subjects = [(np.zeros(len(prompts), np.int32), np.zeros((len(prompts), 2), np.int32))]
  else:
    nouns = [(noun,) if isinstance(noun, str) else tuple(noun) for noun in nouns]
    rows = [_encode_subjects(first, *row, s_words) for row in zip(prompts, nouns, strict=True)]
    ids = np.stack([row[0] for row in rows])
    subjects = [
      (np.asarray([slot for slot, _ in subject], np.int32), np.stack([s for _, s in subject]))
      for subject in zip(*(row[1] for row in rows), strict=True)
    ]
  other_ids = [np.stack([_pad_ids(t, p) for p in prompts]) for t in tokenizers[1:]]
  return Prompts((ids, *other_ids), *subjects[0], extra_subjects=tuple(subjects[1:]))


def _encode_subjects(tokenizer: Any, prompt: str, nouns: tuple[str, ...], s_words: int):
  """(ids, (slot, noun_span) of each noun's subject)."""
  subjects = []
  for index, noun in enumerate(nouns):
    ids, slot, span = encode_prompt(
      tokenizer, prompt, noun, s_words * len(nouns), occurrence=nouns[:index].count(noun))
    if subjects and slot <= subjects[-1][0]:
      raise UserError(
        f"the prompt {prompt!r} names {noun!r} before {nouns[index - 1]!r}; give the class nouns, "
        "and their references, in the order of the prompt")
    subjects.append((slot, span))
  return ids, subjects


def _pad_ids(tokenizer: Any, prompt: str) -> Int[np.ndarray, " t"]:
  limit, ids = tokenizer.model_max_length, tokenizer(prompt)["input_ids"]
  if len(ids) > limit:
    raise UserError(
      f"the prompt {prompt!r} has {len(ids)} tokens and the tokenizer's limit is {limit}; "
      f"shorten it by {len(ids) - limit} tokens")
  return np.pad(ids, (0, limit - len(ids)), constant_values=tokenizer.pad_token_id).astype(np.int32)
