"""FLOPs of custom calls: the products, convolutions and attentions that XLA leaves to libraries.

cuBLAS and cuDNN on NVIDIA GPUs, Pallas kernels on TPUs. The forms are those of programs that jax
0.10.2 compiled for an H100, and with libtpu 0.0.42 for v5e. All counts are of useful work:
attention's at the width of its heads, not at that to which a kernel pads them.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from cc_jax.plan.flops import convolution_flops
from cc_jax.plan.hlo_text import Instruction, Shape

_OP_NAME = r'op_name="([^"]*)"'


class Kernel(NamedTuple):
  """One custom call. `head_width` is that of an attention's heads; 0 for anything else."""

  flops: int
  head_width: int = 0


def find_kernel(i: Instruction, operands: Sequence[Shape]) -> Kernel | None:
  """The work of a custom call on these operands; None where it is unknown, or no custom call."""
  target = i.target or ""
  if re.match(r"__cublas\$(gemm|lt\$matmul)", target):
    return Kernel(_gemm_flops(i, *operands[:2]))
  if target.startswith("__cudnn$conv"):
    return Kernel(_cudnn_convolution_flops(i, *operands[:2]))
  if target.startswith("__cudnn$fmha"):
    return _cudnn_attention(i, operands)
  if target == "tpu_custom_call":
    return _pallas_kernel(i, operands)
  return None


def _gemm_flops(i: Instruction, lhs: Shape, rhs: Shape) -> int:
  out = i.shapes[0]
  axes = _numbers(i, "lhs_contracting_dimensions")
  if axes is None:  # a batch of [m, k] x [k, n]
    batch = math.prod(out.dims[:-2])
    contracted = math.isqrt(lhs.size * rhs.size // (out.size * batch))
  else:
    contracted = math.prod(lhs.dims[axis] for axis in axes)
  return 2 * out.size * contracted


def _cudnn_convolution_flops(i: Instruction, first: Shape, second: Shape) -> int:
  """Window and labels of both gradients are those of the forward convolution, and so is its work:
  (input, filter) -> output, (gradient of output, filter) -> input, (input, gradient) -> filter.
  """
  result = i.shapes[0]
  if "BackwardInput" in i.target:
    return convolution_flops(i, result, second, first)
  if "BackwardFilter" in i.target:
    return convolution_flops(i, first, result, second)
  return convolution_flops(i, first, second, result)


def _cudnn_attention(i: Instruction, operands: Sequence[Shape]) -> Kernel | None:
  """Scores [B, N, T, S] are in the call's description, the width is the last axis of the query.

  Two products forward; backward the scores again, and the gradients of q, k, v and of the weights.
  """
  scores = re.search(r'"intermediate_tensor_shape":\s*\{[^{]*?"dimensions":\s*\[([^\]]*)\]',
                     i.attributes)  # fmt: skip
  if not scores:
    return None
  width = operands[0].dims[-1]
  products = 5 if "Backward" in i.target else 2
  return Kernel(2 * products * math.prod(map(int, re.findall(r"\d+", scores[1]))) * width, width)


def _pallas_kernel(i: Instruction, operands: Sequence[Shape]) -> Kernel | None:
  """Attention by its shapes, q [..., s, d] and k [..., t, d]; others by their own cost estimate.

  JAX's attention kernels for TPUs estimate only their forward pass, or not even that.
  """
  if re.search(r"attention|splash|mha|mqa", i.name + (i.attribute(_OP_NAME) or "")):
    arrays = [s for s in operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f16", "f32")]
    if len(arrays) < 3:
      return None
    query, key = arrays[:2]
    width = query.dims[-1]
    return Kernel(2 * _attention_products(i, query) * query.size * key.dims[-2], width)
  flops = i.attribute(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
  return Kernel(int(flops)) if flops else None


def _attention_products(i: Instruction, query: Shape) -> int:
  """How many products of the size of q kᵀ a kernel computes, by its name in JAX's libraries.

  dq: scores, gradient of the weights, dq. dkv: scores, gradient of the weights, dk, dv; a fused one
  returns dq, too.
  """
  name = i.name + (i.attribute(_OP_NAME) or "").removesuffix("/pallas_call").rpartition("/")[2]
  if "dkv" in name:
    return 4 + (sum(s.dtype == query.dtype and s.dims[-1:] == query.dims[-1:]
                    for s in i.shapes if len(s.dims) >= 3) > 2)  # fmt: skip
  return 3 if "dq" in name else 2


def _numbers(i: Instruction, key: str) -> list[int] | None:
  found = re.search(rf'"{key}":\s*\[([^\]]*)\]', i.attributes)
  return [int(n) for n in re.findall(r"\d+", found[1])] if found else None
