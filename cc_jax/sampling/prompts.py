"""Prompts as token ids for every text encoder, and where the pseudo-words S+ go in them."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from cc_jax.bases.base import Base
from data_pipeline.tokens import tokenize


class Prompts(NamedTuple):
  """Tokenized prompts. Everything is one array per text encoder (SDXL has two).

  Where a prompt is longer than a text encoder's T tokens, all have P pieces.
  """

  ids: tuple[Int[np.ndarray, "b *p t"], ...]
  slot: tuple[Int[np.ndarray, " b"], ...]  # where S+ goes, counted through all pieces
  noun_span: tuple[Int[np.ndarray, "b 2"], ...]  # the class noun's tokens
  # (slot, noun_span) of every further subject in the same prompts, in the order of their slots.
  extra_subjects: tuple[tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]], ...] = ()


def encode_prompts(
  tokenizers: Sequence[Any], prompts: Sequence[str],
  nouns: Sequence[str | Sequence[str]] | None = None, *, s_words: int = 0,
  long_prompts: str = "error",
) -> Prompts:
  """Token ids of prompts and, with `nouns`, where S+ goes (without them there is no S+).

  A prompt of several subjects has a sequence of nouns, in the order in which the prompt names them,
  and as many as the other prompts; a noun that comes twice means its second occurrence the second
  time. `long_prompts`: see `data_pipeline.tokens.tokenize`.

  Raises:
    DataError: a prompt is too long (with S+'s `s_words` tokens), lacks its noun, or names its
      subjects in another order.
  """
  nouns = nouns or [()] * len(prompts)
  nouns = [(noun,) if isinstance(noun, str) else tuple(noun) for noun in nouns]
  rows = [
    [tokenize(t, *row, s_words, long_prompts=long_prompts) for row in zip(prompts, nouns)]
    for t in tokenizers
  ]
  for prompt in dict.fromkeys(prompts):
    cut_off = [row[prompts.index(prompt)].cut_off for row in rows]
    if any(cut_off):
      warnings.warn(
        f"the prompt {prompt[:30]!r}... is longer than {tokenizers[0].model_max_length} tokens; "
        f"this is left out: {max(cut_off, key=len)!r}; long_prompts='chunk' takes it in",
        stacklevel=3,
      )
  pieces = max(len(tokens.ids) for row in rows for tokens in row)
  ids = tuple(
    np.stack([_pad(tokens.ids, pieces, tokenizer) for tokens in row])
    for tokenizer, row in zip(tokenizers, rows)
  )
  if pieces == 1:
    ids = tuple(i[:, 0] for i in ids)
  subjects = [
    (tuple(np.stack([tokens.slots[k] for tokens in row]) for row in rows),
     tuple(np.stack([tokens.noun_spans[k] for tokens in row]) for row in rows))
    for k in range(len(nouns[0]))
  ]  # fmt: skip
  if not subjects:
    nowhere = np.zeros((len(prompts), 2), np.int32)
    subjects = [((nowhere[:, 0],) * len(rows), (nowhere,) * len(rows))]
  return Prompts(ids, *subjects[0], extra_subjects=tuple(subjects[1:]))


def encode_with_negative(
  base: Base, prompts: Sequence[str], nouns: Sequence[str | Sequence[str]] | None = None,
  negative_prompt: str | None = None, **options: Any,
) -> tuple[Prompts, Prompts | None]:
  """`encode_prompts` with those options, and the one prompt that guidance leads away from.

  None stands for zeros in place of a text. That is what SDXL is guided away from where no negative
  prompt is given; "" is encoded, as it is by other bases in either case. The same as in diffusers.
  Both have equally many pieces: the shorter one goes on with empty ones.
  """
  encoded = encode_prompts(base.tokenizers, prompts, nouns, **options)
  if negative_prompt is None and base.force_zeros_for_empty_prompt:
    return encoded, None
  options |= dict(s_words=0)
  negative = encode_prompts(base.tokenizers, [negative_prompt or ""], **options)
  pair = [[i if i.ndim == 3 else i[:, None] for i in p.ids] for p in (encoded, negative)]
  count = max(ids[0].shape[1] for ids in pair)
  if count == 1:
    return encoded, negative
  ids, negative_ids = (
    tuple(np.stack([_pad(row, count, t) for row in i]) for t, i in zip(base.tokenizers, ids))
    for ids in pair
  )
  return encoded._replace(ids=ids), negative._replace(ids=negative_ids)


def _pad(pieces: Int[np.ndarray, "p t"], count: int, tokenizer: Any) -> Int[np.ndarray, "count t"]:
  """`count` pieces, the missing ones those of an empty prompt."""
  if len(pieces) == count:
    return pieces
  empty = tokenize(tokenizer, "").ids
  return np.concatenate([pieces, *[empty] * (count - len(pieces))])
