"""Files and folders as systems and people leave them: paths, names, kinds of files."""

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import TypeVar

from etils import epath
from PIL import Image

from data_pipeline import sampling
from data_pipeline.errors import DataError

# What people call pictures. Which of them can be read, Pillow says; see `check_kind`.
_PICTURES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .avif .heic .heif .hif .jxl"
    " .jp2".split()
)
HEIF = (".heic", ".heif", ".hif")
# Of macOS, Windows, NAS systems and file systems; names with a dot in front are skipped as well.
_OF_THE_SYSTEM = frozenset((
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
))  # fmt: skip

T = TypeVar("T")


def data_path(name: str, key: str) -> epath.Path:
  """The path that the config's `key` gives: local, or in a bucket such as gs://..."""
  try:
    return epath.Path(os.path.expanduser(name))
  except KeyError:
    scheme = name.split("://")[0]
    raise DataError(
        f"{key}={name!r}: no file system is known for {scheme}://; give a local folder, gs:// or "
        "s3://, or register the scheme with etils.epath"
    ) from None


def is_local(path: os.PathLike) -> bool:
  """Whether the operating system itself can open the path."""
  return "://" not in os.fspath(path)


def entries(folder: epath.Path) -> list[epath.Path]:
  """What people put into the folder, in the order of its name."""
  try:
    found = sorted(folder.iterdir(), key=lambda path: path.name)
  except OSError as error:
    reason = error.strerror or error
    raise DataError(f"{folder} cannot be listed ({reason}); check its permissions") from None
  return [p for p in found if p.name[:1] != "." and p.name.lower() not in _OF_THE_SYSTEM]


def is_picture(file: epath.Path) -> bool:
  """Whether the name ends as those of pictures do."""
  return file.suffix.lower() in _PICTURES


def check_kind(file: epath.Path) -> None:
  """Raises DataError for a kind of file that Pillow cannot read here."""
  suffix = file.suffix.lower()
  if suffix in Image.registered_extensions() or (suffix in HEIF and _register_heif()):
    return
  remedy = "pip install pillow-heif, or save it as JPEG" if suffix in HEIF else "save it as PNG"
  raise DataError(f"{file}: pictures of the kind {suffix or '(no ending)'} cannot be read here; "
                  f"{remedy}")  # fmt: skip


def _register_heif() -> bool:
  """Teaches Pillow to read HEIF if the package for it is installed."""
  try:
    import pillow_heif
  except ImportError:
    return False
  pillow_heif.register_heif_opener()
  return True


def find(name: str, files: Mapping[str, T], where: epath.Path) -> T:
  """The file that `where` calls `name`: exactly so, or in another spelling (1.JPG, accents).

  Raises DataError when there is none, or when several are spelled so.
  """
  if name in files:
    return files[name]
  key = sampling.spelling_key(name)
  same = [other for other in files if sampling.spelling_key(other) == key]
  if len(same) > 1:
    raise DataError(f"{where} names {name!r}, which may be {' or '.join(same)}; write one of them")
  if not same:
    raise DataError(f"{where} names {name!r}, which is not in its folder{nearest(name, files)}")
  return files[same[0]]


def nearest(name: str, known: Iterable[str]) -> str:
  """'; did you mean ...?', or nothing when no known name is near."""
  spelled = {other.lower(): other for other in known}
  close = difflib.get_close_matches(name.lower(), spelled, 1)
  return f"; did you mean {spelled[close[0]]!r}?" if close else ""
