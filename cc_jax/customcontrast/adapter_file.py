"""The adapter as one .safetensors file: its tensors, its config, and the base it was trained on.

docs/adapter_format.md describes the file for readers without cc_jax.
"""

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
  # What cc_jax.customcontrast.adapter_base says of the base; older files do not.
  prediction_type: str = ""
  base_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by network
  base_shapes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def adapter_tensors(model: nnx.Module) -> dict[str, Any]:
  """The trainable tensors of a CustomContrast, by dotted path."""
  state = nnx.state(model, is_trainable)
  return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def save_adapter(
  path: str | os.PathLike, tensors: Mapping[str, Any], *, encoder: MFIEncoderConfig,
  injection: InjectionConfig, base_name: str, base_hash: str, prediction_type: str = "",
  base_hashes: Mapping[str, str] | None = None, base_shapes: Mapping[str, Any] | None = None,
  dtype: str = "", notes: Mapping[str, str] | None = None,
) -> None:
  """Writes the file, whole or not at all, in a folder or a bucket. `dtype` '' keeps each tensor's.

  What concerns the base comes from `adapter_base.describe_base(base)`, as keywords.

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
  if prediction_type:
    metadata["prediction_type"] = prediction_type
  if base_hashes:
    metadata["base_hashes"] = json.dumps(dict(base_hashes))
  if base_shapes:
    metadata["base_shapes"] = json.dumps(dict(base_shapes))
  path = epath.Path(path)
  part = path.parent / f"{path.name}.part"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(save(arrays, metadata=metadata))
    part.replace(path)
  except (OSError, SafetensorError) as error:
    raise UserError(f"cannot write {path}: {error}; choose another path") from error


def load_adapter(path: str | os.PathLike) -> Adapter:
  """Reads a file that `save_adapter` wrote, of this version or an older one.

  Raises:
    UserError: no such file, truncated, not an adapter of ours, a newer format, metadata that make
      no sense, a config that this version does not know, or a value that is not finite.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such adapter file")
  try:
    with safe_open(path, framework="np") as file:
      metadata = file.metadata() or {}
      names = list(file.keys())
      ours = metadata.get("format") == FORMAT
      tensors = {name: file.get_tensor(name) for name in names} if ours else {}
  except (OSError, SafetensorError) as error:
    raise UserError(
      f"{path} is truncated or no safetensors file ({one_line(error)}); get it again"
    ) from error
  except (TypeError, ValueError, AttributeError, KeyError) as error:  # dtypes that numpy lacks
    raise UserError(
      f"{path} has tensors that cannot be read ({one_line(error)}); store them in float32"
    ) from error
  if not ours:
    raise UserError(
      f"{path} is no CustomContrast adapter (its first tensors: {first_names(names)}); "
      "adapters are written by cc_jax.train"
    )
  for name, value in tensors.items():
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise UserError(f"{path}: {name} is {value.dtype}; an adapter's tensors are floating point")
    if not np.isfinite(value.astype(np.float32)).all():
      raise UserError(f"{path}: {name} is not finite (NaN or infinite); take an earlier adapter")
  return _parse(str(path), metadata, tensors)


def _parse(path: str, metadata: Mapping[str, str], tensors: dict[str, np.ndarray]) -> Adapter:
  version = _entry(path, metadata, "format_version")
  if not version.isdecimal():
    raise UserError(f"{path}: its format_version is {version!r} and no number; get the file again")
  if int(version) > FORMAT_VERSION:
    raise UserError(
      f"{path} has adapter format {version}, this version reads up to {FORMAT_VERSION}; "
      "update cc_jax"
    )
  sections = {
    name: values if isinstance(values, Mapping) else {}
    for name, values in _json(path, metadata, "config").items()
  }
  try:
    encoder = MFIEncoderConfig.from_config(sections.get("encoder", {}))
    injection = InjectionConfig.from_config(sections.get("injection", {}))
  except UserError as error:
    raise UserError(
      f"{path}: {error}; if a newer cc_jax wrote it, update, else get the file again"
    ) from error
  shapes = _json(path, metadata, "base_shapes", "{}")
  hashes, notes = (
    {key: str(value) for key, value in _json(path, metadata, name, "{}").items()}
    for name in ("base_hashes", "notes")
  )
  return Adapter(
    tensors=tensors, encoder=encoder, injection=injection,
    base_name=_entry(path, metadata, "base"), base_hash=_entry(path, metadata, "base_hash"),
    notes=notes, prediction_type=metadata.get("prediction_type", ""), base_hashes=hashes,
    base_shapes=shapes,
  )


def _entry(path: str, metadata: Mapping[str, str], key: str) -> str:
  if key not in metadata:
    raise UserError(f"{path}: its metadata lack {key!r}; get the file again")
  return metadata[key]


def _json(
  path: str, metadata: Mapping[str, str], key: str, default: str | None = None
) -> dict[str, Any]:
  """A metadata entry that is a JSON object; `default` is what stands for an absent one."""
  text = _entry(path, metadata, key) if default is None else metadata.get(key, default)
  try:
    values = json.loads(text)
  except (ValueError, RecursionError):
    values = None
  if not isinstance(values, dict):
    raise UserError(f"{path}: its metadata entry {key!r} is no JSON object; get the file again")
  return values


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
