"""The loss of a training step: diffusion and contrast over the global batch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.customcontrast.mfi_encoder import MFIFeatures
from cc_jax.customcontrast.model import Conditioning, CustomContrast
from cc_jax.customcontrast.text_conditioning import size_conditions
from cc_jax.models.params import Params
from cc_jax.objectives.diffusion import diffusion_loss, min_snr_weights
from cc_jax.training.contrastive import compare_embeddings, contrastive_embeddings
from cc_jax.training.encodings import encode_subjects
from cc_jax.training.inputs import normal, target_latents
from cc_jax.training.noise import StepNoise, sample_step_noise
from cc_jax.training.step_context import Batch, Metrics, StepContext, prefix_keys
from data_pipeline.tokens import prompt_keys


def subject_weights(masks: Array, size: tuple[int, int], weight: float) -> Array | None:
  """1 + weight * mask [B, H, W] (uint8) at the latents' size [B, h, w]; None for weight 0. [R]"""
  if not weight:
    return None
  masks = masks.astype(jnp.float32) / 255
  return 1 + weight * jax.image.resize(masks, (masks.shape[0], *size), "linear", antialias=True)


def denoise(
  context: StepContext, model: CustomContrast, batch: Batch, shown: MFIFeatures,
  step_noise: StepNoise,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
  """(prediction, its target) for the target frame with the noise of t.

  `shown` is what the MFI-Encoder says of the references, as far as they are kept.
  """
  t, keys = step_noise.t, step_noise.keys
  posterior_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  latents = target_latents(model, batch, posterior_keys)
  noise = normal(noise_keys, latents.shape[1:])
  conditioning = condition(context, model, batch, shown, step_noise)
  schedule = context.schedule
  prediction = model.predict(schedule.add_noise(latents, noise, t), t, conditioning)
  return prediction, schedule.target(latents, noise, t)


def condition(
  context: StepContext, model: CustomContrast, batch: Batch, shown: MFIFeatures,
  step_noise: StepNoise,
) -> Conditioning:
  """What the UNet is told of reference and caption, as far as they are kept."""
  t, keep_text, keep_image, _ = step_noise
  keys = prompt_keys(len(context.empty_prompt))
  ids, slots, spans = ([batch[key] for key in names] for names in zip(*keys))
  empty = [jnp.asarray(i, jnp.int32) for i in context.empty_prompt]
  return model.condition(
    None,
    [jnp.where(keep_text[:, None], *pair) for pair in zip(ids, empty)],
    slots,
    spans,
    t,
    encoded=shown,
    use_image=keep_image,
    # An empty prompt has no noun for S+ to stand after. [R]
    use_s_plus=keep_image & keep_text,
    zero_text=~keep_text if model.force_zeros_for_empty_prompt else False,
    time_ids=_time_ids(model.unet, batch["target_mask"]),
  )


def total_loss(
  context: StepContext, trainable: Params, frozen: Params, batch: Batch, key: Array
) -> tuple[Float[Array, ""], Metrics]:
  """L = L_diffusion + λ_cscl L_CSCL + λ_macl L_MACL [P: the form; R: λ] over the global batch.

  `batch` is that of data_pipeline.make_loader, global. Condition dropout concerns the diffusion
  loss alone: to the contrastive losses the tokens of dropped images would all be the same.
  """
  model = context.model_for_gradient(trainable, frozen)
  step_noise = sample_step_noise(context, key, batch["target_mask"].shape[0])
  subjects = encode_subjects(context, model, batch, step_noise)
  total, metrics = diffusion_objective(context, model, batch, subjects.shown, step_noise)
  objective = context.config.objective
  embeddings = contrastive_embeddings(objective, subjects)
  contrast, more = compare_embeddings(objective, embeddings, batch["subject_id"], context.contrast)
  total = total + contrast
  return total, {"loss": total, **metrics, **more}


def diffusion_objective(
  context: StepContext, model: CustomContrast, batch: Batch, shown: MFIFeatures,
  step_noise: StepNoise,
) -> tuple[Float[Array, ""], Metrics]:
  """L_diffusion; `shown` as for `denoise`."""
  objective, schedule = context.config.objective, context.schedule
  prediction, target = denoise(context, model, batch, shown, step_noise)
  snr = schedule.snr(step_noise.t)
  weights = min_snr_weights(snr, objective.min_snr_gamma, schedule.prediction_type)
  mask = subject_weights(batch["target_mask"], prediction.shape[1:3], objective.subject_weight)
  total, metrics = diffusion_loss(prediction, target, weights, mask)
  return total, {"loss/diffusion": total, **prefix_keys("diffusion", metrics)}


def _time_ids(unet: nnx.Module, masks: Array) -> Float[Array, "b 6"] | None:
  """SDXL's size conditions of whole images, as large as masks [B, H, W]; None for other bases."""
  if unet.config.addition_embed_type != "text_time":
    return None
  size, height, width = masks.shape[:3]
  return jnp.tile(jnp.asarray(size_conditions(height, width), jnp.float32), (size, 1))
