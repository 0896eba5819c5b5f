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
from collections.abc import Iterator

from cc_jax.errors import UserError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")  # fmt: skip
# Instructions that stand for a place in memory, or hand on what others have made.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
         "partition-id", "replica-id", "optimization-barrier", "add-dependency")  # fmt: skip
# Custom calls that are no work.
_BOOKKEEPING = re.compile(r"AllocateBuffer|Sharding|SPMD\w+|annotate_device_placement|MoveTo\w+|"
                          r"AssumeGatherIndicesInBound|ConcatBitcast|AsyncCollective(Start|Done)|"
                          r"GatherScatterIndicesBitpacked")  # fmt: skip
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array. `layout` is what stands in its braces: minor-to-major order, tiles, memory."""

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without padding: what is sent to other devices."""
    return math.ceil(self.size * _bits(self.dtype) / 8)

  @property
  def padded_bytes(self) -> int:
    """In memory: TPUs fill the minor dimensions up to whole tiles, e.g. 8 x 128."""
    dims = [self.dims[int(i)] for i in reversed(_ORDER.findall(self.layout.split(":")[0]))]
    tile = _TILE.search(self.layout)
    if tile and dims:
      sides = [int(side) for side in tile[1].split(",")]
      dims = [1] * (len(sides) - len(dims)) + dims
      for i, side in enumerate(reversed(sides), 1):
        dims[-i] = -(-dims[-i] // side) * side
    return math.ceil(math.prod(dims or self.dims) * _bits(self.dtype) / 8)

  @property
  def in_main_memory(self) -> bool:
    """Not in a TPU's on-chip memories: S(1) is its vector memory, S(6) its scalar memory."""
    return not re.search(r"S\(\d+\)", self.layout)


_ORDER = re.compile(r"\d+")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass
class Instruction:
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # more than one for a tuple
  operands: tuple[str, ...]
  arguments: str  # between the parentheses
  attributes: str  # behind them
  root: bool

  def attribute(self, pattern: str) -> str | None:
    found = re.search(pattern, self.attributes)
    return found[1] if found else None

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Computations that this instruction runs; not the scalar function of a reduction."""
    if self.opcode in ("reduce", "all-reduce", "all-reduce-start", "reduce-scatter", "scatter",
                       "reduce-window", "select-and-scatter", "sort", "map"):  # fmt: skip
      return ()
    names = re.findall(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)", self.attributes)
    branches = self.attribute(r"branch_computations=\{([^}]*)\}")
    either = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
    return (*names, *(_NAME.findall(branches) if branches else ()), *either)

  @property
  def results(self) -> tuple[Shape, ...]:
    """What comes out; a `-start` hands on what goes in as well, before or (a copy) behind it."""
    count = len(self.operands)
    if not self.opcode.endswith("-start") or len(self.shapes) <= count:
      return self.shapes
    return self.shapes[:1] if self.opcode == "copy-start" else self.shapes[count : 2 * count]

  @property
  def target(self) -> str | None:
    """Whom a custom call calls, unless that is no work."""
    name = self.opcode == "custom-call" and self.attribute(r'custom_call_target="([^"]+)"')
    return name if name and not _BOOKKEEPING.fullmatch(name) else None

  @property
  def free(self) -> bool:
    """Takes no time: `-done` and `-update` belong to a `-start`."""
    return (
      self.opcode in _FREE
      or self.opcode.endswith(("-done", "-update"))
      or (self.opcode == "custom-call" and not self.target)
    )

  @functools.cached_property
  def cycles(self) -> int | None:
    """libtpu's estimate of the time at the chip's clock; None elsewhere."""
    found = self.attribute(r'"estimated_cycles":"(\d+)"')
    return int(found) if found else None


class Computation(dict):
  """Name -> Instruction, in the program's order."""

  @property
  def root(self) -> Instruction:
    return next(i for i in self.values() if i.root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.arguments): i for i in self.values() if i.opcode == "parameter"}


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
    self.computations, self.entry = _parse(text)
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
    compare, inputs = condition.root, {}
    scope = condition
    if compare.opcode == "fusion":
      scope = self.computations[compare.called[0]]
      inputs = {p.name: compare.operands[n] for n, p in scope.parameters.items()}
      compare = scope.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
      return None

    def resolve(name):  # an operand of the comparison, in the condition
      return _behind(condition, inputs[name] if name in inputs else name, scope)

    counter, limit = (resolve(name) for name in compare.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
      return None
    index = int(counter.attribute(r"index=(\d+)"))
    body = self.computations[loop.attribute(r"body=%?([\w.\-]+)")]
    stride = self._stride(body, index)
    start = around[loop.operands[0]]
    first = _behind(around, start.operands[index]) if start.opcode == "tuple" else None
    if first is None or first.opcode != "constant" or not stride:
      return None
    return max(0, -(-(int(limit.arguments) - int(first.arguments)) // stride))

  def _stride(self, body: Computation, index: int) -> int | None:
    """What the body adds to the loop's counter."""
    new = _behind(body, body.root.operands[index])
    scope, inputs = body, {}
    if new.opcode == "fusion":
      scope = self.computations[new.called[0]]
      inputs = {p.name: new.operands[n] for n, p in scope.parameters.items()}
      new = scope.root
    if new.opcode != "add":
      return None
    parts = [_behind(body, inputs[n] if n in inputs else n, scope) for n in new.operands]
    constants = [int(p.arguments) for p in parts if p.opcode == "constant"]
    return constants[0] if len(constants) == 1 else None

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
    read = [sum(s.padded_bytes for s in shapes) for shapes in operands]
    written = sum(s.padded_bytes for s in i.results if s.in_main_memory)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
      read[0] = min(read[0], sum(s.padded_bytes for s in i.shapes)) if read[0] else 0
    elif i.opcode in ("dynamic-update-slice", "scatter"):
      update = here[i.operands[1 if i.opcode == "dynamic-update-slice" else 2]].shapes
      read[0] = 0
      written = sum(s.padded_bytes for s in update) if written else 0
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


def _parse(text: str) -> tuple[dict[str, Computation], str | None]:
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is None:
      start = _COMPUTATION.match(line)
      if start and " -> " in line:
        current = computations.setdefault(start[2], Computation())
        entry = start[2] if start[1] else entry
    elif line.startswith("}"):
      current = None
    elif start := _INSTRUCTION.match(line):
      current[start[2]] = _instruction(start[2], bool(start[1]), line[start.end() :])
  return computations, entry


def _instruction(name: str, root: bool, rest: str) -> Instruction:
  """`SHAPE opcode(arguments), attributes`; a tuple's shape has parentheses of its own."""
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  arguments = rest[opening + 1 : closing]
  return Instruction(
    name=name,
    opcode=rest[:opening],
    shapes=tuple(
      Shape(dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
      for dtype, dims, layout in _SHAPE.findall(shape)
    ),
    operands=tuple(_NAME.findall(arguments)),
    arguments=arguments,
    attributes=rest[closing + 1 :],
    root=root,
  )


def _closing(text: str, opening: int) -> int:
  """The place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for found in re.finditer(r"[()]", text[opening:]):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return opening + found.start()
  raise UserError(f"this is no compiled program: unbalanced parentheses in {text[:80]!r}")


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
  if not found:
    raise UserError(f"this program has arrays of a type that hlo.py does not know: {dtype}")
  return int(found[1])


def _behind(computation: Computation, name: str, other: Computation | None = None) -> Instruction:
  """What `name` is a copy or a change of type of; looked up in `other` too."""
  found = computation[name] if name in computation else other[name]
  while found.opcode in ("copy", "bitcast", "convert") and len(found.operands) == 1:
    found = computation[found.operands[0]]
  return found


def _read_of(inside: Computation, parameter: str, whole: int) -> int:
  """Bytes of a fusion's operand that it reads: of one that it only slices, the slices."""
  total = 0
  for user in inside.values():
    for place, name in enumerate(user.operands):
      if name != parameter:
        continue
      if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        total += sum(s.padded_bytes for s in user.shapes)
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
    return sum(s.padded_bytes for s in inside[root.operands[1]].shapes)
  if root.opcode == "bitcast":
    return _written_by(inside, inside[root.operands[0]], whole)
  if root.opcode == "tuple":
    return sum(
      _written_by(inside, part, sum(s.padded_bytes for s in part.shapes if s.in_main_memory))
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
