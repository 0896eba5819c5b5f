"""The device part of generation: prompts, references and noise in, images and maps out.

For one batch, and pure: `begin`, then `take_call` for every call of the UNet, then `decode`.
`cc_jax.sampling.sampler` compiles each of them and calls them one after the other, so that the host
knows how far a picture is without any call back from the device: a program with a host callback
never enters JAX's cache of compiled programs. `sample_images` is all of it as one function. With a
`CustomContrast` model they draw subjects, with a plain base they are Stable Diffusion.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.guidance import classifier_free
from cc_jax.diffusion.samplers import State, advance, first_state, integrate, keyed_noise
from cc_jax.models.vae import images_to_latents, latents_to_images
from cc_jax.sampling.conditions import (
  EMPTY,
  FULL,
  TEXT,
  SamplerInputs,
  SamplingConfig,
  conditions,
  encode,
)


class SamplerOutput(NamedTuple):
  """`images` in [0, 1]; `maps`: per layer, the location map m at every step (may be empty)."""

  images: Float[Array, "b h w 3"]
  maps: tuple[Float[Array, "steps b s 1"], ...] = ()


def guidance_branches(guidance: float, image_guidance: float | None) -> tuple[str, ...]:
  """The conditions that guidance needs; `image_guidance` None = `guidance` is for both.

  A guidance up to 1 is none, as in diffusers: distilled models' cards say 0.
  """
  if image_guidance is None:
    return (EMPTY, FULL) if guidance > 1 else (FULL,)
  if guidance <= 1:
    return (TEXT, FULL) if image_guidance > 1 else (FULL,)
  return (EMPTY, TEXT, FULL)


def bundle(base: Any) -> nnx.Module:
  """The networks of a `bases.base.Base` that plain Stable Diffusion needs, as one module."""
  return nnx.Dict(unet=base.unet, vae=base.vae, text_encoders=nnx.List(base.text_encoders))


def sample_images(
  merge: Callable[[Any], Any], params: Any, inputs: SamplerInputs, config: SamplingConfig
) -> SamplerOutput:
  """Noise -> images; pure.

  The visual Q-Former and the image encoder run once. The textual Q-Former, and with S+ the text
  encoder on L sequences per prompt, run at every step, because S+ depends on t.

  Args:
    merge: params -> model: a `CustomContrast`, or what `bundle` makes of a base.
    params: pytree of arrays.
    inputs: the batch.
    config: static.
  """
  model = merge(params)
  told = conditions(model, inputs, config, encode(model, inputs, config))
  latents, states = integrate(
    _denoiser(model, inputs, config, told), inputs.noise, inputs.table,
    image=None if inputs.image is None else images_to_latents(model.vae, inputs.image),
    noise_fn=_fresh_noise(inputs.noise) if config.adds_noise else None, return_inputs=True,
  )
  images = latents_to_images(model.vae, latents)
  if not config.maps:
    return SamplerOutput(images)

  # The maps are of a second pass over each step's first state, with the FULL condition alone.
  def maps_of(row):
    step, t, latents = row
    return _predict(model, latents, t, told((FULL,), t, step), maps=True)[1]

  steps = jnp.arange(len(inputs.scale))
  first = jnp.searchsorted(inputs.table.step, steps)  # the first call of each step
  rows = (steps, inputs.table.timestep[first], states[first])
  return SamplerOutput(images, jax.lax.map(maps_of, rows))


def begin(
  merge: Callable[[Any], Any], params: Any, inputs: SamplerInputs, config: SamplingConfig
) -> tuple[State, Any]:
  """(the first state, what no call changes: for `take_call` and `location_maps`).

  Of `inputs.table` only `start` is read, and `mix` for its shape.
  """
  model = merge(params)
  image = None if inputs.image is None else images_to_latents(model.vae, inputs.image)
  return first_state(inputs.noise, inputs.table, image), encode(model, inputs, config)


def take_call(
  merge: Callable[[Any], Any], params: Any, inputs: SamplerInputs, encoded: Any, state: State,
  index: Int[Array, ""], config: SamplingConfig,
) -> State:
  """One call of the UNet, number `index` of the trajectory: the state after it.

  `inputs.table` and `inputs.scale` have one row, the call's own, whose `step` is 0. The pictures in
  `inputs` are not read.
  """
  model = merge(params)
  denoise = _denoiser(model, inputs, config, conditions(model, inputs, config, encoded))
  row = jax.tree.map(lambda x: x[0], inputs.table._replace(start=None))
  return advance(denoise, state, index, row,
                 _fresh_noise(inputs.noise) if config.adds_noise else None)


def location_maps(
  merge: Callable[[Any], Any], params: Any, inputs: SamplerInputs, encoded: Any, state: State,
  config: SamplingConfig,
) -> tuple[Float[Array, "b s 1"], ...]:
  """Per layer, the map m of a call's state, by a pass with the FULL condition alone.

  `inputs` are those of `take_call`.
  """
  model = merge(params)
  t = inputs.table.timestep[0]
  condition = conditions(model, inputs, config, encoded)((FULL,), t, 0)
  return _predict(model, state[0], t, condition, maps=True)[1]


def decode(merge: Callable[[Any], Any], params: Any, state: State) -> Float[Array, "b h w 3"]:
  """The images of the last state."""
  return latents_to_images(merge(params).vae, state[0])


def _denoiser(model: nnx.Module, inputs: SamplerInputs, config: SamplingConfig, told):
  """`denoise(latents, t, step)` -> the prediction with guidance."""
  count = len(config.branches)

  def denoise(latents, t, step):
    x = jnp.concatenate([latents] * count)
    prediction = _predict(model, x, t, told(config.branches, t, step))
    predictions = dict(zip(config.branches, jnp.split(prediction, count)))
    if count == 1:
      return predictions[FULL]
    if EMPTY not in predictions:  # the prompt has no guidance, the image has
      return classifier_free(predictions[TEXT], predictions[FULL], inputs.image_guidance)
    separate = {}
    if TEXT in predictions:
      separate = dict(text_only=predictions[TEXT], image_guidance=inputs.image_guidance)
    return classifier_free(predictions[EMPTY], predictions[FULL], inputs.guidance, **separate)

  return denoise


def _fresh_noise(noise: Float[Array, "b h w c"]):
  """A sampler's `noise_fn`: an image's depends on its first noise alone, as that on its seed."""
  bits = jax.lax.bitcast_convert_type(noise.astype(jnp.float32), jnp.uint32)
  keys = jax.vmap(jax.random.key)(bits.reshape(len(noise), -1).sum(-1, dtype=jnp.uint32))
  return keyed_noise(keys, noise.shape[1:])


def _predict(model, latents, t, condition, *, maps: bool = False):
  t = jnp.full(len(latents), t)
  if isinstance(model, CustomContrast):
    return model.predict(latents, t, condition, maps=maps)
  return model.unet(latents, t, **condition)
