"""Stable Diffusion bases, read from a folder, a file or a hub id, and written as a folder.

PyTorch's diffusers loads what is written here. cc_jax.bases.files knows where the parts are.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from flax import nnx

from cc_jax.bases import ldm_names
from cc_jax.bases.files import BaseFiles, locate_base, read_config
from cc_jax.bases.lora_files import Lora, Merged, find_lora
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.bases.torch_names import torch_shapes
from cc_jax.bases.weights import Sharding, load_weights
from cc_jax.errors import UserError
from cc_jax.models.clip_text import CLIPTextModel
from cc_jax.models.image_encoder import ImageEncoder
from cc_jax.models.rngs import StatelessRngs, abstract
from cc_jax.models.unet import UNet2DCondition
from cc_jax.models.vae import AutoencoderKL


@dataclasses.dataclass
class Base:
  """A text-to-image model, its networks in our classes. Not a pytree: take the modules out."""

  name: str
  folder: Path
  unet: UNet2DCondition
  vae: AutoencoderKL
  text_encoders: tuple[CLIPTextModel, ...]
  tokenizers: tuple[Any, ...]
  scheduler_config: dict[str, Any]
  image_encoder: ImageEncoder | None
  image_processor: dict[str, Any] | None  # see models/clip_pixels.py
  hash: str = ""  # of every stored tensor and LoRA; '' for a base without weights
  plain_hash: str = ""  # the same without LoRAs: what adapters were trained on
  hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of each network's tensors
  unused: tuple[str, ...] = ()  # what the folder or file holds besides
  # SDXL: no (negative) prompt at all is zeros in place of the encoded "", as in diffusers.
  force_zeros_for_empty_prompt: bool = False

  @property
  def networks(self) -> dict[str, nnx.Module]:
    """The networks under the names of their folders."""
    networks = {"unet": self.unet, "vae": self.vae, "image_encoder": self.image_encoder}
    networks |= {f"text_encoder{s}": tower for s, tower in zip(("", "_2"), self.text_encoders)}
    return {name: module for name, module in networks.items() if module is not None}


def load_base(
  name: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None, lora: Sequence[tuple[str | Path, float]] = (),
  sharding: Sharding | None = None, only: Sequence[str] | None = None,
) -> Base:
  """Reads a base.

  Args:
    name: see `cc_jax.bases.files.resolve_base`.
    dtype: of the computation.
    param_dtype: in which the parameters are held, whatever the files store.
    image_encoder: the folder of CLIP's or DINO's (a path or a hub id), for a base without one or
      instead of its own.
    lora: files or PEFT's folders (paths or hub ids) and the scales with which they are merged.
    sharding: where each parameter shall lie; default the first device. Its path is the one in the
      frozen part of cc_jax.customcontrast.build, e.g. 'unet.conv_in.kernel', 'text_encoders.0...'.
    only: names of `Base.networks` to read, the others stay abstract; `hash` is of those read.

  Raises:
    UserError: a folder or file is missing, unreadable, or not what its config.json says; a LoRA is
      for another base.
  """
  files = locate_base(name, image_encoder)
  base = _build(files, lambda cls, config: _abstract(cls, config, dtype, param_dtype))
  if len(base.tokenizers) < len(base.text_encoders):
    raise UserError(
      f"{files.folder} has {len(base.tokenizers)} tokenizer(s) for {len(base.text_encoders)} text "
      "encoder(s); copy tokenizer/ (SDXL: tokenizer_2/ too) of the published model there"
    )
  modules = base.networks
  shapes = {label: torch_shapes(nnx.state(module)) for label, module in modules.items()}
  loras = [Lora(find_lora(path), scale) for path, scale in lora]
  changes = _changes(loras, shapes, base)

  digests: dict[str, str] = {}
  with contextlib.ExitStack() as stack:
    sources, unused = files.open(stack, shapes)
    for label, module in base.networks.items():
      if only is not None and label not in only:
        continue
      stored: dict[str, str] = {}
      modules[label] = load_weights(
        module, sources[label], digests=stored,
        change=lambda tensors, label=label: Merged(tensors, changes.get(label, {})),
        sharding=sharding and _below(sharding, label),
        what=f"the weights in {files.weights[label]}",
      )
      digests.update({f"{label}/{key}": digest for key, digest in stored.items()})
  lines = [f"{key} {digest}\n" for key, digest in digests.items()]
  base = dataclasses.replace(base, **_network_fields(modules))
  base.plain_hash = _digest(lines)
  base.hashes = {
    label: _digest([line for line in lines if line.startswith(f"{label}/")]) for label in modules
  }
  base.hash = _digest(lines + [f"lora {lora.identity}\n" for lora in loras])
  base.unused = (*base.unused, *unused)
  if base.unused:
    logging.warning("%s: not used: %s", name, ", ".join(base.unused))
  return base


def random_base(
  name: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None, seed: int = 0,
) -> Base:
  """A base of the folder's configs with new parameters; the folder needs no weight files.

  Inside `nnx.eval_shape` this costs nothing, whatever the size.
  """

  def create(cls: type[nnx.Module], config: Any) -> nnx.Module:
    return cls(config, dtype=dtype, param_dtype=param_dtype, rngs=StatelessRngs(seed))

  return _build(locate_base(name, image_encoder, weights=False), create)


def abstract_base(
  name: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
) -> Base:
  """A base whose parameters are shapes and dtypes only, from the config files alone."""
  files = locate_base(name, image_encoder, weights=False)
  return _build(files, lambda cls, config: _abstract(cls, config, dtype, param_dtype))


def load_module(
  folder: str | Path, cls: type[nnx.Module], *, dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32, digests: dict[str, str] | None = None,
) -> nnx.Module:
  """Reads one network: `config.json` and the safetensors file beside it (see load_weights)."""
  folder = Path(folder)
  module = _abstract(cls, read_config(folder, cls), dtype, param_dtype)
  return load_weights(module, folder, digests=digests)


# ---- reading


def _build(files: BaseFiles, make: Callable[[type[nnx.Module], Any], nnx.Module]) -> Base:
  modules = {part: make(files.classes[part], config) for part, config in files.configs.items()}
  suffixes = [suffix for suffix in ("", "_2") if f"text_encoder{suffix}" in modules]
  # A folder of config files only, for abstract states, has no vocabulary.
  tokenizers = [files.folder / f"tokenizer{suffix}" for suffix in suffixes]
  return Base(
    name=files.name, folder=files.folder, **_network_fields(modules),
    tokenizers=tuple(load_tokenizer(path) for path in tokenizers if path.is_dir()),
    scheduler_config=files.scheduler, image_processor=files.processor, unused=files.unused,
    force_zeros_for_empty_prompt=files.force_zeros_for_empty_prompt,
  )


def _digest(lines: Sequence[str]) -> str:
  return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _network_fields(modules: Mapping[str, nnx.Module]) -> dict[str, Any]:
  """Networks by the names of their folders -> the fields of Base."""
  texts = [name for name in ("text_encoder", "text_encoder_2") if name in modules]
  return dict(
    unet=modules["unet"], vae=modules["vae"],
    text_encoders=tuple(modules[name] for name in texts),
    image_encoder=modules.get("image_encoder"),
  )


def _changes(
  loras: Sequence[Lora], shapes: Mapping[str, Mapping[str, tuple[int, ...]]], base: Base
) -> dict[str, dict[str, list]]:
  """component -> tensor -> the changes of all LoRAs with their scales."""
  merged: dict[str, dict[str, list]] = {}
  if not loras:
    return merged
  modules = [name.removesuffix(".weight") for name in shapes["unet"] if name.endswith(".weight")]
  other_names = ldm_names.unet_names(base.unet.config, modules)
  for lora in loras:
    for component, changes in lora.resolve(shapes, other_names).items():
      for tensor, change in changes.items():
        merged.setdefault(component, {}).setdefault(tensor, []).append((change, lora.scale))
  return merged


def _below(sharding: Sharding, label: str) -> Sharding:
  """The same rule for a component's own paths."""
  place = {"text_encoder": "text_encoders.0", "text_encoder_2": "text_encoders.1"}.get(label, label)
  return lambda path, shape: sharding(f"{place}.{path}", shape)


def _abstract(cls: type[nnx.Module], config: Any, dtype: Any, param_dtype: Any) -> nnx.Module:
  skeleton = _skeleton(cls, config, jnp.dtype(dtype), jnp.dtype(param_dtype))
  return nnx.merge(*skeleton, copy=True)  # or all would share their variables


# The laboratory and notebooks load one base many times, and tracing its constructors is most of it.
@functools.lru_cache(maxsize=8)
def _skeleton(cls: type[nnx.Module], config: Any, dtype: Any, param_dtype: Any) -> tuple:
  return nnx.split(
    abstract(lambda rngs: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)))
