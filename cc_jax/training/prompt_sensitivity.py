"""Wrong-word gaps: does the denoiser still follow the prompt while an adapter injects a subject?

A gap is the relative rise of the diffusion loss at one timestep when a word of the caption is
replaced by a wrong one; 0 = the word is ignored. It needs neither sampling nor a judge, so that
training can log it (docs/method.md, "The wrong-word gap").
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from cc_jax.models.params import Params
from cc_jax.objectives.diffusion import per_sample_mse
from cc_jax.parallel.mesh import replicated_sharding, shard_batch
from cc_jax.training.inputs import image_features
from cc_jax.training.losses import denoise
from cc_jax.training.noise import StepNoise
from cc_jax.training.step_context import Batch, StepContext
from data_pipeline.tokens import prompt_keys

NOISE_LEVEL = 0.85  # t / T: so noisy that the picture itself tells little
NumpyBatch = dict[str, np.ndarray]
Swap = tuple[int, int, tuple[int, ...]]  # tokens [start, end), and what comes in their place


def sample_losses(
  context: StepContext, adapter: Params, frozen: Params, batch: Batch
) -> Float[Array, " b"]:
  """Diffusion loss of each sample at t = 0.85 T, with reference, prompt and one noise."""
  model = context.model(adapter, frozen)
  size = batch["target_mask"].shape[0]
  t = jnp.full((size,), int(NOISE_LEVEL * context.schedule.num_train_timesteps), jnp.int32)
  keep = jnp.ones(size, bool)
  features, _ = image_features(model, batch, ["reference"])
  keys = jax.random.split(jax.random.key(context.config.seed), size)
  step_noise = StepNoise(t, keep_text=keep, keep_image=keep, keys=keys)
  shown = model.encode(features[:, 0], t)
  return per_sample_mse(*denoise(context, model, batch, shown, step_noise))


def make_prompt_sensitivity(
  context: StepContext, mesh: Mesh, batch: NumpyBatch,
  wrong: Mapping[str, tuple[NumpyBatch, np.ndarray]],
) -> Callable[[Params, Params], dict[str, float]]:
  """A function (adapter, frozen) -> {'gap/<word>': relative rise of the loss} on one fixed batch.

  `wrong` maps a name to (the batch with a wrong word, which samples really changed [B]). A word of
  which nothing changed has no gap: a warning says so, and the key is left out.
  """
  losses = jax.jit(
    lambda adapter, frozen, batch: sample_losses(context, adapter, frozen, batch),
    out_shardings=replicated_sharding(mesh),
  )
  right = shard_batch(batch, mesh)
  sharded = {
    name: (shard_batch(values, mesh), shard_batch({"changed": changed}, mesh))
    for name, (values, changed) in wrong.items()
  }
  # Of the whole batch: all processes must agree on the programs that they run.
  changes = jax.jit(jnp.any, out_shardings=replicated_sharding(mesh))
  for name in [name for name, (_, mask) in sharded.items() if not changes(mask["changed"])]:
    del sharded[name]
    logging.warning(
      "gap/%s is left out: in no caption of the first %d can that word be replaced by another",
      name, len(batch["slot"]))

  def prompt_sensitivity(adapter: Params, frozen: Params) -> dict[str, float]:
    right_losses = losses(adapter, frozen, right)
    gaps = {
      f"gap/{name}": relative_rise(right_losses, losses(adapter, frozen, values), mask["changed"])
      for name, (values, mask) in sharded.items()
    }
    return {key: float(value) for key, value in jax.device_get(gaps).items()}

  return prompt_sensitivity


@jax.jit
def relative_rise(
  right: Float[Array, " b"], wrong: Float[Array, " b"], changed: Bool[Array, " b"]
) -> Float[Array, ""]:
  """sum(wrong) / sum(right) - 1 over the changed samples; 0 if there are none."""
  before = jnp.sum(jnp.where(changed, right, 0.0))
  after = jnp.sum(jnp.where(changed, wrong, 0.0))
  return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0) - 1.0, 0.0)


def wrong_nouns(
  batch: NumpyBatch, tokenizers: Sequence[Any], s_words: int
) -> tuple[NumpyBatch, np.ndarray]:
  """Replaces the class noun of every caption by that of the next sample which has another one.

  Returns:
    (the batch with new input_ids, slot and noun_span, for every text encoder's tokenizer; which
    samples changed [B]).
  """

  def swaps(ids, spans, tokenizer):
    nouns = [tuple(row[start:end]) for row, (start, end) in zip(ids, spans)]
    for i, noun in enumerate(nouns):
      others = (nouns[(i + k) % len(nouns)] for k in range(1, len(nouns)))
      yield *spans[i], next((other for other in others if other != noun), noun)

  return _swap_words(batch, swaps, tokenizers, s_words)


def wrong_phrases(
  batch: NumpyBatch, phrases: Sequence[str], tokenizers: Sequence[Any], s_words: int
) -> tuple[NumpyBatch, np.ndarray]:
  """Replaces the longest of `phrases` that a caption has by the next of them; see `wrong_nouns`."""

  def swaps(ids, spans, tokenizer):
    tokens = [tuple(tokenizer(phrase, add_special_tokens=False).input_ids) for phrase in phrases]
    for row in ids:
      matches = [
        (start, start + len(phrase), tokens[(k + 1) % len(tokens)])
        for k, phrase in enumerate(tokens)
        for start in range(1, len(row) - len(phrase))
        if tuple(row[start : start + len(phrase)]) == phrase
      ]
      yield max(matches, key=lambda m: m[1] - m[0]) if matches else (0, 0, ())

  return _swap_words(batch, swaps, tokenizers, s_words)


def _swap_words(
  batch: NumpyBatch, swaps: Callable[..., Iterable[Swap]], tokenizers: Sequence[Any], s_words: int
) -> tuple[NumpyBatch, np.ndarray]:
  """Does `swaps(ids, spans, tokenizer)`, one for each row, for every text encoder or for none."""
  wrong, changed = {}, np.ones(len(batch["slot"]), bool)
  for names, tokenizer in zip(prompt_keys(len(tokenizers)), tokenizers):
    ids, slot, span = (batch[key] for key in names)
    arrays, possible = _swapped(ids, slot, span, swaps(ids, span, tokenizer), tokenizer, s_words)
    wrong |= zip(names, arrays)
    changed &= possible
  for key, new in wrong.items():
    wrong[key] = np.where(changed.reshape(-1, *[1] * (new.ndim - 1)), new, batch[key])
  return {**batch, **wrong}, changed


def _swapped(
  ids: np.ndarray, slot: np.ndarray, span: np.ndarray, swaps: Iterable[Swap], tokenizer: Any,
  s_words: int,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
  """Replaces tokens [start, end) of each row; a row without room for it and S+ stays as it is."""
  ids, slot, span = (np.array(array) for array in (ids, slot, span))
  changed = np.zeros(len(ids), bool)
  length = ids.shape[1]
  for i, (start, end, new) in enumerate(swaps):
    stop = int(np.flatnonzero(ids[i] == tokenizer.eos_token_id)[0])
    row = [*ids[i, :start], *new, *ids[i, end:stop]]
    if row == list(ids[i, :stop]) or len(row) + 1 + s_words > length:
      continue
    ids[i] = [*row, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - len(row) - 1)
    longer = len(new) - (end - start)
    if (start, end) == tuple(span[i]):
      span[i, 1] += longer
      slot[i] += longer
    elif end <= span[i, 0]:
      span[i] += longer
      slot[i] += longer
    changed[i] = True
  return (ids, slot, span), changed
