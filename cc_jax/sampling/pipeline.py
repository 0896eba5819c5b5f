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
from cc_jax.customcontrast.adapter_file import Adapter, apply_adapter, load_adapter
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only, merge_params
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.sampling.images import read_reference, read_start, reference_display
from cc_jax.sampling.prompts import encode_prompts
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler, check_guidance

BASE = "subjects3d-base"
ADAPTER = ASSETS / "subjects3d-adapter.safetensors"


def load(
  checkpoint: str | os.PathLike | None = None, base: str | os.PathLike | None = None, *,
  lora: Sequence[tuple[str | os.PathLike, float]] = (), mesh: jax.sharding.Mesh | None = None,
  dtype: Any = jnp.float32,
) -> Pipeline:
  """A pipeline ready to draw.

  Args:
    checkpoint: an adapter's .safetensors file, or the workdir of a training that finished. None:
      the adapter that ships, or no adapter when `base` is another one than the shipped.
    base: a folder in the diffusers layout, a single .safetensors checkpoint, a hub id, or
      'subjects3d-base', the one that ships. None: the base that the adapter names.
    lora: files and the scales with which they are merged into the base.
    mesh: several devices to draw on; the pictures of a call are sharded over them.
    dtype: of the parameters and of the computation.

  Raises:
    UserError: a missing, truncated or foreign file, or an adapter of another base.
  """
  adapter, file = None, None
  if checkpoint is not None or base is None or str(base) == BASE:
    file = _adapter_file(checkpoint)
    adapter = load_adapter(file)  # before the base, which takes longer
  image_encoder = (adapter.encoder.image_encoder or None) if adapter else None
  loaded = load_base(base or adapter.base_name, dtype=dtype, param_dtype=dtype,
                     image_encoder=image_encoder, lora=lora)
  if adapter is not None:
    adapter = load_adapter(file, base_hash=loaded.plain_hash)
  return Pipeline(loaded, adapter, source=str(file or ""), mesh=mesh, dtype=dtype)


def _adapter_file(checkpoint: str | os.PathLike | None) -> Path:
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
    mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32,
  ):
    """`source` names the adapter's file; for `mesh` and `dtype` see `load`."""
    self.base, self.adapter, self.source = base, adapter, source
    self.schedule = NoiseSchedule.from_config(base.scheduler_config)
    self.s_words = 0
    if adapter is None:
      model = bundle(base)
    else:
      if base.image_encoder is None:
        raise UserError(
          f"the base {base.name} has no image_encoder/ to read references with, and the adapter "
          "names none; add one to the folder")
      # Nothing is initialised, since every value of the adapter comes from its file.
      parts = build_customcontrast(
        base, adapter.encoder, adapter.injection, dtype=dtype, transform=eval_shape_only)
      model = merge_params(*parts)
      apply_adapter(model, adapter.tensors, source=source or "the adapter")
      self.s_words = adapter.encoder.s_words
      self.layer_paths = model.layer_paths
    self.sampler = ImageSampler(model, self.schedule, mesh=mesh)
    height, width = (side * self.sampler.factor for side in self.sampler.latent_size)
    self.size = (width, height)
    self._bar = tqdm(disable=True)

  def __call__(
    self,
    prompt: str,
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
    negative_prompt: str = "",
    num_images: int | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Any = None,
    strength: float = 0.8,
    clip_skip: int = 0,
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
      class_noun: what the subject is, in one or several words. Several subjects in one picture
        have a list of nouns, in the order of the prompt, and a list of references for each.
      references: one picture or several of one subject (paths, PIL images, uint8 [h, w, 3 or 4]),
        used together in any order. A mask, or an alpha channel, cuts the subject out. None: the
        base draws alone.
      masks: one per reference (path, PIL image, array; None where there is none).
      scale: how much of the subject: 0 draws with the base, 1 is as in training; or [L] numbers
        per cross-attention layer, or [steps, L].
      guidance: classifier-free, 1 = none; of prompt and image together, or of the prompt alone when
        `image_guidance` is given.
      steps, sampler, eta: the sampler is the base's own if None; `eta` is the share of fresh noise
        in DDIM's steps.
      seed: of the first picture, the next ones count up from it; or one for each picture.
      num_images: default 1, or as many as there are seeds.
      height, width: of the pictures in pixels, multiples of the VAE's factor (8 for Stable
        Diffusion); default the base's own.
      image: what to start from in place of noise alone (a path, PIL image or array): img2img. Its
        largest centred part of the pictures' shape is taken. The VAE's mean is used, not a sample.
      strength: with `image`: the share of the steps that is run, in (0, 1]; 1 keeps next to
        nothing of the image.
      clip_skip: how many layers of the text encoders to leave out at the end (0 = none; what other
        programs call 2 is 1 here, as in diffusers), for prompt and negative prompt alike.
      original_size, crop, target_size: SDXL's size conditions: (height, width), (top, left) and
        (height, width) in pixels; default the pictures' size, not cropped. Other bases ignore them.
      s_plus: False leaves the pseudo-words out of the prompt.
      return_maps: also return the location maps m by layer, [steps, n, h, w] in (0, 1).
      progress: show a bar over the steps.

    Raises:
      UserError, DataError: one line that says what is wrong and what to do.
    """
    nouns = [class_noun] if isinstance(class_noun, str) else list(class_noun or ())
    references, masks = _lists_by_subject(references, masks, nouns)
    seeds = _check_seeds(seed, num_images)
    for index in range(len(references)):
      self._check(prompt, nouns[index : index + 1], references[index], masks[index])
    check_guidance(guidance, image_guidance)
    width, height = self._check_size(width, height)
    latent_size = (height // self.sampler.factor, width // self.sampler.factor)
    subjects = [np.stack([self.read_references(*pair)] * len(seeds))
                for pair in zip(references, masks) if pair[0]]
    trajectory = dict(steps=steps, sampler=sampler or "default", eta=eta)
    start = None
    if image is not None:
      start = np.stack([read_start(image, width=width, height=height)] * len(seeds))
      trajectory["strength"] = strength
    calls = len(self.sampler.table(**trajectory).step)  # Heun's, for one, are two per step
    tokenizers = self.base.tokenizers
    prompts = encode_prompts(
      tokenizers, [prompt] * len(seeds), [nouns] * len(seeds) if any(nouns) else None,
      s_words=self.s_words if subjects and s_plus else 0)
    negative = encode_prompts(tokenizers, [negative_prompt])
    self._bar = tqdm(total=calls, desc="drawing", unit="step", disable=not progress)
    with self._bar:
      images, maps = self.sampler(
        prompts, negative, noise=self.sampler.noise(seeds, latent_size), image=start,
        references=subjects[0] if subjects else None, extra_subjects=subjects[1:],
        scale=scale, s_plus=s_plus, guidance=guidance, image_guidance=image_guidance,
        time_ids=(*(original_size or (height, width)), *crop, *(target_size or (height, width))),
        clip_skip=clip_skip, maps=return_maps, tick=self._tick if progress else None, **trajectory)
      jax.effects_barrier()  # the last ticks
    images = [Image.fromarray(image) for image in images]
    return (images, self._maps_by_layer(maps, latent_size)) if return_maps else images

  @property
  def shown(self) -> dict[str, Any]:
    """How the adapter's training showed references: arguments of `read_reference`."""
    # As large as in training; the model itself resizes them for the image encoder.
    return reference_display(self.adapter.notes, min(self.size))

  def read_references(self, references: Any, masks: Any = None) -> UInt8[np.ndarray, "r s s 3"]:
    """One subject's references (paths, PIL images or arrays), as training showed them."""
    references, masks = _as_list(references), _as_list(masks)
    masks = masks or [None] * len(references)
    return np.stack([read_reference(*pair, **self.shown) for pair in zip(references, masks)])

  def _check_size(self, width: int | None, height: int | None) -> tuple[int, int]:
    factor = self.sampler.factor
    size = (width or self.size[0], height or self.size[1])
    for name, side in zip(("width", "height"), size):
      if side < factor or side % factor:
        raise UserError(
          f"{name} {side} is no multiple of {factor}; use {max(1, round(side / factor)) * factor}")
    return size

  def _check(self, prompt, nouns, references, masks) -> None:
    if not prompt or not prompt.strip():
      raise UserError("there is no prompt; say what to draw with --prompt")
    if references and self.adapter is None:
      raise UserError(
        f"the base {self.base.name} has no adapter to read references with; give --checkpoint")
    if references and not any(nouns):
      raise UserError(
        "a reference needs --class_noun, the word in the prompt that says what the subject is")
    if masks and len(masks) != len(references):
      raise UserError(f"{len(masks)} masks for {len(references)} references; give one for each")

  def _maps_by_layer(self, maps, latent_size) -> dict[str, np.ndarray]:
    if len(maps) != len(self.layer_paths):
      raise UserError("this adapter has no location maps (config.injection.location=False)")
    return {
      path: m.reshape(*m.shape[:2], *_layer_size(latent_size, m.shape[2]))
      for path, m in zip(self.layer_paths, maps)
    }

  def _tick(self) -> None:
    self._bar.update()


def _as_list(pictures: Any) -> list[Any]:
  """One picture or several or None, as a list."""
  single = isinstance(pictures, str | os.PathLike | Image.Image | np.ndarray)
  return [pictures] if single else list(pictures or ())


def _lists_by_subject(references: Any, masks: Any, nouns: Sequence[str]) -> tuple[list, list]:
  """A list of references and one of masks for each subject; one subject may come without lists."""
  if len(nouns) < 2:
    return [_as_list(references)], [_as_list(masks)]
  references = [_as_list(subject) for subject in references or ()]
  masks = [_as_list(subject) for subject in masks or [None] * len(nouns)]
  if references and not len(nouns) == len(references) == len(masks):
    raise UserError(
      f"{len(references)} lists of references and {len(masks)} of masks for {len(nouns)} class "
      "nouns; give one of each for every subject")
  if not all(references):
    raise UserError("a subject has no reference; give every class noun at least one")
  return references or [[]], masks if references else [[]]


def _check_seeds(seed: int | Sequence[int], num_images: int | None) -> list[int]:
  count = 1 if num_images is None else num_images
  if count < 1:
    raise UserError(f"num_images is {num_images}; draw at least one")
  seeds = list(map(int, seed)) if np.ndim(seed) else [int(seed) + k for k in range(count)]
  if num_images not in (None, len(seeds)):
    raise UserError(f"{len(seeds)} seeds for {num_images} pictures; leave num_images out")
  if not seeds or not all(0 <= one < 2**31 for one in seeds):
    raise UserError(f"seed {seed} is out of range; use 0 to {2**31 - count}")
  return seeds


def _layer_size(latent_size: tuple[int, int], pixels: int) -> tuple[int, int]:
  """Height and width of the layer that has so many pixels: halved, rounded up, until they agree."""
  height, width = latent_size
  while height * width > pixels:
    height, width = -(-height // 2), -(-width // 2)
  return height, width
