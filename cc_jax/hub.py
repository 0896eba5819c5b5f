"""Stable Diffusion bases: a folder in the hub's layout, one file, or a hub id; read and written.

  model_index.json    which class each of the folders below is of
  unet/ vae/          config.json, diffusion_pytorch_model.safetensors
  text_encoder/ ...   config.json, model.safetensors; SDXL has text_encoder_2/ as well
  tokenizer/ ...      vocab.json, merges.txt, tokenizer_config.json
  scheduler/          scheduler_config.json
  image_encoder/      a CLIP vision tower, with feature_extractor/preprocessor_config.json

A single .safetensors file in the original key format (cc_jax.models.ldm_names) holds the networks
only. Tokenizers, and a scheduler's config if there is one, are looked for in the folder named like
the file without its suffix, in the file's own folder, and then in the published model on the hub.

PyTorch's diffusers loads what is written here. This is the only file that knows the layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from cc_jax import downloads
from cc_jax.errors import UserError
from cc_jax.models import ldm_names
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
from cc_jax.models.lora import Lora, Merged
from cc_jax.models.tokenizer import load_tokenizer, save_tokenizer
from cc_jax.models.torch_names import torch_shapes
from cc_jax.models.unet import UNet2DCondition
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.models.weights import load_weights, open_tensors, replacing, save_weights

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

# (dotted path as in cc_jax.assemble, shape in our layout) -> where a parameter shall lie.
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
  unused: tuple[str, ...] = ()  # what the folder or file holds besides

  @property
  def networks(self) -> dict[str, nnx.Module]:
    """The networks under the names of their folders."""
    found = {"unet": self.unet, "vae": self.vae, "image_encoder": self.image_encoder}
    found |= {f"text_encoder{s}": tower for s, tower in zip(("", "_2"), self.text_encoders)}
    return {name: module for name, module in found.items() if module is not None}


def resolve_base(name: str | Path) -> Path:
  """The folder or file of a base: a path, the name of one inside the package, or a hub id.

  A hub id, `owner/name[@revision]` or `owner/name/file.safetensors[@revision]`, is downloaded, or
  taken from the hub's cache (cc_jax.downloads).

  Raises:
    UserError: it is none of these.
  """
  for path in (Path(name), ASSETS / name):
    if path.exists():
      return path
  shipped = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
  problem = f"base {str(name)!r} is no folder or file and not one of the package's ({shipped})"
  if not downloads.is_hub_id(str(name)):
    raise UserError(f"{problem}; give a path, or a hub id as owner/name")
  try:
    return _download(str(name))
  except UserError as error:
    raise UserError(f"{problem}; {error}") from error


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
    name: see `resolve_base`.
    dtype: of the computation.
    param_dtype: in which the parameters are held, whatever the files store.
    image_encoder: the folder of a CLIP vision tower (a path or a hub id), for a base without one or
      instead of its own.
    lora: files (paths or hub ids) and the scales with which they are merged into the base.
    sharding: where each parameter shall lie; default the first device. Its path is the one in
      cc_jax.assemble's frozen part, e.g. 'unet.conv_in.kernel' or 'text_encoders.0.<...>'.

  Raises:
    UserError: a folder or file is missing, unreadable, or not what its config.json says; a LoRA is
      for another base.
  """
  found = _find(name, image_encoder)
  base = _build(found, lambda cls, config: _abstract(cls, config, dtype, param_dtype))
  if len(base.tokenizers) < len(base.text_encoders):
    raise UserError(
      f"{found.folder} has {len(base.tokenizers)} tokenizer(s) for {len(base.text_encoders)} text "
      "encoder(s); copy tokenizer/ (SDXL: tokenizer_2/ too) of the published model there"
    )
  modules = base.networks
  shapes = {label: torch_shapes(nnx.state(module)) for label, module in modules.items()}
  loras = [Lora(_file(path), scale) for path, scale in lora]
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
  lines += [f"lora {one.identity}\n" for one in loras]
  base = _with_networks(base, modules)
  base.hash = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
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

  return _build(_find(name, image_encoder), create)


def abstract_base(
  name: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  image_encoder: str | Path | None = None,
) -> Base:
  """A base whose parameters are shapes and dtypes only, from the config files alone."""
  return _build(
    _find(name, image_encoder), lambda cls, config: _abstract(cls, config, dtype, param_dtype)
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


@dataclasses.dataclass
class _Found:
  """Where the parts of a base are."""

  name: str
  folder: Path  # of the tokenizers
  configs: dict[str, Any]  # component -> our config
  weights: dict[str, Path]  # component -> its folder, or the file that has them all
  checkpoint: ldm_names.Checkpoint | None  # what that file is
  scheduler: dict[str, Any]
  processor: dict[str, Any] | None
  unused: tuple[str, ...]

  def open(
    self, stack: contextlib.ExitStack, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
  ) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `load_weights` reads each component from, and what a single file holds besides."""
    sources: dict[str, Any] = dict(self.weights)
    if self.checkpoint is None:
      return sources, ()
    file = self.weights["unet"]
    tensors = open_tensors(file, stack)
    stored, used = tensors.shapes(), {}
    for label in self.checkpoint.configs:
      used[label] = ldm_names.entries(self.checkpoint, label, shapes[label], stored)
    keys = [key for own in used.values() for key, _ in own.values()]
    unused = ldm_names.check(self.checkpoint, keys, stored, str(file))
    return sources | {label: tensors.select(own) for label, own in used.items()}, unused


def _find(name: str | Path, image_encoder: str | Path | None) -> _Found:
  path = resolve_base(name)
  found = _find_in_file(str(name), path) if path.is_file() else _find_in_folder(str(name), path)
  if image_encoder is not None:
    vision = _vision_folder(image_encoder)
    found.configs["image_encoder"] = _read_config(vision, CLIPVisionModel)
    found.weights["image_encoder"] = vision
  if "image_encoder" in found.configs:
    size = found.configs["image_encoder"].image_size
    found.processor = _read_processor(found.weights["image_encoder"], size)
  channels = found.configs["unet"].in_channels, found.configs["vae"].latent_channels
  if channels[0] != channels[1]:
    raise UserError(
      f"{path}: the UNet takes {channels[0]} channels, the VAE has {channels[1]}: an inpainting, "
      "depth or instruct model; use a text-to-image one"
    )
  return found


def _find_in_folder(name: str, folder: Path) -> _Found:
  index = _read_json(folder / "model_index.json")
  listed = {
    part: entry[1]
    for part, entry in index.items()
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
  }
  for part in _REQUIRED:
    if part not in listed:
      raise UserError(f"{folder / 'model_index.json'} lists no {part}; it is no Stable Diffusion")
  configs = {}
  for part, kind in listed.items():
    if part not in _COMPONENTS:
      continue
    cls = _COMPONENTS[part]
    if kind not in _NETWORKS[cls][2]:
      raise UserError(
        f"{folder / 'model_index.json'}: {part} is a {kind}; we have {_NETWORKS[cls][2]}"
      )
    configs[part] = _read_config(folder / part, cls)
  known = {*_COMPONENTS, *_OTHERS}
  on_disk = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
  unused = sorted((set(listed) | on_disk) - known | on_disk & known - set(listed))
  return _Found(
    name=name,
    folder=folder,
    configs=configs,
    weights={part: folder / part for part in configs},
    checkpoint=None,
    scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
    processor=None,
    unused=tuple(f"{part}/" for part in unused),
  )


def _find_in_file(name: str, file: Path) -> _Found:
  with contextlib.ExitStack() as stack:
    checkpoint = ldm_names.describe(open_tensors(file, stack).shapes(), str(file))
  configs = {
    part: _NETWORKS[_COMPONENTS[part]][0].from_dict(values)
    for part, values in checkpoint.configs.items()
  }
  beside = [f for f in (file.with_suffix(""), file.parent) if (f / "tokenizer").is_dir()]
  if beside:
    folder = beside[0]
  else:
    try:
      folder = downloads.fetch_folder(checkpoint.repository, ("tokenizer*/*",))
    except UserError as error:
      raise UserError(
        f"{file} needs a tokenizer, which no such file holds; put the folder tokenizer/ of "
        f"{checkpoint.repository} (SDXL: tokenizer_2/ too) beside it; {error}"
      ) from error
  scheduler = checkpoint.scheduler
  if beside and (folder / "scheduler").is_dir():
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
  elif checkpoint.kind == "sd2":
    logging.warning(
      "%s: no file says what an SD 2.x predicts; taken for v_prediction. For one that predicts the "
      "noise put its scheduler/scheduler_config.json beside its tokenizer/", file,
    )  # fmt: skip
  return _Found(
    name=name,
    folder=folder,
    configs=configs,
    weights={part: file for part in configs},
    checkpoint=checkpoint,
    scheduler=scheduler,
    processor=None,
    unused=(),
  )


def _build(found: _Found, make: Callable[[type[nnx.Module], Any], nnx.Module]) -> Base:
  modules = {part: make(_COMPONENTS[part], config) for part, config in found.configs.items()}
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


def _download(name: str) -> Path:
  """What a hub id names: one weight file, or the parts of a folder that we use."""
  if Path(downloads.inside(name)).suffix:
    return downloads.fetch_file(name)
  folder = downloads.fetch_folder(name, ("model_index.json",))
  index = _read_json(folder / "model_index.json")
  parts = [part for part in (*_COMPONENTS, *_OTHERS) if (index.get(part) or [None])[0]]
  networks = [part for part in parts if part in _COMPONENTS]
  patterns = [f"{part}/*.{kind}" for part in parts for kind in ("json", "txt")]
  stems = {part: _NETWORKS[_COMPONENTS[part]][1] for part in networks}
  # Repositories hold a network in several precisions: the plain one, if there is one.
  for variant in ("", ".fp16"):
    for part, stem in stems.items():
      patterns += [f"{part}/{stem}{variant}.safetensors", f"{part}/{stem}{variant}-0*.safetensors"]
    folder = downloads.fetch_folder(name, patterns)
    stems = {part: s for part, s in stems.items() if not any((folder / part).glob("*.safetensors"))}
    if not stems:
      break
  return folder


def _file(name: str | Path) -> Path:
  """A file: a path, or `owner/name/path/to/file[@revision]` on the hub."""
  if not Path(name).exists() and downloads.is_hub_id(str(name)) and downloads.inside(str(name)):
    return downloads.fetch_file(str(name))
  return Path(name)


def _vision_folder(name: str | Path) -> Path:
  """The folder of a CLIP vision tower: itself, or image_encoder/ in it; a path or a hub id."""
  folder = Path(name)
  if not folder.is_dir() and downloads.is_hub_id(str(name)):
    files = ("config.json", "preprocessor_config.json", "model.safetensors", "model-0*.safetensors",
             "model.safetensors.index.json")  # fmt: skip
    folder = downloads.fetch_folder(str(name), files)
  return folder / "image_encoder" if (folder / "image_encoder").is_dir() else folder


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
