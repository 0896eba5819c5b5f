"""Which attention computes what: by chip, head width, tokens, mask and dtype, chosen in one place.

docs/attention.md has the table, what it was measured or read from, and with which versions.
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from cc_jax.errors import UserError

KINDS = ("auto", "xla", "cudnn", "pallas")

# Shorter attentions are XLA's: their scores fit the TPU's own memory, and fused they cost more.
# It also keeps cuDNN from lengths that it is known to fail at (64, 77, single queries).
_LEAST_TOKENS = {"pallas": 768, "cudnn": 256}
_PALLAS_MAX_WIDTH = 512  # of a head: the VAE's only one


@dataclasses.dataclass(frozen=True)
class AttentionKernels:
  """The attention of one program: a fused kernel where it serves and pays, elsewhere XLA.

  Pallas' kernels cannot be partitioned by XLA, and so on a mesh both kernels run on each device's
  part of the batch, and of the heads.
  """

  kernel: str = "xla"  # 'cudnn' or 'pallas'
  max_width: int = 0  # of the kernel's heads
  training: bool = False  # the program has gradients
  chip: str = dataclasses.field(default="any chip", compare=False)  # for the log
  mesh: Mesh | AbstractMesh | None = None  # of several devices
  batch_axes: tuple[str, ...] = ()
  head_axis: str | None = None

  def choose(
    self, *, width: int, queries: int, keys: int, dtype: Any, masked: bool = False,
    batch: int | None = None,
  ) -> str:
    """'xla', 'cudnn' or 'pallas' for heads of `width` and so many tokens.

    Args:
      masked: also causal. Masks are XLA's: a NaN is reported of cuDNN's gradient with one.
      batch: global; must divide over the mesh.
    """
    if self.kernel == "xla" or masked or width > self.max_width:
      return "xla"
    if min(queries, keys) < _LEAST_TOKENS[self.kernel]:
      return "xla"
    if batch is not None and batch % self.batch_shards:
      return "xla"
    if self.kernel == "cudnn":
      half = jnp.dtype(dtype).itemsize == 2
      # That NaN is of lengths of 64 modulo 128 (pytorch issue 196678): not even without a mask.
      reported = self.training and 64 in (queries % 128, keys % 128)
      if not half or width % 8 or reported:
        return "xla"
    return self.kernel

  @property
  def batch_shards(self) -> int:
    """The devices over which the batch is divided."""
    count = 1
    for axis in self.batch_axes if self.mesh is not None else ():
      count *= self.mesh.shape[axis]
    return count

  def describe(self) -> str:
    """One line for the log."""
    if self.kernel == "xla":
      return f"attention: xla on {self.chip}"
    return (
      f"attention: {self.kernel} on {self.chip} from {_LEAST_TOKENS[self.kernel]} tokens on, with "
      f"heads up to {self.max_width} wide; xla elsewhere, and where there is a mask"
    )


XLA_ONLY = AttentionKernels()


def choose_kernels(
  asked: str, device: Any, *, dtype: Any, training: bool, **mesh: Any
) -> AttentionKernels:
  """The attention of a program for devices like `device`.

  Args:
    asked: one of KINDS; 'auto' is the kernel of the device's platform.
    device: a jax.Device, perhaps of a topology; None: unknown, and then 'auto' is XLA.
    dtype: in which the program computes.
    mesh: `mesh`, `batch_axes` and `head_axis` of AttentionKernels.

  Raises:
    UserError: the kernel that is asked for is none, or does not run on such a device or in `dtype`.
  """
  if asked not in KINDS:
    raise UserError(f"attention {asked!r} is unknown; use {', '.join(KINDS)}")
  half = jnp.dtype(dtype).itemsize == 2
  chip, platform, capability = "an unknown device", "", None
  if device is not None:
    chip, platform = device.device_kind, device.platform
    capability = _compute_capability(device)
  old_tpu = re.search(r"TPU v[23]\b", chip)
  # What is wrong with each kernel; '' where it can run.
  problems = {
    "xla": "",
    "pallas": "" if platform == "tpu" and not old_tpu else "needs a TPU, v4 or later",
    "cudnn": "needs an NVIDIA GPU of compute capability 8.0 or later" if not capability
    else "" if half else "computes in bfloat16 only (train.dtype, --dtype)",
  }
  kernel = asked
  if asked == "auto":
    kernel = next(k for k in ("pallas", "cudnn", "xla") if not problems[k])
  elif device is not None and problems[asked]:
    raise UserError(
      f"attention {asked!r} {problems[asked]}; this is {chip}, {jnp.dtype(dtype).name}: use 'auto'"
    )
  if kernel == "xla":
    return AttentionKernels(chip=chip)
  width = _PALLAS_MAX_WIDTH if kernel == "pallas" else _cudnn_max_width(capability, training)
  return AttentionKernels(kernel, width, training, chip, **mesh)


def _compute_capability(device: Any) -> tuple[int, int] | None:
  """(9, 0) of an H100; None below 8.0, where cuDNN's attention begins, and of other devices."""
  match = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
  capability = match and (int(match[1]), int(match[2]))
  return capability if capability and capability >= (8, 0) else None


def _cudnn_max_width(capability: tuple[int, int] | None, training: bool) -> int:
  """JAX refuses more than 128 before Hopper; cuDNN 9.18 has such gradients on Hopper alone."""
  major = capability[0] if capability else 0
  return 256 if major == 9 or (major > 9 and not training) else 128
