"""A prompt through the text encoders, with the S+ words of its subjects."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast import s_plus
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig

# One subject's words per text encoder [S, B, W, E], slot [B] and noun_span [B, 2].
SubjectWords = tuple[tuple[Float[Array, "s b w e"], ...], Int[Array, " b"], Int[Array, "b 2"]]


def check_room(
  text_encoders: Sequence[nnx.Module], ids: Sequence[Int[Array, "b t"]], num_words: int
) -> None:
  """Raises UserError where S+ would push EOS out. Under jit values are unknown: no check there."""
  for tower, ids_BxT in zip(text_encoders, ids):
    if not isinstance(ids_BxT, jax.core.Tracer):
      eos = tower.pool_position(ids_BxT)
      if not isinstance(eos, jax.core.Tracer):
        s_plus.check_room(ids_BxT, eos, num_words)


def encode_text(
  text_encoders: Sequence[nnx.Module], ids: Sequence[Int[Array, "b t"]],
  subjects: Sequence[SubjectWords] | None, use: Bool[Array, " b"], *, config: MFIEncoderConfig,
  addition: str | None, clip_skip: int,
) -> tuple[Float[Array, "s b t d"], Float[Array, "b t d"] | None, Float[Array, "b e"] | None]:
  """(texts, plain text or None, pooled or None); S = G, or 1 without S+ / where it is shared.

  Args:
    ids: one array per text encoder.
    subjects: in the order of their slots; None = no S+.
    use: per sample, whether its prompt gets S+.
    addition: the UNet's addition_embed_type, which says what it reads besides the texts.
  """
  pooled_s_plus = config.s_plus_pooled == "s_plus" and subjects is not None
  several = len(text_encoders) > 1  # SDXL: penultimate states, concatenated; no final norm
  needs_plain = addition is not None and subjects is not None and not pooled_s_plus
  all_texts, all_plain, pooled = [], [], None
  for index, (tower, ids_BxT) in enumerate(zip(text_encoders, ids)):
    embeddings = tower.token_embedding(ids_BxT)
    sequences, pool_ids = embeddings[None], ids_BxT[None]
    if subjects is not None:
      eos, shifted = tower.pool_position(ids_BxT), ids_BxT
      # The last subject first, so that what is inserted moves no slot that is still to be filled.
      for number, (words, slot, noun_span) in enumerate(reversed(subjects)):
        w = words[index]
        if config.s_plus_norm == "class_noun":
          w = s_plus.set_norm(w, s_plus.noun_norm(embeddings, noun_span))
        insert = s_plus.insert_more_words if number else s_plus.insert_words
        end = eos + number * w.shape[2]
        sequences = insert(sequences if number else embeddings, w, slot, end, use)
        shifted = s_plus.insert_ids(shifted, w.shape[2], slot, end, use)
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
