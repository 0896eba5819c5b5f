"""What the UNet is told while a picture is drawn: prompts and references at every time step.

`encode` is what no time step changes, `conditions` the rest. Pure functions of arrays.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from cc_jax.customcontrast.model import Conditioning, CustomContrast, Subject
from cc_jax.customcontrast.text_conditioning import encode_text
from cc_jax.diffusion.samplers import StepTable
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


class Encoded(NamedTuple):
  """What the subjects of a batch are, whatever the time step: a pytree."""

  without_image: Any  # the visual tokens of no image
  subject: Subject | None  # None: no image has a reference
  extra_subjects: tuple[Subject, ...] = ()
  interpolation: tuple[Subject, Float[Array, " b"]] | None = None
  # Without a reference nothing depends on the time step: branches -> what the UNet is told.
  constant: dict[tuple[str, ...], Conditioning] | None = None


def encode(model: nnx.Module, inputs: SamplerInputs, config: SamplingConfig) -> Any:
  """A pytree of all that the conditions need and no time step changes."""
  if not isinstance(model, CustomContrast):
    return _encode_prompts(model, inputs, config)
  return _encode_subjects(model, inputs, config)


def conditions(model: nnx.Module, inputs: SamplerInputs, config: SamplingConfig, encoded: Any):
  """`conditions(branches, t, step)` -> what the UNet is told: Conditioning, or its arguments.

  `encoded` is what `encode` returns; of `inputs` no picture is read.
  """
  if not isinstance(model, CustomContrast):
    return lambda branches, t, step: encoded
  return _subject_conditions(model, inputs, config, encoded)


def _encode_subjects(
  model: CustomContrast, inputs: SamplerInputs, config: SamplingConfig
) -> Encoded:
  """The subjects' features and visual tokens."""
  encoded = Encoded(model.visual(None, batch=1), None)
  if inputs.references is None:
    told = _subject_conditions(model, inputs, config, encoded)
    names = {config.branches, (FULL,)} if config.maps else {config.branches}
    return encoded._replace(constant={name: told(name, 0, 0) for name in names})

  def encode_references(references, slot, noun_span) -> Subject:
    pixels = references.reshape(-1, *references.shape[2:])
    features, _ = model.image_features(pixels.astype(jnp.float32) / 255)
    # Several references of one subject: their tokens side by side, so that one attention, which
    # knows no order among tokens, picks from all of them. [R]; averaging would blur two views.
    features = features.reshape(len(references), -1, features.shape[-1])
    place = jax.tree.map(jnp.asarray, (slot, noun_span))
    return Subject(features, *place, model.visual(features, inputs.use_image))

  prompts, interpolation = inputs.prompts, None
  place = prompts.slot, prompts.noun_span
  subject = encode_references(inputs.references, *place)
  extra = zip(inputs.extra_subjects, prompts.extra_subjects, strict=True)
  extra_subjects = tuple(encode_references(references, *where) for references, where in extra)
  if inputs.interpolate_to is not None:
    references, weight = inputs.interpolate_to
    interpolation = encode_references(references, *place), jnp.asarray(weight)
  return Encoded(encoded.without_image, subject, extra_subjects, interpolation)


def _subject_conditions(
  model: CustomContrast, inputs: SamplerInputs, config: SamplingConfig, encoded: Encoded
):
  """`conditions(branches, t, step)` -> Conditioning, for a CustomContrast model."""
  prompts, use_image, size = inputs.prompts, inputs.use_image, inputs.noise.shape[0]
  time_ids = jnp.broadcast_to(inputs.time_ids, (size, 6))
  prompt_ids = jax.tree.map(jnp.asarray, prompts.ids)
  subject, extra_subjects = encoded.subject, encoded.extra_subjects

  def without_image(ids, t, *, zero_text: bool = False) -> Conditioning:
    rows = len(ids[0])
    visual = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), encoded.without_image)
    condition = model.condition(
      None, [jnp.asarray(i) for i in ids], None, None, jnp.full(rows, t), visual=visual,
      time_ids=time_ids[:rows], clip_skip=config.clip_skip, zero_text=zero_text)
    return _repeat_visual_tokens(condition, 1 + len(extra_subjects))

  def branch(name: str, t) -> Conditioning:
    if name == EMPTY:  # the same for all images, so computed once
      ids, zero_text = _empty_prompt(inputs)
      return _repeat_row(without_image(ids, t, zero_text=zero_text), size)
    if name == TEXT or subject is None:
      return without_image(prompts.ids, t)
    return model.condition(
      subject.features, prompt_ids, subject.slot, subject.noun_span, jnp.full(size, t),
      use_image=use_image, use_s_plus=config.s_plus, visual=subject.visual, time_ids=time_ids,
      clip_skip=config.clip_skip, also=extra_subjects, toward=encoded.interpolation)

  def conditions(branches, t, step) -> Conditioning:
    # A branch without image sees the image of all zeros at the same scale, as in training; an
    # image without reference is the base's.
    scale = inputs.scale[step][:, None] * use_image
    return Conditioning.concatenate([_with_scale(branch(name, t), scale) for name in branches])

  if encoded.constant is not None:
    return lambda branches, t, step: encoded.constant[branches]
  return conditions


def _encode_prompts(
  model: nnx.Module, inputs: SamplerInputs, config: SamplingConfig
) -> dict[str, Array]:
  """Arguments of the UNet, for a plain base."""
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
  return arguments


def _empty_prompt(inputs: SamplerInputs) -> tuple[tuple[Int[Array, "1 *p t"], ...], bool]:
  """(token ids of what guidance leads away from, whether zeros take the place of that text)."""
  if inputs.negative is None:  # then the ids say nothing but how long the text is
    return tuple(ids[:1] for ids in inputs.prompts.ids), True
  return inputs.negative, False


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
