"""Plans as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cc_jax.plan.estimate import REACHED, TRUST, CompiledPlan, all_bytes, chip_bytes
from cc_jax.plan.lower import AbstractProgram
from cc_jax.plan.topology import Slice
from cc_jax.text import align_table

# What is told.


def state_table(work: AbstractProgram) -> str:
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
  return align_table(rows, left=1)


def _is_whole(leaf: Any) -> bool:
  return tuple(leaf.sharding.shard_shape(leaf.shape)) == tuple(leaf.shape)


def describe_plan(plan: CompiledPlan, what: str) -> str:
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
    align_table(rows, left=1), "",
    f"FLOPs a chip        {n['flops']:.4g} ({n['flops'] * plan.count / plan.images:.4g} an image)",
    f"bytes moved a chip  {n['bytes_moved']:.4g}",
  ]  # fmt: skip
  rows = [("collective", "runs", "output MiB a chip")]
  rows += [
    (kind, f"{own['runs']:g}", f"{own['output_bytes'] / 2**20:,.2f}")
    for kind, own in n["collectives"].items()
  ]
  lines += ["", align_table(rows, left=1)] if len(rows) > 1 else ["no collectives"]
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


def _error_sources(plan: CompiledPlan) -> list[str]:
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


def describe_truth(plan: CompiledPlan, truth: Mapping[str, Any]) -> str:
  seconds, memory = truth["seconds"], truth["memory"]
  return "\n".join([
    f"measured step       {seconds:.4g} s; the estimate is {plan.estimate.seconds / seconds:.2f} "
    f"times that; {100 * plan.program.flops / seconds / plan.chip.flops:.1f} % of the chip's peak",
    f"measured memory     {memory / 2**30:.3f} GiB at its peak; the plan says "
    f"{plan.memory.total / 2**30:.3f}"
    if memory
    else "measured memory     this device does not tell it",
  ])


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
