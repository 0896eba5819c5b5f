"""Stable Diffusion bases, read from a folder, a file or a hub id, and written as a folder.

PyTorch's diffusers loads what is written here. cc_jax.bases.files knows where the parts are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from cc_jax.bases import ldm_names
from cc_jax.bases.files import (
  ASSETS,
  COMPONENTS,
  NETWORKS,
  Found,
  find,
  find_file,
  read_config,
  read_json,
  resolve_base,
)
from cc_jax.bases.lora import Lora, Merged
from cc_jax.bases.tokenizer import load_tokenizer, save_tokenizer
from cc_jax.bases.torch_names import torch_shapes
from cc_jax.bases.weights import load_weights, replacing, save_weights
from cc_jax.errors import UserError
from cc_jax.models.abstract import abstract
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels, processor_to_dict
from cc_jax.models.clip_text import CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionModel
from cc_jax.models.keys import Keys
from cc_jax.models.unet import UNet2DCondition
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKL

__all__ = [
  "ASSETS", "CLIP_PROCESSOR", "Base", "abstract_base", "clip_pixels", "finish_base", "load_base",
  "load_module", "load_tokenizer", "random_base", "resolve_base", "save_base", "save_module",
  "save_tokenizer",
]  # fmt: skip

# Our UNetConfig always has one value a block.
_PER_BLOCK = (
  "layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"
)  # fmt: skip

# (dotted path as in cc_jax.customcontrast.build, shape in our layout) -> where a parameter shall lie.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


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
  image_encoder: CLIPVisionModel | None
  image_processor: dict[str, Any] | None  # mean, std, size (after the crop), shortest_edge
  hash: str = ""  # of every stored tensor and LoRA; '' for a base without weights
  plain_hash: str = ""  # the same without LoRAs: what adapters were trained on
  unused: tuple[str, ...] = ()  # what the folder or file holds besides

  @property
  def networks(self) -> dict[str, nnx.Module]:
    """The networks under the names of their folders."""
    found = {"unet": self.unet, "vae": self.vae, "image_encoder": self.image_encoder}
    found |= {f"text_encoder{s}": tower for s, tower in zip(("", "_2"), self.text_encoders)}
    return {name: module for name, module in found.items() if module is not None}


def load_base(
  name: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
  lora: Sequence[tuple[str | Path, float]] = (),
  sharding: Sharding | None = None,
) -> Base:
  """Reads a base.

  Args:
    name: see `cc_jax.bases.files.resolve_base`.
    dtype: of the computation.
    param_dtype: in which the parameters are held, whatever the files store.
    image_encoder: the folder of a CLIP vision tower (a path or a hub id), for a base without one or
      instead of its own.
    lora: files (paths or hub ids) and the scales with which they are merged into the base.
    sharding: where each parameter shall lie; default the first device. Its path is the one in
      cc_jax.customcontrast.build's frozen part, e.g. 'unet.conv_in.kernel' or 'text_encoders.0.<...>'.

  Raises:
    UserError: a folder or file is missing, unreadable, or not what its config.json says; a LoRA is
      for another base.
  """
  found = find(name, image_encoder)
  base = _build(found, lambda cls, config: _abstract(cls, config, dtype, param_dtype))
  if len(base.tokenizers) < len(base.text_encoders):
    raise UserError(
      f"{found.folder} has {len(base.tokenizers)} tokenizer(s) for {len(base.text_encoders)} text "
      "encoder(s); copy tokenizer/ (SDXL: tokenizer_2/ too) of the published model there"
    )
  modules = base.networks
  shapes = {label: torch_shapes(nnx.state(module)) for label, module in modules.items()}
  loras = [Lora(find_file(path), scale) for path, scale in lora]
  changes = _changes(loras, shapes, base)

  digests: dict[str, str] = {}
  with contextlib.ExitStack() as stack:
    sources, unused = found.open(stack, shapes)
    for label, module in modules.items():
      own: dict[str, str] = {}
      modules[label] = load_weights(
        module,
        sources[label],
        digests=own,
        change=lambda tensors, label=label: Merged(tensors, changes.get(label, {})),
        sharding=sharding and _below(sharding, label),
        what=f"the weights in {found.weights[label]}",
      )
      digests.update({f"{label}/{key}": digest for key, digest in own.items()})
  lines = [f"{key} {digest}\n" for key, digest in digests.items()]
  base = _with_networks(base, modules)
  base.plain_hash = _digest(lines)
  base.hash = _digest(lines + [f"lora {one.identity}\n" for one in loras])
  base.unused = (*base.unused, *unused)
  if base.unused:
    logging.warning("%s: not used: %s", name, ", ".join(base.unused))
  return base


def random_base(
  name: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
  seed: int = 0,
) -> Base:
  """A base of the folder's configs with new parameters; the folder needs no weight files.

  Inside `nnx.eval_shape` this costs nothing, whatever the size.
  """

  def create(cls: type[nnx.Module], config: Any) -> nnx.Module:
    return cls(config, dtype=dtype, param_dtype=param_dtype, rngs=Keys(seed))

  return _build(find(name, image_encoder), create)


def abstract_base(
  name: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
) -> Base:
  """A base whose parameters are shapes and dtypes only, from the config files alone."""
  return _build(
    find(name, image_encoder), lambda cls, config: _abstract(cls, config, dtype, param_dtype)
  )


def load_module(
  folder: str | Path,
  cls: type[nnx.Module],
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  digests: dict[str, str] | None = None,
) -> nnx.Module:
  """Reads one network: `config.json` and the safetensors file beside it (see load_weights)."""
  folder = Path(folder)
  module = _abstract(cls, read_config(folder, cls), dtype, param_dtype)
  return load_weights(module, folder, digests=digests)


def save_module(module: nnx.Module, folder: str | Path, *, dtype: Any = None) -> None:
  """Writes one network as diffusers or transformers would; `dtype` None keeps the parameters'."""
  folder = Path(folder)
  _, stem, _ = NETWORKS[type(module)]
  save_weights(module, folder / f"{stem}.safetensors", dtype=dtype)
  _write_json(folder / "config.json", _config_json(module))


def save_base(base: Base, folder: str | Path, *, dtype: Any = None) -> None:
  """Writes the whole base. `model_index.json` comes last: a folder without it is incomplete.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f"{folder} cannot be written: {error.strerror}; choose another") from error
  for suffix, tokenizer in zip(("", "_2"), base.tokenizers):
    save_tokenizer(tokenizer, folder / f"tokenizer{suffix}")
  for name, module in base.networks.items():
    save_module(module, folder / name, dtype=dtype)
  finish_base(folder, base.scheduler_config, base.image_processor)


def finish_base(
  folder: str | Path, scheduler: Mapping[str, Any], processor: Mapping[str, Any] | None = None
) -> None:
  """Adds what makes a folder of saved networks and tokenizers a base.

  Args:
    scheduler: the scheduler's config with its `_class_name`.
    processor: as in `Base.image_processor`; default CLIP's at the image encoder's size.
  """
  folder = Path(folder)
  index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": _diffusers_version()}
  for name, cls in COMPONENTS.items():
    if (folder / name).is_dir():
      values = read_json(folder / name / "config.json")
      in_transformers = "architectures" in values
      kind = values["architectures"][0] if in_transformers else values["_class_name"]
      assert kind in NETWORKS[cls][2], (name, kind)
      index[name] = ["transformers" if in_transformers else "diffusers", kind]
  for name in ("tokenizer", "tokenizer_2"):
    if (folder / name).is_dir():
      index[name] = ["transformers", "CLIPTokenizer"]

  # The pipeline forces an offset of 1 on every scheduler; the file says so, for all who read it.
  scheduler = {"steps_offset": 1, **scheduler}
  _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
  index["scheduler"] = ["diffusers", scheduler["_class_name"]]
  index["feature_extractor"] = [None, None]
  if "image_encoder" in index:
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    size = read_json(folder / "image_encoder" / "config.json")["image_size"]
    processor = processor or {**CLIP_PROCESSOR, "size": size}
    file = folder / "feature_extractor" / "preprocessor_config.json"
    _write_json(file, processor_to_dict(processor))
  if "text_encoder_2" in index:
    index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
  else:
    index |= {"safety_checker": [None, None], "requires_safety_checker": False}
  _write_json(folder / "model_index.json", index)


# ---- reading


def _build(found: Found, make: Callable[[type[nnx.Module], Any], nnx.Module]) -> Base:
  modules = {part: make(COMPONENTS[part], config) for part, config in found.configs.items()}
  suffixes = [suffix for suffix in ("", "_2") if f"text_encoder{suffix}" in modules]
  # A folder of config files only, for abstract states, has no vocabulary.
  tokenizers = [found.folder / f"tokenizer{suffix}" for suffix in suffixes]
  return Base(
    name=found.name,
    folder=found.folder,
    unet=modules["unet"],
    vae=modules["vae"],
    text_encoders=tuple(modules[f"text_encoder{suffix}"] for suffix in suffixes),
    tokenizers=tuple(load_tokenizer(path) for path in tokenizers if path.is_dir()),
    scheduler_config=found.scheduler,
    image_encoder=modules.get("image_encoder"),
    image_processor=found.processor,
    unused=found.unused,
  )


def _digest(lines: Sequence[str]) -> str:
  return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _with_networks(base: Base, modules: Mapping[str, nnx.Module]) -> Base:
  texts = [name for name in ("text_encoder", "text_encoder_2") if name in modules]
  return dataclasses.replace(
    base,
    unet=modules["unet"],
    vae=modules["vae"],
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
  for one in loras:
    for component, changes in one.resolve(shapes, other_names).items():
      for tensor, change in changes.items():
        merged.setdefault(component, {}).setdefault(tensor, []).append((change, one.scale))
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


# ---- writing


def _config_json(module: nnx.Module) -> dict[str, Any]:
  """The network's config.json in the words of its PyTorch original."""
  config = module.config
  values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
  if isinstance(config, UNetConfig):
    for name in _PER_BLOCK:  # some readers of these take a number only
      values[name] = values[name][0] if len(set(values[name])) == 1 else values[name]
  if "architectures" in values:
    return values
  kind = NETWORKS[type(module)][2][0]
  return {"_class_name": kind, "_diffusers_version": _diffusers_version(), **values}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
  with replacing(file) as temporary:
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _diffusers_version() -> str:
  return importlib.metadata.version("diffusers")
