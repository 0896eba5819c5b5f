"""FLOPs of matrix products and convolutions in a compiled program.

2 for every multiplication with its addition. Products with padding and with the holes of dilated
inputs do not count, as in XLA's own analysis.
"""

import functools
import math
from collections.abc import Sequence

from cc_jax.plan.hlo_text import Instruction, Shape


def product_flops(i: Instruction, operands: Sequence[Shape]) -> int:
  """FLOPs of a dot or a convolution of `operands`; 0 for any other instruction."""
  if i.opcode == "convolution":
    return convolution_flops(i, *operands, i.shapes[0])
  if i.opcode != "dot":
    return 0
  contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  lengths = [operands[0].dims[int(d)] for d in contracted.split(",") if d]
  return 2 * i.shapes[0].size * math.prod(lengths)


def convolution_flops(i: Instruction, lhs: Shape, rhs: Shape, out: Shape) -> int:
  """2 · batch · features out · features in (of a group) · pairs of (output, kernel) positions.

  Forward and both gradients of a convolution count the same, and a batched product that libtpu
  writes as a convolution counts as the product that it is.
  """
  labels = i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
  inputs, out_labels = labels.split("->")
  lhs_labels, rhs_labels = inputs.split("_")
  window = _window(i.attribute(r"window=\{([^}]*)\}") or "")
  pairs = 1
  for label in (c for c in out_labels if c.isdigit()):
    pairs *= position_pairs(
      size_in=lhs.dims[lhs_labels.index(label)], size_out=out.dims[out_labels.index(label)],
      kernel=rhs.dims[rhs_labels.index(label)],
      **{key: values[int(label)] for key, values in window.items()},
    )
  batch, features = (out.dims[out_labels.index(c)] for c in "bf")
  return 2 * batch * features * rhs.dims[rhs_labels.index("i")] * pairs


def _window(text: str) -> dict[str, list[int]]:
  """{size=3x3 pad=1_1x1_1 ...} -> per spatial axis: stride, padding before, both dilations."""
  fields = dict(part.split("=") for part in text.split())
  axes = len(fields["size"].split("x")) if "size" in fields else 0

  def numbers(key: str, default: int) -> list[int]:  # of padding before and after, the former
    values = fields[key].split("x") if key in fields else [str(default)] * axes
    return [int(value.split("_")[0]) for value in values]

  defaults = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
  return {key: numbers(key, default) for key, default in defaults.items()}


@functools.cache
def position_pairs(
  size_in: int, size_out: int, kernel: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
  """How many pairs (output position, kernel position) of one axis meet an input value."""
  last = (size_in - 1) * lhs_dilate
  return sum(
    0 <= position <= last and position % lhs_dilate == 0
    for start in range(-pad, size_out * stride - pad, stride)
    for position in range(start, start + kernel * rhs_dilate, rhs_dilate)
  )
