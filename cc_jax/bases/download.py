"""Files named by a hub id, `owner/name[/inside][@revision]`, through huggingface_hub's own cache.

This is the only file that knows that library. Its switches are the user's: HF_HUB_OFFLINE=1 takes
what the cache holds, HF_HOME and HF_HUB_CACHE say where that is.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cc_jax.errors import UserError

_ID = re.compile(
  r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?P<inside>(/[\w][\w.-]*)*)(@(?P<revision>[\w][\w./-]*))?"
)


def is_hub_id(name: str) -> bool:
  """Whether `name` is written as a hub id; nothing is looked up."""
  return _ID.fullmatch(name) is not None


def inside(name: str) -> str:
  """The path within the repository; '' for the repository itself."""
  return _ID.fullmatch(name)["inside"].removeprefix("/")


def fetch_file(name: str) -> Path:
  """The one file that `owner/name/path/to/file[@revision]` names."""
  import huggingface_hub

  parts = _ID.fullmatch(name)
  return Path(
    _call(
      name, huggingface_hub.hf_hub_download, repo_id=parts["repo"], filename=inside(name),
      revision=parts["revision"],
    )
  )


def find_file(name: str | Path) -> Path:
  """A file: a path, or `owner/name/path/to/file[@revision]` on the hub."""
  if not Path(name).exists() and is_hub_id(str(name)) and inside(str(name)):
    return fetch_file(str(name))
  return Path(name)


def fetch_folder(name: str, patterns: Sequence[str]) -> Path:
  """The folder that `owner/name[/path][@revision]` names, with its files that match `patterns`.

  A file that the repository does not have is not missed here.
  """
  import huggingface_hub

  parts, within = _ID.fullmatch(name), inside(name)
  root = _call(
    name, huggingface_hub.snapshot_download, repo_id=parts["repo"], revision=parts["revision"],
    allow_patterns=[f"{within}/{pattern}" if within else pattern for pattern in patterns],
  )
  return Path(root) / within


def _call(name: str, download, **arguments) -> str:
  from huggingface_hub import constants
  from huggingface_hub.errors import HfHubHTTPError

  try:
    return download(**arguments)
  except (OSError, ValueError, HfHubHTTPError) as error:
    reason = " ".join(str(error).split()).split(". ")[0]
    remedy = "check the spelling and the network"
    if constants.is_offline_mode():
      remedy = f"HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} does not have it"
    raise UserError(f"{name!r} cannot be had from the hub ({reason}); {remedy}") from error
