"""LoRA files merged into a frozen base while it is loaded: W + scale · (alpha / rank) · up · down.

Low-rank adaptation (Hu et al. 2021) in the formats that people share: kohya's (also with the UNet's
original names, as for SDXL) and diffusers' three, of linear layers and of convolutions.

  lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight, .lora_up.weight, .alpha         kohya
  lora_te_text_model_encoder_layers_0_..., lora_te1_..., lora_te2_...                      kohya
  unet.down_blocks.0....attn1.to_q.lora_A.weight, .lora_B.weight                           PEFT
  unet.down_blocks.0....attn1.processor.to_q_lora.down.weight, .up.weight                  old
  text_encoder.text_model....q_proj.lora_linear_layer.down.weight, .up.weight              old
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cc_jax.bases.weights import TensorWrapper, open_tensors
from cc_jax.errors import UserError, first_names
from cc_jax.models.clip_layers import tower_name

# Ends of keys, and which factor they are; `mid` is the kernel of a convolution in three factors.
_FACTORS = (
  (re.compile(r"(\.lora_down|\.lora_A(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
   "down"),
  (re.compile(r"(\.lora_up|\.lora_B(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"), "up"),
  (re.compile(r"\.lora_mid\.weight$"), "mid"),
  (re.compile(r"(_lora|\.lora)?\.alpha$"), "alpha"),
)  # fmt: skip
_KOHYA = {
  "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
  "lora_te2_": "text_encoder_2",
}  # fmt: skip
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's settings


@dataclasses.dataclass
class _Change:
  """The factors of one module's change, in PyTorch's layout."""

  up: np.ndarray | None = None  # [O, r], for a convolution [O, r, 1, 1]
  down: np.ndarray | None = None  # [r, I], [r, I, kh, kw]
  mid: np.ndarray | None = None  # [r, r, kh, kw]; up and down are 1x1 then
  alpha: float | None = None

  def delta(self) -> np.ndarray:
    """(alpha / rank) · up · down, [O, I] or [O, I, kh, kw], float32."""
    up = self.up.reshape(self.up.shape[:2]).astype(np.float32)
    down = self.down.astype(np.float32)
    rank = down.shape[0]
    if self.mid is not None:
      window = self.mid.astype(np.float32)
      product = np.einsum("oa,abkl,bi->oikl", up, window, down.reshape(down.shape[:2]))
    else:
      product = (up @ down.reshape(rank, -1)).reshape(up.shape[0], *down.shape[1:])
    return product * np.float32((rank if self.alpha is None else self.alpha) / rank)

  def shape(self) -> tuple[int, ...]:
    window = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
    return (self.up.shape[0], self.down.shape[1], *window)


class Lora:
  """One file, and how much of it is wanted."""

  def __init__(self, path: str | Path, scale: float = 1.0):
    """Reads the file.

    Raises:
      UserError: unreadable, or not a LoRA of a kind that we have.
    """
    self.path, self.scale = Path(path), float(scale)
    if not math.isfinite(self.scale):
      raise UserError(f"the scale of {path} is {scale}; give a number, 1 for the LoRA as it is")
    if not self.path.is_file():
      raise UserError(f"{path} is no file; name the LoRA's .safetensors file")
    # (component, module as the file names it) -> its factors.
    self._changes: dict[tuple[str, str], _Change] = {}
    with contextlib.ExitStack() as stack:
      tensors = open_tensors(self.path, stack)
      for key in tensors:
        module, factor = _split(key, self.path)
        change = self._changes.setdefault(module, _Change())
        if getattr(change, factor) is not None:
          raise UserError(f"{path} has {key} in two spellings; keep one")
        value = tensors[key]
        setattr(change, factor, float(value.flat[0]) if factor == "alpha" else value)
      self._read_metadata(tensors.metadata)
    for (_, module), change in self._changes.items():
      self._check(module, change)
    if not self._changes:
      raise UserError(f"{path} is empty; get it again")

  @property
  def identity(self) -> str:
    """What was merged, for the base's hash."""
    with open(self.path, "rb") as file:
      return f"{hashlib.file_digest(file, 'sha256').hexdigest()} {self.scale}"

  def _read_metadata(self, metadata: Mapping[str, str]) -> None:
    """PEFT's alphas, which diffusers keeps in the header and not in tensors."""
    settings = json.loads(metadata.get(_METADATA, "{}"))
    for (component, module), change in self._changes.items():
      options = {
        name.removeprefix(f"{component}."): value for name, value in settings.items()
        if name.startswith(f"{component}.")
      }  # fmt: skip
      if options.get("use_dora") or options.get("lora_bias"):
        raise UserError(f"{self.path} uses DoRA or biases, which we do not have; use a plain LoRA")
      alpha = options.get("lora_alpha")
      for pattern, value in (options.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module):
          alpha = value
      if alpha is None or change.alpha is not None or change.down is None:
        continue
      rank = change.down.shape[0]
      change.alpha = float(alpha) * (rank**0.5 if options.get("use_rslora") else 1.0)

  def _check(self, module: str, change: _Change) -> None:
    missing = [part for part in ("down", "up") if getattr(change, part) is None]
    if missing:
      raise UserError(f"{self.path} lacks the {missing[0]} weights of {module}; get it again")
    rank = change.down.shape[0]
    if change.up.ndim < 2 or change.down.ndim < 2 or change.up.shape[1] != rank or not rank:
      raise UserError(
        f"{self.path}: {module} has factors {change.up.shape} and {change.down.shape}, which "
        "do not multiply; get it again"
      )

  def resolve(
    self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], other_names: Mapping[str, str]
  ) -> dict[str, dict[str, _Change]]:
    """Finds each change's tensor: component -> our name of the tensor -> change.

    Args:
      shapes: component -> our name -> shape, of all the base's networks.
      other_names: our name of a module of the UNet -> the original code's.

    Raises:
      UserError: a change is for a module that the base lacks, or of another shape.
    """
    spellings = {
      name: _spellings(name, tensors, other_names if name == "unet" else {})
      for name, tensors in shapes.items()
    }
    resolved: dict[str, dict[str, _Change]] = {}
    missing, wrong = [], []
    for (component, module), change in self._changes.items():
      name = spellings.get(component, {}).get(module)
      if name is None:
        missing.append(f"{component}'s {module}")
        continue
      tensor = f"{name}.weight"
      wanted = shapes[component][tensor]
      if _core(change.shape()) != _core(wanted):
        wrong.append(f"{component}'s {name} is {change.shape()}, there {wanted}")
      if tensor in resolved.setdefault(component, {}):
        raise UserError(f"{self.path} changes {component}'s {name} twice; keep one spelling")
      resolved[component][tensor] = change
    if missing or wrong:
      kinds = [
        f"{len(names)} of its {len(self._changes)} modules {label}: {first_names(names)}"
        for label, names in (("are not in this base", missing), ("have other shapes", wrong))
        if names
      ]
      raise UserError(
        f"{self.path} is a LoRA for another base ({'. '.join(kinds)}); use one that was made for "
        "this base"
      )
    return resolved


class Merged(TensorWrapper):
  """A component's tensors with the changes added as each is read; the sum is made in float32."""

  def __init__(
    self, tensors: Mapping[str, np.ndarray], changes: Mapping[str, list[tuple[_Change, float]]]
  ):
    """`changes`: our name of a tensor -> changes and their scales."""
    super().__init__(tensors)
    self._changes = changes

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    for change, scale in self._changes.get(name, ()):
      delta = np.float32(scale) * change.delta()
      tensor = tensor.astype(np.float32) + delta.reshape(tensor.shape)
    return tensor


def _split(key: str, path: Path) -> tuple[tuple[str, str], str]:
  """A key -> ((component, module), factor). Kohya's modules keep their underscores."""
  ends = ((pattern.search(key), factor) for pattern, factor in _FACTORS)
  match, factor = next((end for end in ends if end[0]), (None, ""))
  if match is None:
    raise UserError(
      f"{path} has the tensor {key}, which is none of a LoRA (down, up, alpha); LoHa, LoKr, DoRA "
      "and full differences are not implemented"
    )
  module, old = key[: match.start()], match.group().startswith("_lora")
  for prefix, component in _KOHYA.items():
    if module.startswith(prefix):
      return (component, module.removeprefix(prefix)), factor
  module = module.removeprefix("base_model.model.")
  component, _, rest = module.partition(".")
  if component not in _COMPONENTS:  # old files of a UNet alone
    component, rest = "unet", module
  rest = rest.replace(".processor.", ".")
  parent, _, last = rest.rpartition(".")
  if component != "unet":
    rest = tower_name(f"{parent}.{_OLD_TEXT[last]}" if last in _OLD_TEXT else rest, "text_model")
  elif last == "to_out" and old:
    rest += ".0"
  return (component, rest), factor


def _spellings(
  component: str, tensors: Mapping[str, tuple[int, ...]], other_names: Mapping[str, str]
) -> dict[str, str]:
  """Every way in which files write a module's name -> our name of it."""
  modules = [
    name.removesuffix(".weight") for name, shape in tensors.items()
    if name.endswith(".weight") and len(shape) >= 2
  ]  # fmt: skip
  spellings = {name: name for name in modules}
  for name in modules:
    for spelling in (name, other_names.get(name, name)):
      # Underscores for dots cannot be undone by rules alone ("to_out_0"), but by looking it up.
      assert spellings.setdefault(spelling.replace(".", "_"), name) == name, (component, spelling)
  return spellings


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A shape without a window of one pixel: 1x1 convolutions and linear layers are alike."""
  return tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape)
