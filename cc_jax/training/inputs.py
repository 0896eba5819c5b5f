"""What the step sees of a batch's pictures: computed here, or stored before (`data.cached`).

`data_pipeline.make_loader` says what a batch holds. Stored features are those that `encode_role`
gave for the same pictures, so that both ways lead to the same numbers.
"""

import functools
from collections.abc import Sequence

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


def image_features(
  model: CustomContrast, batch: Batch, roles: Sequence[str]
) -> tuple[Float[Array, "b n p c"], Float[Array, "b n e"]]:
  """`CustomContrast.image_features` of n pictures of each sample, as one batch.

  `roles` are 'reference' alone or with 'positive'; of stored features only the reference's have an
  embedding. Sample by sample, not role by role: a batch sharded over devices then stays so.
  """
  if f"{roles[0]}_features" in batch:
    features = jnp.stack([batch[f"{role}_features"] for role in roles], axis=1)
    return features, batch["reference_embed"][:, None]
  pictures = jnp.stack([batch[role] for role in roles], axis=1)
  found = model.image_features(to_unit_range(pictures.reshape(-1, *pictures.shape[2:])))
  return tuple(x.reshape(*pictures.shape[:2], *x.shape[1:]) for x in found)


def sample_latents(vae: nnx.Module, images: Array, keys: Array) -> Float[Array, "b h w c"]:
  """uint8 images [B, H, W, 3] -> a sample of the VAE's posterior in the UNet's units, float32.

  `keys` [B]: one for each sample.
  """
  return images_to_latents(vae, images, functools.partial(normal, keys))


def normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Standard normal samples [B, *shape], one for each key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
