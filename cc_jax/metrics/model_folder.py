"""The folder of a scorer's network: which model it is, its config, its checkpoint's hash."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cc_jax.bases import download
from cc_jax.bases.tensor_files import open_tensors
from cc_jax.errors import UserError

_FILES = ("*.json", "*.txt", "model.safetensors", "model-0*.safetensors")
_CHUNK = 1 << 22  # bytes


class Expected(NamedTuple):
  """What a kind of scorer reads."""

  kind: str  # of load_scorer
  architectures: tuple[str, ...]  # in config.json
  model_types: tuple[str, ...]  # in config.json, where it names no architecture
  example: str  # what to get


def find_folder(name: str | Path) -> Path:
  """A folder: a path, or `owner/name[@revision]` on the hub.

  Raises:
    UserError: it is neither.
  """
  if Path(name).is_dir():
    return Path(name)
  if not Path(name).exists() and download.is_hub_id(str(name)):
    layout = download.Layout("config.json and model.safetensors", _FILES)
    folder = download.fetch_folder(str(name), _FILES, layout)
    if not list(folder.glob("*.safetensors")):
      raise UserError(
        f"{name} has no model.safetensors on the hub; a revision may ({name}@refs/pr/NUMBER), or "
        "convert its weights where PyTorch is and give the folder"
      )
    return folder
  raise UserError(f"{name} is no folder; give the folder that has config.json and the weights")


def read_json(file: Path) -> dict[str, Any]:
  """A JSON object; raises UserError naming the file."""
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"{file} is missing; copy the whole folder of the model") from error
  except (ValueError, OSError) as error:
    raise UserError(f"{file} is no readable JSON ({error}); get it again") from error
  if not isinstance(values, dict):
    raise UserError(f"{file} is no JSON object; get it again")
  return values


def read_config(folder: Path, expected: Expected) -> dict[str, Any]:
  """`config.json` of a model that `expected` reads.

  Raises:
    UserError: it is missing, or of another model: it says which one and what was expected.
  """
  values = read_json(folder / "config.json")
  names = values.get("architectures") or []
  kind = names[0] if names else None
  known = kind in expected.architectures or (
    kind is None and values.get("model_type") in expected.model_types
  )
  if not known:
    found = kind or values.get("model_type") or "a model without architectures and model_type"
    raise UserError(
      f"{folder} holds {found}; the scorer {expected.kind!r} reads "
      f"{' or '.join(expected.architectures)}, such as {expected.example}"
    )
  return values


@contextlib.contextmanager
def named_in_errors(folder: Path) -> Iterator[None]:
  """Adds the folder's name to a UserError that does not have it."""
  try:
    yield
  except UserError as error:
    raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from None


def weight_shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
  """Shapes of a folder's tensors, of their headers alone."""
  with contextlib.ExitStack() as stack:
    return open_tensors(folder, stack).shapes()


def checkpoint_hash(files: Sequence[Path]) -> str:
  """sha256 of a weights file; of several (shards) that of their hashes, one a line, by name."""
  digests = [_sha256(file) for file in sorted(files)]
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def folder_hash(folder: Path) -> str:
  """`checkpoint_hash` of the safetensors files in a folder."""
  return checkpoint_hash(list(folder.glob("*.safetensors")))


def _sha256(file: Path) -> str:
  digest = hashlib.sha256()
  with file.open("rb") as data:
    while chunk := data.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()
