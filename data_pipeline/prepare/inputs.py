"""The manifest of what a user names: a manifest, a published layout, or a folder of subjects."""

import functools
import importlib
import re
from collections.abc import Callable

from etils import epath

from data_pipeline import images, sampling
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, LeftOut, Manifest, SubjectRow
from data_pipeline.manifest_frames import load_frame
from data_pipeline.sources import listing
from data_pipeline.sources.captions_file import read_listing

_IN_TABLE = "table:"  # begins the name of a picture that is no file


def read_manifest(
  name: str, layout: str = "auto", max_bad_share: float = 0.0, needs_masks: bool = True
) -> Manifest:
  """Of a folder that `Manifest.write` wrote, of a published layout, else of a folder of subjects.

  The last is the layout of `data_pipeline.sources.folder`, where captions.json and masks may be
  missing: the class noun is then the folder's name ('blue_mug_02' is a blue mug). `layout`,
  `max_bad_share` and `needs_masks`: of `data_pipeline.readers.read`. Raises DataError for a folder
  that is neither.
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

  captures = readers.read(
    str(folder), layout, max_bad_share=max_bad_share, needs_masks=needs_masks)
  if hasattr(captures.subjects, "manifest"):
    return captures.subjects.manifest
  return _of_subjects(captures, str(folder))


def _of_subjects(captures, root: str) -> Manifest:
  """Of subjects whose pictures lie inside of tables: the reader gives them, see `loader`."""
  subjects = captures.subjects
  reader = importlib.import_module(f"data_pipeline.readers.{captures.layout}")
  tables = f"{_IN_TABLE}{subjects.fingerprint()[:12]}"  # other files are other data
  # Whether there is a mask the picture tells: 'alpha' asks it.
  rows = [
    SubjectRow(name, subject.noun, [
      FrameRow(f"{tables}/{name}/{f}", list(subject.captions(f)), mask_kind="alpha",
               is_reference=bool(is_reference))
      for f, is_reference in enumerate(subject.is_reference())],
      licence=getattr(reader, "LICENCE", ""))
    for name, subject in ((name, subjects[n]) for n, name in enumerate(subjects.names))]
  return Manifest.from_subjects(
    rows, where=subjects.where, layout=captures.layout, root=root, left_out=captures.left_out)


def loader(manifest: Manifest, frame: FrameRow, subject: int, f: int) -> Callable:
  """A function that reads a frame, the f-th of its subject: picture uint8 [h, w, 3] and mask."""
  if frame.picture.startswith(_IN_TABLE):
    return functools.partial(_open_subjects(manifest.root, manifest.layout)[subject].frame, f)
  return functools.partial(load_frame, manifest.root, frame)


@functools.lru_cache(1)
def _open_subjects(root: str, layout: str):
  """The subjects of tables, in the order in which `_of_subjects` saw them."""
  from data_pipeline import readers

  # That not too much is missing was found before.
  return readers.read(root, layout, max_bad_share=0.999).subjects


def _recognise(folder: epath.Path) -> str:
  """The published layout that the folder has, else 'folder'."""
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
    listing.check_kind(path)  # of HEIF Pillow is taught first
    return images.file_has_alpha(path)
  except DataError:
    return True  # a broken file: reading it will say so
