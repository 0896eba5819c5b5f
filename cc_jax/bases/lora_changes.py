"""What a LoRA file makes of one weight W, in the four forms that people share.

  LoRA   W + strength · up · down                              arXiv 2106.09685
  LoHa   W + strength · (w1_a · w1_b) * (w2_a · w2_b)          arXiv 2108.06098, LyCORIS
  LoKr   W + strength · w1 ⊗ w2, each whole or w_a · w_b       LyCORIS (arXiv 2309.14859)
  DoRA   any of these, then each output's (or input's) norm set to a stored one, arXiv 2402.09353

A convolution's product may have a third factor in its middle (Tucker, `lora_mid`, `t1`, `t2`). The
strength is alpha / rank. LyCORIS 4.1.3 applies it twice when it merges LoHa and LoKr, and once when
it trains and draws; it is once here, as in ComfyUI and PEFT.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cc_jax.errors import UserError


class _Product(NamedTuple):
  """left · right, or left · core · right, of a matrix or of a convolution's kernel."""

  left: np.ndarray  # [O, r], perhaps [O, r, 1, 1]
  right: np.ndarray  # [r, I] or [r, I, kh, kw]
  core: np.ndarray | None = None  # [r, r, kh, kw]

  def shape(self) -> tuple[int, ...] | None:
    """[O, I] or [O, I, kh, kw]; None if the factors do not multiply."""
    if self.left.ndim < 2 or self.right.ndim < 2 or not self.right.shape[0]:
      return None
    inner = (self.left.shape[1], self.right.shape[0])
    if self.core is None:
      ok, window = inner[0] == inner[1], self.right.shape[2:]
    else:
      ok, window = self.core.ndim > 2 and self.core.shape[:2] == inner, self.core.shape[2:]
    return (self.left.shape[0], self.right.shape[1], *window) if ok else None

  def value(self) -> np.ndarray:
    """float32."""
    left = self.left.reshape(self.left.shape[:2]).astype(np.float32)
    right = self.right.astype(np.float32)
    if self.core is None:
      return (left @ right.reshape(len(right), -1)).reshape(self.shape())
    core = self.core.astype(np.float32)
    return np.einsum("oa,abkl,bi->oikl", left, core, right.reshape(right.shape[:2]))


@dataclasses.dataclass
class Change:
  """The factors of one module's change, by the names of lora_names.FACTORS, PyTorch's layout."""

  factors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  strength: float | None = None  # None: alpha / rank, or 1 if the file states no alpha

  def missing(self) -> list[str]:
    """What the change lacks, if anything."""
    has = self.factors.keys()
    if any(name.startswith("hada") for name in has):
      wanted = [f"hada_w{i}_{side}" for i in "12" for side in "ab"]
    elif any(name.startswith("lokr") for name in has):
      wanted = [
        f"lokr_w{i}_{side}" for i in "12" if f"lokr_w{i}" not in has for side in "ab"
      ]  # fmt: skip
    else:
      wanted = ["down", "up"]
    return [name for name in wanted if name not in has]

  @property
  def rank(self) -> int | None:
    """None where no product is of low rank (a LoKr of two whole matrices)."""
    names = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((self.factors[name].shape[0] for name in names if name in self.factors), None)

  def shape(self) -> tuple[int, ...]:
    """Of what is added; a kernel's window may be flattened into the inputs.

    Raises:
      UserError: the factors do not multiply; their shapes are named.
    """
    shapes = [p.shape() if isinstance(p, _Product) else p.shape for p in self._parts()]
    broken = None in shapes or any(len(shape) < 2 for shape in shapes)
    if not broken and len(shapes) > 1:
      if "hada_w1_a" in self.factors:
        broken = shapes[0] != shapes[1]
      else:
        (a, b, *_), (c, d, *window) = shapes
        shapes = [(a * c, b * d, *window)]
    if broken:
      listed = " and ".join(str(f.shape) for name, f in self.factors.items() if f.ndim)
      raise UserError(f"has factors {listed}, which do not multiply")
    return shapes[0]

  def fits(self, shape: tuple[int, ...]) -> bool:
    """Whether it can change a weight of this shape: [O, I] or [O, I, kh, kw]."""
    ours = self.shape()
    flat = (shape[0], math.prod(shape[1:]))
    if core_shape(ours) != core_shape(shape) and not (len(ours) == 2 and ours == flat):
      return False
    outputs, inputs = shape[:2]
    if "lora_magnitude_vector" in self.factors:
      return self.factors["lora_magnitude_vector"].size == outputs
    scale = self.factors.get("dora_scale")
    return scale is None or scale.shape[:2] in ((outputs,), (outputs, 1), (1, inputs))

  def apply(self, weight: np.ndarray, scale: float) -> np.ndarray:
    """The changed weight, float32, with the change taken `scale` times; 0 leaves the weight alone.

    For a DoRA that is what the readers of its spelling do: diffusers and PEFT scale the product
    before the norm is set, ComfyUI the whole difference. Both are the same at a scale of 1.
    """
    weight = weight.astype(np.float32)
    if not scale:
      return weight
    product = self._product().reshape(weight.shape) * np.float32(self._strength())
    magnitude = self._magnitude(weight.ndim)
    if magnitude is None:
      return weight + np.float32(scale) * product
    whole = "dora_scale" in self.factors
    changed = weight + (product if whole else np.float32(scale) * product)
    axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
    norm = np.sqrt(np.square(changed).sum(axes, keepdims=True))
    changed *= magnitude / np.maximum(norm, np.finfo(np.float32).tiny)
    return weight + np.float32(scale) * (changed - weight) if whole else changed

  def _strength(self) -> float:
    if self.strength is not None:
      return self.strength
    alpha, rank = self.factors.get("alpha"), self.rank
    return 1.0 if alpha is None or rank is None else float(alpha.flat[0]) / rank

  def _magnitude(self, ndim: int) -> np.ndarray | None:
    """The stored norms, [O, 1...] or [1, I, 1...]; PEFT's are [O] or [1, O, 1, 1], of outputs."""
    stored = self.factors.get("lora_magnitude_vector")
    if stored is not None:
      return stored.reshape(-1, *[1] * (ndim - 1)).astype(np.float32)
    stored = self.factors.get("dora_scale")
    if stored is not None:
      head = stored.shape[:2] if stored.ndim > 1 else (len(stored), 1)
      return stored.reshape(*head, *[1] * (ndim - 2)).astype(np.float32)
    return None

  def _parts(self) -> list["_Product | np.ndarray"]:
    """What is multiplied: one product, or two halves."""
    get = self.factors.get
    if "down" in self.factors:
      return [_Product(get("up"), get("down"), get("mid"))]
    if "hada_w1_a" in self.factors:
      return [_half(self.factors, f"hada_w{i}", f"hada_t{i}") for i in "12"]
    return [
      self.factors[f"lokr_w{i}"] if f"lokr_w{i}" in self.factors
      else _half(self.factors, f"lokr_w{i}", f"lokr_t{i}") for i in "12"
    ]  # fmt: skip

  def _product(self) -> np.ndarray:
    values = [
      part.value() if isinstance(part, _Product) else part.astype(np.float32)
      for part in self._parts()
    ]
    if len(values) == 1:
      return values[0]
    first, second = values
    if "hada_w1_a" in self.factors:
      return first * second
    return np.kron(first.reshape(*first.shape[:2], *[1] * (second.ndim - 2)), second)


def core_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A shape without a window of one pixel: 1x1 convolutions and linear layers are alike."""
  return tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape)


def _half(factors: Mapping[str, np.ndarray], name: str, core: str) -> _Product:
  """LyCORIS' w_a and w_b; beside a core w_a is stored the other way round, [r, O]."""
  left, core = factors[f"{name}_a"], factors.get(core)
  return _Product(left if core is None else left.T, factors[f"{name}_b"], core)
