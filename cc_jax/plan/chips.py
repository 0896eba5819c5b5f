"""Accelerators: the one table of published numbers."""

import dataclasses

_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX_BLACKWELL = (
  "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
  "nvidia-rtx-blackwell-gpu-architecture.pdf"
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator as its vendor describes it; numbers are of what JAX calls one device."""

  name: str  # as in a topology's name
  kinds: tuple[str, ...]  # jax's device_kind
  memory: float  # bytes of HBM, or of what the card has
  flops: float  # bf16 operations per second with sums in float32, dense
  bandwidth: float  # of that memory, bytes per second
  # Between chips, bytes per second that one chip can send, all its links together. Vendors publish
  # the sum of both directions; this is half of it.
  interconnect: float
  clock: float | None  # Hz; libtpu's cycle estimates count these
  source: str
  # Attention kernels compute at a multiple of this head width: a TPU's matrix unit has 128 x 128
  # places, since v6e 256 x 256; of cuDNN's tiles 64 is an assumption.
  kernel_width: int = 64


# Clocks: the TPUs' peak over 131,072 operations a cycle and matrix unit set (v5e 1 x, v4 and v5p
# 2 x, v6e 4 x): docs/scale.md, "How the step time is estimated". v5p's memory is 95 GB on one page,
# 95 GiB on another; XLA's own limit decides what fits. v4's links, 6 of 50 GB/s, are from its paper
# (arXiv 2304.01433). A v7x is two chiplets, and JAX has a device for each (its page, "Dual-chiplet
# architecture"): the row is half of the chip's 2,307 TFLOP/s, 192 GiB, 7,380 and 1,200 GB/s. Its
# clock is not published, so --topology does not know it.
#
# NVIDIA's tables give bf16 with sparsity: dense is half of it (989.4 for H100 SXM is in its Hopper
# white paper, 165.2 and 209.5 for the GeForce cards, with sums in float32, in those of Ada and RTX
# Blackwell). NVLink's and PCIe's numbers are sums of both directions. nvidia.com could not be read
# when the rows after h200 were written: their numbers are from copies of these pages, and agree
# with multiprocessors x operations x clock (tests/test_chips.py), but for the memory and links of
# h200-nvl and h100-nvl, which nothing else confirms. Names of devices are those of XLA's
# descriptions of targets and of logs by others.
CHIPS = (
  Chip("v4", ("TPU v4",), 32 * 2**30, 275e12, 1200e9, 300e9, 1.05e9, f"{_CLOUD}v4", 128),
  Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * 2**30, 197e12, 819e9, 200e9, 1.5e9,
       f"{_CLOUD}v5e", 128),
  Chip("v5p", ("TPU v5", "TPU v5p"), 95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9,
       f"{_CLOUD}v5p", 128),
  Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * 2**30, 918e12, 1638e9, 400e9, 1.75e9,
       f"{_CLOUD}v6e", 256),
  Chip("v7x", ("TPU7x",), 96 * 2**30, 1153.5e12, 3690e9, 300e9, None, f"{_CLOUD}tpu7x", 256),
  Chip("h100", ("NVIDIA H100 80GB HBM3",), 80e9, 989.4e12, 3350e9, 450e9, None, f"{_NVIDIA}h100/"),
  Chip("h200", ("NVIDIA H200",), 141e9, 989.4e12, 4800e9, 450e9, None, f"{_NVIDIA}h200/"),
  Chip("h100-pcie", ("NVIDIA H100 PCIe",), 80e9, 756e12, 2000e9, 300e9, None, f"{_NVIDIA}h100/"),
  Chip("h100-nvl", ("NVIDIA H100 NVL",), 94e9, 835.5e12, 3900e9, 300e9, None, f"{_NVIDIA}h100/"),
  Chip("h200-nvl", ("NVIDIA H200 NVL",), 141e9, 835.5e12, 4800e9, 450e9, None, f"{_NVIDIA}h200/"),
  Chip("b200", ("NVIDIA B200",), 180e9, 2250e12, 8000e9, 900e9, None, f"{_NVIDIA}hgx/"),
  Chip("a100-40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40e9, 312e12, 1555e9, 300e9,
       None, f"{_NVIDIA}a100/"),
  Chip("a100-80", ("NVIDIA A100-SXM4-80GB",), 80e9, 312e12, 2039e9, 300e9, None,
       f"{_NVIDIA}a100/"),
  Chip("a100-80-pcie", ("NVIDIA A100 80GB PCIe",), 80e9, 312e12, 1935e9, 300e9, None,
       f"{_NVIDIA}a100/"),
  Chip("l4", ("NVIDIA L4",), 24e9, 121e12, 300e9, 32e9, None, f"{_NVIDIA}l4/"),
  Chip("l40s", ("NVIDIA L40S",), 48e9, 362.05e12, 864e9, 32e9, None, f"{_NVIDIA}l40s/"),
  Chip("rtx4090", ("NVIDIA GeForce RTX 4090",), 24e9, 165.2e12, 1008e9, 32e9, None, _ADA),
  Chip("rtx5090", ("NVIDIA GeForce RTX 5090",), 32e9, 209.5e12, 1792e9, 64e9, None,
       _RTX_BLACKWELL),
)  # fmt: skip


def find(kind: str) -> Chip | None:
  """The chip of this device_kind or name; None for one that is not in the table."""
  return next((chip for chip in CHIPS if kind == chip.name or kind in chip.kinds), None)
