"""What a compiled program takes of a chip: its memory, and a model of its time."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax

from cc_jax.plan import hlo
from cc_jax.plan.chips import Chip
from cc_jax.plan.lower import AbstractProgram
from cc_jax.plan.topology import Slice

# A share of the published memory bandwidth that programs reach; from the recipe of `Estimate`.
REACHED = 0.9
# How far the estimate may be off: it met the one published step time that we know of within 3 %,
# partly by luck.
TRUST = 0.25


class Memory(NamedTuple):
  """Bytes on one chip. XLA's numbers: with padding, and all that is alive at the worst moment."""

  parts: dict[str, int]  # what lies there between two steps, used or not
  padding: int  # of the arguments
  temporaries: int  # activations, gradients, and whatever else comes and goes
  outputs: int  # that do not take an argument's place
  code: int

  @property
  def total(self) -> int:
    return sum(self.parts.values()) + self.padding + self.temporaries + self.outputs + self.code


class Overflow(NamedTuple):
  """The compiler's refusal, bytes on one chip."""

  needed: float
  limit: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run on every chip.

  Method (docs/scale.md, "How the step time is estimated"): a fusion with a matrix product or
  convolution takes the longer of libtpu's own cycles and its traffic with HBM; everything else its
  traffic; nothing overlaps. Without cycles (no TPU), products take their FLOPs at the
  chip's peak. A collective takes what a ring algorithm sends, over all links of a chip at once.
  """

  products: float
  memory: float
  collectives: float

  @property
  def seconds(self) -> float:
    return self.products + self.memory + self.collectives

  def between(self, dimensions: int) -> tuple[float, float]:
    """The range: ± TRUST; a collective along one dimension of the torus uses that one's links."""
    high = self.products + self.memory + self.collectives * max(dimensions, 1)
    return self.seconds * (1 - TRUST), high * (1 + TRUST)


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
  """What the compiled program says of itself."""

  chip: Chip
  count: int  # chips
  dimensions: int  # of the slice's torus
  images: int
  memory: Memory
  program: hlo.Program
  estimate: Estimate
  compiled: Any

  @property
  def fits(self) -> bool:
    return self.memory.total <= self.chip.memory

  def numbers(self) -> dict[str, Any]:
    """Everything for --json; SI units, bytes and FLOPs per chip and run."""
    seconds, program = self.estimate.seconds, self.program
    low, high = self.estimate.between(self.dimensions)
    per_chip = self.images / self.count
    kinds = hlo.by_kind(program.collectives)
    return {
      "chip": self.chip.name,
      "chips": self.count,
      "images": self.images,
      "fits": self.fits,
      "memory": {
        **self.memory._asdict(),
        "total": self.memory.total,
        "chip": None if math.isinf(self.chip.memory) else self.chip.memory,
      },
      "flops": program.flops,
      "bytes_moved": program.bytes,
      "collectives": {k: {"runs": n, "output_bytes": b} for k, (n, b) in kinds.items()},
      "seconds": seconds,
      "seconds_range": [low, high],
      "seconds_parts": dataclasses.asdict(self.estimate),
      "flops_utilisation": program.flops / seconds / self.chip.flops,
      "images_per_second": self.images / seconds,
      "images_per_second_per_chip": per_chip / seconds,
      "chip_hours_per_million_images": 1e6 * seconds / per_chip / 3600,
      "not_counted": program.opaque,
      "loops_counted_once": sorted(program.endless),
      "source": self.chip.source,
    }


def make_plan(work: AbstractProgram, place: Slice, count: int) -> CompiledPlan | Overflow:
  """Compiles for `count` of the chips, and reads the program.

  Returns `Overflow` if the compiler finds that it does not fit.
  """
  try:
    compiled = work.function.lower(*work.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    overflow = _overflow(str(error), place.chip)
    if overflow is None:
      raise
    return overflow
  program = hlo.Program(compiled.as_text())
  stats = compiled.memory_analysis()
  parts = {name: chip_bytes(tree) for name, tree in work.parts.items()}
  memory = Memory(
    parts,
    max(0, stats.argument_size_in_bytes - program.argument_bytes),
    stats.temp_size_in_bytes,
    max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
    stats.generated_code_size_in_bytes,
  )
  estimate = make_estimate(program, place.chip)
  return CompiledPlan(
    place.chip, count, len(place.sides), work.images, memory, program, estimate, compiled
  )


def make_estimate(program: hlo.Program, chip: Chip) -> Estimate:
  """See Estimate for the method."""
  products = memory = collectives = 0.0
  for step in program.steps:
    traffic = step.bytes / (REACHED * chip.bandwidth)
    if step.collective:
      collectives += step.times * step.collective.sent_bytes() / chip.interconnect
    if step.flops:
      own = step.cycles / chip.clock if step.cycles and chip.clock else step.flops / chip.flops
      products += step.times * max(own, traffic)
    elif not step.collective:
      memory += step.times * traffic
  return Estimate(products, memory, collectives)


def chip_bytes(tree: Any) -> int:
  """Bytes of a placed pytree on each chip."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def all_bytes(tree: Any) -> int:
  """Bytes of a pytree, once."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _overflow(message: str, chip: Chip) -> Overflow | None:
  """Reads XLA's 'Used 20.30G of 15.75G hbm'; None where the error is another one.

  Of a program that is too large by itself it says only what the temporaries need.
  """
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  found = re.search(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm", message) or re.search(
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
  if not found:
    return Overflow(math.nan, chip.memory)
  needed, unit, limit, limit_unit = found.groups()
  return Overflow(float(needed) * _UNITS[unit], float(limit) * _UNITS[limit_unit])
