"""Result files of the laboratory: one JSON file for each run.

A finished run writes all of its results. `pack` then moves the values of single subjects into one
compressed file beside the folders of results, which leaves short files to read.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

from cc_jax.errors import UserError

_PACKED = "subjects.json.gz"
_PER_SUBJECT = ("subjects", "rounds", "leakage")


def result_file(results: Path, arm: str, seed: int, split: str, tuned: Any = None) -> Path:
  """The file of a run's result."""
  value = "" if tuned is None else f"@{tuned:g}"
  ending = "" if split == "validation" else f"-{split}"
  return results / f"{arm}{value}-{seed}{ending}.json"


def read_result(file: Path) -> dict[str, Any]:
  """A result, without the values of single subjects if they are packed."""
  return json.loads(file.read_text())


def read_results(results: Path) -> list[dict[str, Any]]:
  """All results of a folder, with the values of single subjects.

  Raises:
    UserError: values that are neither in a result file nor in the packed file.
  """
  packed, files = _read_packed(results), sorted(results.glob("*.json"))
  complete = [read_result(file) for file in files]
  for file, result in zip(files, complete):
    if "subjects" not in result:
      if _packed_name(file) not in packed:
        raise UserError(f"{results.resolve().parent / _PACKED} does not have the values of {file}")
      result |= packed[_packed_name(file)]
  return complete


def pack(results: Path) -> None:
  """Moves the values of single subjects out of a folder's files into the packed file beside it.

  Leakage in the files becomes its means. After a kill the same call completes the work: the packed
  file is written first.
  """
  folder, packed = results.resolve().parent, _read_packed(results)
  files = {file: read_result(file) for file in results.glob("*.json")}
  files = {file: result for file, result in files.items() if "subjects" in result}
  for file, result in files.items():
    packed[_packed_name(file)] = {key: result[key] for key in _PER_SUBJECT if key in result}
  packed = {name: row for name, row in packed.items() if (folder / f"{name}.json").exists()}
  text = json.dumps(packed, sort_keys=True).replace("}, ", "},\n")
  _replace(folder / _PACKED, gzip.compress(text.encode(), mtime=0))
  for file, result in files.items():
    del result["subjects"]
    result.pop("rounds", None)
    for move, values in result["leakage"].items():
      known = [value for value in values if value is not None]
      result["leakage"][move] = round(sum(known) / len(known), 4) if known else None
    write_result(file, result)


def _read_packed(results: Path) -> dict[str, dict[str, Any]]:
  file = results.resolve().parent / _PACKED
  return json.loads(gzip.decompress(file.read_bytes())) if file.exists() else {}


def _packed_name(file: Path) -> str:
  return f"{file.resolve().parent.name}/{file.stem}"


def write_result(file: Path, result: dict[str, Any]) -> None:
  """Writes a result completely or not at all; what holds only plain values is on one line."""
  lines = []

  def shorten(value):
    if not isinstance(value, dict | list):
      return value
    parts = value.values() if isinstance(value, dict) else value
    if not any(isinstance(part, dict | list) for part in parts):
      lines.append(json.dumps(value))
      return f"@{len(lines) - 1}@"
    if isinstance(value, dict):
      return {key: shorten(part) for key, part in value.items()}
    return [shorten(part) for part in value]

  text = json.dumps(shorten(result), indent=1)
  for number, line in enumerate(lines):
    text = text.replace(f'"@{number}@"', line, 1)
  file.parent.mkdir(parents=True, exist_ok=True)
  _replace(file, text.encode() + b"\n")


def _replace(file: Path, data: bytes) -> None:
  part = file.with_name(file.name + ".part")
  part.write_bytes(data)
  os.replace(part, file)
