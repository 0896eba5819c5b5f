"""Parses the text of a compiled program (`compiled.as_text()`) into shapes and instructions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

from cc_jax.errors import UserError

# Instructions that take no time: they name memory, or pass on the results of others.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
         "partition-id", "replica-id", "optimization-barrier", "add-dependency")  # fmt: skip
# Custom calls that take no time.
_BOOKKEEPING = re.compile(r"AllocateBuffer|Sharding|SPMD\w+|annotate_device_placement|MoveTo\w+|"
                          r"AssumeGatherIndicesInBound|ConcatBitcast|AsyncCollective(Start|Done)|"
                          r"GatherScatterIndicesBitpacked")  # fmt: skip
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_NO_ESTIMATE = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array; `layout` is the text in its braces: minor-to-major order, tiles, memory."""

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
    """In memory: TPUs pad the minor dimensions to multiples of a tile, e.g. 8 x 128."""
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
    """False in a TPU's on-chip memories: S(1) is its vector memory, S(6) its scalar memory."""
    return not re.search(r"S\(\d+\)", self.layout)


def padded_bytes(shapes: Iterable[Shape]) -> int:
  """Bytes in memory of several arrays, padding included."""
  return sum(shape.padded_bytes for shape in shapes)


_ORDER = re.compile(r"\d+")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_END = re.compile(r"\}(?:$| |, execution_thread)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")


@dataclasses.dataclass
class Instruction:
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # more than one for a tuple
  operands: tuple[str, ...]
  arguments: str  # the text between the parentheses
  attributes: str  # and after them
  root: bool

  def attribute(self, pattern: str) -> str | None:
    match = re.search(pattern, self.attributes)
    return match[1] if match else None

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Computations that this instruction runs; not the scalar function of a reduction."""
    if self.opcode in ("reduce", "all-reduce", "all-reduce-start", "reduce-scatter", "scatter",
                       "reduce-window", "select-and-scatter", "sort", "map"):  # fmt: skip
      return ()
    names = _CALLED.findall(self.attributes)
    branches = self.attribute(r"branch_computations=\{([^}]*)\}")
    return (*names, *_NAME.findall(branches or ""))

  @property
  def results(self) -> tuple[Shape, ...]:
    """The results alone: a `-start` lists its operands too, before or (a copy) after them."""
    count = len(self.operands)
    if not self.opcode.endswith("-start") or len(self.shapes) <= count:
      return self.shapes
    return self.shapes[:1] if self.opcode == "copy-start" else self.shapes[count : 2 * count]

  @property
  def target(self) -> str | None:
    """What a custom call calls, unless that takes no time."""
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
    """libtpu's estimate of the time at the chip's clock; None elsewhere, and where it has none."""
    cycles = self.attribute(r'"estimated_cycles":"(\d+)"')
    return int(cycles) if cycles and int(cycles) != _NO_ESTIMATE else None


class Computation(dict):
  """Name -> Instruction, in the program's order."""

  @property
  def root(self) -> Instruction:
    return next(i for i in self.values() if i.root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.arguments): i for i in self.values() if i.opcode == "parameter"}

  def resolve(self, name: str, other: Computation | None = None) -> Instruction:
    """What `name` is a copy or a conversion of; names are looked up here, then in `other`."""
    i = self[name] if name in self else other[name]
    while i.opcode in ("copy", "bitcast", "convert") and len(i.operands) == 1:
      i = self[i.operands[0]]
    return i


def parse(text: str) -> tuple[dict[str, Computation], str | None]:
  """(name -> computation, the name of the entry computation or None)."""
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is None:
      start = _COMPUTATION.match(line)
      if start and " -> " in line:
        current = computations.setdefault(start[2], Computation())
        entry = start[2] if start[1] else entry
    elif _END.match(line):
      current = None
    elif start := _INSTRUCTION.match(line):
      last = current[start[2]] = _instruction(start[2], bool(start[1]), line[start.end() :])
    else:  # attributes may go on: Pallas kernels have metadata of several lines
      last.attributes += line
  return computations, entry


def _instruction(name: str, root: bool, rest: str) -> Instruction:
  """`SHAPE opcode(arguments), attributes`; the shape of a tuple has parentheses, too."""
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
  """The index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.finditer(r"[()]", text[opening:]):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return opening + match.start()
  raise UserError(f"this is no compiled program: unbalanced parentheses in {text[:80]!r}")


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  match = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
  if not match:
    raise UserError(f"this program has arrays of a type that hlo_text.py does not know: {dtype}")
  return int(match[1])
