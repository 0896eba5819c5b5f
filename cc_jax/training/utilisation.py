"""How much of the chips a step uses: `mfu` and `hfu` of the log.

mfu: the FLOPs that the step's mathematics needs (`plain_context`), the same on every backend and
with every memory saving. hfu: those of the compiled program, recomputed work and kernels included.
Both over the dense bf16 peak of cc_jax/plan/chips.py, whatever dtype the step computes in.
"""

import dataclasses
import functools
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from cc_jax.errors import one_line
from cc_jax.training.step import train_step
from cc_jax.training.step_context import StepContext
from cc_jax.training.telemetry import Telemetry


def plain_context(context: StepContext) -> StepContext:
  """The same step in the plainest words, whose FLOPs are the model's.

  Nothing is computed twice (no rematerialisation, and no accumulation, which encodes each picture
  for the contrastive losses first), attention is written out in products, and the whole batch lies
  on one device. Losses and gradients are the same. It is traced, and never compiled.
  """
  config = ml_collections.ConfigDict(context.config)
  config.train.remat_unet, config.train.remat_text = ("none",), "none"
  config.train.grad_accum_steps, config.objective.contrast = 1, "naive"
  config.train.attention = "xla"
  return dataclasses.replace(context, config=ml_collections.FrozenConfigDict(config), mesh=None)


def measure_utilisation(
  log: Telemetry, context: StepContext, mesh: Mesh, step_fn: jax.stages.Compiled, arguments: tuple
) -> Any:
  """Gives the log a step's FLOPs and the chip's peak, and says them, where the peak is known.

  Returns the `cc_jax.plan.hlo.Program` that was read for it, or None.

  Args:
    step_fn: `train_step`, compiled.
    arguments: its (state, frozen, batch, seed).
  """
  from cc_jax.plan import chips, model_flops  # lazily: only accelerators need them

  chip = chips.find(mesh.devices.flat[0].device_kind)
  if chip is None:
    return None
  plain, program = functools.partial(train_step, plain_context(context)), read_program(step_fn)
  done = f"{program.flops / 1e12:.4g} of the compiled program (hfu)"
  try:
    needed = model_flops.model_flops(plain, *arguments) / mesh.size
    done = f"{needed / 1e12:.4g} TFLOP of the model (mfu), {done}"
  except ValueError as error:  # a kernel that no config key replaces: no reason to end a run
    needed = None
    log.say(f"no mfu: {one_line(error)}")
  log.program(needed, program.flops, chip.flops)
  log.say(f"a step on one {chip.name}: {done}, of {chip.flops / 1e12:.4g} TFLOP a second")
  for target, runs in program.not_counted.items():
    log.say(f"hfu does not count {runs:g} calls of {target}")
  return program


def read_program(step_fn: jax.stages.Compiled) -> Any:
  """The `cc_jax.plan.hlo.Program` of a compiled function; takes seconds for a large one."""
  from cc_jax.plan import hlo

  return hlo.Program(step_fn.as_text())
