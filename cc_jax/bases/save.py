"""Writes bases and single networks as diffusers and transformers would."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from cc_jax.bases.base import Base
from cc_jax.bases.files import COMPONENTS, NETWORKS, network_class, read_config, read_json
from cc_jax.bases.tokenizer import save_tokenizer
from cc_jax.bases.weights import replacing, save_weights
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import processor_to_dict
from cc_jax.models.unet_config import PER_BLOCK, UNetConfig


def save_module(module: nnx.Module, folder: str | Path, *, dtype: Any = None) -> None:
  """Writes one network as diffusers or transformers would; `dtype` None keeps the parameters'."""
  folder = Path(folder)
  save_weights(module, folder / f"{NETWORKS[type(module)].stem}.safetensors", dtype=dtype)
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
  finish_base(folder, base.scheduler_config, base.image_processor,
              force_zeros_for_empty_prompt=base.force_zeros_for_empty_prompt)


def finish_base(
  folder: str | Path, scheduler: Mapping[str, Any], processor: Mapping[str, Any] | None = None, *,
  force_zeros_for_empty_prompt: bool = True,
) -> None:
  """Adds what makes a folder of saved networks and tokenizers a base.

  Args:
    scheduler: the scheduler's config with its `_class_name`.
    processor: as in `Base.image_processor`; default the image encoder's own.
    force_zeros_for_empty_prompt: of a base with two text encoders; see `Base`.
  """
  folder = Path(folder)
  index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": _diffusers_version()}
  for name in COMPONENTS:
    if (folder / name).is_dir():
      values = read_json(folder / name / "config.json")
      in_transformers = "architectures" in values
      kind = values["architectures"][0] if in_transformers else values["_class_name"]
      cls = network_class(name, kind)
      if name == "image_encoder":
        processor = processor or cls.default_processor(read_config(folder / name, cls))
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
    file = folder / "feature_extractor" / "preprocessor_config.json"
    _write_json(file, processor_to_dict(processor))
  if "text_encoder_2" in index:
    index |= {"_class_name": "StableDiffusionXLPipeline",
              "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt}
  else:
    index |= {"safety_checker": [None, None], "requires_safety_checker": False}
  _write_json(folder / "model_index.json", index)


# ---- writing


def _config_json(module: nnx.Module) -> dict[str, Any]:
  """The network's config.json in the words of its PyTorch original."""
  config = module.config
  values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
  if isinstance(config, UNetConfig):
    for name in PER_BLOCK:  # some readers of these take a number only
      values[name] = values[name][0] if len(set(values[name])) == 1 else values[name]
  if "architectures" in values:
    return values
  kind = NETWORKS[type(module)].architectures[0]
  return {"_class_name": kind, "_diffusers_version": _diffusers_version(), **values}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
  with replacing(file) as temporary:
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _diffusers_version() -> str:
  return importlib.metadata.version("diffusers")
