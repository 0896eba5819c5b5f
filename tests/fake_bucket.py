"""A file system that only etils.epath knows: fake://bucket/... is FakePath.root/bucket/..."""

from pathlib import PurePosixPath

from etils import epath

_FORWARDED = ("exists", "is_dir", "open", "read_bytes", "read_text", "stat", "unlink",
              "write_bytes", "mkdir")  # fmt: skip


@epath.register_path_cls("fake://")
class FakePath(PurePosixPath):
  """What epath asks of a path class, and no more. `root` is set by the `bucket` fixture."""

  root = None

  def __str__(self):
    return "fake://" + "/".join(self.parts[1:])

  __fspath__ = __str__

  @property
  def _here(self):
    return epath.Path(self.root).joinpath(*self.parts[1:])

  def __getattr__(self, name):
    if name not in _FORWARDED:
      raise AttributeError(name)
    return getattr(self._here, name)

  def iterdir(self):
    return (self / path.name for path in self._here.iterdir())

  def expanduser(self):
    return self

  def glob(self, pattern):
    return (self / str(path.relative_to(self._here)) for path in self._here.glob(pattern))

  def replace(self, target):
    self._here.replace(target._here)
    return target
