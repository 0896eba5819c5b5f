"""Plans as text."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cc_jax.parallel.sharding_report import align_table
from cc_jax.plan.estimate import (
  BANDWIDTH_RATIO,
  KERNEL_RATIO,
  TOLERANCE,
  CompiledPlan,
  all_bytes,
  chip_bytes,
)
from cc_jax.plan.lower import AbstractProgram
from cc_jax.plan.topology import Slice

_LABELS = {"average": "EMA"}  # of parts whose name in --json is another


def state_table(program: AbstractProgram) -> str:
  """What is kept on the chips between two steps, and the gradients of a step."""
  rows = [("kind", "GB in all", "GB a chip", "of it replicated")]
  parts = {k: v for k, v in program.parts.items() if "batch" not in k}
  if "adapter" in parts and "Adam" in parts:
    parts["gradients"] = parts["adapter"]  # in float32 and sharded like the weights
  totals = np.zeros(3)
  for name, tree in parts.items():
    replicated = [leaf for leaf in jax.tree.leaves(tree) if _is_replicated(leaf)]
    numbers = np.asarray([all_bytes(tree), chip_bytes(tree), all_bytes(replicated)])
    totals += numbers
    rows.append((_LABELS.get(name, name), *(f"{n / 1e9:.4g}" for n in numbers)))
  rows.append(("total", *(f"{n / 1e9:.4g}" for n in totals)))
  return align_table(rows, left=1)


def _is_replicated(leaf: Any) -> bool:
  return tuple(leaf.sharding.shard_shape(leaf.shape)) == tuple(leaf.shape)


def describe_plan(plan: CompiledPlan, what: str) -> str:
  """Memory, work, collectives and estimated time of a plan."""
  n, chip, memory = plan.numbers(), plan.chip, plan.memory
  sizes = {_LABELS.get(name, name): size for name, size in memory.parts.items()} | {
    "padding of these": memory.padding,
    "activations, gradients, the rest": memory.temporaries,
    "other outputs": memory.outputs,
    "program": memory.code,
    "total": memory.total,
  }
  if not math.isinf(chip.memory):
    sizes["the chip has"] = chip.memory
  rows = [("memory of a chip", "GiB")]
  rows += [(name, f"{size / 2**30:.3f}") for name, size in sizes.items()]
  lines = [
    f"{what} on {plan.chips} x {chip.name}, {plan.images} images a run", "",
    align_table(rows, left=1), "",
    f"FLOPs a chip        {n['flops']:.4g} ({n['flops'] * plan.chips / plan.images:.4g} an image), "
    f"of them the model's {n['model_flops']:.4g}",
    f"bytes moved a chip  {n['bytes_moved']:.4g}",
  ]  # fmt: skip
  rows = [("collective", "runs", "output MiB a chip")]
  rows += [
    (kind, f"{total['runs']:g}", f"{total['output_bytes'] / 2**20:,.2f}")
    for kind, total in n["collectives"].items()
  ]
  lines += ["", align_table(rows, left=1)] if len(rows) > 1 else ["no collectives"]
  (low, high), e = n["seconds_range"], plan.estimate
  lines += [
    "",
    f"estimated step      {e.seconds:.4g} s ({low:.3g} to {high:.3g}): products {e.products:.3g}, "
    f"other traffic {e.memory:.3g}, collectives {e.collectives:.3g}",
    f"utilisation         mfu {100 * n['mfu']:.1f} %, hfu {100 * n['hfu']:.1f} % of "
    f"{chip.flops / 1e12:,.4g} TFLOP/s",
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
    f"Method: products take {cycles} or their traffic, the rest its traffic at "
    f"{BANDWIDTH_RATIO:.0%} of {chip.bandwidth / 1e9:,.0f} GB/s, collectives what a ring sends at "
    f"{chip.interconnect / 1e9:,.0f} GB/s, attention kernels their FLOPs at heads of "
    f"{chip.kernel_width} or a multiple at {KERNEL_RATIO:.0%} of the peak; nothing overlaps.",
    f"Errors: {TOLERANCE:.0%} either way; a collective that uses one axis of the torus alone is "
    f"{plan.dimensions} times as slow (the upper end); reading data, saving and drawing samples "
    "are not in it.",
    f"Numbers of the chip: {chip.source}",
  ]
  for target, runs in program.not_counted.items():
    lines.append(f"Not counted: the work of {runs:g} calls of {target}.")
  for name in sorted(program.loops_counted_once):
    lines.append(f"Counted once: the loop {name}, whose trip count is not in the program.")
  return lines


def describe_measured(plan: CompiledPlan, measured: Mapping[str, Any]) -> str:
  """What `measure_program` returned, beside the plan."""
  seconds, memory = measured["seconds"], measured["memory"]
  return "\n".join([
    f"measured step       {seconds:.4g} s; the estimate is {plan.estimate.seconds / seconds:.2f} "
    f"times that; mfu {100 * plan.model_flops / seconds / plan.chip.flops:.1f} % of the peak",
    f"measured memory     {memory / 2**30:.3f} GiB at its peak; the plan says "
    f"{plan.memory.total / 2**30:.3f}"
    if memory
    else "measured memory     this device does not report it",
  ])


def describe_refusal(refusal: Mapping[str, Any], slice_: Slice) -> str:
  """What does not fit, and what does."""
  gib, memory = 2**30, refusal["memory"]
  lines = [
    f"{refusal['images_per_chip']} images a chip do not fit on {len(slice_.devices)} x "
    f"{slice_.chip.name}: {memory['total'] / gib:.2f} GiB of {memory['chip'] / gib:.2f}"
  ]
  lines += [f"  {b} images a chip: {n / gib:.2f} GiB" for b, n in refusal["tried"].items()]
  if largest := refusal["largest_images_per_chip"]:
    lines.append(f"the largest that fits, compiled: --batch_per_chip={largest}")
  else:
    lines.append(
      "not one image a chip fits: shard more (--config.mesh.fsdp), keep less for the backward "
      "pass, or take a chip with more memory"
    )
  return "\n".join(lines)
