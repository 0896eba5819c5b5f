"""The adapter as one .safetensors file: its tensors, its config, and the base it belongs to."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.param_groups import is_trainable
from cc_jax.errors import UserError, first_names, one_line

FORMAT = "cc_jax.adapter"
FORMAT_VERSION = 1
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "": None}


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What an adapter file holds."""

  tensors: dict[str, np.ndarray]  # dotted path -> array, as `adapter_tensors` names them
  encoder: MFIEncoderConfig
  injection: InjectionConfig
  base_name: str
  base_hash: str
  notes: dict[str, str]  # anything that the writer wanted to say (steps, data set ...)


def adapter_tensors(model: nnx.Module) -> dict[str, Any]:
  """The trainable tensors of a CustomContrast, by dotted path."""
  state = nnx.state(model, is_trainable)
  return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def save_adapter(
  path: str | os.PathLike, tensors: Mapping[str, Any], *, encoder: MFIEncoderConfig,
  injection: InjectionConfig, base_name: str, base_hash: str, dtype: str = "",
  notes: Mapping[str, str] | None = None,
) -> None:
  """Writes the file, whole or not at all, in a folder or a bucket. `dtype` '' keeps each tensor's.

  Raises:
    UserError: the folder cannot be written, or a value does not fit into `dtype`.
  """
  arrays = {}
  for name, value in tensors.items():
    array = np.asarray(value)
    with np.errstate(over="ignore"):
      stored = array if _DTYPES[dtype] is None else array.astype(_DTYPES[dtype])
    if not np.isfinite(stored.astype(np.float32)).all():
      raise UserError(f"{name} is not finite in {stored.dtype}; store the adapter in float32")
    arrays[name] = np.array(stored, order="C")  # ascontiguousarray would give the gates a dimension
  metadata = {
    "format": FORMAT,
    "format_version": str(FORMAT_VERSION),
    "config": json.dumps(
      {"encoder": dataclasses.asdict(encoder), "injection": dataclasses.asdict(injection)}
    ),
    "base": base_name,
    "base_hash": base_hash,
    "notes": json.dumps(dict(notes or {})),
  }
  path = epath.Path(path)
  part = path.parent / f"{path.name}.part"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(save(arrays, metadata=metadata))
    part.replace(path)
  except (OSError, SafetensorError) as error:
    raise UserError(f"cannot write {path}: {error}; choose another path") from error


def load_adapter(path: str | os.PathLike, *, base_hash: str | None = None) -> Adapter:
  """Reads a file that `save_adapter` wrote; `base_hash` is that of the base it shall run on.

  Raises:
    UserError: no such file, truncated, not an adapter of ours, a newer format, a config that this
      version does not know, or an adapter of another base.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such adapter file")
  try:
    with safe_open(path, framework="np") as file:
      metadata = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
  except (OSError, SafetensorError) as error:
    raise UserError(
      f"{path} is truncated or no safetensors file ({one_line(error)}); get it again"
    ) from error
  if metadata.get("format") != FORMAT:
    raise UserError(
      f"{path} is no CustomContrast adapter (its first tensors: {first_names(tensors)}); "
      "adapters are written by cc_jax.train"
    )
  if int(metadata["format_version"]) > FORMAT_VERSION:
    raise UserError(
      f"{path} has adapter format {metadata['format_version']}, this version reads up to "
      f"{FORMAT_VERSION}; update cc_jax"
    )
  if base_hash is not None and metadata["base_hash"] != base_hash:
    raise UserError(
      f"{path} was trained on the base {metadata['base']!r} ({metadata['base_hash'][:12]}), but "
      f"this base is {base_hash[:12]}; load that base, or train an adapter for this one"
    )
  config = json.loads(metadata["config"])
  return Adapter(
    tensors=tensors, encoder=MFIEncoderConfig.from_config(config["encoder"]),
    injection=InjectionConfig.from_config(config["injection"]), base_name=metadata["base"],
    base_hash=metadata["base_hash"], notes=json.loads(metadata["notes"]),
  )


def apply_adapter(
  model: nnx.Module, tensors: Mapping[str, Any], *, source: str = "adapter"
) -> None:
  """Puts the tensors into the model, in the model's own dtypes. Strict in both directions.

  Raises:
    UserError: a tensor is missing, unknown or of another shape; the first such names are in it.
  """
  state = nnx.state(model, is_trainable)
  flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
  missing, unknown = sorted(flat.keys() - tensors.keys()), sorted(tensors.keys() - flat.keys())
  wrong = [
    f"{name} {tuple(tensors[name].shape)} instead of {tuple(flat[name].shape)}"
    for name in sorted(flat.keys() & tensors.keys())
    if tuple(tensors[name].shape) != tuple(flat[name].shape)
  ]
  faults = [
    f"{kind} {first_names(names)}"
    for kind, names in (("missing", missing), ("unknown", unknown), ("wrong shape:", wrong))
    if names
  ]
  if faults:
    raise UserError(
      f"{source} does not fit this base and config: {'; '.join(faults)}; use the base and the "
      "config that it was trained with"
    )
  for name, leaf in flat.items():
    leaf.set_value(jnp.asarray(tensors[name], leaf.get_value().dtype))
  nnx.update(model, state)
