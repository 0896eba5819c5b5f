"""What the sharding rules lead to: a table, and a check that nothing is replicated by mistake."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from cc_jax.errors import UserError
from cc_jax.models.params import flatten
from cc_jax.parallel.mesh import AXES
from cc_jax.parallel.rules import axes_in_use, find_rule

MAX_REPLICATED_RATIO = 0.02  # of the bytes that RULES should shard


def unexpectedly_replicated(tree: Any, mesh: Mesh | AbstractMesh) -> tuple[int, dict[str, int]]:
  """(bytes that RULES should shard, path -> bytes of those of them that an axis replicates)."""
  total, replicated = 0, {}
  for name, x in flatten(tree).items():
    rule = find_rule(name)
    axes = axes_in_use(rule, mesh).keys()
    if axes and x.size >= rule.min_size:
      size = x.size * x.dtype.itemsize
      total += size
      if not axes <= set(jax.tree.leaves(tuple(x.sharding.spec))):
        replicated[name] = size
  return total, replicated


def check_sharding(tree: Any, mesh: Mesh | AbstractMesh) -> None:
  """Raises UserError if more than MAX_REPLICATED_RATIO of the bytes that RULES shard are not."""
  total, replicated = unexpectedly_replicated(tree, mesh)
  ratio = sum(replicated.values()) / max(total, 1)
  if ratio > MAX_REPLICATED_RATIO:
    names = sorted(replicated, key=lambda name: -replicated[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    sizes = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in AXES[1:])
    raise UserError(
      f"{ratio:.0%} of the bytes that should be sharded are replicated on every device ({sizes}): "
      f"{', '.join(names[:3])}{more}; choose sizes that divide these shapes"
    )


def describe_sharding(parts: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> str:
  """A table with a row for each network of each part and each set of axes that shards it.

  Args:
    parts: name -> tree of arrays with shardings, e.g. {'trained': ..., 'frozen': ...}.
  """
  groups: dict[tuple[str, str, str], list[float]] = {}
  for part, tree in parts.items():
    for name, x in flatten(tree).items():
      network = name.replace("/", ".").split(".")[0] if isinstance(tree, dict) else "all"
      axes = jax.tree.leaves(tuple(x.sharding.spec))
      key = part, network, " x ".join(sorted(axes)) or "replicated"
      local = math.prod(x.sharding.shard_shape(x.shape))
      sizes = 1, x.size * x.dtype.itemsize, local * x.dtype.itemsize
      groups[key] = [a + b for a, b in zip(groups.get(key, (0, 0, 0)), sizes)]
  rows = [("part", "network", "sharded over", "arrays", "MiB", "MiB a device")]
  rows += [
    (*key, str(n), f"{size / 2**20:,.1f}", f"{local / 2**20:,.1f}")
    for key, (n, size, local) in groups.items()
  ]
  size, local = (sum(row[i] for row in groups.values()) / 2**20 for i in (1, 2))
  rows.append(("all", "", "", "", f"{size:,.1f}", f"{local:,.1f}"))
  return align_table(rows, left=3)


def align_table(rows: Sequence[Sequence[str]], left: int) -> str:
  """A table in plain text; the first `left` columns are flush left, numbers flush right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
