"""What the step sees of a batch's pictures: computed here, or stored before (`data.cached`).

`data_pipeline.make_loader` says what a batch holds. Stored features are those that `encode_role`
gave for the same pictures, so that both ways lead to the same numbers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.models.vae import images_to_latents, moments_to_latents
from cc_jax.training.step_context import Batch, to_unit_range


def encode_role(
  model: CustomContrast, role: str, pictures: UInt8[Array, "b h w 3"]
) -> dict[str, Array]:
  """What a cache stores of targets, references or positives, in the networks' own dtypes."""
  if role == "target":
    moments = model.vae.encode(pictures.astype(jnp.float32) / 127.5 - 1)
    return {"target_moments": jnp.concatenate(moments, axis=-1)}
  features, embed = model.image_features(to_unit_range(pictures))
  if role == "positive":
    return {"positive_features": features}
  return {"reference_features": features, "reference_embed": embed}


def target_latents(
  model: CustomContrast, batch: Batch, keys: Array
) -> Float[Array, "b h w c"]:
  """A sample of the VAE's posterior of the targets; `keys` [B]: one for each."""
  if "target_moments" not in batch:
    return sample_latents(model.vae, batch["target"], keys)
  moments = jnp.split(batch["target_moments"], 2, axis=-1)
  return moments_to_latents(model.vae.config, *moments, functools.partial(normal, keys))


def reference_features(
  model: CustomContrast, batch: Batch
) -> tuple[Float[Array, "b p c"], Float[Array, "b e"]]:
  """`CustomContrast.image_features` of the references."""
  if "reference_features" in batch:
    return batch["reference_features"], batch["reference_embed"]
  return model.image_features(to_unit_range(batch["reference"]))


def positive_features(model: CustomContrast, batch: Batch) -> Float[Array, "b p c"]:
  """The features of the positives."""
  if "positive_features" in batch:
    return batch["positive_features"]
  return model.image_features(to_unit_range(batch["positive"]))[0]


def sample_latents(vae: nnx.Module, images: Array, keys: Array) -> Float[Array, "b h w c"]:
  """uint8 images [B, H, W, 3] -> a sample of the VAE's posterior in the UNet's units, float32.

  `keys` [B]: one for each sample.
  """
  return images_to_latents(vae, images, functools.partial(normal, keys))


def normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Standard normal samples [B, *shape], one for each key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
