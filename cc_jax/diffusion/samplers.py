"""Samplers: a table of numbers per call of the network, computed on the host, and one lax.scan.

All samplers are the same recurrence with different numbers (solvers.py), which are arguments of the
compiled function. So it depends only on the number of calls of the network, which is the length of
the scan, and on whether noise is added. Different prompts, samplers, spacings, prediction types and
schedules share it; a different number of calls compiles again. Who compiles one call alone
(`advance`) compiles once for any number. There is one call per step, except for Heun's method with
2 steps - 1 and PNDM with steps + 1.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cc_jax.diffusion import solvers
from cc_jax.diffusion.registry import REGISTRY, Sampler
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.diffusion.timesteps import Path, spacing_of
from cc_jax.errors import UserError

SAMPLERS = tuple(REGISTRY)


class StepTable(NamedTuple):
  """A trajectory, one row per call of the network in the order of denoising; float32 except `step`.

  first x = start[0] image + start[1] noise
  x_0 = clip(x0_state x + x0_prediction prediction, +-x0_limit)
  next (x, memory...) = mix (x, prediction, x_0, fresh noise, memory...)
  """

  timestep: Float[Array, "calls"]  # whole numbers, except for Euler and Heun
  step: Int[Array, "calls"]  # the step that a call belongs to; Heun and PNDM have two calls in some
  x0_state: Float[Array, "calls"]
  x0_prediction: Float[Array, "calls"]
  x0_limit: Float[Array, "calls"]
  mix: Float[Array, "calls outputs inputs"]
  start: Float[Array, "2"]


# (latents, what a multistep sampler remembers), all float32 [b h w c]
State = tuple[Array, tuple[Array, ...]]
# (state [b h w c] float32, timestep [] float32, step [] int32) -> prediction, any dtype
ModelFn = Callable[[Array, Array, Array], Array]
# (number of the call [] int32) -> unit normal noise [b h w c]
NoiseFn = Callable[[Array], Array]


def sample(
  model_fn: ModelFn, noise: Float[Array, "b h w c"], schedule: NoiseSchedule, *, steps: int,
  sampler: str = "default", eta: float = 0.0, noise_fn: NoiseFn | None = None,
) -> Float[Array, "b h w c"]:
  """Denoises unit normal `noise`: `integrate` along `step_table`."""
  return integrate(model_fn, noise, step_table(schedule, steps=steps, sampler=sampler, eta=eta),
                   noise_fn=noise_fn)  # fmt: skip


def integrate(
  model_fn: ModelFn, noise: Float[Array, "b h w c"], table: StepTable, *,
  image: Float[Array, "b h w c"] | None = None, noise_fn: NoiseFn | None = None,
  return_inputs: bool = False,
) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Float[Array, "calls b h w c"]]:
  """Denoises unit normal `noise` along a table; pure, so it may be called inside a jit.

  Args:
    model_fn: its prediction type is the schedule's. Guidance (guidance.py) is part of it.
    noise: the first state's.
    table: may be traced.
    image: clean latents to start from, for a table with `skip`.
    noise_fn: fresh noise; None leaves it out, which is only right where `adds_noise` is False.
    return_inputs: also return the states that the network saw.

  Returns:
    float32 latents, whatever dtype the model works in.
  """
  def call(carry, row):
    index, row = row
    return advance(model_fn, carry, index, row, noise_fn), (carry[0] if return_inputs else None)

  rows = (jnp.arange(len(table.step)), table._replace(start=None))
  (final, _), states = jax.lax.scan(call, first_state(noise, table, image), rows)
  return (final, states) if return_inputs else final


def first_state(
  noise: Float[Array, "b h w c"], table: StepTable, image: Float[Array, "b h w c"] | None = None
) -> State:
  """Where a trajectory begins; the arguments are those of `integrate`."""
  first = table.start[1] * noise.astype(jnp.float32)
  if image is not None:
    first += table.start[0] * image.astype(jnp.float32)
  return first, (jnp.zeros_like(first),) * (table.mix.shape[1] - 1)


def advance(
  model_fn: ModelFn, state: State, index: Int[Array, ""], row: StepTable,
  noise_fn: NoiseFn | None = None,
) -> State:
  """One call of the network: the state after it. `row` is row number `index` of the table."""
  x, memory = state
  prediction = model_fn(x, row.timestep, row.step).astype(jnp.float32)
  x0 = row.x0_state * x + row.x0_prediction * prediction
  x0 = jnp.clip(x0, -row.x0_limit, row.x0_limit)
  fresh = None if noise_fn is None else noise_fn(index).astype(jnp.float32)
  inputs = (x, prediction, x0, fresh, *memory)
  outputs = [
    sum(factor * x for factor, x in zip(factors, inputs, strict=True) if x is not None)
    for factors in row.mix
  ]
  return outputs[0], tuple(outputs[1:])


def step_table(
  schedule: NoiseSchedule, *, steps: int, sampler: str = "default", eta: float = 0.0,
  skip: int | None = None,
) -> StepTable:
  """The numbers of a trajectory, in numpy.

  Args:
    schedule: the base's.
    steps: at least 1.
    sampler: one of SAMPLERS, or 'default': the one that the base's scheduler_config names.
    eta: the share of fresh noise in DDIM's steps, 0 to 1; other samplers do not take it.
    skip: None starts from noise. A number starts from a noised image instead and leaves out the
      first `skip` steps (see `skip_of_strength`). Multistep samplers begin there with no memory,
      PNDM with its first step; diffusers' PNDM goes one step too far.

  Raises:
    UserError: steps < 1 or more than the schedule has, an unknown sampler, an option of the
      scheduler config that the sampler lacks, or a division by zero (a start at zero SNR, or
      options that do not go together).
  """
  entry = REGISTRY[resolve_sampler(schedule, sampler)]
  _check_options(schedule, entry)
  steps = _checked_steps(steps, schedule.num_train_timesteps)
  if skip is not None and not 0 <= skip < steps:
    raise UserError(f"{skip} of {steps} steps are left out and none is drawn; raise the strength")
  if eta and not entry.takes_eta:
    takers = " and ".join(other.name for other in REGISTRY.values() if other.takes_eta)
    raise UserError(f"eta={eta:g} is an option of {takers}, not of {entry.name}; leave it out")
  if not 0 <= eta <= 1:
    raise UserError(f"eta={eta:g} makes no sense; use 0 (no noise) to 1")
  path = entry.path(schedule, steps, entry.spacing)
  path = Path(*(column[skip or 0 :] for column in path))
  if path.alpha[0] == 0.0 and (entry.divides_by_alpha or schedule.prediction_type == "epsilon"):
    what = entry.name if entry.divides_by_alpha else "a base with epsilon prediction"
    raise UserError(
      f"{what} cannot start at zero SNR; set timestep_spacing to 'leading' or "
      "rescale_betas_zero_snr to false in its scheduler config"
    )
  with np.errstate(divide="ignore", invalid="ignore"):
    calls = entry.solver(schedule, path, steps=steps, eta=eta, skip=skip or 0)
  if not np.isfinite(calls.mix).all():
    raise UserError(
      f"the scheduler config's options lead {entry.name} to a division by zero in {steps} steps; "
      "leave out final_sigmas_type and lower_order_final, or choose another sampler"
    )
  scaled = skip is not None or (
    entry.scales_noise and spacing_of(schedule, entry.spacing) != "leading"
  )
  start = (0.0 if skip is None else path.alpha[0], path.sigma[0] if scaled else 1.0)
  x0_state, x0_prediction = solvers.x0_of(schedule.prediction_type, calls.alpha, calls.sigma)
  limit = np.full(len(calls.t), _x0_limit(schedule, entry))
  columns = (x0_state, x0_prediction, limit, calls.mix, np.array(start))
  columns = (np.asarray(column, np.float32) for column in columns)
  return StepTable(calls.t.astype(np.float32), calls.step.astype(np.int32), *columns)


def resolve_sampler(schedule: NoiseSchedule, sampler: str) -> str:
  """One of SAMPLERS. 'default' is the sampler of the class that the scheduler config names."""
  if sampler != "default":
    if sampler not in REGISTRY:
      raise UserError(f"unknown sampler {sampler!r}; we have {', '.join(REGISTRY)}, default")
    return sampler
  by_class = {}
  for entry in REGISTRY.values():
    by_class.setdefault(entry.scheduler_class, []).append(entry.name)
  if schedule.class_name not in by_class:
    raise UserError(
      f"the base names the scheduler {schedule.class_name or 'nothing'}, which we lack (we have "
      f"{', '.join(by_class)}); choose a sampler: {', '.join(REGISTRY)}"
    )
  names = by_class[schedule.class_name]
  name = names[0] if len(names) == 1 else schedule.option("algorithm_type", names[0])
  if name not in names:
    raise UserError(
      f"the scheduler config has algorithm_type={name!r}, and we have {' and '.join(names)}; "
      "change it or choose another sampler"
    )
  return name


def adds_noise(table: StepTable) -> bool:
  """Whether a table (not traced) needs `noise_fn`."""
  return bool(np.any(table.mix[:, :, solvers.NOISE]))


def keyed_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> NoiseFn:
  """A `noise_fn`: each picture's noise, of `shape` [h, w, c], depends on its own key alone."""

  def noise(index):
    call_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(call_keys)

  return noise


def skip_of_strength(steps: int, strength: float) -> int:
  """How many steps img2img leaves out, as diffusers' pipelines count them.

  Raises:
    UserError: the strength is not in (0, 1], or so small that no step is left.
  """
  remaining = int(steps * strength) if 0 < strength <= 1 else 0
  if remaining < 1:
    raise UserError(
      f"strength {strength:g} of {steps} steps leaves no step; use {1 / max(steps, 1):.2g} to 1"
    )
  return steps - remaining


def _check_options(schedule: NoiseSchedule, entry: Sampler) -> None:
  defaults = entry.class_defaults if schedule.class_name == entry.scheduler_class else {}
  for key, implemented in entry.options.items():
    value = schedule.option(key, defaults.get(key, implemented[0]))
    if key == "prediction_type":
      value = schedule.prediction_type
    if value not in implemented:
      raise UserError(
        f"the scheduler config has {key}={value!r}, and our {entry.name} has only "
        f"{' or '.join(map(repr, implemented))}; change it or choose another sampler"
      )


def _checked_steps(steps: int, total: int) -> int:
  try:
    count = 0 if isinstance(steps, bool) else operator.index(steps)
  except TypeError:
    count = 0
  if not 1 <= count <= total:
    raise UserError(f"steps={steps!r}: a sampler takes between 1 and {total} steps")
  return count


def _x0_limit(schedule: NoiseSchedule, entry: Sampler) -> float:
  """The bound of |x_0|, none unless the config asks for it.

  DDIM's and DDPM's schedulers clip by default, but diffusers' Stable Diffusion pipelines switch it
  off: latents have no such range.
  """
  clips = entry.clips_x0 and schedule.option("clip_sample", False)
  return float(schedule.option("clip_sample_range", 1.0)) if clips else np.inf
