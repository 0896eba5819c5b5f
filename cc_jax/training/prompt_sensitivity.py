"""Wrong-word gaps: does the denoiser still listen to the prompt while it holds the subject?

The relative rise of the diffusion loss at one timestep when a word of the caption is replaced by a
wrong one. 0 = the word is ignored. It needs no sampling and no judge, so that training can log it
(docs/method.md, "The wrong-word gap").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from cc_jax.models.params import Params
from cc_jax.objectives.diffusion import per_sample_mse
from cc_jax.parallel.mesh import replicated_sharding, shard_batch
from cc_jax.training.context import Batch, StepContext, to_unit_range
from cc_jax.training.losses import denoise
from cc_jax.training.noise import StepNoise

NOISE_LEVEL = 0.85  # t / T: late enough that the picture itself says little (docs/method.md)
NumpyBatch = dict[str, np.ndarray]


def sample_losses(
  method: StepContext, adapter: Params, frozen: Params, batch: Batch
) -> Float[Array, " b"]:
  """Diffusion loss of each sample at t = 0.85 T, with reference, prompt and one noise."""
  model = method.model(adapter, frozen)
  size = batch["target"].shape[0]
  t = jnp.full((size,), int(NOISE_LEVEL * method.schedule.num_train_timesteps), jnp.int32)
  every = jnp.ones(size, bool)
  features, _ = model.image_features(to_unit_range(batch["reference"]))
  keys = jax.random.split(jax.random.key(method.config.seed), size)
  draws = StepNoise(t, keep_text=every, keep_image=every, noise=keys)
  return per_sample_mse(*denoise(method, model, batch, features, draws))


def make_prompt_sensitivity(
  method: StepContext, mesh: Mesh, batch: NumpyBatch, wrong: Mapping[str, tuple[NumpyBatch, np.ndarray]]
) -> Callable[[Params, Params], dict[str, float]]:
  """A function (adapter, frozen) -> {'gap/<word>': relative rise of the loss} on one fixed batch.

  `wrong` maps a name to (the batch with a wrong word, which samples really changed [B]).
  """
  losses = jax.jit(
    lambda adapter, frozen, batch: sample_losses(method, adapter, frozen, batch),
    out_shardings=replicated_sharding(mesh),
  )
  right = shard_batch(batch, mesh)
  others = {
    name: (shard_batch(values, mesh), shard_batch({"changed": changed}, mesh))
    for name, (values, changed) in wrong.items()
  }

  def gaps(adapter: Params, frozen: Params) -> dict[str, float]:
    base = losses(adapter, frozen, right)
    rises = {
      f"gap/{name}": relative_rise(base, losses(adapter, frozen, values), mark["changed"])
      for name, (values, mark) in others.items()
    }
    return {key: float(value) for key, value in jax.device_get(rises).items()}

  return gaps


@jax.jit
def relative_rise(
  right: Float[Array, " b"], wrong: Float[Array, " b"], changed: Bool[Array, " b"]
) -> Float[Array, ""]:
  """sum(wrong) / sum(right) - 1 over the changed samples; 0 if there are none."""
  before = jnp.sum(jnp.where(changed, right, 0.0))
  after = jnp.sum(jnp.where(changed, wrong, 0.0))
  return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0) - 1.0, 0.0)


def wrong_nouns(batch: NumpyBatch, tokenizer: Any, s_words: int) -> tuple[NumpyBatch, np.ndarray]:
  """Every caption with the class noun of the next sample that has another one.

  Returns:
    (the batch with new input_ids, slot and noun_span, which samples changed [B]).
  """
  ids, spans = batch["input_ids"], batch["noun_span"]
  nouns = [tuple(row[start:end]) for row, (start, end) in zip(ids, spans)]
  swaps = []
  for i, noun in enumerate(nouns):
    others = (nouns[(i + k) % len(nouns)] for k in range(1, len(nouns)))
    swaps.append((*spans[i], next((other for other in others if other != noun), noun)))
  return _swapped(batch, swaps, tokenizer, s_words)


def wrong_phrases(
  batch: NumpyBatch, phrases: Sequence[str], tokenizer: Any, s_words: int
) -> tuple[NumpyBatch, np.ndarray]:
  """Every caption that holds one of `phrases` (scenes, say) with the next phrase instead.

  The longest phrase that occurs counts. Returns what `wrong_nouns` does.
  """
  tokens = [tuple(tokenizer(phrase, add_special_tokens=False).input_ids) for phrase in phrases]
  swaps = []
  for row in batch["input_ids"]:
    found = [
      (start, start + len(phrase), tokens[(k + 1) % len(tokens)])
      for k, phrase in enumerate(tokens)
      for start in range(1, len(row) - len(phrase))
      if tuple(row[start : start + len(phrase)]) == phrase
    ]
    swaps.append(max(found, key=lambda f: f[1] - f[0]) if found else (0, 0, ()))
  return _swapped(batch, swaps, tokenizer, s_words)


def _swapped(
  batch: NumpyBatch, swaps: Sequence[tuple[int, int, tuple[int, ...]]], tokenizer: Any, s_words: int
) -> tuple[NumpyBatch, np.ndarray]:
  """Replaces tokens [start, end) of each row; a row without room for it and S+ stays as it is."""
  ids, slot, span = (np.array(batch[key]) for key in ("input_ids", "slot", "noun_span"))
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
  return {**batch, "input_ids": ids, "slot": slot, "noun_span": span}, changed
