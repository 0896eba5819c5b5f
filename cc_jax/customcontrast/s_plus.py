"""S+: pseudo-words for the subject, placed in a prompt right after its class noun."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cc_jax.errors import UserError


def noun_norm(
  embeddings: Float[Array, "b t d"], noun_span: Int[Array, "b 2"]
) -> Float[Array, " b"]:
  """Mean norm of the class noun's token embeddings; `noun_span` = token indices [start, end).

  An empty span (no noun known) counts as the one token before its end, so that the norm is never 0.
  """
  start = jnp.minimum(noun_span[:, :1], noun_span[:, 1:] - 1)
  position = jnp.arange(embeddings.shape[1])
  noun = (position >= start) & (position < noun_span[:, 1:])
  norms = jnp.linalg.norm(embeddings.astype(jnp.float32), axis=-1)
  return jnp.sum(norms * noun, axis=1) / jnp.sum(noun, axis=1)


def set_norm(words: Float[Array, "s b w d"], norm: Float[Array, " b"]) -> Float[Array, "s b w d"]:
  """Every word of sample b scaled to length norm[b], as NeTI does [R]; float32 inside."""
  words_f32 = words.astype(jnp.float32)
  square = jnp.sum(words_f32**2, axis=-1, keepdims=True)
  return (words_f32 * norm[:, None, None] / jnp.sqrt(square + 1e-12)).astype(words.dtype)


def insert_words(
  embeddings: Float[Array, "b t d"], words: Float[Array, "s b w d"], slot: Int[Array, " b"],
  eos: Int[Array, " b"], use: Bool[Array, " b"],
) -> Float[Array, "s b t d"]:
  """Token embeddings with the words at `slot`; what stood there and behind moves right by W.

  The length stays T: pads fall off at the end. Where even EOS (at index `eos`) would fall off, it
  takes the last place instead of the caption's last words, since the encoder reads the sentence off
  at EOS. The pipeline never lets it come to that, and `check_room` refuses a user's prompt.
  Where `use` is False the prompt stays as it is.
  """
  length, count = embeddings.shape[1], words.shape[2]
  position = jnp.arange(length)
  source = _source(length, count, slot, eos)
  moved = jnp.take_along_axis(embeddings, source[..., None], axis=1)
  index = jnp.clip(position - slot[:, None], 0, count - 1)  # which word stands at a position
  placed = jnp.take_along_axis(words, index[None, :, :, None], axis=2)  # [S, B, T, D]
  is_word = _is_word(length, count, slot, eos)
  inserted = jnp.where(is_word[..., None], placed.astype(embeddings.dtype), moved)
  return jnp.where(use[:, None, None], inserted, embeddings)


def insert_more_words(
  sequences: Float[Array, "s b t d"], words: Float[Array, "s b w d"], slot: Int[Array, " b"],
  eos: Int[Array, " b"], use: Bool[Array, " b"],
) -> Float[Array, "s b t d"]:
  """`insert_words` where each layer has its own sequence already: a prompt's second subject."""
  insert = lambda sequence, w: insert_words(sequence, w[None], slot, eos, use)[0]  # noqa: E731
  return jax.vmap(insert)(sequences, words)


def insert_ids(
  ids: Int[Array, "b t"], count: int, slot: Int[Array, " b"], eos: Int[Array, " b"],
  use: Bool[Array, " b"],
) -> Int[Array, "b t"]:
  """The ids that belong to `insert_words`: only where EOS is counts, so words repeat the noun's."""
  length = ids.shape[1]
  moved = jnp.take_along_axis(ids, _source(length, count, slot, eos), axis=1)
  noun = jnp.take_along_axis(ids, jnp.maximum(slot - 1, 0)[:, None], axis=1)
  inserted = jnp.where(_is_word(length, count, slot, eos), noun, moved)
  return jnp.where(use[:, None], inserted, ids)


def check_room(input_ids: Int[Array, "b t"], eos: Int[Array, " b"], words: int) -> None:
  """Raises UserError if a prompt has no room for W more tokens before its EOS falls off."""
  length = input_ids.shape[1]
  worst = int(np.max(np.asarray(eos)))
  if worst + words > length - 1:
    raise UserError(
      f"a prompt of {worst + 1} tokens with {words} S+ words exceeds the text encoder's {length}; "
      f"shorten it by {worst + words - length + 1} tokens"
    )


def _source(length: int, count: int, slot, eos) -> Int[Array, "b t"]:
  """From which position each position of the longer prompt is taken (words aside)."""
  position = jnp.arange(length)
  source = jnp.where(position < slot[:, None], position, jnp.maximum(position - count, 0))
  return jnp.where(_eos_last(length, count, slot, eos), eos[:, None], source)


def _is_word(length: int, count: int, slot, eos) -> Bool[Array, "b t"]:
  position = jnp.arange(length)
  is_word = (position >= slot[:, None]) & (position < slot[:, None] + count)
  return is_word & ~_eos_last(length, count, slot, eos)


def _eos_last(length: int, count: int, slot, eos) -> Bool[Array, "b t"]:
  """True at the last position of a prompt whose EOS the insertion would push off the end."""
  lost = (slot <= eos) & (eos + count > length - 1)
  return lost[:, None] & (jnp.arange(length) == length - 1)
