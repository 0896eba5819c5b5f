"""Folders in the hub's layout: a Stable Diffusion base is read from one and written to one.

  model_index.json    which class each of the folders below is of
  unet/ vae/          config.json, diffusion_pytorch_model.safetensors
  text_encoder/ ...   config.json, model.safetensors; SDXL has text_encoder_2/ as well
  tokenizer/ ...      vocab.json, merges.txt, tokenizer_config.json
  scheduler/          scheduler_config.json
  image_encoder/      a CLIP vision tower, with feature_extractor/preprocessor_config.json

PyTorch's diffusers loads what is written here. This is the only file that knows the layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from flax import nnx

from cc_jax.errors import UserError
from cc_jax.models.abstract import abstract
from cc_jax.models.clip_pixels import (
  CLIP_PROCESSOR,
  clip_pixels,
  processor_from_dict,
  processor_to_dict,
)
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.models.dino import Dino, DinoConfig
from cc_jax.models.keys import Keys
from cc_jax.models.tokenizer import load_tokenizer, save_tokenizer
from cc_jax.models.unet import UNet2DCondition
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.models.weights import load_weights, replacing, save_weights

__all__ = [
  "CLIP_PROCESSOR", "Base", "abstract_base", "clip_pixels", "finish_base", "load_base",
  "load_module", "load_tokenizer", "random_base", "resolve_base", "save_base", "save_module",
  "save_tokenizer",
]  # fmt: skip

ASSETS = Path(__file__).parent / "assets"

# Ours, its config, the file its weights are in, and the classes of model_index.json that it is.
_NETWORKS = {
  UNet2DCondition: (UNetConfig, "diffusion_pytorch_model", ("UNet2DConditionModel",)),
  AutoencoderKL: (AutoencoderKLConfig, "diffusion_pytorch_model", ("AutoencoderKL",)),
  CLIPTextModel: (CLIPTextConfig, "model", ("CLIPTextModel", "CLIPTextModelWithProjection")),
  CLIPVisionModel: (
    CLIPVisionConfig, "model", ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
  ),
  Dino: (DinoConfig, "model", ("ViTModel", "Dinov2Model")),
}  # fmt: skip
_COMPONENTS = {
  "unet": UNet2DCondition,
  "vae": AutoencoderKL,
  "text_encoder": CLIPTextModel,
  "text_encoder_2": CLIPTextModel,
  "image_encoder": CLIPVisionModel,
}
# Our UNetConfig always has one value a block.
_PER_BLOCK = (
  "layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"
)  # fmt: skip
_REQUIRED = ("unet", "vae", "text_encoder")
_OTHERS = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")


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
  hash: str = ""  # of every stored tensor; '' for a base without weights


def resolve_base(name_or_folder: str | Path) -> Path:
  """The folder of a base: a path, or the name of one inside the package ('subjects3d-base').

  Raises:
    UserError: it is neither.
  """
  for folder in (Path(name_or_folder), ASSETS / name_or_folder):
    if folder.is_dir():
      return folder
  shipped = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
  raise UserError(
    f"base {str(name_or_folder)!r} is no folder and not one of the package's ({shipped}); give the "
    "path of a downloaded folder in the diffusers layout"
  )


def load_base(
  name_or_folder: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
) -> Base:
  """Reads a base.

  Args:
    dtype: of the computation.
    param_dtype: in which the parameters are held, whatever the files store.
    image_encoder: the folder of a CLIP vision tower, for a base without one or instead of its own.

  Raises:
    UserError: a folder or file is missing, unreadable, or not what its config.json says.
  """
  digests: dict[str, str] = {}

  def load(folder: Path, cls: type[nnx.Module], label: str) -> nnx.Module:
    own: dict[str, str] = {}
    module = load_module(folder, cls, dtype=dtype, param_dtype=param_dtype, digests=own)
    digests.update({f"{label}/{name}": digest for name, digest in own.items()})
    return module

  base = _assemble(name_or_folder, load, image_encoder)
  lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
  base.hash = hashlib.sha256(lines.encode()).hexdigest()
  return base


def random_base(
  name_or_folder: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
  seed: int = 0,
) -> Base:
  """A base of the folder's configs with new parameters; the folder needs no weight files.

  Inside `nnx.eval_shape` this costs nothing, whatever the size.
  """

  def create(folder: Path, cls: type[nnx.Module], label: str) -> nnx.Module:
    del label
    config = _read_config(folder, cls)
    return cls(config, dtype=dtype, param_dtype=param_dtype, rngs=Keys(seed))

  return _assemble(name_or_folder, create, image_encoder)


def abstract_base(
  name_or_folder: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
) -> Base:
  """A base whose parameters are shapes and dtypes only, from the config files alone."""

  def create(folder: Path, cls: type[nnx.Module], label: str) -> nnx.Module:
    del label
    return _abstract(cls, _read_config(folder, cls), dtype, param_dtype)

  return _assemble(name_or_folder, create, image_encoder)


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
  module = _abstract(cls, _read_config(folder, cls), dtype, param_dtype)
  return load_weights(module, folder, digests=digests)


def save_module(module: nnx.Module, folder: str | Path, *, dtype: Any = None) -> None:
  """Writes one network as diffusers or transformers would; `dtype` None keeps the parameters'."""
  folder = Path(folder)
  _, stem, _ = _NETWORKS[type(module)]
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
  networks = {"unet": base.unet, "vae": base.vae}
  for suffix, encoder, tokenizer in zip(("", "_2"), base.text_encoders, base.tokenizers):
    networks[f"text_encoder{suffix}"] = encoder
    save_tokenizer(tokenizer, folder / f"tokenizer{suffix}")
  if base.image_encoder is not None:
    networks["image_encoder"] = base.image_encoder
  for name, module in networks.items():
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
  for name, cls in _COMPONENTS.items():
    if (folder / name).is_dir():
      values = _read_json(folder / name / "config.json")
      in_transformers = "architectures" in values
      kind = values["architectures"][0] if in_transformers else values["_class_name"]
      assert kind in _NETWORKS[cls][2], (name, kind)
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
    size = _read_json(folder / "image_encoder" / "config.json")["image_size"]
    processor = processor or {**CLIP_PROCESSOR, "size": size}
    file = folder / "feature_extractor" / "preprocessor_config.json"
    _write_json(file, processor_to_dict(processor))
  if "text_encoder_2" in index:
    index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
  else:
    index |= {"safety_checker": [None, None], "requires_safety_checker": False}
  _write_json(folder / "model_index.json", index)


# ---- reading


def _assemble(
  name_or_folder: str | Path,
  make: Callable[[Path, type[nnx.Module], str], nnx.Module],
  image_encoder: str | Path | None,
) -> Base:
  folder = resolve_base(name_or_folder)
  index = _read_json(folder / "model_index.json")
  listed = {
    name: entry[1]
    for name, entry in index.items()
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
  }
  for name in _REQUIRED:
    if name not in listed:
      raise UserError(f"{folder / 'model_index.json'} lists no {name}; it is no Stable Diffusion")
  modules = {}
  for name, kind in listed.items():
    if name in _COMPONENTS:
      cls = _COMPONENTS[name]
      if kind not in _NETWORKS[cls][2]:
        raise UserError(
          f"{folder / 'model_index.json'}: {name} is a {kind}; we have {_NETWORKS[cls][2]}"
        )
      if name == "image_encoder" and image_encoder is not None:
        continue
      modules[name] = make(folder / name, cls, name)
    elif name not in _OTHERS:
      logging.info("%s/ is not used", folder / name)
  vision = folder / "image_encoder"
  if image_encoder is not None:
    vision = Path(image_encoder)
    vision = vision / "image_encoder" if (vision / "image_encoder").is_dir() else vision
    modules["image_encoder"] = make(vision, CLIPVisionModel, "image_encoder")

  processor = None
  if "image_encoder" in modules:
    processor = _read_processor(vision, modules["image_encoder"].config.image_size)
  suffixes = [suffix for suffix in ("", "_2") if f"text_encoder{suffix}" in modules]
  # A folder of config files only, for abstract states, has no vocabulary.
  tokenizers = [folder / f"tokenizer{s}" for s in suffixes if (folder / f"tokenizer{s}").is_dir()]
  return Base(
    name=str(name_or_folder),
    folder=folder,
    unet=modules["unet"],
    vae=modules["vae"],
    text_encoders=tuple(modules[f"text_encoder{suffix}"] for suffix in suffixes),
    tokenizers=tuple(load_tokenizer(path) for path in tokenizers),
    scheduler_config=_read_json(folder / "scheduler" / "scheduler_config.json"),
    image_encoder=modules.get("image_encoder"),
    image_processor=processor,
  )


def _abstract(cls: type[nnx.Module], config: Any, dtype: Any, param_dtype: Any) -> nnx.Module:
  return abstract(lambda rngs: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs))


def _read_config(folder: Path, cls: type[nnx.Module]) -> Any:
  file = folder / "config.json"
  try:
    return _NETWORKS[cls][0].from_dict(_read_json(file))
  except UserError as error:
    raise _about(file, error) from None


def _read_processor(vision: Path, image_size: int) -> dict[str, Any]:
  """The preprocessor_config.json beside the tower, or in the base's feature_extractor/."""
  for folder in (vision, vision.parent / "feature_extractor"):
    file = folder / "preprocessor_config.json"
    if file.is_file():
      break
  else:
    return {**CLIP_PROCESSOR, "size": image_size, "shortest_edge": image_size}
  try:
    return processor_from_dict(_read_json(file), image_size)
  except UserError as error:
    raise _about(file, error) from None


def _about(file: Path, error: UserError) -> UserError:
  """The error with the file's name, unless it is there already."""
  return error if str(file) in str(error) else UserError(f"{file}: {error}")


def _read_json(file: Path) -> dict[str, Any]:
  if not file.is_file():
    raise UserError(f"{file} is missing; a base is a folder in the diffusers layout")
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is no JSON ({error}); get it again") from error
  if not isinstance(values, dict):
    raise UserError(f"{file} is no JSON object; get it again")
  return values


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
  kind = _NETWORKS[type(module)][2][0]
  return {"_class_name": kind, "_diffusers_version": _diffusers_version(), **values}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
  with replacing(file) as temporary:
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _diffusers_version() -> str:
  return importlib.metadata.version("diffusers")
