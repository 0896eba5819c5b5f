"""The manifest of what a user names: a manifest, a published layout, or a folder of subjects."""

import importlib.util
import re

from etils import epath

from data_pipeline import images, sampling
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, LeftOut, Manifest, SubjectRow
from data_pipeline.sources import listing
from data_pipeline.sources.captions_file import read_listing


def read_manifest(name: str, layout: str = "auto", max_bad_share: float = 0.0) -> Manifest:
  """Of a folder that `Manifest.write` wrote, of a published layout, else of a folder of subjects.

  The last is the layout of `data_pipeline.sources.folder`, where captions.json and masks may be
  missing: the class noun is then the folder's name ('blue_mug_02' is a blue mug). `layout` and
  `max_bad_share`: of `data_pipeline.readers.read`. Raises DataError for a folder that is neither,
  and for layouts whose pictures are no files.
  """
  folder = listing.data_path(name, "--data")
  folder = folder.resolve() if listing.is_local(folder) else folder
  if not folder.is_dir():
    raise DataError(f"{folder} is no folder; name the folder of your subjects")
  if (folder / "frames.parquet").exists():
    return Manifest.read(folder)
  layout = _recognise(folder) if layout == "auto" else layout
  if layout == "folder":
    return _read_folder(folder)
  from data_pipeline import readers

  captures = readers.read(str(folder), layout, max_bad_share=max_bad_share)
  if not hasattr(captures.subjects, "manifest"):
    raise DataError(f"{folder}: in the layout {layout} pictures lie inside of tables, and only "
                    "files can be prepared; train on it as it is (data.source='captures')")
  return captures.subjects.manifest


def _recognise(folder: epath.Path) -> str:
  """The published layout that the folder has, else 'folder'."""
  if importlib.util.find_spec("data_pipeline.readers") is None:
    return "folder"
  from data_pipeline import readers

  try:
    return readers.recognise(folder)
  except DataError:  # of none: subjects without captions.json, say
    return "folder"


def _read_folder(folder: epath.Path) -> Manifest:
  subjects, left_out = [], []
  for place in (path for path in listing.entries(folder) if path.is_dir()):
    try:
      subject = _read_subject(folder, place)
    except DataError as error:
      left_out.append(LeftOut(place.name, str(error)))
      continue
    if subject.frames:
      subjects.append(subject)
    else:
      left_out.append(LeftOut(place.name, "no pictures"))
  if not subjects:
    why = f" ({left_out[0].name}: {left_out[0].reason})" if left_out else ""
    raise DataError(f"{folder} has no folders with pictures in them{why}; put the pictures of each "
                    "subject into a folder of its own")
  return Manifest.from_subjects(
    subjects, where=str(folder), layout="folder", root=str(folder), left_out=left_out)


def _read_subject(root: epath.Path, place: epath.Path) -> SubjectRow:
  inside = listing.entries(place)
  pictures = {path.name: path for path in inside if listing.is_picture(path)}
  masks = {sampling.spelling_key(path.stem): path for path in pictures.values()
           if sampling.spelling_key(path.stem).endswith("_mask")}  # fmt: skip
  spelled = [path for path in inside if path.name.lower() == "captions.json"]
  said = read_listing(spelled[0]) if spelled else None
  captions = {} if said is None else {
    listing.find(name, pictures, spelled[0]).name: texts for name, texts in said.captions.items()}
  references = None if said is None or said.references is None else {
    listing.find(name, pictures, spelled[0]).name for name in said.references}
  frames = []
  for path in pictures.values():
    if path in masks.values() and path.name not in captions:
      continue
    mask = masks.get(sampling.spelling_key(f"{path.stem}_mask"))
    frames.append(FrameRow(
      picture=f"{place.name}/{path.name}", captions=captions.get(path.name, ()),
      mask=f"{place.name}/{mask.name}" if mask else "",
      mask_kind="file" if mask else "alpha" if _has_alpha(path) else "none",
      is_reference=references is None or path.name in references))
  noun = said.class_noun if said else re.sub(r"[\W_\d]+$", "", place.name)
  noun = " ".join(re.split(r"[\s_-]+", noun)) if said is None else noun
  if not noun.strip():
    raise DataError("its name is no class noun, and it has no captions.json")
  return SubjectRow(place.name, noun, frames, family=said.family or "" if said else "")


def _has_alpha(path: epath.Path) -> bool:
  try:
    return images.file_has_alpha(path)
  except DataError:
    return True  # a broken file: reading it will say so
