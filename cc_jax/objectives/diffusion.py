"""The diffusion loss: a weighted mean square error per sample, and its min-SNR weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cc_jax.errors import UserError


def per_sample_mse(
  prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"],
  mask: Float[Array, "b h w"] | None = None,
) -> Float[Array, "b"]:
  """Mean square error of every sample in float32; with a mask, its weighted mean over positions.

  `mask` holds non-negative weights at the latents' resolution. A sample whose mask is empty has
  error 0.
  """
  error_BxHxWxC = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
  error_BxHxW = error_BxHxWxC.mean(axis=-1)
  if mask is None:
    return error_BxHxW.mean(axis=(1, 2))
  weight = mask.astype(jnp.float32)
  total = weight.sum(axis=(1, 2))
  return (error_BxHxW * weight).sum(axis=(1, 2)) / jnp.where(total > 0, total, 1.0)


def min_snr_weights(
  snr: Float[Array, "b"], gamma: float, prediction_type: str
) -> Float[Array, "b"]:
  """Weights that cap at min(SNR, gamma) what a timestep contributes to the error of x_0.

  Section 3.4 of arXiv 2303.09556. The error of x_0 is that of epsilon over SNR, that of v over
  SNR + 1; so the weights are min(SNR, gamma) / SNR, / (SNR + 1) and, for 'sample', / 1. SNR = 0 is
  allowed. gamma = 0 means the plain loss: ones.

  Raises:
    UserError: a negative gamma, or an unknown prediction type.
  """
  if gamma < 0:
    raise UserError(f"min_snr_gamma={gamma}: give 0 for the plain loss, or a positive number")
  if gamma == 0:
    return jnp.ones_like(snr, jnp.float32)
  snr = snr.astype(jnp.float32)
  if prediction_type == "epsilon":
    return gamma / jnp.maximum(snr, gamma)  # min(SNR, gamma) / SNR without 0 / 0
  if prediction_type == "v_prediction":
    return jnp.minimum(snr, gamma) / (snr + 1.0)
  if prediction_type == "sample":
    return jnp.minimum(snr, gamma)
  raise UserError(
    f"unknown prediction_type {prediction_type!r}; we have epsilon, v_prediction, sample"
  )


def diffusion_loss(
  prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"],
  weights: Float[Array, "b"] | None = None, mask: Float[Array, "b h w"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean over samples of weight times error [P: epsilon- or v-prediction as the base says].

  Args:
    prediction, target: of the base's prediction type (NoiseSchedule.target).
    weights: per sample, for example `min_snr_weights`; they are not normalised.
    mask: see `per_sample_mse`.

  Returns:
    (loss, {'mse': the same mean without weights}).
  """
  error_B = per_sample_mse(prediction, target, mask)
  loss = error_B.mean() if weights is None else (error_B * weights.astype(jnp.float32)).mean()
  return loss, {"mse": error_B.mean()}
