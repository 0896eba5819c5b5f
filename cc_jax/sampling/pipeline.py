"""The user's pipeline: a base and an adapter, from words and pictures to pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from cc_jax.bases.base import Base, load_base
from cc_jax.bases.files import ASSETS
from cc_jax.customcontrast.adapter_base import check_base
from cc_jax.customcontrast.adapter_file import Adapter, apply_adapter, load_adapter
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only, merge_params
from cc_jax.customcontrast.text_conditioning import size_conditions
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.parallel.attention import mesh_kernels
from cc_jax.sampling import arguments
from cc_jax.sampling.images import read_reference, read_start, reference_display
from cc_jax.sampling.prompts import encode_with_negative
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler, check_guidance
from data_pipeline.triples import LAYOUTS

BASE = "subjects3d-base"
ADAPTER = ASSETS / "subjects3d-adapter.safetensors"


def load(
  checkpoint: str | os.PathLike | None = None, base: str | os.PathLike | None = None, *,
  image_encoder: str | os.PathLike | None = None,
  lora: Sequence[tuple[str | os.PathLike, float]] = (), strict_base: bool = False,
  mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32, attention: str = "auto",
) -> Pipeline:
  """A pipeline ready to draw. '~' in a path is the home folder.

  Args:
    checkpoint: an adapter's .safetensors file, or the workdir of a training that wrote one. None:
      the adapter that ships, or no adapter when `base` is another one than the shipped.
    base: a folder in the diffusers layout, a single .safetensors checkpoint, a hub id, or
      'subjects3d-base', the one that ships. None: the base that the adapter names. Another one of
      its family (a fine-tune, or a copy in another precision) is taken with a warning.
    image_encoder: the folder or hub id of the one that the adapter was trained with, if it is not
      where the adapter says.
    lora: files and the scales with which they are merged into the base; a file alone has scale 1.
    strict_base: refuse every base but the very one that the adapter was trained on.
    mesh: several devices to draw on; the pictures of a call are sharded over them.
    dtype, attention: of parameters and computation; 'auto', 'xla', 'cudnn' or 'pallas'.

  Raises:
    UserError: a missing, truncated or foreign file; other bases' adapters or chips' attention.
  """
  checkpoint, base, image_encoder = (arguments.as_path(name, value) for name, value in (
    ("checkpoint", checkpoint), ("base", base), ("image_encoder", image_encoder)))
  dtype, lora = arguments.as_dtype(dtype), arguments.as_loras(lora)
  mesh_kernels(attention, mesh, dtype=dtype, training=False)  # before anything is read
  adapter, file = None, None
  if checkpoint is not None or base is None or base == BASE:
    file = _adapter_file(checkpoint)
    adapter = load_adapter(file)  # before the base, which takes longer
    image_encoder = image_encoder or adapter.encoder.image_encoder or None
  try:
    loaded = load_base(base or adapter.base_name, dtype=dtype, param_dtype=dtype,
                       image_encoder=image_encoder, lora=lora)
  except UserError as error:
    if adapter is None or (base and image_encoder != adapter.encoder.image_encoder):
      raise
    named = " and ".join(filter(None, (adapter.base_name, adapter.encoder.image_encoder)))
    raise UserError(
      f"{error} ({file} was trained with {named}; where these are elsewhere, give --base and "
      "--image_encoder)") from error
  return Pipeline(loaded, adapter, source=str(file or ""), strict_base=strict_base, mesh=mesh,
                  dtype=dtype, attention=attention)


def _adapter_file(checkpoint: str | None) -> Path:
  if checkpoint is None:
    if not ADAPTER.is_file():
      raise UserError(f"{ADAPTER} is missing; give --checkpoint, or install cc_jax again")
    return ADAPTER
  path = Path(checkpoint)
  if path.is_dir():
    path = path / "adapter.safetensors"
    if not path.is_file():
      raise UserError(
        f"{path} is missing: no training in {checkpoint} has saved yet; it does so every "
        "train.save_every steps, and at its end")
  if not path.is_file():
    raise UserError(
      f"checkpoint {path} is missing; give an adapter's .safetensors file or a training's workdir, "
      "or leave --checkpoint out for the adapter that ships")
  return path


class Pipeline:
  """Draws with a base and perhaps an adapter; `load` makes one."""

  def __init__(
    self, base: Base, adapter: Adapter | None = None, *, source: str = "",
    strict_base: bool = False, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32,
    attention: str = "auto",
  ):
    """`source` names the adapter's file; for the rest see `load`."""
    self.base, self.adapter, self.source = base, adapter, source
    self.schedule = NoiseSchedule.from_config(base.scheduler_config)
    self.s_words = 0
    if adapter is None:
      model = bundle(base)
    else:
      if base.image_encoder is None:
        raise UserError(
          f"the base {base.name} has no image_encoder/ to read references with, and the adapter "
          f"names none (it was trained with the one of {adapter.base_name}); give --image_encoder")
      check_base(adapter, base, source=source or "the adapter", strict=strict_base)
      # Nothing is initialised, since every value of the adapter comes from its file.
      parts = build_customcontrast(
        base, adapter.encoder, adapter.injection, dtype=dtype, transform=eval_shape_only)
      model = merge_params(*parts)
      apply_adapter(model, adapter.tensors, source=source or "the adapter")
      self.s_words = adapter.encoder.s_words
      self.layer_paths = model.layer_paths
    self.sampler = ImageSampler(model, self.schedule, mesh=mesh, attention=attention)
    height, width = (side * self.sampler.factor for side in self.sampler.latent_size)
    self.size = (width, height)
    self._bar = tqdm(disable=True)

  def __call__(
    self,
    prompt: str | Sequence[str],
    class_noun: str | Sequence[str] | None = None,
    references: Sequence[Any] = (),
    masks: Sequence[Any] | None = None,
    *,
    scale: float | Sequence | np.ndarray = 1.0,
    guidance: float = 5.0,
    image_guidance: float | None = None,
    steps: int = 20,
    seed: int | Sequence[int] = 0,
    sampler: str | None = None,
    eta: float = 0.0,
    negative_prompt: str | None = None,
    num_images: int | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Any = None,
    strength: float = 0.8,
    clip_skip: int = 0,
    long_prompts: str = "cut",
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    target_size: tuple[int, int] | None = None,
    s_plus: bool = True,
    return_maps: bool = False,
    progress: bool = False,
  ) -> list[Image.Image] | tuple[list[Image.Image], dict[str, Float[np.ndarray, "steps n h w"]]]:
    """Draws `num_images` pictures, one batch; each depends on its own seed, not on their number.

    Args:
      prompt: a sentence; with references it must contain the class noun, after which S+ goes.
        A list of sentences draws one picture of each.
      class_noun: what the subject is, in one or several words. Several subjects in one picture
        have a list of nouns, in the order of the prompt, and a list of references for each.
      references: one picture or several of one subject (paths, PIL images, or arrays [h, w, 3 or 4]
        of 0 to 255 or floats in [0, 1]), used together in any order. A mask, or an alpha channel,
        cuts the subject out. None: the base draws alone.
      masks: one per reference (path, PIL image, array; None where there is none).
      scale: how much of the subject: 0 draws with the base, 1 is as in training; or [L] numbers
        per cross-attention layer, or [steps, L].
      guidance: classifier-free, up to 1 = none; of prompt and image together, or of the prompt
        alone when `image_guidance` is given.
      steps, sampler, eta: the sampler is the base's own if None; `eta` is the share of fresh noise
        in DDIM's steps.
      seed: of the first picture, the next ones count up from it; or one for each picture.
      negative_prompt: what the picture should not show. To SDXL, None is not "" but zeros.
      num_images: default 1, or as many as there are seeds.
      height, width: of the pictures in pixels, multiples of the VAE's factor (8 for Stable
        Diffusion); default the base's own.
      image: what to start from in place of noise alone (a path, PIL image or array): img2img. Its
        largest centred part of the pictures' shape is taken. The VAE's mean is used, not a sample.
      strength: with `image`: the share of the steps that is run, in (0, 1]; 1 keeps next to
        nothing of the image.
      clip_skip: how many layers of the text encoders to leave out at the end (0 = none; what other
        programs call 2 is 1 here, as in diffusers), for prompt and negative prompt alike.
      long_prompts: of prompts over 77 tokens: 'cut' leaves out the end, with a warning, as
        diffusers does; 'chunk' goes on in pieces of 75, as other programs do; or 'error'.
      original_size, crop, target_size: SDXL's size conditions: (height, width), (top, left) and
        (height, width) in pixels; default the pictures' size, not cropped. Other bases ignore them.
      s_plus: False leaves the pseudo-words out of the prompt.
      return_maps: also return the location maps m by layer, [steps, n, h, w] in (0, 1).
      progress: show a bar over the steps.

    Raises:
      UserError, DataError: one line that says what is wrong and what to do.
    """
    texts, nouns = arguments.as_prompts(prompt), arguments.as_nouns(class_noun)
    references, masks = arguments.pictures_by_subject(references, masks, nouns)
    seeds = arguments.as_seeds(seed, num_images, len(texts))
    texts = texts if len(texts) > 1 else texts * len(seeds)
    self._check_references(nouns, references)
    negative_prompt = arguments.as_text("negative_prompt", negative_prompt)
    guidance = arguments.as_number("guidance", guidance)
    if image_guidance is not None:
      image_guidance = arguments.as_number("image_guidance", image_guidance)
    check_guidance(guidance, image_guidance)
    width, height = self._check_size(width, height)
    original_size = arguments.as_pixels("original_size", original_size)
    target_size = arguments.as_pixels("target_size", target_size)
    crop = arguments.as_pixels("crop", crop, least=0) or (0, 0)
    clip_skip = arguments.as_integer("clip_skip", clip_skip or 0)
    latent_size = (height // self.sampler.factor, width // self.sampler.factor)
    sampler = arguments.as_text("sampler", sampler) or "default"
    trajectory = dict(steps=arguments.as_integer("steps", steps), sampler=sampler,
                      eta=arguments.as_number("eta", eta))
    if image is not None:
      trajectory["strength"] = arguments.as_number("strength", strength)
      image = read_start(arguments.as_picture("image", image), width=width, height=height)
    start = None if image is None else np.stack([image] * len(seeds))
    subjects = [np.stack([self.read_references(*pair)] * len(seeds))
                for pair in zip(references, masks) if pair[0]]
    calls = len(self.sampler.table(**trajectory).step)  # Heun's, for one, are two per step
    prompts, negative = encode_with_negative(
      self.base, texts, [nouns] * len(seeds) if any(nouns) else None,
      negative_prompt, s_words=self.s_words if subjects and s_plus else 0,
      long_prompts=long_prompts)
    self._bar = tqdm(total=calls, desc="drawing", unit="step", disable=not progress)
    with self._bar:
      images, maps = self.sampler(
        prompts, negative, noise=self.sampler.noise(seeds, latent_size), image=start,
        references=subjects[0] if subjects else None, extra_subjects=subjects[1:],
        scale=scale, s_plus=s_plus, guidance=guidance, image_guidance=image_guidance,
        time_ids=size_conditions(
          height, width, original_size=original_size, crop=crop, target_size=target_size),
        clip_skip=clip_skip, maps=return_maps, tick=self._tick if progress else None, **trajectory)
    images = [Image.fromarray(image) for image in images]
    return (images, self._maps_by_layer(maps, latent_size)) if return_maps else images

  @property
  def shown(self) -> dict[str, Any]:
    """How the adapter's training showed references: arguments of `read_reference`."""
    try:
      # As large as in training; the model itself resizes them for the image encoder.
      display = reference_display(self.adapter.notes, min(self.size))
    except ValueError:
      display = {}
    if not (display and 0 < display["ratio"] <= 1 and display["layout"] in LAYOUTS):
      raise UserError(
        f"{self.source or 'the adapter'}: its notes do not say how references are shown "
        f"({self.adapter.notes}); get the file again")
    return display

  def read_references(self, references: Any, masks: Any = None) -> UInt8[np.ndarray, "r s s 3"]:
    """One subject's references (paths, PIL images or arrays), as training showed them."""
    references = arguments.as_pictures("reference", references)
    masks = arguments.as_pictures("mask", masks) or [None] * len(references)
    return np.stack([read_reference(*pair, **self.shown) for pair in zip(references, masks)])

  def _check_size(self, width: int | None, height: int | None) -> tuple[int, int]:
    factor = self.sampler.factor
    size = []
    for name, side, default in zip(("width", "height"), (width, height), self.size):
      size.append(default if side is None else arguments.as_integer(name, side))
      if size[-1] < factor or size[-1] % factor:
        raise UserError(
          f"{name} {side} is no multiple of {factor}; use {max(1, round(side / factor)) * factor}")
    return tuple(size)

  def _check_references(self, nouns: Sequence[str], references: Sequence[list]) -> None:
    for index, shown in enumerate(references):
      if shown and self.adapter is None:
        raise UserError(
          f"the base {self.base.name} has no adapter to read references with; give --checkpoint")
      if shown and not any(nouns[index : index + 1]):
        raise UserError(
          "a reference needs --class_noun, the word in the prompt that says what the subject is")

  def _maps_by_layer(self, maps, latent_size) -> dict[str, np.ndarray]:
    if len(maps) != len(self.layer_paths):
      raise UserError("this adapter has no location maps (config.injection.location=False)")
    return {path: m.reshape(*m.shape[:2], *_layer_size(latent_size, m.shape[2]))
            for path, m in zip(self.layer_paths, maps)}

  def _tick(self) -> None:
    self._bar.update()


def _layer_size(latent_size: tuple[int, int], pixels: int) -> tuple[int, int]:
  """Height and width of the layer that has so many pixels: halved, rounded up, until they agree."""
  height, width = latent_size
  while height * width > pixels:
    height, width = -(-height // 2), -(-width // 2)
  return height, width
