'''Triples from a plain folder: a folder per subject.

    my_subjects/
      blue_mug/
        captions.json
        on_desk.png          transparency marks what is not the subject
        in_garden.jpg        a picture without transparency has its mask beside it:
        in_garden_mask.png   white (or opaque) = subject
      old_teapot/
        ...

captions.json, in UTF-8:

    {
      "class_noun": "mug",
      "captions": {
        "on_desk.png": "a mug on a desk",
        "in_garden.jpg": ["a mug in a garden", "the mug between flowers"]
      },
      "references": ["on_desk.png"],
      "family": "mugs of the blue set"
    }

Every picture has a caption that contains the class noun and does not describe what the reference
shows (colours, patterns). Of a list of captions one is drawn for each triple. Optional:
"references" lists the pictures that may serve as reference (by default all), "family" (a text or a
whole number) is shared by subjects that are hard to distinguish. A subject needs at least two
pictures. Subjects with the same noun form a class; subjects are numbered in the order of their
folders' names.

- Spelling: nouns, families and names of files count as equal when they differ in capitals or in the
  Unicode form of their accents only (1.JPG is found as 1.jpg).
- Pictures: PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF, JPEG 2000, as Pillow reads them; HEIC if the
  package pillow-heif is installed. Of several pictures in a file the first counts.
- Skipped: empty folders, names with a dot in front, and what systems leave (__MACOSX, @eaDir,
  Thumbs.db, desktop.ini ...).
- The folder may lie in a bucket (gs://..., s3://..., what etils.epath knows).
- Names and captions are checked before the first step. A picture that turns out to be unreadable
  ends the run; others take its place while at most `data.max_bad_share` of all pictures are so.
- `data.holdout_subjects` are left out of training, for pictures that are drawn meanwhile.
'''

import dataclasses
import hashlib

import numpy as np
from etils import epath

from data_pipeline import images, sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow
from data_pipeline.sources import listing
from data_pipeline.sources.captions_file import read_listing


@dataclasses.dataclass(frozen=True)
class Frame:
  """The files of a picture and its mask (None: the alpha channel is the mask), and its captions."""

  picture: epath.Path
  mask: epath.Path | None
  captions: tuple[str, ...]
  is_reference: bool

  @property
  def caption(self) -> str:
    """The first of the captions."""
    return self.captions[0]

  def load(self) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [h, w, 3] and mask uint8 [h, w]; raises DataError naming the file."""
    mask_file = self.mask and _content(self.mask)
    picture, mask = images.read_pair(
        _content(self.picture), mask_file, str(self.picture), str(self.mask)
    )
    if mask is None:
      if np.all(picture[..., 3:] == 255):
        raise _no_mask(self.picture)
      mask = picture[..., 3]
    picture = picture[..., :3]
    triples.check_frame(picture, mask, str(self.picture))
    return picture, mask


@dataclasses.dataclass(frozen=True)
class Subject:
  """A subject's folder."""

  place: epath.Path
  where: str  # the file with its captions
  noun: str
  family: str | None
  frames: tuple[Frame, ...]

  def is_reference(self) -> np.ndarray:
    """bool [frames]: can frame f serve as a reference?"""
    return np.array([frame.is_reference for frame in self.frames])

  def captions(self, f: int) -> tuple[str, ...]:
    """Frame f's captions."""
    return self.frames[f].captions

  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame f's picture uint8 [h, w, 3] and mask uint8 [h, w]."""
    return self.frames[f].load()

  def files(self, f: int) -> tuple[str, FrameRow]:
    """The folder of frame f's files, '' for whole paths, and the frame as a manifest has it."""
    frame = self.frames[f]
    mask = dict(mask=str(frame.mask), mask_kind="file") if frame.mask else dict(mask_kind="alpha")
    return "", FrameRow(str(frame.picture), frame.captions, **mask)


class FolderSubjects:
  """The subjects of a folder, a `data_pipeline.sources.rows.SubjectSet`.

  With `lenient`, a file that is no picture is found when it is read, not before.
  """

  def __init__(self, name: str, *, lenient: bool = False):
    if not name:
      raise DataError("data.name is empty; set it to the folder of your subjects")
    folder = listing.data_path(name, "data.name")
    self._subjects = read_folder(folder, lenient=lenient)
    self.where = str(folder)
    self.names = [subject.place.name for subject in self._subjects]
    self.table = _table(self._subjects)
    self.pictures = sum(len(subject.frames) for subject in self._subjects)
    self.features_folder = folder.parent / f"{folder.name}_features"

  def __getitem__(self, number: int) -> Subject:
    return self._subjects[number]

  def fingerprint(self) -> str:
    """A hash of subjects, files and their sizes, and of which are references."""
    digest = hashlib.sha256()
    for subject in self._subjects:
      for frame in subject.frames:
        sizes = [file and file.stat().length for file in (frame.picture, frame.mask)]
        line = subject.place.name, frame.picture.name, *sizes, frame.is_reference
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()

  def check_captions(self, encode) -> None:
    """Raises DataError for a caption that encode(caption, noun) refuses."""
    for subject in self._subjects:
      for frame in subject.frames:
        for caption in frame.captions:
          try:
            encode(caption, subject.noun)
          except DataError as error:
            raise DataError(f"{subject.where}: {error}") from None


def read_folder(folder: epath.PathLike, *, lenient: bool = False) -> list[Subject]:
  """The subjects of a folder in the layout above; reads the pictures' headers only.

  Raises DataError that names the file and the remedy: no folder, no subjects, no or invalid
  captions.json, a picture without caption or mask, a caption without picture, a file that is no
  picture (unless `lenient`), fewer than two pictures.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise DataError(_not_a_folder(folder))
  inside = listing.entries(folder)
  subfolders = {place: listing.entries(place) for place in inside if place.is_dir()}
  subfolders = {place: files for place, files in subfolders.items() if files}  # copies leave some
  _check_depth(folder, inside, subfolders)
  return [_read_subject(place, files, lenient) for place, files in subfolders.items()]


def _not_a_folder(folder: epath.Path) -> str:
  if not folder.exists():
    return f"{folder} is not a folder; set data.name to the folder of your subjects"
  remedy = "set data.name to the folder of your subjects"
  if folder.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
    remedy = "unpack it, and set data.name to the folder that comes out"
  return f"{folder} is a file, not a folder; {remedy}"


def _check_depth(folder, inside, subfolders) -> None:
  """Raises DataError for a folder that is a level too high or too low, or empty."""
  if any(file.name == "captions.json" for file in inside):
    raise DataError(
        f"{folder} is the folder of one subject: it has a captions.json; set data.name to the "
        f"folder above it, {folder.parent}"
    )
  if not subfolders:
    found = "pictures, but no folders" if any(map(listing.is_picture, inside)) else "no folders"
    raise DataError(
        f"{folder} has {found} in it; put the pictures of each subject into a folder of its own, "
        "with a captions.json"
    )
  is_subject = lambda files: any(  # noqa: E731
      file.name.lower() == "captions.json" or listing.is_picture(file) for file in files
  )
  if any(map(is_subject, subfolders.values())):
    return
  for place, files in subfolders.items():
    below = [file for file in files if file.is_dir() and is_subject(listing.entries(file))]
    if below:
      remedy = f"set data.name to {place}"
      remedy += ", or move them all a level up" if len(subfolders) > 1 else ""
      raise DataError(
          f"{folder}: the subjects' folders lie a level too deep, as {below[0]}; {remedy}"
      )


def _read_subject(folder: epath.Path, inside: list[epath.Path], lenient: bool) -> Subject:
  spelled = (path for path in inside if path.name.lower() == "captions.json")
  file = next(spelled, folder / "captions.json")
  values = read_listing(file)
  files = {path.name: path for path in inside}
  captions: dict[str, tuple[str, ...]] = {}
  for name, texts in values.captions.items():
    picture = listing.find(name, files, file)
    if picture.name in captions:
      raise DataError(f"{file} names {picture.name!r} in two spellings; keep one of them")
    listing.check_kind(picture)
    captions[picture.name] = texts
  references = {listing.find(name, files, file).name for name in values.references or captions}
  masks = {
      sampling.spelling_key(path.stem): path for path in reversed(inside)
      if listing.is_picture(path) and path.name not in captions
      and sampling.spelling_key(path.stem).endswith("_mask")
  }  # fmt: skip
  frames = []
  for picture in filter(listing.is_picture, inside):
    if picture in masks.values():
      continue
    if picture.name not in captions:
      raise DataError(f"{picture} has no caption; add one to {file}")
    mask = masks.get(sampling.spelling_key(f"{picture.stem}_mask"))
    if mask is not None:
      listing.check_kind(mask)
    if mask is None and not _may_have_alpha(picture, lenient):
      raise _no_mask(picture)
    frames.append(Frame(picture, mask, captions[picture.name], picture.name in references))
  if len(frames) < 2:
    raise DataError(
        f"{folder} has {len(frames)} picture(s); a triple needs 2 or more of a subject: "
        "add some, or move the folder away"
    )
  return Subject(folder, str(file), values.class_noun, values.family, tuple(frames))


def _may_have_alpha(file: epath.Path, lenient: bool) -> bool:
  try:
    return images.file_has_alpha(file)
  except DataError:
    if not lenient:
      raise
    return True  # `Frame.load` will say what is wrong


def _content(file: epath.Path) -> epath.Path | bytes:
  """The file as `images` takes it: Pillow cannot open what lies in a bucket."""
  if listing.is_local(file):
    return file
  try:
    return file.read_bytes()
  except OSError as error:
    reason = error.strerror or error
    raise DataError(f"{file} cannot be read ({reason}); check that it is there") from error


def _no_mask(file: epath.Path) -> DataError:
  return DataError(
      f"{file} has no mask, so the subject cannot be cut out; save it as PNG with a transparent "
      f"background, or put {file.stem}_mask.png (white = subject) beside it"
  )


def _table(subjects: list[Subject]) -> sampling.SubjectTable:
  """Numbers subjects in their order; spellings of one noun or family have one number."""
  nouns = [sampling.spelling_key(subject.noun) for subject in subjects]
  families = [subject.family and sampling.spelling_key(subject.family) for subject in subjects]
  number = {family: n for n, family in enumerate(sorted({*families} - {None}))}
  return sampling.SubjectTable(
      subject_id=np.arange(len(subjects)),
      family_id=np.array([number.get(family, -1) for family in families]),
      class_id=np.unique(nouns, return_inverse=True)[1],
  )
