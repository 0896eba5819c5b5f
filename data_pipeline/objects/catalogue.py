"""Which 3D models there are: files in folders, and the catalogues of Sweet Home 3D (.sh3f).

- Folders: every .glb, .gltf and .obj below. The name is the file's, or its folder's where all files
  are called alike (scene.gltf, model.obj); glTF files of Sketchfab, and so those of Objaverse, name
  title, author and license in `asset.extras` ("license": "CC-BY-4.0 (http://creativecommons...)").
  A `models.json` in the top folder, {"path/in/folder.obj": {"name", "noun", "licence", "creator"}},
  says what files do not; each key may be missing.
- .sh3f: a zip with `PluginFurnitureCatalog.properties` (Latin-1; `name#3=Armchair`, likewise model,
  category, creator, doorOrWindow, modelRotation, width, depth, height; `license=` for all). Looked
  up in the Debian package sweethome3d-furniture 1.8-1. Sweet Home 3D turns a model by its
  modelRotation (a 3 x 3 matrix by rows) and stretches it to width, height and depth.
"""

import dataclasses
import json
import math
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.objects import nouns

LICENCES = ("any", "cc0", "cc-by")
_MODELS = (".glb", ".gltf", ".obj")
_CATALOGUE = "PluginFurnitureCatalog.properties"
_EXTENT = ("width", "height", "depth")
_GENERIC = ("scene", "model", "mesh", "object", "source", "textured", "model_normalized")
# Of a catalogue: parts of a building, people, and flat marks and fittings without a shape.
_NO_SUBJECTS = ("doors and windows", "characters", "staircases")
_NO_NAMES = re.compile(r"\b(plug|switch|parking slot|socket|crossing|arrow)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Model:
  """A 3D model: where it lies, what it is called and whose it is.

  `key` names it on every machine: its path below the folder that was given.
  """

  key: str
  path: str  # the file, or the .sh3f
  member: str  # the file in the .sh3f; '' = `path` itself
  name: str
  noun: str
  licence: str
  creator: str
  rotation: tuple[float, ...] = ()  # 3 x 3 by rows, of a catalogue
  extent: tuple[float, ...] = ()  # width, height, depth


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A model that is not in the data, and why."""

  key: str
  reason: str


def find_models(place: str | os.PathLike, licences: str = "any"):
  """(models sorted by key, list of LeftOut) of a folder, a .sh3f or a single model.

  Args:
    licences: 'cc0' keeps public domain alone, 'cc-by' that and attribution (no NC, ND, SA); models
      whose licence is not stated are kept by 'any' only.

  Raises:
    DataError: no such folder, a broken catalogue or models.json, no model at all.
  """
  if licences not in LICENCES:
    raise DataError(f"--licences={licences!r} is unknown; choose one of {', '.join(LICENCES)}")
  place = Path(place).expanduser()
  if not place.exists():
    raise DataError(f"{place} does not exist; set --models to a folder of 3D models or a .sh3f")
  root = place if place.is_dir() else place.parent
  files = sorted(place.rglob("*")) if place.is_dir() else [place]
  said = _read_models_json(root)
  models, left_out = [], []
  for file in files:
    if any(part.startswith(".") for part in file.relative_to(root).parts):
      continue
    if file.suffix.lower() == ".sh3f":
      found, out = _read_catalogue(file, file.relative_to(root).with_suffix("").as_posix())
      models += found
      left_out += out
    elif file.suffix.lower() in _MODELS:
      key = file.relative_to(root).as_posix()
      models.append(_of_file(file, key, said.get(key, {})))
  if not models:
    raise DataError(
      f"{place} has no 3D models; wanted are .glb, .gltf, .obj files or .sh3f catalogues"
    )
  kept = [model for model in models if _allows(licences, model.licence)]
  left_out += [
    LeftOut(model.key, f"licence {model.licence or 'not stated'}: --licences={licences}")
    for model in models if not _allows(licences, model.licence)
  ]
  return sorted(kept, key=lambda model: model.key), left_out


def licence_name(text: str) -> str:
  """'CC0', 'CC-BY-3.0', 'CC-BY-NC-4.0' ... where it is one of Creative Commons, else the text."""
  plain = " ".join(text.split())
  folded = re.sub(r"[\s_-]+", "-", plain.lower())
  if re.search(r"\bcc-?0\b|public-domain|publicdomain|zero", folded):
    return "CC0"
  if not re.search(r"(?<![a-z])cc(?![a-z])|creative-?commons", folded):
    return plain
  kind = re.search(r"(?<![a-z])by((-(nc|nd|sa))*)(?![a-z])", folded)
  if not kind and "attribution" not in folded:
    return plain
  terms = kind.group(1).upper() if kind else ""
  for word, term in (("non-?commercial", "-NC"), ("no-?deriv", "-ND"), ("share-?alike", "-SA")):
    if re.search(word, folded) and term not in terms:
      terms += term
  version = re.search(r"(?<!\d)[1-4]\.[05](?!\d)", folded)
  return f"CC-BY{terms}" + (f"-{version.group(0)}" if version else "")


def _allows(licences: str, licence: str) -> bool:
  if licences == "any":
    return True
  free = licence == "CC0"
  return free or (licences == "cc-by" and re.fullmatch(r"CC-BY(-\d\.\d)?", licence) is not None)


def _of_file(file: Path, key: str, said: dict) -> Model:
  extras = _gltf_extras(file)
  stem = file.stem
  if stem.lower() in _GENERIC and "/" in key:
    stem = file.parent.name
  name = said.get("name") or extras.get("title") or nouns.spaced(stem)
  return Model(
    key, str(file), "", name, said.get("noun") or nouns.class_noun(nouns.spaced(name)),
    licence_name(said.get("licence") or extras.get("license") or ""),
    said.get("creator") or extras.get("author") or "",
  )


def _gltf_extras(file: Path) -> dict:
  """`asset.extras` of a glTF file, as texts; {} where there is none or the file is broken."""
  try:
    if file.suffix.lower() == ".gltf":
      header = json.loads(file.read_text("utf-8"))
    elif file.suffix.lower() == ".glb":
      with file.open("rb") as stream:  # magic, version, length; length and type of the JSON chunk
        _, _, _, length, _ = struct.unpack("<4sIII4s", stream.read(20))
        header = json.loads(stream.read(min(length, file.stat().st_size)))
    else:
      return {}
    asset = header.get("asset", {})
    extras = {**asset.get("extras", {})}
    if "license" not in extras and asset.get("copyright"):
      extras["license"] = asset["copyright"]
    return {key: str(value) for key, value in extras.items()}
  except (OSError, ValueError, struct.error, AttributeError, TypeError):
    return {}  # loading it will say what is wrong


def _read_models_json(root: Path) -> dict:
  file = root / "models.json"
  if not file.exists():
    return {}
  try:
    said = json.loads(file.read_text("utf-8"))
    valid = all(isinstance(v, str) for entry in said.values() for v in entry.values())
  except (ValueError, AttributeError) as error:
    raise DataError(f"{file} is not valid JSON of texts ({error}); see --help") from None
  known = {"name", "noun", "licence", "creator"}
  wrong = [key for key, entry in said.items() if set(entry) - known]
  if not valid or wrong:
    raise DataError(f"{file}: {(wrong or ['an entry'])[0]!r} may have the texts "
                    f"{', '.join(sorted(known))} only")
  return said


def _read_catalogue(file: Path, prefix: str):
  """The models of a .sh3f that are subjects, and those that are not."""
  try:
    with zipfile.ZipFile(file) as archive:
      text = archive.read(_CATALOGUE).decode("latin-1")
  except (zipfile.BadZipFile, KeyError, OSError) as error:
    raise DataError(
      f"{file} is not a Sweet Home 3D catalogue ({error}); fetch it again, or move it away"
    ) from None
  licence = re.search(r"^license=(.*)$", text, re.MULTILINE)
  licence = licence_name(licence.group(1) if licence else "")
  rows: dict[str, dict[str, str]] = {}
  for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
    # A properties file writes other letters than those of Latin-1 as \uXXXX.
    value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m.group(1), 16)), value)
    rows.setdefault(number, {})[key] = value.strip()
  models, left_out = [], []
  for key, row in _with_keys(prefix, rows.values()):
    reason = _no_subject(row)
    if reason:
      left_out.append(LeftOut(key, reason))
      continue
    numbers = [row.get(name, "") for name in _EXTENT]
    models.append(Model(
      key, str(file), row["model"].lstrip("/"), row["name"], nouns.class_noun(row["name"]), licence,
      row.get("creator", ""), tuple(map(float, row.get("modelRotation", "").split())),
      tuple(map(float, numbers)) if all(numbers) else (),
    ))  # fmt: skip
  return models, left_out


def _with_keys(prefix: str, rows: Iterable[dict]):
  """(key, row) of rows with a model: the catalogue's ids, numbered where they are repeated."""
  seen: Counter[str] = Counter()
  for row in rows:
    if "model" not in row or "name" not in row:
      continue
    key = f"{prefix}/{row.get('id', row['model']).split('#')[-1]}"
    seen[key] += 1
    yield key + (f"_{seen[key]}" if seen[key] > 1 else ""), row


def _no_subject(row: dict) -> str:
  if row.get("doorOrWindow") == "true":
    return "a door or window"
  if row.get("category", "").lower() in _NO_SUBJECTS:
    return f"of the category {row['category']!r}"
  if _NO_NAMES.search(row["name"]):
    return f"a mark or fitting without a shape of its own: {row['name']!r}"
  for key in (*_EXTENT, "modelRotation"):
    value = row.get(key, "")
    numbers = value.split() if key == "modelRotation" else filter(None, [value])
    try:
      are_numbers = all(math.isfinite(float(number)) for number in numbers)
    except ValueError:
      are_numbers = False
    if not are_numbers:
      return f"its {key} {value!r} is no number"
  return ""
