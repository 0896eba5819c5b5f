"""The host part of generation: any number of pictures, drawn in batches of one compiled shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.samplers import StepTable, adds_noise, padded, skip_of_strength, step_table
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.parallel.mesh import batch_sharding, pad_batch, replicate
from cc_jax.sampling.images import to_uint8
from cc_jax.sampling.prompts import Prompts
from cc_jax.sampling.sample import SamplerInputs, SamplingConfig, guidance_branches, sample_images

CALLS = 25  # numbers of UNet calls are rounded up to multiples of this


class ImageSampler:
  """Draws any number of pictures with one model, in batches of one size.

  What is compiled once serves all prompts, seeds, scales, guidances above 1 and, up to the next
  multiple of CALLS, all numbers of steps and all samplers that agree in adding noise or not. It is
  compiled anew for another size, batch, number of references, or set of guidance's branches.
  """

  def __init__(
    self,
    model: nnx.Module,
    schedule: NoiseSchedule,
    *,
    merge: Callable[[Any], nnx.Module] | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Takes the model apart; later changes of it are not seen.

    Args:
      model: a `CustomContrast`, or `bundle(base)`.
      schedule: the base's.
      merge: for callers with parameters in a form of their own (training): parameters -> model.
        `model` may then be abstract, and every call must give `params`.
      mesh: pictures are spread over its axis `data`; parameters lie whole on every device.
    """
    definition, self.params = nnx.split(model)
    self.merge = merge or (lambda params: nnx.merge(definition, params))
    if merge is not None:
      self.params = None
    elif mesh is not None:
      self.params = replicate(self.params, mesh)
    self.schedule, self.mesh = schedule, mesh
    self.is_subject_model = isinstance(model, CustomContrast)
    self.layers = len(model.group_of_layer) if self.is_subject_model else 1
    side = model.unet.config.sample_size
    self.latent_size = (side, side) if isinstance(side, int) else tuple(side)
    self.latent_channels = model.vae.config.latent_channels
    self.factor = model.vae.config.factor  # pixels per latent
    # Bound here, so that what one ImageSampler has compiled is never looked up for another.
    self._draw = jax.jit(
      lambda params, request, plan, tick: sample_images(self.merge, params, request, plan, tick),
      static_argnames=("plan", "tick"),
    )

  def noise(
    self, seeds: Sequence[int], size: tuple[int, int] | None = None
  ) -> Float[np.ndarray, "b h w c"]:
    """Unit normal noise: a picture's depends on its own seed alone, and on the latents' size."""
    shape = (*(size or self.latent_size), self.latent_channels)
    return np.stack([np.asarray(jax.random.normal(jax.random.key(seed), shape)) for seed in seeds])

  def table(
    self, steps: int, sampler: str = "default", *, eta: float = 0.0, strength: float | None = None
  ) -> StepTable:
    """The sampler's numbers: a row for every call of the UNet. See `__call__` for the arguments."""
    skip = None if strength is None else skip_of_strength(steps, strength)
    return step_table(self.schedule, steps=steps, sampler=sampler, eta=eta, skip=skip)

  def __call__(
    self,
    prompts: Prompts,
    negative: Prompts,
    *,
    noise: Float[np.ndarray, "n h w c"],
    references: UInt8[np.ndarray, "n r h w 3"] | None = None,
    also: Sequence[UInt8[np.ndarray, "n r h w 3"]] = (),
    toward: tuple[UInt8[np.ndarray, "n r h w 3"], Float[np.ndarray, " n"]] | None = None,
    use_image: Bool[np.ndarray, " n"] | None = None,
    scale: float | Sequence | np.ndarray = 1.0,
    s_plus: bool = True,
    guidance: float = 5.0,
    image_guidance: float | None = None,
    steps: int = 20,
    sampler: str = "default",
    eta: float = 0.0,
    image: UInt8[np.ndarray, "n h w 3"] | None = None,
    strength: float | None = None,
    clip_skip: int = 0,
    time_ids: Sequence[float] | None = None,
    maps: bool = False,
    batch_size: int | None = None,
    params: Any = None,
    progress: bool = False,
    tick: Callable[[], None] | None = None,
  ) -> tuple[UInt8[np.ndarray, "n h w 3"], tuple[Float[np.ndarray, "steps n s 1"], ...]]:
    """Pictures, and location maps per layer if `maps` (else an empty tuple).

    Args:
      prompts: N prompts.
      negative: what to be led away from, one for all; usually the empty prompt.
      noise: see `noise`; equal noise makes pictures comparable. Its size is the pictures'.
      references: R references of each subject, as training shows them; None draws with the base.
      also: the references of the further subjects that the prompts name (`Prompts.more`).
      toward: references of another subject, and how far each picture goes to it: 0 to 1.
      use_image: per picture; False draws that one with the base.
      scale: of the visual path: a number, [L] per layer, or [steps, L] (either may be 1). 0
        everywhere, like no reference, draws with the base: without S+.
      s_plus: False leaves S+ out of every prompt.
      guidance: classifier-free; 1 = none (one branch less).
      image_guidance: the image's own guidance; None = `guidance` is for both.
      eta: the share of fresh noise in DDIM's steps.
      image, strength: pictures to start from in place of noise alone, of the size to draw, and the
        share of the steps that is made, (0, 1]; both or neither.
      clip_skip: layers of the text encoders left out at the end.
      time_ids: SDXL's (original height, width, crop top, left, target height, width) in pixels;
        None = drawn at the size that is asked for, not cropped. Other bases read nothing of it.
      batch_size: pictures at once; the last batch is filled up with copies. Default N. On a mesh,
        rounded up to a multiple of its size.
      params: in place of the model's own.
      progress: show a bar over the batches.
      tick: see `draw`.

    Raises:
      UserError: steps, sampler, guidance or scale make no sense.
    """
    count = len(noise)
    table = self.table(steps, sampler, eta=eta, strength=strength)
    # Row 0 belongs to the first step that is made.
    made = 1 + int(table.step[-1])
    scale = self._scale(scale, steps)[-made:]
    check_guidance(guidance, image_guidance)
    if time_ids is None:
      height, width = (side * self.factor for side in noise.shape[1:3])
      time_ids = (height, width, 0, 0, height, width)
    if not self.is_subject_model or not scale.any():
      references = None
    if references is None:
      also, toward = (), None
      use_image = np.zeros(count, bool)
      scale = np.zeros_like(scale)
    elif use_image is None:
      use_image = np.ones(count, bool)
    asked = guidance_branches(guidance, None if references is None else image_guidance)
    if maps and not self.is_subject_model:
      raise UserError("a plain base has no location maps; give an adapter")
    plan = SamplingConfig(asked, adds_noise(table), s_plus, maps, clip_skip)

    table = padded(table, -(-len(table.step) // CALLS) * CALLS)
    scale = np.pad(scale, ((0, len(table.step) - made), (0, 0)))
    if not also:
      prompts = prompts._replace(more=())
    rows = (
      (prompts, references, np.asarray(use_image, bool), np.asarray(noise, np.float32), image),
      (tuple(also), toward),
    )
    size = batch_size or count
    if self.mesh is not None:
      size = -(-size // self.mesh.size) * self.mesh.size
    images, recorded = [], []
    for start in tqdm(
      range(0, count, size), desc="drawing", unit="batch", disable=not progress
    ):
      here = min(size, count - start)
      cut = lambda x: pad_batch(x[start : start + here], size)  # noqa: B023, E731
      rows_here = jax.tree.map(cut, rows)
      if self.mesh is not None:
        rows_here = jax.device_put(rows_here, batch_sharding(self.mesh))
      batch, subjects = rows_here
      request = SamplerInputs(
        batch[0],
        tuple(i[:1] for i in negative.ids),
        *batch[1:],
        scale,
        np.float32(guidance),
        np.float32(0.0 if image_guidance is None else image_guidance),
        table,
        np.asarray(time_ids, np.float32),
        *subjects,
      )
      drawing = self._draw(self.params if params is None else params, request, plan=plan, tick=tick)
      pixels = np.asarray(drawing.images)[:here]
      if not np.isfinite(pixels).all():
        raise UserError("the picture is not finite; draw in float32 (--dtype=float32)")
      images.append(to_uint8(pixels))
      recorded.append([np.asarray(m)[:made, :here] for m in drawing.maps])
    return np.concatenate(images), tuple(np.concatenate(m, axis=1) for m in zip(*recorded))

  def _scale(self, scale, steps: int) -> Float[np.ndarray, "steps l"]:
    try:
      scale = np.asarray(scale, np.float32)
      if steps >= 1:
        scale = np.broadcast_to(scale, (steps, self.layers)).copy()
    except (TypeError, ValueError):
      raise UserError(
        f"scale {scale!r} is no number, nor {self.layers} numbers (one per layer), nor "
        f"[{steps}, {self.layers}] (per step and layer)"
      ) from None
    if not (np.isfinite(scale) & (scale >= 0)).all():
      raise UserError(
        f"scale {scale.min():g} makes no sense; use 0 (the base) to about 2, usually 1"
      )
    return scale


def check_guidance(guidance: float, image_guidance: float | None) -> None:
  """Raises UserError for a guidance that is negative or no number."""
  for name, value in (("guidance", guidance), ("image_guidance", image_guidance)):
    if value is not None and not (np.isfinite(value) and value >= 0):
      raise UserError(f"{name} {value} makes no sense; use 1 (none) to about 10, usually 5")
