"""IP-Adapter and IP-Adapter-plus files as a warm start of the adapter (arXiv 2308.06721).

Their image attention is our visual cross-attention without map and gate: `ip_adapter.N.to_k_ip` and
`to_v_ip` become `to_k_visual` and `to_v_visual`, N = 1, 3, 5, ... over the UNet's cross-attentions
in the order down, up, mid. The Resampler of the plus files becomes the Visual-Qformer, as far as
they are alike:

  latents [1, V, D]                    queries 1 ... V (query 0 is our CLS)
  proj_in                              proj_in, if the image features have the same width
  layers.N.0.norm2, .to_q, .to_out     blocks.N.norm_attn, .to_q, .to_out
  layers.N.0.to_kv [2D, D]             blocks.N.to_k, .to_v
  layers.N.1.0, .1.1, .1.3             blocks.N.norm_ff, .ff_in, .ff_out
  norm_out                             norm_out, in the width that to_k_ip reads

Our Q-Former has nothing like `layers.N.0.norm1` (a norm of the image side) and `proj_out`.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cc_jax.bases.tensor_files import open_tensors, refuse_pickle
from cc_jax.errors import UserError

# Prefixes of published files, and of what IP-Adapter's own training writes.
_PREFIXES = {
  "ip_adapter.": "ip_adapter.",
  "image_proj.": "image_proj.",
  "adapter_modules.": "ip_adapter.",
  "image_proj_model.": "image_proj.",
}
# A .bin holds two dicts.
_FLAT = (
  "{f'{part}.{name}': x for part, own in torch.load(old, weights_only=True).items() "
  "for name, x in own.items()}"
)
_STAGES = ("down_blocks", "up_blocks", "mid_block")
_QFORMER = "mfi_encoder.visual."
_BLOCK = {
  "0.norm2.weight": "norm_attn.scale",
  "0.norm2.bias": "norm_attn.bias",
  "0.to_q.weight": "to_q.kernel",
  "0.to_out.weight": "to_out.kernel",
  "1.0.weight": "norm_ff.scale",
  "1.0.bias": "norm_ff.bias",
  "1.1.weight": "ff_in.kernel",
  "1.3.weight": "ff_out.kernel",
}
_OUTSIDE = {
  "proj_in.weight": "proj_in.kernel",
  "proj_in.bias": "proj_in.bias",
  "norm_out.weight": "norm_out.scale",
  "norm_out.bias": "norm_out.bias",
}


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every tensor of the file."""

  source: str
  used: tuple[tuple[str, str], ...]  # (theirs, ours), in the file's order; `to_kv` stands twice
  left: tuple[tuple[str, str], ...]  # (theirs, why)

  def summary(self) -> str:
    """One line."""
    taken = len({theirs for theirs, _ in self.used})
    total = len({theirs for theirs, _ in (*self.used, *self.left)})
    layers = sum("to_k_visual" in ours for _, ours in self.used)
    return (
      f"warm start from {self.source}: {taken} of {total} tensors used, in {layers} visual "
      f"cross-attentions and {sum(ours.startswith(_QFORMER) for _, ours in self.used)} tensors of "
      "the Visual-Qformer"
    )

  def __str__(self) -> str:
    """The summary, then a line per tensor."""
    lines = [f"used  {theirs} -> {ours}" for theirs, ours in self.used]
    lines += [f"left  {theirs}: {why}" for theirs, why in self.left]
    return "\n".join([self.summary(), *lines]) + "\n"


def read_ip_adapter(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of an IP-Adapter under the prefixes `image_proj.` and `ip_adapter.`.

  Args:
    source: a .safetensors file, or what the .bin files hold: {'image_proj': {name: array},
      'ip_adapter': {...}}; anything that numpy can read will do.

  Raises:
    UserError: unreadable, a pickle, or no IP-Adapter.
  """
  if isinstance(source, Mapping):
    what = "this dictionary"
    stored = {
      f"{part}.{name}": np.asarray(value)
      for part, tensors in source.items()
      for name, value in tensors.items()
    }
  else:
    what = str(source)
    if not Path(source).is_file():
      raise UserError(f"{what} is no file; name an IP-Adapter's .safetensors file")
    refuse_pickle(Path(source), _FLAT)
    with contextlib.ExitStack() as stack:
      stored = dict(open_tensors(Path(source), stack))
  tensors = {}
  for name, value in stored.items():
    old, new = next((p for p in _PREFIXES.items() if name.startswith(p[0])), ("", ""))
    tensors[new + name.removeprefix(old)] = value
  if not any(re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", name) for name in tensors):
    raise UserError(
      f"{what} is no IP-Adapter (its first tensors: {', '.join(sorted(stored)[:3])}); such a file "
      "has ip_adapter.1.to_k_ip.weight"
    )
  return tensors


def warm_start(
  trainable: Mapping[str, Array], source: str | os.PathLike | Mapping[str, Any]
) -> tuple[dict[str, Array], Report]:
  """The adapter's parameters with those of an IP-Adapter in place of random ones.

  The gates stay at zero, so that the model still starts as its base.

  Args:
    trainable: dotted path -> array (cc_jax.customcontrast.build).
    source: see `read_ip_adapter`.

  Returns:
    All parameters, in their own dtypes, and what became of every tensor of the file.

  Raises:
    UserError: not an IP-Adapter, or one of which nothing fits.
  """
  tensors = read_ip_adapter(source)
  what = "a dictionary" if isinstance(source, Mapping) else str(source)
  started, used, left = dict(trainable), [], []
  layers = _layers(trainable)
  for theirs, value in tensors.items():
    targets = _targets(theirs, value, layers)
    if not targets:
      left.append((theirs, _reason(theirs, layers)))
    for ours, part in targets:
      why = _misfit(trainable.get(ours), part)
      if why:
        left.append((theirs, f"{ours} {why}"))
        continue
      array = np.asarray(started[ours])
      if ours == f"{_QFORMER}queries":  # the CLS, which IP-Adapter lacks, keeps its own start
        part = np.concatenate([array[:1], part[1:]])
      started[ours] = jnp.asarray(part.astype(array.dtype))
      used.append((theirs, ours))
  if not used:
    raise UserError(
      f"{what} has nothing that fits this adapter ({left[0][0]}: {left[0][1]}); take the "
      "IP-Adapter of this base, and config.encoder.width as wide as its tokens"
    )
  return started, Report(what, tuple(used), tuple(left))


def _layers(trainable: Mapping[str, Array]) -> dict[int, str]:
  """IP-Adapter's N -> the path of our attn2; the order is diffusers' `unet.attn_processors`."""
  paths = {name.split(".attn2.")[0] + ".attn2" for name in trainable if ".attn2." in name}

  def order(path: str) -> tuple:
    stage = next(i for i, name in enumerate(_STAGES) if f"unet.{name}." in path)
    return stage, [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", path)]

  return {2 * i + 1: path for i, path in enumerate(sorted(paths, key=order))}


def _targets(
  theirs: str, value: np.ndarray, layers: Mapping[int, str]
) -> list[tuple[str, np.ndarray]]:
  """Our paths for a tensor of theirs, and what each receives, in our layout."""
  if match := re.fullmatch(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight", theirs):
    path = layers.get(int(match[1]))
    return [(f"{path}.to_{match[2]}_visual.kernel", value.T)] if path else []
  name = theirs.removeprefix("image_proj.")
  if name == "latents":
    rows = value.reshape(-1, value.shape[-1])
    return [(f"{_QFORMER}queries", np.concatenate([np.zeros_like(rows[:1]), rows]))]
  if name in _OUTSIDE:
    return [_ours(_OUTSIDE[name], value)]
  if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
    block = f"blocks.{match[1]}."
    if match[2] == "0.to_kv.weight":
      key, content = np.split(value, 2)
      return [_ours(f"{block}to_k.kernel", key), _ours(f"{block}to_v.kernel", content)]
    if match[2] in _BLOCK:
      return [_ours(block + _BLOCK[match[2]], value)]
  return []


def _ours(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
  return _QFORMER + name, value.T if name.endswith("kernel") else value


def _reason(theirs: str, layers: Mapping[int, str]) -> str:
  if theirs.startswith("ip_adapter."):
    return f"the UNet has {len(layers)} cross-attentions"
  return "our Visual-Qformer has no such part"


def _misfit(ours: Array | None, theirs: np.ndarray) -> str:
  if ours is None:
    return "is not in this adapter"
  if tuple(ours.shape) != tuple(theirs.shape):
    return f"is {tuple(ours.shape)}, there {tuple(theirs.shape)}"
  return ""
