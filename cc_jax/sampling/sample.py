"""The device part of generation: prompts, references and noise in, images and maps out.

`sample_images` is one pure function, for one batch; `cc_jax.sampling.sampler` compiles and calls
it. With a `CustomContrast` model it draws subjects, with a plain base it is Stable Diffusion.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from cc_jax.customcontrast.model import Conditioning, CustomContrast, Subject
from cc_jax.customcontrast.text_conditioning import encode_text
from cc_jax.diffusion.guidance import classifier_free
from cc_jax.diffusion.samplers import StepTable, integrate, keyed_noise
from cc_jax.models.vae import images_to_latents, latents_to_images
from cc_jax.sampling.prompts import Prompts

# The conditions that guidance combines, stacked along the batch in this order.
EMPTY, TEXT, FULL = "empty prompt, no image", "prompt, no image", "prompt and image"


class SamplerInputs(NamedTuple):
  """One batch: B images, each of one subject with R references, or of several subjects."""

  prompts: Prompts
  # The negative prompt, one for the whole batch; None: zeros, SDXL's way to say nothing.
  negative: tuple[Int[Array, "1 *p t"], ...] | None
  references: UInt8[Array, "b r h w 3"] | None
  use_image: Bool[Array, " b"]
  noise: Float[Array, "b h w c"]  # unit normal
  image: UInt8[Array, "b h w 3"] | None  # to start from (img2img), where the table has a `skip`
  scale: Float[Array, "steps l"]  # of the visual path, per step and layer
  guidance: Float[Array, ""]
  image_guidance: Float[Array, ""]
  table: StepTable  # of the sampler
  time_ids: Float[Array, "6"]  # SDXL's (original h, w, crop top, left, target h, w), pixels
  extra_subjects: tuple[UInt8[Array, "b r h w 3"], ...] = ()  # of prompts.extra_subjects
  # References of another subject, and the weight of the interpolation to it: 0 to 1.
  interpolate_to: tuple[UInt8[Array, "b r h w 3"], Float[Array, " b"]] | None = None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """What is static when `sample_images` is compiled."""

  branches: tuple[str, ...]
  adds_noise: bool = False  # the sampler adds noise at every step
  s_plus: bool = True  # S+ stands in the prompts of images that have a reference
  maps: bool = False
  clip_skip: int = 0  # layers of the text encoders left out at the end


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
  merge: Callable[[Any], Any], params: Any, inputs: SamplerInputs, config: SamplingConfig,
  tick: Callable[[], None] | None = None,
) -> SamplerOutput:
  """Noise -> images; pure.

  The visual Q-Former and the image encoder run once. The textual Q-Former, and with S+ the text
  encoder on L sequences per prompt, run at every step, because S+ depends on t.

  Args:
    merge: params -> model: a `CustomContrast`, or what `bundle` makes of a base.
    params: pytree of arrays.
    inputs: the batch.
    config: static.
    tick: called on the host at every call of the UNet, for a progress bar.
  """
  model = merge(params)
  is_subject_model = isinstance(model, CustomContrast)
  make_conditions = _subject_conditions if is_subject_model else _base_conditions
  conditions = make_conditions(model, inputs, config)
  count = len(config.branches)

  def denoise(latents, t, step):
    if tick is not None:
      jax.debug.callback(tick)
    x = jnp.concatenate([latents] * count)
    prediction = _predict(model, x, t, conditions(config.branches, t, step))
    predictions = dict(zip(config.branches, jnp.split(prediction, count)))
    if count == 1:
      return predictions[FULL]
    if EMPTY not in predictions:  # the prompt has no guidance, the image has
      return classifier_free(predictions[TEXT], predictions[FULL], inputs.image_guidance)
    separate = {}
    if TEXT in predictions:
      separate = dict(text_only=predictions[TEXT], image_guidance=inputs.image_guidance)
    return classifier_free(predictions[EMPTY], predictions[FULL], inputs.guidance, **separate)

  latents, states = integrate(
    denoise, inputs.noise, inputs.table,
    image=None if inputs.image is None else images_to_latents(model.vae, inputs.image),
    noise_fn=_fresh_noise(inputs.noise) if config.adds_noise else None, return_inputs=True,
  )
  images = latents_to_images(model.vae, latents)
  if not config.maps:
    return SamplerOutput(images)

  # The maps are of a second pass over each step's first state, with the FULL condition alone.
  def location_maps(row):
    step, t, latents = row
    return _predict(model, latents, t, conditions((FULL,), t, step), maps=True)[1]

  steps = jnp.arange(len(inputs.scale))
  first = jnp.searchsorted(inputs.table.step, steps)  # the first call of each step
  rows = (steps, inputs.table.timestep[first], states[first])
  return SamplerOutput(images, jax.lax.map(location_maps, rows))


def _fresh_noise(noise: Float[Array, "b h w c"]):
  """A sampler's `noise_fn`: an image's depends on its first noise alone, as that on its seed."""
  bits = jax.lax.bitcast_convert_type(noise.astype(jnp.float32), jnp.uint32)
  keys = jax.vmap(jax.random.key)(bits.reshape(len(noise), -1).sum(-1, dtype=jnp.uint32))
  return keyed_noise(keys, noise.shape[1:])


def _subject_conditions(model: CustomContrast, inputs: SamplerInputs, config: SamplingConfig):
  """`conditions(branches, t, step)` -> Conditioning, for a CustomContrast model."""
  prompts, use_image, size = inputs.prompts, inputs.use_image, inputs.noise.shape[0]
  time_ids = jnp.broadcast_to(inputs.time_ids, (size, 6))
  visual_without_image = model.visual(None, batch=1)
  prompt_ids, slot, noun_span = jax.tree.map(jnp.asarray, prompts[:3])
  features = visual = interpolation = None
  extra_subjects = []

  def encode_references(references):
    pixels = references.reshape(-1, *references.shape[2:])
    features, _ = model.image_features(pixels.astype(jnp.float32) / 255)
    # Several references of one subject: their tokens side by side, so that one attention, which
    # knows no order among tokens, picks from all of them. [R]; averaging would blur two views.
    features = features.reshape(len(references), -1, features.shape[-1])
    return features, model.visual(features, use_image)

  if inputs.references is not None:
    features, visual = encode_references(inputs.references)
    extra = zip(inputs.extra_subjects, prompts.extra_subjects, strict=True)
    for references, (extra_slot, extra_span) in extra:
      extra_features, extra_visual = encode_references(references)
      place = jax.tree.map(jnp.asarray, (extra_slot, extra_span))
      extra_subjects.append(Subject(extra_features, *place, extra_visual))
    if inputs.interpolate_to is not None:
      references, weight = inputs.interpolate_to
      other_features, other_visual = encode_references(references)
      other = Subject(other_features, slot, noun_span, other_visual)
      interpolation = other, jnp.asarray(weight)

  def without_image(ids, t, *, zero_text: bool = False) -> Conditioning:
    rows = len(ids[0])
    visual = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), visual_without_image)
    condition = model.condition(
      None, [jnp.asarray(i) for i in ids], None, None, jnp.full(rows, t), visual=visual,
      time_ids=time_ids[:rows], clip_skip=config.clip_skip, zero_text=zero_text)
    return _repeat_visual_tokens(condition, 1 + len(extra_subjects))

  def branch(name: str, t) -> Conditioning:
    if name == EMPTY:  # the same for all images, so computed once
      ids, zero_text = _empty_prompt(inputs)
      return _repeat_row(without_image(ids, t, zero_text=zero_text), size)
    if name == TEXT or features is None:
      return without_image(prompts.ids, t)
    return model.condition(
      features, prompt_ids, slot, noun_span, jnp.full(size, t), use_image=use_image,
      use_s_plus=config.s_plus, visual=visual, time_ids=time_ids, clip_skip=config.clip_skip,
      also=extra_subjects, toward=interpolation)

  def conditions(branches, t, step) -> Conditioning:
    # A branch without image sees the image of all zeros at the same scale, as in training; an
    # image without reference is the base's.
    scale = inputs.scale[step][:, None] * use_image
    return Conditioning.concatenate([_with_scale(branch(name, t), scale) for name in branches])

  if features is None:  # then nothing depends on t: the scale is 0
    constant = {names: conditions(names, 0, 0) for names in {config.branches, (FULL,)}}
    return lambda branches, t, step: constant[branches]
  return conditions


def _base_conditions(model: nnx.Module, inputs: SamplerInputs, config: SamplingConfig):
  """`conditions(branches, t, step)` -> arguments of the UNet, for a plain base."""
  size, count = inputs.noise.shape[0], len(config.branches)
  rows, zero = [], []
  for name in config.branches:
    ids, zero_text = _empty_prompt(inputs) if name == EMPTY else (inputs.prompts.ids, False)
    rows.append([jnp.broadcast_to(jnp.asarray(i), (size, *i.shape[1:])) for i in ids])
    zero += [zero_text] * size
  ids = [jnp.concatenate(column) for column in zip(*rows)]
  texts, _, pooled = encode_text(
    model.text_encoders, ids, addition=model.unet.config.addition_embed_type,
    clip_skip=config.clip_skip, zero=jnp.asarray(zero) if any(zero) else False,
  )  # fmt: skip
  arguments = dict(context=texts[0])
  if pooled is not None:
    time_ids = jnp.broadcast_to(inputs.time_ids, (size * count, 6))
    arguments |= dict(text_embeds=pooled, time_ids=time_ids)
  return lambda branches, t, step: arguments


def _empty_prompt(inputs: SamplerInputs) -> tuple[tuple[Int[Array, "1 *p t"], ...], bool]:
  """(token ids of what guidance leads away from, whether zeros take the place of that text)."""
  if inputs.negative is None:  # then the ids say nothing but how long the text is
    return tuple(ids[:1] for ids in inputs.prompts.ids), True
  return inputs.negative, False


def _predict(model, latents, t, condition, *, maps: bool = False):
  t = jnp.full(len(latents), t)
  if isinstance(model, CustomContrast):
    return model.predict(latents, t, condition, maps=maps)
  return model.unet(latents, t, **condition)


def _repeat_row(condition: Conditioning, count: int) -> Conditioning:
  """One row -> `count` equal rows."""
  tokens = jnp.repeat(condition.textual_tokens, count, axis=1)  # its batch is axis 1
  rest = condition.replace(textual_tokens=None)
  return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), rest).replace(textual_tokens=tokens)


def _repeat_visual_tokens(condition: Conditioning, count: int) -> Conditioning:
  """The visual tokens `count` times over, so as many as `count` subjects have.

  The prediction stays: attention over equal keys is attention over one of them.
  """
  if count == 1:
    return condition
  context = tuple(c.replace(visual=jnp.tile(c.visual, (1, count, 1))) for c in condition.context)
  return condition.replace(context=context)


def _with_scale(condition: Conditioning, scale: Float[Array, "l b"]) -> Conditioning:
  context = tuple(c.replace(scale=s) for c, s in zip(condition.context, scale, strict=True))
  return condition.replace(context=context)
