"""The host part of generation: any number of images, drawn in batches of one compiled shape."""

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.customcontrast.text_conditioning import size_conditions
from cc_jax.diffusion.samplers import StepTable, adds_noise, skip_of_strength, step_table
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.attention_kernels import with_kernels
from cc_jax.parallel.attention import mesh_kernels
from cc_jax.parallel.mesh import batch_sharding, pad_batch, replicate
from cc_jax.sampling import sample
from cc_jax.sampling.conditions import SamplerInputs, SamplingConfig
from cc_jax.sampling.images import to_uint8
from cc_jax.sampling.prompts import Prompts
from cc_jax.sampling.sample import SamplerOutput, guidance_branches

_PER_IMAGE = ("prompts", "references", "use_image", "noise", "image", "extra_subjects",
              "interpolate_to")  # fields of SamplerInputs


class ImageSampler:
  """Draws any number of images with one model, in batches of one size.

  What is compiled (what begins a batch, one call of the UNet, the VAE's decoder) serves all
  prompts, seeds, scales, guidances above 1, numbers of steps, and all samplers that agree in adding
  noise or not. Another size, batch, number of references, or set of guidance's branches compiles
  anew.
  """

  def __init__(self, model: nnx.Module, schedule: NoiseSchedule, *,
               merge: Callable[[Any], nnx.Module] | None = None,
               mesh: jax.sharding.Mesh | None = None, attention: str = "auto"):
    """Splits the model into its definition and parameters; later changes of it have no effect.

    Args:
      model: a `CustomContrast`, or `bundle(base)`.
      schedule: the base's.
      merge: for callers whose parameters have another form (training): parameters -> model.
        `model` may then be abstract, and every call must give `params`.
      mesh: images are sharded over its axis `data`; parameters are replicated on every device.
      attention: 'auto', 'xla', 'cudnn' or 'pallas', see `models.attention_kinds`.
    """
    definition, params = nnx.split(model)
    if mesh is not None and merge is None:
      params = replicate(params, mesh)
    self.params = params if merge is None else None
    merge = merge or (lambda params: nnx.merge(definition, params))
    self.kernels = mesh_kernels(attention, mesh, dtype=model.unet.dtype, training=False)
    self.merge = lambda params: with_kernels(merge(params), self.kernels)
    self.schedule, self.mesh = schedule, mesh
    self.is_subject_model = isinstance(model, CustomContrast)
    self.layers = len(model.group_of_layer) if self.is_subject_model else 1
    side = model.unet.config.sample_size
    self.latent_size = (side, side) if isinstance(side, int) else tuple(side)
    self.latent_channels = model.vae.config.latent_channels
    self.factor = model.vae.config.factor  # pixels per latent
    # Functions of this object, so that no other ImageSampler's compiled programs are looked up. The
    # state is laid out alike by whatever made it, or the second call would be compiled for itself.
    laid_out = None if mesh is None else batch_sharding(mesh)

    def compiled(function, out_shardings=laid_out, static=("config",)):
      return jax.jit(functools.partial(function, self.merge), static_argnames=static,
                     out_shardings=out_shardings)

    self._begin = compiled(sample.begin, None if mesh is None else (laid_out, None))
    self._take_call = compiled(sample.take_call)
    self._location_maps = compiled(sample.location_maps, None)
    self._decode = compiled(sample.decode, static=())

  def noise(self, seeds: Sequence[int],
            size: tuple[int, int] | None = None) -> Float[np.ndarray, "b h w c"]:
    """Unit normal noise: an image's depends on its own seed alone, and on the latents' size."""
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
    negative: Prompts | None,
    *,
    noise: Float[np.ndarray, "n h w c"],
    references: UInt8[np.ndarray, "n r h w 3"] | None = None,
    extra_subjects: Sequence[UInt8[np.ndarray, "n r h w 3"]] = (),
    interpolate_to: tuple[UInt8[np.ndarray, "n r h w 3"], Float[np.ndarray, " n"]] | None = None,
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
    """Images, and location maps per layer if `maps` (else an empty tuple).

    Args:
      prompts: N prompts.
      negative: the negative prompt, one for all; see `prompts.encode_with_negative`.
      noise: see `noise`; equal noise makes images comparable. Its size is the images'.
      references: R references of each subject, as training shows them; None draws with the base.
      extra_subjects: references of the further subjects in `prompts.extra_subjects`.
      interpolate_to: references of another subject, and the weight of the interpolation to it, per
        image: 0 is the first subject, 1 the other.
      use_image: per image; False draws that one with the base.
      scale: of the visual path: a number, [L] per layer, or [steps, L] (either may be 1). 0
        everywhere, like no reference, draws with the base: without S+.
      s_plus: False leaves S+ out of every prompt.
      guidance: classifier-free; up to 1 = none (one branch less).
      image_guidance: the image's own guidance, up to 1 = none; None = `guidance` is for both.
      eta: the share of fresh noise in DDIM's steps.
      image, strength: images to start from (img2img), of the size to draw, and the share of the
        steps that is run, (0, 1]; both or neither.
      clip_skip: layers of the text encoders left out at the end.
      time_ids: SDXL's (original height, width, crop top, left, target height, width) in pixels;
        None = the drawn size, not cropped. Other bases ignore it.
      batch_size: default N; the last batch is padded with copies. On a mesh, rounded up to a
        multiple of its size.
      params: in place of the model's own.
      progress: show a bar over the batches.
      tick: called after every call of the UNet, for a progress bar.

    Raises:
      UserError: steps, sampler, guidance or scale make no sense.
    """
    num_images = len(noise)
    table = self.table(steps, sampler, eta=eta, strength=strength)
    # Row 0 of the scale belongs to the first step that is run.
    steps_run = 1 + int(table.step[-1])
    scale = self._check_scale(scale, steps)[-steps_run:]
    check_guidance(guidance, image_guidance)
    if time_ids is None:
      height, width = (side * self.factor for side in noise.shape[1:3])
      time_ids = size_conditions(height, width)
    if not self.is_subject_model or not scale.any():
      references = None
    if references is None:
      extra_subjects, interpolate_to = (), None
      use_image = np.zeros(num_images, bool)
      scale = np.zeros_like(scale)
    elif use_image is None:
      use_image = np.ones(num_images, bool)
    if maps and not self.is_subject_model:
      raise UserError("a plain base has no location maps; give an adapter")
    branches = guidance_branches(guidance, None if references is None else image_guidance)
    config = SamplingConfig(branches, adds_noise(table), s_plus, maps, clip_skip)

    inputs = SamplerInputs(
      prompts=prompts if extra_subjects else prompts._replace(extra_subjects=()),
      negative=None if negative is None else tuple(ids[:1] for ids in negative.ids),
      references=references,
      use_image=np.asarray(use_image, bool),
      noise=np.asarray(noise, np.float32),
      image=image,
      scale=scale,
      guidance=np.float32(guidance),
      image_guidance=np.float32(max(image_guidance or 0.0, 1.0)),  # up to 1 it is none
      table=table,
      time_ids=np.asarray(time_ids, np.float32),
      extra_subjects=tuple(extra_subjects),
      interpolate_to=interpolate_to,
    )
    params = self.params if params is None else params
    size = batch_size or num_images
    if self.mesh is not None:
      size = -(-size // self.mesh.size) * self.mesh.size
    starts = range(0, num_images, size)
    images, batches_of_maps = [], []
    for start in tqdm(starts, desc="drawing", unit="batch", disable=not progress):
      count = min(size, num_images - start)
      batch = self._batch(inputs, slice(start, start + count), size)
      output = self._sample(params, batch, config=config, tick=tick)
      pixels = np.asarray(output.images)[:count]
      if not np.isfinite(pixels).all():
        raise UserError("the picture is not finite; draw in float32 (--dtype=float32)")
      images.append(to_uint8(pixels))
      batches_of_maps.append([m[:, :count] for m in output.maps])
    location_maps = (np.concatenate(layer, axis=1) for layer in zip(*batches_of_maps))
    return np.concatenate(images), tuple(location_maps)

  def _sample(self, params: Any, inputs: SamplerInputs, config: SamplingConfig,
              tick: Callable[[], None] | None = None) -> SamplerOutput:
    """One batch. The device works while the host prepares the next call."""
    table, scale, maps = inputs.table, inputs.scale, []
    at_call = functools.partial(_at_call, table=table, scale=scale)
    state, encoded = self._begin(params, at_call(inputs, 0), config=config)
    # The pictures are encoded now.
    inputs = inputs._replace(references=None, image=None, extra_subjects=(), interpolate_to=None)
    for index, step in enumerate(table.step):
      before, now = state, at_call(inputs, index)
      if config.maps and (index == 0 or step != table.step[index - 1]):
        maps.append(self._location_maps(params, now, encoded, state, config=config))
      state = self._take_call(params, now, encoded, state, np.int32(index), config=config)
      if tick is not None and index:
        jax.block_until_ready(before)
        tick()
    if tick is not None:
      jax.block_until_ready(state)
      tick()
    images = self._decode(params, state)
    return SamplerOutput(images, tuple(np.stack(jax.device_get(layer)) for layer in zip(*maps)))

  def _batch(self, inputs: SamplerInputs, rows: slice, size: int) -> SamplerInputs:
    """Some images' inputs, padded to `size` and sharded over the mesh."""
    per_image = {name: getattr(inputs, name) for name in _PER_IMAGE}
    batch = jax.tree.map(lambda x: pad_batch(x[rows], size), per_image)
    if self.mesh is not None:
      batch = jax.device_put(batch, batch_sharding(self.mesh))
    return inputs._replace(**batch)

  def _check_scale(self, scale, steps: int) -> Float[np.ndarray, "steps l"]:
    try:
      scale = np.asarray(scale, np.float32)
      if steps >= 1:
        scale = np.broadcast_to(scale, (steps, self.layers)).copy()
    except (TypeError, ValueError):
      raise UserError(
        f"scale {textwrap.shorten(repr(scale), 60)} is no number, nor {self.layers} numbers (one "
        f"per layer), nor [{steps}, {self.layers}] (per step and layer)"
      ) from None
    if not (np.isfinite(scale) & (scale >= 0)).all():
      raise UserError(
        f"scale {scale.min():g} makes no sense; use 0 (the base) to about 2, usually 1")
    return scale


def _at_call(inputs: SamplerInputs, index: int, table: StepTable,
             scale: Float[np.ndarray, "steps l"]) -> SamplerInputs:
  """The inputs with one call's row of the table, and of the scale, in place of all rows."""
  step = table.step[index]
  row = jax.tree.map(lambda column: column[index : index + 1], table._replace(start=None))
  row = row._replace(start=table.start, step=np.zeros(1, np.int32))
  return inputs._replace(table=row, scale=scale[step : step + 1])


def check_guidance(guidance: float, image_guidance: float | None) -> None:
  """Raises UserError for a guidance that is negative or no number."""
  for name, value in (("guidance", guidance), ("image_guidance", image_guidance)):
    if value is not None and not (np.isfinite(value) and value >= 0):
      raise UserError(
        f"{name} {value} makes no sense; use 0 or 1 (none) to about 10, usually 5")
