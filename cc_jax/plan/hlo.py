"""What a compiled program costs, read from its text (`compiled.as_text()`): pure functions.

XLA's own `cost_analysis` counts the body of a loop once, and on a TPU it knows no collectives. Here
a loop counts as often as it turns, and what was rematerialised counts again, because it stands in
the program again. A program that was partitioned describes one device: so do all numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

from cc_jax.errors import UserError
from cc_jax.plan.hlo_text import Computation, Instruction, Shape, padded_bytes, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction that talks to other devices, as often as it runs."""

  kind: str  # one of COLLECTIVES
  bytes: int  # of its output on one device
  group: int  # devices that take part
  times: float
  name: str

  def sent_bytes(self) -> float:
    """What one device sends in one run by the usual ring algorithms.

    An all-reduce is a reduce-scatter and an all-gather: 2 (n - 1) / n of its bytes. A
    reduce-scatter's output is an n-th of what goes in.
    """
    n = self.group
    share = {
      "all-reduce": 2 * (n - 1) / n,
      "reduce-scatter": n - 1,
      "collective-permute": 1,
    }
    return self.bytes * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Step:
  """One instruction that takes a device's time, with all that is fused into it."""

  name: str
  opcode: str
  times: float  # turns of the loops around it
  flops: int  # of one run
  bytes: int  # to and from main memory, of one run
  cycles: int | None
  collective: Collective | None


class Program:
  """A compiled program's text, taken apart.

  Raises:
    UserError: the text is not an optimised HLO module.
  """

  def __init__(self, text: str):
    self.computations, self.entry = parse(text)
    if self.entry is None:
      raise UserError("this is no compiled program: it has no ENTRY; take compiled.as_text()")
    partitions = re.search(r"num_partitions=(\d+)", text[:10_000])
    replicas = re.search(r"replica_count=(\d+)", text[:10_000])
    self.devices = math.prod(int(m[1]) for m in (partitions, replicas) if m)
    self._endless: set[str] = set()

  @functools.cached_property
  def steps(self) -> tuple[Step, ...]:
    return tuple(self._steps(self.entry, 1))

  @property
  def flops(self) -> float:
    """2 for every multiplication and addition of matrix products and convolutions.

    Products with padding and with the holes of dilated inputs do not count, as in XLA's analysis.
    """
    return sum(step.flops * step.times for step in self.steps)

  @property
  def bytes(self) -> float:
    """Read from and written to main memory, by the shapes of what is not fused."""
    return sum(step.bytes * step.times for step in self.steps)

  @property
  def argument_bytes(self) -> int:
    """Of what the program takes, without padding; arguments that it never reads are no part."""
    inputs = self.computations[self.entry].parameters.values()
    return sum(shape.bytes for i in inputs for shape in i.shapes)

  @property
  def collectives(self) -> list[Collective]:
    return [step.collective for step in self.steps if step.collective]

  @property
  def endless(self) -> set[str]:
    """Loops whose turns cannot be read; they count once."""
    return self._endless if self.steps else set()

  @property
  def opaque(self) -> dict[str, float]:
    """Custom calls whose work is not counted: target -> times."""
    found: dict[str, float] = {}
    for instruction, times in self._walk(self.entry, 1):
      if instruction.target:
        found[instruction.target] = found.get(instruction.target, 0) + times
    return found

  def _walk(self, computation: str, times: float) -> Iterator[tuple[Instruction, float]]:
    """Every instruction and how often it runs; fusions and loops are entered."""
    for instruction in self.computations[computation].values():
      yield instruction, times
      for called in instruction.called:
        yield from self._walk(called, times * self._turns(instruction, computation))

  def _steps(self, computation: str, times: float) -> Iterator[Step]:
    for i in self.computations[computation].values():
      if i.opcode in ("while", "call", "conditional", "async-start"):
        branches = [
          list(self._steps(c, times * self._turns(i, computation))) for c in i.called
        ]
        if i.opcode == "conditional":  # the dearest branch
          branches = [max(branches, key=lambda steps: sum(s.bytes for s in steps))]
        for branch in branches:
          yield from branch
      elif not i.free:
        yield Step(
          i.name, i.opcode, times, self._flops(i, computation), self._bytes(i, computation),
          i.cycles, self._collective(i, times),
        )  # fmt: skip

  def _turns(self, i: Instruction, computation: str) -> int:
    """How often a loop's body runs; 1 for what is no loop."""
    if i.opcode != "while":
      return 1
    known = i.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    turns = self._read_turns(i, self.computations[computation])
    if turns is None:
      self._endless.add(i.name)
    return 1 if turns is None else turns

  def _read_turns(self, loop: Instruction, around: Computation) -> int | None:
    """From `i < constant` in the condition, i's start and its stride; None if it is not so."""
    condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    compare, behind = self._opened(condition, condition.root)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
      return None
    counter, limit = map(behind, compare.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
      return None
    index = int(counter.attribute(r"index=(\d+)"))
    stride = self._stride(self.computations[loop.attribute(r"body=%?([\w.\-]+)")], index)
    start = around[loop.operands[0]]
    first = around.behind(start.operands[index]) if start.opcode == "tuple" else None
    if first is None or first.opcode != "constant" or not stride:
      return None
    return max(0, -(-(int(limit.arguments) - int(first.arguments)) // stride))

  def _stride(self, body: Computation, index: int) -> int | None:
    """What the body adds to the loop's counter."""
    new, behind = self._opened(body, body.behind(body.root.operands[index]))
    if new.opcode != "add":
      return None
    constants = [int(p.arguments) for p in map(behind, new.operands) if p.opcode == "constant"]
    return constants[0] if len(constants) == 1 else None

  def _opened(
    self, around: Computation, i: Instruction
  ) -> tuple[Instruction, Callable[[str], Instruction]]:
    """`i`, or what a fusion ends in, and a function: an operand's name -> what is behind it."""
    if i.opcode != "fusion":
      return i, around.behind
    inside = self.computations[i.called[0]]
    inputs = {p.name: i.operands[n] for n, p in inside.parameters.items()}
    return inside.root, lambda name: around.behind(inputs.get(name, name), inside)

  def _flops(self, i: Instruction, computation: str) -> int:
    own = 0
    operands = [self.computations[computation][name].shapes[0] for name in i.operands[:2]
                if self.computations[computation][name].shapes]  # fmt: skip
    if i.opcode == "dot":
      contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
      own = 2 * i.shapes[0].size * math.prod(
        operands[0].dims[int(d)] for d in contracted.split(",") if d
      )
    elif i.opcode == "convolution":
      own = _convolution_flops(i, *operands)
    return own + sum(
      self._flops(inner, called)
      for called in i.called
      if i.opcode != "while"
      for inner in self.computations[called].values()
    )

  def _bytes(self, i: Instruction, computation: str) -> int:
    """Operands and results, but of a slice only the slice, in place only what is written."""
    here = self.computations[computation]
    operands = [[s for s in here[name].shapes if s.in_main_memory] for name in i.operands]
    read = [padded_bytes(shapes) for shapes in operands]
    written = padded_bytes(s for s in i.results if s.in_main_memory)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
      read[0] = min(read[0], padded_bytes(i.shapes)) if read[0] else 0
    elif i.opcode in ("dynamic-update-slice", "scatter"):
      update = here[i.operands[1 if i.opcode == "dynamic-update-slice" else 2]].shapes
      read[0] = 0
      written = padded_bytes(update) if written else 0
    elif i.opcode == "fusion":
      inside = self.computations[i.called[0]]
      for number, parameter in inside.parameters.items():
        if read[number]:
          read[number] = min(read[number], _read_of(inside, parameter.name, read[number]))
      written = min(written, _written_by(inside, inside.root, written)) if written else 0
    return sum(read) + written

  def _collective(self, i: Instruction, times: float) -> Collective | None:
    """The instruction as a collective, or one that is fused into it.

    libtpu lets one go on in the background: a fusion that starts it, others that compute meanwhile
    and one that ends it, each with the collective in it. It counts at its start.
    """
    kind, shapes, inner = i.opcode.removesuffix("-start"), i.shapes, i
    if kind not in COLLECTIVES:
      found = [
        (called, one)
        for called in i.called
        for one in self.computations[called].values()
        if one.opcode in COLLECTIVES
      ]
      if not found:
        return None
      called, inner = found[0]
      others = self.computations[called].values()
      starts = any('"AsyncCollectiveStart"' in other.attributes for other in others)
      if "chain_id=" in inner.attributes and not starts:
        return None
      kind, shapes = inner.opcode, inner.shapes
      if called.startswith("all-reduce-scatter"):  # libtpu's name for the two in one
        kind, shapes = "reduce-scatter", i.shapes
    else:
      shapes = i.results
    total = sum(s.bytes for s in shapes)
    return Collective(kind, total, _group(inner.attributes, self.devices), times, i.name)


def by_kind(collectives: list[Collective]) -> dict[str, tuple[float, float]]:
  """kind -> (times run, output bytes of all runs), the largest first."""
  found: dict[str, list[float]] = {}
  for one in collectives:
    total = found.setdefault(one.kind, [0, 0])
    total[0] += one.times
    total[1] += one.times * one.bytes
  return {k: tuple(v) for k, v in sorted(found.items(), key=lambda kv: -kv[1][1])}


def _read_of(inside: Computation, parameter: str, whole: int) -> int:
  """Bytes of a fusion's operand that it reads: of one that it only slices, the slices."""
  total = 0
  for user in inside.values():
    for place, name in enumerate(user.operands):
      if name != parameter:
        continue
      if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        total += padded_bytes(user.shapes)
      elif user.opcode == "dynamic-update-slice" and place == 0:
        pass  # written in place
      elif user.opcode == "bitcast":
        total += _read_of(inside, user.name, whole)
      else:
        return whole
  return total


def _written_by(inside: Computation, root: Instruction, whole: int) -> int:
  """Bytes that a fusion writes: of a dynamic-update-slice, the slice."""
  if root.opcode == "dynamic-update-slice":
    return padded_bytes(inside[root.operands[1]].shapes)
  if root.opcode == "bitcast":
    return _written_by(inside, inside[root.operands[0]], whole)
  if root.opcode == "tuple":
    return sum(
      _written_by(inside, part, padded_bytes(s for s in part.shapes if s.in_main_memory))
      for part in (inside[name] for name in root.operands)
    )
  return whole


def _convolution_flops(i: Instruction, lhs: Shape, rhs: Shape) -> int:
  """2 · batch · features out · features in (of a group) · pairs of (output, kernel) positions.

  A pair counts where it meets a number: not the padding, not a hole of a dilated input. So forward
  and both gradients of a convolution count the same, and a batched product that libtpu writes as a
  convolution counts as the product that it is.
  """
  labels = i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
  of_lhs, of_rhs = labels.split("->")[0].split("_")
  of_out = labels.split("->")[1]
  out = i.shapes[0]
  window = _window(i.attribute(r"window=\{([^}]*)\}") or "")
  pairs = 1
  for label in (c for c in of_out if c.isdigit()):
    axis = int(label)
    pairs *= _pairs(
      size_in=lhs.dims[of_lhs.index(label)],
      size_out=out.dims[of_out.index(label)],
      kernel=rhs.dims[of_rhs.index(label)],
      **{key: values[axis] for key, values in window.items()},
    )
  batch, features = (out.dims[of_out.index(c)] for c in "bf")
  return 2 * batch * features * rhs.dims[of_rhs.index("i")] * pairs


def _window(text: str) -> dict[str, list]:
  """{size=3x3 pad=1_1x1_1 ...} -> per spatial axis: stride, padding before, both dilations."""
  given = dict(part.split("=") for part in text.split())
  count = len(given["size"].split("x")) if "size" in given else 0

  def numbers(key, default):
    return [int(v) for v in given[key].split("x")] if key in given else [default] * count

  pads = given["pad"].split("x") if "pad" in given else ["0_0"] * count
  return {
    "stride": numbers("stride", 1),
    "pad": [int(p.split("_")[0]) for p in pads],
    "lhs_dilate": numbers("lhs_dilate", 1),
    "rhs_dilate": numbers("rhs_dilate", 1),
  }


@functools.cache
def _pairs(size_in, size_out, kernel, stride, pad, lhs_dilate, rhs_dilate) -> int:
  """(output position, kernel position) that meet an input, along one axis."""
  extent = (size_in - 1) * lhs_dilate  # place of the last input
  if kernel > size_out:  # go through the shorter side
    return sum(
      _hits(o * stride - pad, rhs_dilate, kernel, lhs_dilate, extent) for o in range(size_out)
    )
  return sum(
    _hits(k * rhs_dilate - pad, stride, size_out, lhs_dilate, extent) for k in range(kernel)
  )


def _hits(start: int, step: int, count: int, every: int, extent: int) -> int:
  """How many of start + n · step, n < count, are multiples of `every` in [0, extent]."""
  places = range(start, start + count * step, step)
  return sum(0 <= place <= extent and place % every == 0 for place in places)


def _group(attributes: str, devices: int) -> int:
  """Devices in one group of a collective, in the three ways in which XLA writes them."""
  # mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], ... {'axis_0'}
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in named) if named else devices
  # [groups,devices]<=[...]
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
    return int(iota[2])
  # {{0,1},{2,3}}
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(listed[1].split(","))
  return devices
