"""What became of the sharding rules: tables, and a check that nothing stays replicated by mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from cc_jax.errors import UserError
from cc_jax.models.params import flatten
from cc_jax.parallel.mesh import AXES
from cc_jax.parallel.rules import _rule, _wanted
from cc_jax.text import align_table

MAX_REPLICATED_RATIO = 0.02  # of the bytes that the rules should cut


# What became of it.


def unexpectedly_replicated(tree: Any, mesh: Mesh | AbstractMesh) -> tuple[int, dict[str, int]]:
  """(bytes that RULES should cut, path -> bytes of those of them that lie whole along an axis).

  Looks at the arrays' own shardings, whoever placed them; `tree` may hold placed abstract arrays.
  """
  total, whole = 0, {}
  for name, x in flatten(tree).items():
    rule = _rule(name, None)
    wanted = _wanted(rule, mesh)
    if not wanted or x.size < rule.above:
      continue
    total += x.size * x.dtype.itemsize
    if not wanted.keys() <= set(jax.tree.leaves(tuple(x.sharding.spec))):
      whole[name] = x.size * x.dtype.itemsize
  return total, whole


def check_sharding(tree: Any, mesh: Mesh | AbstractMesh) -> None:
  """Raises UserError if more than MAX_WHOLE of the bytes that RULES should cut are not."""
  total, whole = unexpectedly_replicated(tree, mesh)
  share = sum(whole.values()) / max(total, 1)
  if share > MAX_REPLICATED_RATIO:
    names = sorted(whole, key=lambda name: -whole[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    sizes = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in AXES[1:])
    raise UserError(
      f"{share:.0%} of the bytes that should be cut lie whole on every device ({sizes}): "
      f"{', '.join(names[:3])}{more}; choose sizes that divide these shapes"
    )


def describe_sharding(parts: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> str:
  """The table of what is cut how: a row for each network of each part and each kind of cut.

  Args:
    parts: name -> tree of placed arrays, e.g. {'trained': ..., 'frozen': ...}.
  """
  groups: dict[tuple[str, str, str], list[float]] = {}
  for part, tree in parts.items():
    for name, x in flatten(tree).items():
      network = name.replace("/", ".").split(".")[0] if isinstance(tree, dict) else "all"
      axes = jax.tree.leaves(tuple(x.sharding.spec))
      row = groups.setdefault((part, network, " x ".join(sorted(axes)) or "whole"), [0, 0, 0])
      itemsize = x.dtype.itemsize
      local = math.prod(x.sharding.shard_shape(x.shape)) * itemsize
      for i, value in enumerate((1, x.size * itemsize, local)):
        row[i] += value
  rows = [("part", "network", "cut over", "arrays", "MiB", "MiB a device")]
  rows += [
    (*key, str(n), f"{size / 2**20:,.1f}", f"{local / 2**20:,.1f}")
    for key, (n, size, local) in groups.items()
  ]
  size, local = (sum(row[i] for row in groups.values()) / 2**20 for i in (1, 2))
  rows.append(("all", "", "", "", f"{size:,.1f}", f"{local:,.1f}"))
  return align_table(rows, left=3)
