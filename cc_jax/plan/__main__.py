"""Says, before a chip is rented, whether a run fits on it and what a step costs.

    python -m cc_jax.plan --config=configs/sdxl.py --topology=v5e:8x8 --config.mesh.fsdp=4
    python -m cc_jax.plan --config=configs/sd15.py --topology=v6e:4x4 --batch_per_chip=8 --json
    python -m cc_jax.plan --config=... --topology=v5e:2x2 --what=generate
    python -m cc_jax.plan --config=... --topology=v5e:2x2 --what=state
    python -m cc_jax.plan --topology=local

Compiles the real training step, or the sampler, for a TPU slice on a machine that has none (libtpu:
`pip install -e '.[tpu]'`), or for the local devices. Needs no weights. `--what=state` compiles
nothing: it prints what lies on every chip between two steps. `--topology=local` also runs the step
and sets the truth beside the estimate. The exit code is 1 if the program does not fit; the largest
batch that does is then looked for.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from cc_jax import errors
from cc_jax.errors import UserError
from cc_jax.parallel import rules as sharding
from cc_jax.plan.estimate import REACHED, TRUST, Overflow, Plan, all_bytes, chip_bytes, make_plan
from cc_jax.plan.lower import Slice, Work, find_slice, generate_work, train_work
from cc_jax.training.telemetry import align

WHATS = ("train", "generate", "state")


# How many images.


class Search(NamedTuple):
  """What was found when the batch that was asked for did not fit."""

  largest: int  # images a chip, compiled and seen to fit; 0 = none
  tried: dict[int, float]  # images a chip -> bytes needed


def largest_batch(
  asked: int, needed: float, limit: float, need: Callable[[int], float]
) -> Search:
  """The largest batch a chip that fits: by a straight line through two compiles, and a third.

  Where the third does not fit, the line is drawn again.

  Args:
    asked: images a chip, which do not fit.
    needed: bytes that they need; NaN where the compiler does not say.
    limit: bytes that there are.
    need: compiles for a number of images a chip and returns the bytes that these need.
  """
  tried, batch = {asked: needed}, asked // 2
  while batch:
    tried[batch] = need(batch)
    floor = max((b for b, n in tried.items() if n <= limit), default=0)
    ceiling = min(b for b, n in tried.items() if not n <= limit) - 1
    if floor == batch and len(tried) > 2 or floor >= ceiling:
      return Search(floor, tried)
    (one, at_one), (two, at_two) = sorted(tried.items())[:2]
    slope = (at_two - at_one) / (two - one)
    middle = (floor + ceiling + 1) // 2
    guess = math.floor(one + (limit - at_one) / slope) if slope > 0 else middle
    batch = min(max(guess, floor, 1), ceiling)
    if batch in tried:
      return Search(floor, tried)
  return Search(0, tried)


# What is told.


def state_table(work: Work) -> str:
  """What lies on the chips between two steps, and the gradients of a step."""
  rows = [("kind", "GB in all", "GB a chip", "of it whole on every chip")]
  parts = {k: v for k, v in work.parts.items() if k != "batch"}
  if "adapter" in parts and "Adam" in parts:
    parts["gradients"] = parts["adapter"]  # in float32 and placed like the weights
  totals = np.zeros(3)
  for name, tree in parts.items():
    leaves = jax.tree.leaves(tree)
    numbers = np.asarray(
      [all_bytes(tree), chip_bytes(tree), all_bytes([x for x in leaves if _is_whole(x)])]
    )
    totals += numbers
    rows.append((name, *(f"{n / 1e9:.4g}" for n in numbers)))
  rows.append(("all", *(f"{n / 1e9:.4g}" for n in totals)))
  return align(rows, left=1)


def _is_whole(leaf: Any) -> bool:
  return tuple(leaf.sharding.shard_shape(leaf.shape)) == tuple(leaf.shape)


def describe(plan: Plan, what: str) -> str:
  """The plan for people."""
  n, gib, memory, chip = plan.numbers(), 2**30, plan.memory, plan.chip
  low, high = n["seconds_range"]
  rows = [("memory of a chip", "GiB")]
  rows += [(name, f"{size / gib:.3f}") for name, size in memory.parts.items()]
  rows += [
    ("padding of these", f"{memory.padding / gib:.3f}"),
    ("activations, gradients, the rest", f"{memory.temporaries / gib:.3f}"),
    ("outputs apart from these", f"{memory.outputs / gib:.3f}"),
    ("program", f"{memory.code / gib:.3f}"),
    ("all", f"{memory.total / gib:.3f}"),
  ]
  if not math.isinf(chip.memory):
    rows.append(("the chip has", f"{chip.memory / gib:.3f}"))
  lines = [
    f"{what} on {plan.count} x {chip.name}, {plan.images} images a run", "",
    align(rows, left=1), "",
    f"FLOPs a chip        {n['flops']:.4g} ({n['flops'] * plan.count / plan.images:.4g} an image)",
    f"bytes moved a chip  {n['bytes_moved']:.4g}",
  ]  # fmt: skip
  rows = [("collective", "runs", "output MiB a chip")]
  rows += [
    (kind, f"{own['runs']:g}", f"{own['output_bytes'] / 2**20:,.2f}")
    for kind, own in n["collectives"].items()
  ]
  lines += ["", align(rows, left=1)] if len(rows) > 1 else ["no collectives"]
  e = plan.estimate
  lines += [
    "",
    f"estimated step      {e.seconds:.4g} s ({low:.3g} to {high:.3g}): products {e.products:.3g}, "
    f"other traffic {e.memory:.3g}, collectives {e.collectives:.3g}",
    f"model FLOPs used    {100 * n['flops_utilisation']:.1f} % of {chip.flops / 1e12:,.4g} TFLOP/s",
    f"images/s            {n['images_per_second']:.4g} "
    f"({n['images_per_second_per_chip']:.4g} a chip)",
    f"chip-hours per million images  {n['chip_hours_per_million_images']:,.4g}",
    "",
    *_error_sources(plan),
  ]
  return "\n".join(lines)


def _error_sources(plan: Plan) -> list[str]:
  chip, program = plan.chip, plan.program
  cycles = "libtpu's cycles" if chip.clock else "FLOPs at the chip's peak"
  lines = [
    f"Method: products take {cycles} or their traffic, the rest its traffic at {REACHED:.0%} of "
    f"{chip.bandwidth / 1e9:,.0f} GB/s, collectives what a ring sends at "
    f"{chip.interconnect / 1e9:,.0f} GB/s; nothing overlaps.",
    f"Errors: {TRUST:.0%} either way; a collective that uses one axis of the torus alone is "
    f"{plan.dimensions} times as slow (the upper end); reading data, saving and drawing samples "
    "are not in it.",
    f"Numbers of the chip: {chip.source}",
  ]
  for target, times in program.opaque.items():
    lines.append(f"Not counted: the work of {times:g} calls of {target}.")
  for name in sorted(program.endless):
    lines.append(f"Counted once: the loop {name}, whose turns the program does not tell.")
  return lines


# The truth.


def run_here(plan: Plan, work: Work, *, steps: int = 5) -> dict[str, Any]:
  """Runs the compiled program on this machine: the best of some steps, and its peak of memory.

  The weights are constants: what a step costs does not depend on them.
  """

  def fill(leaf):
    value = 0.02 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
    return jnp.full(leaf.shape, value, leaf.dtype)

  places = jax.tree.map(lambda leaf: leaf.sharding, work.arguments)
  create = jax.jit(lambda: jax.tree.map(fill, work.arguments), out_shardings=places)
  first, *rest = create()
  times = []
  for _ in range(steps + 1):
    began = time.perf_counter()
    out = jax.block_until_ready(plan.compiled(first, *rest))
    times.append(time.perf_counter() - began)
    if isinstance(out, tuple) and jax.tree.structure(out[0]) == jax.tree.structure(first):
      first = out[0]  # the state was donated
  stats = jax.local_devices()[0].memory_stats() or {}
  return {"seconds": min(times[1:]), "memory": stats.get("peak_bytes_in_use")}


def describe_truth(plan: Plan, truth: Mapping[str, Any]) -> str:
  seconds, memory = truth["seconds"], truth["memory"]
  return "\n".join([
    f"measured step       {seconds:.4g} s; the estimate is {plan.estimate.seconds / seconds:.2f} "
    f"times that; {100 * plan.program.flops / seconds / plan.chip.flops:.1f} % of the chip's peak",
    f"measured memory     {memory / 2**30:.3f} GiB at its peak; the plan says "
    f"{plan.memory.total / 2**30:.3f}"
    if memory
    else "measured memory     this device does not tell it",
  ])


# The command line.


def plan_for(
  config: ml_collections.ConfigDict, place: Slice, what: str, batch_per_chip: int
) -> tuple[Plan | Overflow, Work]:
  """Plans one batch; 0 images a chip means the config's own global batch."""
  work, count = work_for(config, place, what, batch_per_chip)
  return make_plan(work, place, count), work


def work_for(
  config: ml_collections.ConfigDict, place: Slice, what: str, batch_per_chip: int
) -> tuple[Work, int]:
  """(the program, how many chips it runs on)."""
  config = config.copy_and_resolve_references()
  if batch_per_chip:
    config.train.batch_size = batch_per_chip * len(place.devices)
  mesh = sharding.make_mesh(config.mesh, config.train.batch_size, devices=place.devices)
  return (generate_work if what == "generate" else train_work)(config, mesh), mesh.size


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  settings = flags.FLAGS
  config, what, topology = settings.config, settings.what, settings.topology
  asked = settings.batch_per_chip
  if asked < 0:
    raise UserError(f"--batch_per_chip={asked}; it must be at least 1")
  local = topology == "local"
  if local:
    sharding.set_cpu_devices(config.mesh, config.train.batch_size)
  elif jax.config.jax_platforms is None:
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here; there is no TPU to look for
  place = find_slice(topology, config.train.dtype)
  if what == "state":
    print(state_table(work_for(config, place, what, asked)[0]))
    return

  plan, work = plan_for(config, place, what, asked)
  if isinstance(plan, Plan) and plan.fits:
    numbers, text = plan.numbers(), describe(plan, what)
    if local:
      truth = run_here(plan, work)
      numbers["measured"], text = truth, f"{text}\n\n{describe_truth(plan, truth)}"
    print(json.dumps(numbers, indent=2) if settings.json else text)
    return

  needed, limit = _need(plan)
  each = work.images // len(place.devices)

  def need(batch: int) -> float:
    print(f"compiling for {batch} images a chip ...", file=sys.stderr)
    return _need(plan_for(config, place, what, batch)[0])[0]

  search = largest_batch(each, needed, limit, need)
  refusal = {
    "fits": False,
    "images_per_chip": each,
    "memory": {"total": needed, "chip": limit},
    "largest_images_per_chip": search.largest,
    "tried": {str(batch): size for batch, size in search.tried.items()},
  }
  print(json.dumps(refusal, indent=2) if settings.json else describe_refusal(refusal, place))
  sys.exit(1)


def _need(plan: Plan | Overflow) -> tuple[float, float]:
  """(bytes needed, bytes there are)."""
  if isinstance(plan, Overflow):
    return plan.needed, plan.limit
  return plan.memory.total, plan.chip.memory


def describe_refusal(refusal: Mapping[str, Any], place: Slice) -> str:
  gib, memory = 2**30, refusal["memory"]
  lines = [
    f"{refusal['images_per_chip']} images a chip do not fit on {len(place.devices)} x "
    f"{place.chip.name}: "
    f"{memory['total'] / gib:.2f} GiB of {memory['chip'] / gib:.2f}"
  ]
  lines += [f"  {b} images a chip: {n / gib:.2f} GiB" for b, n in refusal["tried"].items()]
  largest = refusal["largest_images_per_chip"]
  if largest:
    lines.append(f"the largest that fits, compiled: --batch_per_chip={largest}")
  else:
    lines.append(
      "not one image a chip fits: shard more (--config.mesh.fsdp), keep less for the backward "
      "pass, or take a chip with more memory"
    )
  return "\n".join(lines)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/subjects3d.py")
  flags.DEFINE_string("topology", "local", "A slice, such as v5e:4x4 or v5p:2x2x4, or local.")
  flags.DEFINE_enum("what", "train", WHATS, "The program; state compiles nothing.")
  flags.DEFINE_integer("batch_per_chip", 0, "Images a chip; 0 = the config's own global batch.")
  flags.DEFINE_bool("json", False, "Print JSON, in bytes and seconds.")


if __name__ == "__main__":
  errors.run(main, define_flags)
