"""What a compiled program needs of a chip: its memory, and a model of its time."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax

from cc_jax.plan import hlo
from cc_jax.plan.chips import Chip
from cc_jax.plan.collectives import by_kind
from cc_jax.plan.lower import AbstractProgram
from cc_jax.plan.model_flops import model_flops
from cc_jax.plan.topology import Slice

# Part of the published memory bandwidth that programs reach; part of the method of `Estimate`.
BANDWIDTH_RATIO = 0.9
# Part of the peak that attention kernels reach at the width to which they pad heads: by libtpu's
# static profile JAX's flash attention, forward and backward, reaches 0.85 on v5e and 0.71 on v6e
# (docs/scale.md).
KERNEL_RATIO = 0.8
# How far the estimate may be off: it was 3 % off the one published step time that we know of,
# partly by luck.
TOLERANCE = 0.25


class Memory(NamedTuple):
  """Bytes on one chip by XLA's analysis: with padding, at the moment that needs most."""

  parts: dict[str, int]  # the arguments, which stay between two steps, used or not
  padding: int  # of the arguments
  temporaries: int  # activations, gradients and other intermediate results
  outputs: int  # that do not reuse an argument's memory
  code: int

  @property
  def total(self) -> int:
    return sum(self.parts.values()) + self.padding + self.temporaries + self.outputs + self.code


class Overflow(NamedTuple):
  """The compiler's refusal of a program that is too large; bytes on one chip."""

  needed: float
  limit: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run on every chip.

  Method (docs/scale.md, "How the step time is estimated"): a fusion with a matrix product or
  convolution takes the longer of libtpu's own cycles and its traffic with HBM; everything else its
  traffic; nothing overlaps. Without cycles (no TPU, a kernel), products take their FLOPs at the
  chip's peak, and attention kernels theirs at the width to which they pad heads, at KERNEL_RATIO of
  it. A collective takes what a ring algorithm sends, over all links of a chip at once.
  """

  products: float
  memory: float
  collectives: float

  @property
  def seconds(self) -> float:
    return self.products + self.memory + self.collectives

  def bounds(self, dimensions: int) -> tuple[float, float]:
    """± TOLERANCE; above, each collective uses the links of one of the torus' dimensions alone."""
    high = self.products + self.memory + self.collectives * max(dimensions, 1)
    return self.seconds * (1 - TOLERANCE), high * (1 + TOLERANCE)


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
  """A compiled program with what it needs of every chip."""

  chip: Chip
  chips: int
  dimensions: int  # of the slice's torus
  images: int
  memory: Memory
  model_flops: float  # per chip and run: cc_jax.plan.model_flops
  program: hlo.Program
  estimate: Estimate
  compiled: Any

  @property
  def fits(self) -> bool:
    return self.memory.total <= self.chip.memory

  def numbers(self) -> dict[str, Any]:
    """Everything for --json; SI units, bytes and FLOPs per chip and run."""
    seconds, program = self.estimate.seconds, self.program
    per_chip = self.images / self.chips
    return {
      "chip": self.chip.name,
      "chips": self.chips,
      "images": self.images,
      "fits": self.fits,
      "memory": {
        **self.memory._asdict(),
        "total": self.memory.total,
        "chip": None if math.isinf(self.chip.memory) else self.chip.memory,
      },
      "flops": program.flops,
      "model_flops": self.model_flops,
      "bytes_moved": program.bytes,
      "collectives": {
        kind: {"runs": runs, "output_bytes": size}
        for kind, (runs, size) in by_kind(program.collectives).items()
      },
      "seconds": seconds,
      "seconds_range": list(self.estimate.bounds(self.dimensions)),
      "seconds_parts": dataclasses.asdict(self.estimate),
      "mfu": self.model_flops / seconds / self.chip.flops,
      "hfu": program.flops / seconds / self.chip.flops,
      "images_per_second": self.images / seconds,
      "images_per_second_per_chip": per_chip / seconds,
      "chip_hours_per_million_images": 1e6 * seconds / per_chip / 3600,
      "not_counted": program.not_counted,
      "loops_counted_once": sorted(program.loops_counted_once),
      "source": self.chip.source,
    }


def make_plan(program: AbstractProgram, slice_: Slice) -> CompiledPlan | Overflow:
  """Compiles the program for the slice and reads what it needs.

  Returns `Overflow` if the compiler finds that it does not fit.
  """
  try:
    compiled = program.function.lower(*program.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    overflow = read_overflow(str(error), slice_.chip)
    if overflow is None:
      raise
    return overflow
  hlo_program = hlo.Program(compiled.as_text())
  stats = compiled.memory_analysis()
  return CompiledPlan(
    chip=slice_.chip,
    chips=program.chips,
    dimensions=len(slice_.sides),
    images=program.images,
    memory=Memory(
      {name: chip_bytes(tree) for name, tree in program.parts.items()},
      max(0, stats.argument_size_in_bytes - hlo_program.argument_bytes), stats.temp_size_in_bytes,
      max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
      stats.generated_code_size_in_bytes,
    ),
    model_flops=model_flops(program.plain, *program.arguments) / program.chips,
    program=hlo_program,
    estimate=make_estimate(hlo_program, slice_.chip),
    compiled=compiled,
  )


def make_estimate(program: hlo.Program, chip: Chip) -> Estimate:
  """See Estimate for the method."""
  products = memory = collectives = 0.0
  for step in program.steps:
    traffic = step.bytes / (BANDWIDTH_RATIO * chip.bandwidth)
    if step.collective:
      collectives += step.runs * step.collective.sent_bytes() / chip.interconnect
    if step.flops:
      products += step.runs * max(compute_seconds(step, chip), traffic)
    elif not step.collective:
      memory += step.runs * traffic
  return Estimate(products, memory, collectives)


def compute_seconds(step: hlo.Step, chip: Chip) -> float:
  """Of one run of a step with products; see Estimate."""
  if step.cycles and chip.clock:
    return step.cycles / chip.clock
  if not step.head_width:
    return step.flops / chip.flops
  padded = -(-step.head_width // chip.kernel_width) * chip.kernel_width
  return step.flops * padded / step.head_width / (KERNEL_RATIO * chip.flops)


def chip_bytes(tree: Any) -> int:
  """Bytes of a sharded pytree on each chip."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def all_bytes(tree: Any) -> int:
  """Bytes of a pytree on all chips together, copies counted once."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_overflow(message: str, chip: Chip) -> Overflow | None:
  """Reads XLA's 'Used 20.30G of 15.75G hbm'; None for any other error.

  For some programs it reports only what the temporaries need.
  """
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  match = re.search(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm", message) or re.search(
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
  if not match:
    return Overflow(math.nan, chip.memory)
  needed, unit, limit, limit_unit = match.groups()
  return Overflow(float(needed) * _UNITS[unit], float(limit) * _UNITS[limit_unit])
