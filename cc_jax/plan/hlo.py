"""What a compiled program costs, read from its text (`compiled.as_text()`).

XLA's own `cost_analysis` counts the body of a loop once, and on a TPU it knows no collectives. Here
a loop's body counts as often as it runs (the trip count), and rematerialised work counts again,
because it occurs in the program again. A partitioned program describes one device: so do all
numbers.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

from cc_jax.errors import UserError
from cc_jax.plan.collectives import Collective, find_collective
from cc_jax.plan.flops import product_flops
from cc_jax.plan.hlo_text import Computation, Instruction, padded_bytes, parse
from cc_jax.plan.kernels import Kernel, find_kernel
from cc_jax.plan.stack_frames import StackFrames

_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Step:
  """One instruction that takes a device's time, with all that is fused into it."""

  name: str
  runs: float  # product of the trip counts of the loops around it
  flops: int  # of one run
  bytes: int  # to and from main memory, of one run
  cycles: int | None
  collective: Collective | None
  head_width: int = 0  # of a kernel that is an attention


class Program:
  """The steps of a compiled program.

  Raises:
    UserError: the text is not an optimised HLO module.
  """

  def __init__(self, text: str):
    self.computations, entry = parse(text)
    if entry is None:
      raise UserError("this is no compiled program: it has no ENTRY; take compiled.as_text()")
    self.entry = self.computations[entry]
    partitions = re.search(r"num_partitions=(\d+)", text[:10_000])
    replicas = re.search(r"replica_count=(\d+)", text[:10_000])
    self.devices = math.prod(int(m[1]) for m in (partitions, replicas) if m)
    self._loops_counted_once: set[str] = set()
    self._frames = StackFrames(text)

  @functools.cached_property
  def instructions(self) -> dict[str, Instruction]:
    """All of them by name."""
    return {name: i for inside in self.computations.values() for name, i in inside.items()}

  def stack(self, i: Instruction) -> list[tuple[str, str]]:
    """[(file, function)] of the source of an instruction, the innermost first; [] if unknown."""
    return self._frames.stack(int(i.attribute(r"stack_frame_id=(\d+)") or 0))

  @functools.cached_property
  def steps(self) -> tuple[Step, ...]:
    return tuple(self._steps(self.entry, 1))

  @property
  def flops(self) -> float:
    """Of matrix products and convolutions, those in custom calls included: flops.py, kernels.py."""
    return sum(step.flops * step.runs for step in self.steps)

  @property
  def bytes(self) -> float:
    """Read from and written to main memory, by the shapes of what is not fused."""
    return sum(step.bytes * step.runs for step in self.steps)

  @property
  def argument_bytes(self) -> int:
    """Of the program's arguments, without padding; arguments that it never reads are left out."""
    return sum(shape.bytes for i in self.entry.parameters.values() for shape in i.shapes)

  @property
  def collectives(self) -> list[Collective]:
    return [step.collective for step in self.steps if step.collective]

  @property
  def loops_counted_once(self) -> set[str]:
    """Loops whose trip count is not in the program."""
    return self._loops_counted_once if self.steps else set()

  @property
  def not_counted(self) -> dict[str, float]:
    """Custom calls whose work is unknown: target -> runs."""
    runs: dict[str, float] = {}
    for i, computation, count in self._walk(self.entry, 1):
      if i.target and not self._kernel(i, computation):
        runs[i.target] = runs.get(i.target, 0) + count
    return runs

  def _kernel(self, i: Instruction, computation: Computation) -> Kernel | None:
    return i.target and find_kernel(
      i, [shape for name in i.operands for shape in computation[name].shapes[:1]]
    )

  def _walk(
    self, computation: Computation, runs: float
  ) -> Iterator[tuple[Instruction, Computation, float]]:
    """Every instruction, where it is and how often it runs, those in fusions and loops included."""
    for i in computation.values():
      yield i, computation, runs
      for name in i.called:
        yield from self._walk(self.computations[name], runs * self._trip_count(i, computation))

  def _steps(self, computation: Computation, runs: float) -> Iterator[Step]:
    for i in computation.values():
      if i.opcode in ("while", "call", "conditional", "async-start"):
        inner = runs * self._trip_count(i, computation)
        branches = [list(self._steps(self.computations[name], inner)) for name in i.called]
        if i.opcode == "conditional":  # the branch with the most traffic
          branches = [max(branches, key=lambda steps: sum(s.bytes for s in steps))]
        for branch in branches:
          yield from branch
      elif not i.free:
        collective = find_collective(i, self.computations, self.devices, runs)
        flops, size = self._flops(i, computation), self._bytes(i, computation)
        kernel = self._kernel(i, computation)
        width = kernel.head_width if kernel else 0
        yield Step(i.name, runs, flops, size, i.cycles, collective, width)

  def _trip_count(self, i: Instruction, computation: Computation) -> int:
    """How often a loop's body runs; 1 for what is no loop."""
    if i.opcode != "while":
      return 1
    known = i.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    count = int(known) if known else self._read_trip_count(i, computation)
    if count is None:
      self._loops_counted_once.add(i.name)
    return 1 if count is None else count

  def _read_trip_count(self, loop: Instruction, computation: Computation) -> int | None:
    """From `i < constant` in the condition, i's start and its stride; None for other loops."""
    condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    compare, resolve = self._unfused(condition, condition.root)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
      return None
    counter, limit = map(resolve, compare.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
      return None
    index = int(counter.attribute(r"index=(\d+)"))
    stride = self._stride(self.computations[loop.attribute(r"body=%?([\w.\-]+)")], index)
    start = computation[loop.operands[0]]
    first = computation.resolve(start.operands[index]) if start.opcode == "tuple" else None
    if first is None or first.opcode != "constant" or not stride:
      return None
    return max(0, -(-(int(limit.arguments) - int(first.arguments)) // stride))

  def _stride(self, body: Computation, index: int) -> int | None:
    """What the body adds to the loop's counter."""
    new, resolve = self._unfused(body, body.resolve(body.root.operands[index]))
    if new.opcode != "add":
      return None
    constants = [int(x.arguments) for x in map(resolve, new.operands) if x.opcode == "constant"]
    return constants[0] if len(constants) == 1 else None

  def _unfused(
    self, computation: Computation, i: Instruction
  ) -> tuple[Instruction, Callable[[str], Instruction]]:
    """(`i` or the root of a fusion, a function from an operand's name to what it is a copy of)."""
    if i.opcode != "fusion":
      return i, computation.resolve
    inside = self.computations[i.called[0]]
    inputs = {p.name: i.operands[n] for n, p in inside.parameters.items()}
    return inside.root, lambda name: computation.resolve(inputs.get(name, name), inside)

  def _flops(self, i: Instruction, computation: Computation) -> int:
    if kernel := self._kernel(i, computation):
      return kernel.flops
    shapes = [computation[name].shapes for name in i.operands[:2]]
    fused = [self.computations[name] for name in i.called if i.opcode != "while"]
    return product_flops(i, [s[0] for s in shapes if s]) + sum(
      self._flops(inner, inside) for inside in fused for inner in inside.values()
    )

  def _bytes(self, i: Instruction, computation: Computation) -> int:
    """Operands and results, but of a slice only the slice, in place only what is written."""
    operands = [[s for s in computation[name].shapes if s.in_main_memory] for name in i.operands]
    read = [padded_bytes(shapes) for shapes in operands]
    written = padded_bytes(s for s in i.results if s.in_main_memory)
    if i.opcode in _SLICES:
      read[0] = min(read[0], padded_bytes(i.shapes)) if read[0] else 0
    elif i.opcode in ("dynamic-update-slice", "scatter"):
      update = computation[i.operands[1 if i.opcode == "dynamic-update-slice" else 2]].shapes
      read[0] = 0
      written = padded_bytes(update) if written else 0
    elif i.opcode == "fusion":
      inside = self.computations[i.called[0]]
      for number, parameter in inside.parameters.items():
        if read[number]:
          read[number] = min(read[number], _bytes_read(inside, parameter.name, read[number]))
      written = min(written, _bytes_written(inside, inside.root, written)) if written else 0
    return sum(read) + written


def _bytes_read(inside: Computation, parameter: str, size: int) -> int:
  """Bytes of a fusion's operand of `size` bytes that it reads: if it only slices it, the slices."""
  total = 0
  for user in inside.values():
    for position, name in enumerate(user.operands):
      if name != parameter:
        continue
      if user.opcode in _SLICES and position == 0:
        total += padded_bytes(user.shapes)
      elif user.opcode == "dynamic-update-slice" and position == 0:
        pass  # written in place
      elif user.opcode == "bitcast":
        total += _bytes_read(inside, user.name, size)
      else:
        return size
  return total


def _bytes_written(inside: Computation, root: Instruction, size: int) -> int:
  """Bytes of a fusion's result of `size` bytes that it writes: of a dynamic-update-slice, one."""
  if root.opcode == "dynamic-update-slice":
    return padded_bytes(inside[root.operands[1]].shapes)
  if root.opcode == "bitcast":
    return _bytes_written(inside, inside[root.operands[0]], size)
  if root.opcode == "tuple":
    return sum(
      _bytes_written(inside, part, padded_bytes(s for s in part.shapes if s.in_main_memory))
      for part in (inside[name] for name in root.operands)
    )
  return size
