"""Accelerators: the one table of published numbers."""

import dataclasses

_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator as its vendor describes it."""

  name: str  # as in a topology's name
  kinds: tuple[str, ...]  # jax's device_kind
  memory: float  # bytes of HBM
  flops: float  # bf16 operations per second, dense
  bandwidth: float  # HBM, bytes per second
  # Between chips, bytes per second that one chip can send, all its links together. Vendors publish
  # the sum of both directions; this is half of it.
  interconnect: float
  clock: float | None  # Hz; libtpu's cycle estimates count these
  source: str


# Clocks: the TPUs' peak over 131,072 operations a cycle and matrix unit set (v5e 1 x, v4 and v5p
# 2 x, v6e 4 x): docs/scale.md, "How the step time is estimated". v5p's memory is 95 GB on one page,
# 95 GiB on another; XLA's own limit decides what fits. v4's links, 6 of 50 GB/s, are from its paper
# (arXiv 2304.01433). NVIDIA's tables give 1,979 TFLOP/s, with sparsity and rounded: dense is half
# of it (989.4 in its Hopper white paper); NVLink's 900 GB/s is the sum of both directions. Both
# rows are the SXM modules.
CHIPS = (
  Chip("v4", ("TPU v4",), 32 * 2**30, 275e12, 1200e9, 300e9, 1.05e9, f"{_CLOUD}v4"),
  Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * 2**30, 197e12, 819e9, 200e9, 1.5e9,
       f"{_CLOUD}v5e"),
  Chip("v5p", ("TPU v5", "TPU v5p"), 95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9,
       f"{_CLOUD}v5p"),
  Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * 2**30, 918e12, 1638e9, 400e9, 1.75e9,
       f"{_CLOUD}v6e"),
  Chip("h100", ("NVIDIA H100 80GB HBM3",), 80e9, 989.4e12, 3350e9, 450e9, None, f"{_NVIDIA}h100/"),
  Chip("h200", ("NVIDIA H200",), 141e9, 989.4e12, 4800e9, 450e9, None, f"{_NVIDIA}h200/"),
)  # fmt: skip


def find(kind: str) -> Chip | None:
  """The chip of this device_kind or name; None for one that is not in the table."""
  return next((chip for chip in CHIPS if kind == chip.name or kind in chip.kinds), None)
