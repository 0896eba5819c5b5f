"""The device part of generation: prompts, references and noise in, pictures and maps out.

`draw` is one pure function, for one batch; `cc_jax.sampling.sampler` compiles it and feeds it. With a
`CustomContrast` model it draws subjects, with a plain base it is Stable Diffusion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from cc_jax.customcontrast.model import Conditioning, CustomContrast, Subject
from cc_jax.diffusion.guidance import classifier_free
from cc_jax.diffusion.samplers import StepTable, integrate, keyed_noise
from cc_jax.models.vae import images_to_latents, latents_to_images
from cc_jax.sampling.prompts import Prompts

# What one denoising step asks the UNet, stacked along the batch in this order.
EMPTY, TEXT, FULL = "empty prompt, no image", "prompt, no image", "prompt and image"


class SamplerInputs(NamedTuple):
  """One batch for `draw`: B pictures, each of one subject with R references, or of several."""

  prompts: Prompts
  negative: tuple[Int[Array, "1 t"], ...]  # the prompt to be led away from, one for all
  references: UInt8[Array, "b r h w 3"] | None
  use_image: Bool[Array, " b"]
  noise: Float[Array, "b h w c"]  # unit normal
  image: UInt8[Array, "b h w 3"] | None  # to start from, as the table was made for
  scale: Float[Array, "steps l"]  # of the visual path, per step and layer
  guidance: Float[Array, ""]
  image_guidance: Float[Array, ""]
  table: StepTable  # of the sampler
  time_ids: Float[Array, 6]  # SDXL's (original h, w, crop top, left, target h, w), pixels
  also: tuple[UInt8[Array, "b r h w 3"], ...] = ()  # the further subjects of prompts.more
  # Another subject and how far to go to it: what lies between two subjects.
  toward: tuple[UInt8[Array, "b r h w 3"], Float[Array, " b"]] | None = None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """What is fixed when `draw` is compiled."""

  branches: tuple[str, ...]
  adds_noise: bool = False  # the sampler does, at every step
  s_plus: bool = True  # S+ stands in the prompts of pictures that have a reference
  maps: bool = False
  clip_skip: int = 0  # layers of the text encoders left out at the end


def guidance_branches(guidance: float, image_guidance: float | None) -> tuple[str, ...]:
  """What guidance needs of the UNet; `image_guidance` None = `guidance` is for both."""
  if image_guidance is not None:
    return (EMPTY, TEXT, FULL)
  return (FULL,) if guidance == 1.0 else (EMPTY, FULL)


class SamplerOutput(NamedTuple):
  """`images` in [0, 1]; `maps`: per layer, the location map m at every step (may be empty)."""

  images: Float[Array, "b h w 3"]
  maps: tuple[Float[Array, "steps b s 1"], ...] = ()


def sample_images(
  merge: Callable[[Any], Any],
  params: Any,
  request: SamplerInputs,
  plan: SamplingConfig,
  tick: Callable[[], None] | None = None,
) -> SamplerOutput:
  """Noise -> pictures; pure.

  The visual Q-Former and the image encoder run once. The textual Q-Former, and with S+ the text
  encoder on L sequences per prompt, run at every step, because S+ depends on t.

  Args:
    merge: params -> model: a `CustomContrast`, or what `bundle` makes of a base.
    params: pytree of arrays.
    request: the batch.
    plan: static.
    tick: called on the host at every call of the UNet, for a progress bar.
  """
  model = merge(params)
  conditions = (_subject_conditions if isinstance(model, CustomContrast) else _base_conditions)(model, request, plan)
  count = len(plan.branches)

  def denoise(latents, t, step):
    if tick is not None:
      jax.debug.callback(tick)
    x = jnp.concatenate([latents] * count)
    prediction = _predict(model, x, t, conditions(plan.branches, t, step))
    parts = dict(zip(plan.branches, jnp.split(prediction, count)))
    if count == 1:
      return parts[FULL]
    apart = {}
    if TEXT in parts:
      apart = dict(text_only=parts[TEXT], image_guidance=request.image_guidance)
    return classifier_free(parts[EMPTY], parts[FULL], request.guidance, **apart)

  latents, states = integrate(
    denoise,
    request.noise,
    request.table,
    image=None if request.image is None else images_to_latents(model.vae, request.image),
    noise_fn=_fresh_noise(request.noise) if plan.adds_noise else None,
    return_inputs=True,
  )
  images = latents_to_images(model.vae, latents)
  if not plan.maps:
    return SamplerOutput(images)

  # A second look at the states that steps began with, with the prompt and the image alone.
  def look(row):
    step, t, latents = row
    return _predict(model, latents, t, conditions((FULL,), t, step), maps=True)[1]

  steps = jnp.arange(len(request.scale))
  first = jnp.searchsorted(request.table.step, steps)  # of a step's calls
  return SamplerOutput(images, jax.lax.map(look, (steps, request.table.timestep[first], states[first])))


def _fresh_noise(noise: Float[Array, "b h w c"]):
  """A sampler's `noise_fn`: a picture's depends on its first noise alone, as that on its seed."""
  bits = jax.lax.bitcast_convert_type(noise.astype(jnp.float32), jnp.uint32)
  keys = jax.vmap(jax.random.key)(bits.reshape(len(noise), -1).sum(-1, dtype=jnp.uint32))
  return keyed_noise(keys, noise.shape[1:])


def bundle(base: Any) -> nnx.Module:
  """The networks of a `hub.Base` that plain Stable Diffusion needs, as one module."""
  return nnx.Dict(unet=base.unet, vae=base.vae, text_encoders=nnx.List(base.text_encoders))


def _subject_conditions(model: CustomContrast, request: SamplerInputs, plan: SamplingConfig):
  """`conditions(branches, t, step)` -> Conditioning, for a CustomContrast model."""
  prompts, use_image, size = request.prompts, request.use_image, request.noise.shape[0]
  time_ids = jnp.broadcast_to(request.time_ids, (size, 6))
  no_image = model.visual(None, batch=1)
  features = visual = toward = None
  also = []

  def look(references):
    rows, count = references.shape[:2]
    pixels = references.reshape(rows * count, *references.shape[2:])
    features, _ = model.image_features(pixels.astype(jnp.float32) / 255)
    # Several references of one subject: their tokens side by side, so that one attention, which
    # knows no order among tokens, picks from all of them. [R]; averaging would blur two views.
    features = features.reshape(rows, -1, features.shape[-1])
    return features, model.visual(features, use_image)

  if request.references is not None:
    features, visual = look(request.references)
    for references, (slot, span) in zip(request.also, prompts.more, strict=True):
      more, seen = look(references)
      also.append(Subject(more, jnp.asarray(slot), jnp.asarray(span), seen))
    if request.toward is not None:
      more, seen = look(request.toward[0])
      slot, span = jnp.asarray(prompts.slot), jnp.asarray(prompts.noun_span)
      toward = Subject(more, slot, span, seen), jnp.asarray(request.toward[1])

  def without_image(ids, t) -> Conditioning:
    rows = ids[0].shape[0]
    condition = model.condition(
      None,
      [jnp.asarray(i) for i in ids],
      None,
      None,
      jnp.full(rows, t),
      visual=jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), no_image),
      time_ids=time_ids[:rows],
      clip_skip=plan.clip_skip,
    )
    return _with_copies(condition, 1 + len(also))

  def branch(name: str, t) -> Conditioning:
    if name == EMPTY:  # the same for all pictures: made once
      return _repeat(without_image(request.negative, t), size)
    if name == TEXT or features is None:
      return without_image(prompts.ids, t)
    return model.condition(
      features,
      [jnp.asarray(i) for i in prompts.ids],
      jnp.asarray(prompts.slot),
      jnp.asarray(prompts.noun_span),
      jnp.full(size, t),
      use_image=use_image,
      use_s_plus=plan.s_plus,
      visual=visual,
      time_ids=time_ids,
      clip_skip=plan.clip_skip,
      also=also,
      toward=toward,
    )

  def conditions(branches, t, step) -> Conditioning:
    # A branch without image sees the image of all zeros at the same scale, as in training; a
    # picture without image is the base's.
    scale = request.scale[step][:, None] * use_image
    parts = [_with_scale(branch(name, t), scale) for name in branches]
    return Conditioning.concatenate(parts)

  if features is None:  # then nothing depends on t: the scale is 0
    once = {names: conditions(names, 0, 0) for names in {plan.branches, (FULL,)}}
    return lambda branches, t, step: once[branches]
  return conditions


def _base_conditions(model: nnx.Module, request: SamplerInputs, plan: SamplingConfig):
  """`conditions(branches, t, step)` -> arguments of the UNet, for a plain base."""
  size = request.noise.shape[0]
  rows = []
  for name in plan.branches:
    ids = request.negative if name == EMPTY else request.prompts.ids
    rows.append([jnp.broadcast_to(jnp.asarray(i), (size, i.shape[-1])) for i in ids])
  ids = [jnp.concatenate(column) for column in zip(*rows)]
  outputs = [tower(i) for tower, i in zip(model.text_encoders, ids, strict=True)]
  # SDXL: penultimate hidden states of both encoders, and the last one's pooled vector.
  several = len(outputs) > 1
  states = [
    tower.context(output, penultimate=several, clip_skip=plan.clip_skip)
    for tower, output in zip(model.text_encoders, outputs)
  ]
  arguments = dict(context=jnp.concatenate(states, axis=-1))
  if model.unet.config.addition_embed_type == "text_time":
    time_ids = jnp.broadcast_to(request.time_ids, (size * len(rows), 6))
    arguments |= dict(text_embeds=outputs[-1].pooled, time_ids=time_ids)
  return lambda branches, t, step: arguments


def _predict(model, latents, t, condition, *, maps: bool = False):
  t = jnp.full(len(latents), t)
  if isinstance(model, CustomContrast):
    return model.predict(latents, t, condition, maps=maps)
  return model.unet(latents, t, **condition)


def _repeat(condition: Conditioning, count: int) -> Conditioning:
  """One row -> `count` equal rows."""
  tokens = jnp.repeat(condition.textual_tokens, count, axis=1)  # its batch is axis 1
  rest = condition.replace(textual_tokens=None)
  return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), rest).replace(textual_tokens=tokens)


def _with_copies(condition: Conditioning, count: int) -> Conditioning:
  """Its visual tokens `count` times over: as many as several subjects have, and the same answer.

  Attention over equal keys is attention over one of them.
  """
  if count == 1:
    return condition
  context = tuple(c.replace(visual=jnp.tile(c.visual, (1, count, 1))) for c in condition.context)
  return condition.replace(context=context)


def _with_scale(condition: Conditioning, scale: Float[Array, "l b"]) -> Conditioning:
  context = tuple(c.replace(scale=s) for c, s in zip(condition.context, scale, strict=True))
  return condition.replace(context=context)
