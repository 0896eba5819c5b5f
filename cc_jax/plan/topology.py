"""The devices that a program is planned for: a TPU slice that is not there, or the local ones."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from cc_jax.errors import UserError, one_line
from cc_jax.plan import chips
from cc_jax.plan.chips import Chip
from cc_jax.plan.measure import measure_chip


class Slice(NamedTuple):
  """Devices of one kind."""

  devices: Sequence[Any]
  chip: Chip
  sides: tuple[int, ...]  # of the torus


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
  """'v5e:4x4' -> the chip, and the sides of the slice.

  Raises:
    UserError: it names no TPU of chips.CHIPS, or no sides.
  """
  known = [chip.name for chip in chips.CHIPS if chip.clock]
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if not match or match[1] not in known:
    raise UserError(
      f"--topology={name!r} is no slice; write one of {', '.join(known)}, a colon and its sides, "
      "such as v5e:4x4 or v5p:2x2x4, or local"
    )
  return chips.find(match[1]), tuple(int(side) for side in match[2].split("x"))


def libtpu_options(chip: Chip, sides: Sequence[int]) -> dict[str, Any]:
  """What libtpu must be told of a slice besides its name.

  It takes a host to have 2 x 2 x 1 chips, and refuses slices that are smaller; and each of the two
  cores of a v4 to be a device, which JAX on a v4 joins to one.
  """
  options: dict[str, Any] = {}
  if min(sides[:2]) < 2:
    options["chips_per_host_bounds"] = (min(2, sides[0]), min(2, sides[1]), 1)
  if chip.name == "v4":
    options["chip_config_name"] = "megacore"
  return options


def find_slice(name: str, dtype: str) -> Slice:
  """The devices of a topology; without a TPU programs can be compiled for them, not run.

  Raises:
    UserError: see `parse_topology`; libtpu is missing, or knows no such slice.
  """
  if name == "local":
    devices = jax.devices()
    chip = chips.find(devices[0].device_kind) or measure_chip(devices, dtype)
    return Slice(devices, chip, (len(devices),))
  chip, sides = parse_topology(name)
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud machine for its metadata
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f"--topology={name} needs libtpu, TPUs' compiler; pip install -e '.[tpu]'")
  try:
    options = libtpu_options(chip, sides)
    description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  except Exception as error:  # whatever the plugin raises
    remedy = "write the sides of a slice that can be rented, such as v5e:2x2 or v5p:2x2x1"
    raise UserError(f"--topology={name}: {one_line(error)[:200]}; {remedy}") from error
  return Slice(description.devices, chip, sides)
