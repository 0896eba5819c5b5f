"""Collectives of a compiled program: which, how many bytes, among how many devices."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from cc_jax.plan.hlo_text import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction in which devices exchange data."""

  kind: str  # one of KINDS
  bytes: int  # of its output on one device
  group: int  # devices that take part
  runs: float

  def sent_bytes(self) -> float:
    """What one device sends in one run by the usual ring algorithms.

    An all-reduce is a reduce-scatter and an all-gather: 2 (n - 1) / n of its bytes. A
    reduce-scatter's output is an n-th of its input.
    """
    n = self.group
    ratios = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return self.bytes * ratios.get(self.kind, (n - 1) / n)


def find_collective(
  i: Instruction, computations: Mapping[str, Computation], devices: int, runs: float
) -> Collective | None:
  """The instruction as a collective, or the collective that is fused into it.

  libtpu runs some in the background: a fusion that starts it, others that compute meanwhile and one
  that ends it all contain the collective. Only the one that starts it counts.
  """
  kind, shapes, source = i.opcode.removesuffix("-start"), i.results, i
  if kind not in KINDS:
    fused = [
      (name, inner)
      for name in i.called
      for inner in computations[name].values()
      if inner.opcode in KINDS
    ]
    if not fused:
      return None
    name, source = fused[0]
    starts = any('"AsyncCollectiveStart"' in x.attributes for x in computations[name].values())
    if "chain_id=" in source.attributes and not starts:
      return None
    kind, shapes = source.opcode, source.shapes
    if name.startswith("all-reduce-scatter"):  # libtpu's name for the two in one
      kind, shapes = "reduce-scatter", i.shapes
  return Collective(
    kind, sum(shape.bytes for shape in shapes), group_size(source.attributes, devices), runs
  )


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[float, float]]:
  """kind -> (runs, output bytes of all runs), the largest first."""
  totals: dict[str, tuple[float, float]] = {}
  for c in collectives:
    runs, size = totals.get(c.kind, (0, 0))
    totals[c.kind] = (runs + c.runs, size + c.runs * c.bytes)
  return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def group_size(attributes: str, devices: int) -> int:
  """Devices in one group of a collective, in the three ways in which XLA writes them."""
  # mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], ... {'axis_0'}
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes) if axes else devices
  # [groups,devices]<=[...]
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
    return int(iota[2])
  # {{0,1},{2,3}}
  if first := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(first[1].split(","))
  return devices
