"""A prompt through the text encoders, with the S+ words of its subjects.

Training and drawing both come here, with an adapter and without.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast import s_plus
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig

# One subject's words [S, B, W, E], slot [B] and noun_span [B, 2], each per text encoder.
SubjectWords = tuple[
  Sequence[Float[Array, "s b w e"]], Sequence[Int[Array, " b"]], Sequence[Int[Array, "b 2"]]
]
Texts = tuple[Float[Array, "s b t d"], Float[Array, "b t d"] | None, Float[Array, "b e"] | None]


def size_conditions(
  height: int, width: int, *, original_size: tuple[int, int] | None = None,
  crop: tuple[int, int] = (0, 0), target_size: tuple[int, int] | None = None,
) -> tuple[int, ...]:
  """SDXL's time_ids [6] of pictures of that size, in pixels: by default whole ones, not scaled.

  (original height, width, crop top, left, target height, width), as in diffusers.
  """
  return (*(original_size or (height, width)), *crop, *(target_size or (height, width)))


def per_encoder(value: Array | Sequence[Array], count: int) -> list[Array]:
  """One array for each of `count` text encoders: those given, or the only one for all."""
  values = list(value) if isinstance(value, list | tuple) else [value]
  return values * count if len(values) == 1 else values


def check_room(
  text_encoders: Sequence[nnx.Module], ids: Sequence[Int[Array, "b t"]], num_words: int
) -> None:
  """Raises UserError where S+ would push EOS out. Under jit values are unknown: no check there.

  Nor for ids in pieces, which are cut so that there is room.
  """
  for tower, ids_BxT in zip(text_encoders, ids):
    if not isinstance(ids_BxT, jax.core.Tracer) and ids_BxT.ndim == 2:
      eos = tower.pool_position(ids_BxT)
      if not isinstance(eos, jax.core.Tracer):
        s_plus.check_room(ids_BxT, eos, num_words)


def encode_text(
  text_encoders: Sequence[nnx.Module], ids: Sequence[Int[Array, "b *p t"]],
  subjects: Sequence[SubjectWords] | None = None, use: Bool[Array, " b"] | None = None, *,
  config: MFIEncoderConfig | None = None, addition: str | None, clip_skip: int = 0,
  zero: Bool[Array, " b"] | bool = False,
) -> Texts:
  """(texts, plain text or None, pooled or None); S = G, or 1 without S+ / where it is shared.

  Args:
    ids: one array per text encoder; [B, P, T] for prompts in P pieces, whose states come one
      behind the other, [.., B, P T, D]. The pooled text is the first piece's.
    subjects: in the order of their slots; None = no S+. Slots and spans count through all pieces.
    use: per sample, whether its prompt gets S+.
    config: of S+; not read without it.
    addition: the UNet's addition_embed_type, which says what it reads besides the texts.
    zero: per sample; True puts zeros in the place of all texts: the empty prompt of bases with
      force_zeros_for_empty_prompt.
  """
  if ids[0].ndim == 2:
    outputs = _encode_piece(text_encoders, ids, subjects, use, None, config, addition, clip_skip)
  else:
    pieces = [
      _encode_piece(text_encoders, [i[:, number] for i in ids], subjects, use, number, config,
                    addition, clip_skip)
      for number in range(ids[0].shape[1])
    ]  # fmt: skip
    texts, plain, pooled = zip(*pieces)
    plain = None if plain[0] is None else jnp.concatenate(plain, axis=-2)
    outputs = jnp.concatenate(texts, axis=-2), plain, pooled[0]
  if zero is False:
    return outputs
  texts, plain, pooled = outputs
  zero = jnp.broadcast_to(jnp.asarray(zero), ids[0].shape[:1])
  return (
    jnp.where(zero[:, None, None], 0, texts),
    None if plain is None else jnp.where(zero[:, None, None], 0, plain),
    None if pooled is None else jnp.where(zero[:, None], 0, pooled),
  )


def _encode_piece(
  text_encoders: Sequence[nnx.Module], ids: Sequence[Int[Array, "b t"]],
  subjects: Sequence[SubjectWords] | None, use: Bool[Array, " b"], piece: int | None,
  config: MFIEncoderConfig | None, addition: str | None, clip_skip: int,
) -> Texts:
  """`encode_text` of one piece of the prompts; `piece` None where it is all there is."""
  pooled_s_plus = subjects is not None and config.s_plus_pooled == "s_plus"
  several = len(text_encoders) > 1  # SDXL: penultimate states, concatenated; no final norm
  needs_plain = addition is not None and subjects is not None and not pooled_s_plus
  all_texts, all_plain, pooled = [], [], None
  for index, (tower, ids_BxT) in enumerate(zip(text_encoders, ids)):
    embeddings = tower.token_embedding(ids_BxT)
    sequences, pool_ids = embeddings[None], ids_BxT[None]
    if subjects is not None:
      end, shifted = tower.pool_position(ids_BxT), ids_BxT
      # The last subject first, so that what is inserted moves no slot that is still to be filled.
      for number, subject in enumerate(reversed(subjects)):
        w, slot, noun_span = (part[index] for part in subject)
        here = use
        if piece is not None:
          length = ids_BxT.shape[1]
          here = use & (slot // length == piece)
          # Where the subject is in another piece, any index will do.
          slot, noun_span = (jnp.clip(x - piece * length, 1, length - 1) for x in (slot, noun_span))
        if config.s_plus_norm == "class_noun":
          w = s_plus.set_norm(w, s_plus.noun_norm(embeddings, noun_span))
        insert = s_plus.insert_more_words if number else s_plus.insert_words
        sequences = insert(sequences if number else embeddings, w, slot, end, here)
        shifted = s_plus.insert_ids(shifted, w.shape[2], slot, end, here)
        end = end + w.shape[2] * here
      pool_ids = jnp.broadcast_to(shifted, (sequences.shape[0], *shifted.shape))
      if needs_plain:  # the unmodified prompt rides in the same batch
        sequences = jnp.concatenate([sequences, embeddings[None]])
        pool_ids = jnp.concatenate([pool_ids, ids_BxT[None]])
    # Sample by sample, not layer by layer: a batch that is sharded over devices then stays so.
    sequences, pool_ids = jnp.moveaxis(sequences, 0, 1), jnp.moveaxis(pool_ids, 0, 1)
    lead = sequences.shape[:2]
    out = tower(
      inputs_embeds=sequences.reshape(-1, *sequences.shape[2:]),
      pool_ids=pool_ids.reshape(-1, pool_ids.shape[-1]),
    )
    state = tower.context(out, penultimate=several, clip_skip=clip_skip)
    state = jnp.moveaxis(state.reshape(*lead, *state.shape[1:]), 0, 1)
    pools = jnp.moveaxis(out.pooled.reshape(*lead, -1), 0, 1)
    if pooled_s_plus:  # mean over the layers' sequences
      plain, pooled = jnp.mean(state, axis=0), jnp.mean(pools, axis=0)
    else:
      plain, pooled = state[-1], pools[-1]
    all_texts.append(state[:-1] if needs_plain else state)
    all_plain.append(plain)
  texts = jnp.concatenate(all_texts, axis=-1)
  plain = jnp.concatenate(all_plain, axis=-1) if addition == "text" else None
  return texts, plain, pooled if addition == "text_time" else None
