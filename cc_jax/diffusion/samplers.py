"""DDIM and DPM-Solver++(2M): a table of numbers per step, made on the host, and one lax.scan.

Both samplers are the same recurrence with other coefficients: a step turns the network's prediction
into x_0 and takes a linear combination of the state, the prediction, this x_0 and the last one.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cc_jax.diffusion.schedule import SMALLEST_ALPHA_BAR, NoiseSchedule
from cc_jax.errors import UserError

SAMPLERS = ("ddim", "dpmsolver++")
SPACINGS = ("leading", "trailing", "linspace")

_OF_CLASS = {"DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmsolver++"}

# Options of diffusers' schedulers and the values of them that we implement.
_IMPLEMENTED = {
  "ddim": {"thresholding": (False,)},
  "dpmsolver++": {
    "thresholding": (False,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
  },
}


class StepTable(NamedTuple):
  """One row per step, in the order of denoising; everything but `timestep` is float32.

  x_0  = x0_state * x + x0_prediction * prediction
  next = next_state * x + next_prediction * prediction + next_x0 * x_0 + next_x0_before * x_0 before
  """

  timestep: Int[Array, "steps"]
  x0_state: Float[Array, "steps"]
  x0_prediction: Float[Array, "steps"]
  next_state: Float[Array, "steps"]
  next_prediction: Float[Array, "steps"]
  next_x0: Float[Array, "steps"]
  next_x0_before: Float[Array, "steps"]


def sample(
  model_fn: Callable[[Float[Array, "..."], Int[Array, ""]], Float[Array, "..."]],
  latents: Float[Array, "b h w c"],
  schedule: NoiseSchedule,
  *,
  steps: int,
  sampler: str = "default",
  return_trajectory: bool = False,
) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Float[Array, "steps b h w c"]]:
  """Denoises standard normal `latents`; pure, so it may stand inside a jit.

  Args:
    model_fn: (latents float32, timestep int32 []) -> prediction of the schedule's type, any dtype.
      Guidance belongs in here (guidance.py).
    latents: unit normal noise.
    schedule: the base's.
    steps: calls of model_fn, at least 1.
    sampler: one of SAMPLERS, or 'default': the one that the base's scheduler_config names.
    return_trajectory: also return the state after every step.

  Returns:
    float32 latents, whatever dtype the model works in.

  Raises:
    UserError: see `step_table`.
  """
  table = step_table(schedule, steps=steps, sampler=sampler)
  name = resolve_sampler(schedule, sampler)
  return integrate(
    model_fn,
    latents,
    table,
    clip=_clip_range(schedule) if name == "ddim" else None,
    return_trajectory=return_trajectory,
  )


def integrate(model_fn, latents, table: StepTable, *, clip=None, return_trajectory=False):
  """The scan of `sample` over a given table; `clip` bounds |x_0| (diffusers' clip_sample)."""

  def step(carry, row: StepTable):
    state, x0_before = carry
    prediction = model_fn(state, row.timestep).astype(jnp.float32)
    x0 = row.x0_state * state + row.x0_prediction * prediction
    if clip is not None:
      x0 = jnp.clip(x0, -clip, clip)
    state = (
      row.next_state * state
      + row.next_prediction * prediction
      + row.next_x0 * x0
      + row.next_x0_before * x0_before
    )
    return (state, x0), (state if return_trajectory else None)

  start = latents.astype(jnp.float32)
  (final, _), states = jax.lax.scan(step, (start, jnp.zeros_like(start)), table)
  return (final, states) if return_trajectory else final


def step_table(schedule: NoiseSchedule, *, steps: int, sampler: str = "default") -> StepTable:
  """The coefficients of a whole trajectory, computed in float64 numpy.

  Raises:
    UserError: steps < 1 or more than the schedule can hold, an unknown sampler, an option of the
      scheduler config that the sampler lacks, or epsilon prediction started at zero SNR.
  """
  name = resolve_sampler(schedule, sampler)
  for key, implemented in _IMPLEMENTED[name].items():
    value = schedule.option(key, implemented[0])
    if value not in implemented:
      raise UserError(
        f"the scheduler config has {key}={value!r}, and our {name} has only "
        f"{' or '.join(map(repr, implemented))}; change it or choose another sampler"
      )
  t = timesteps(schedule, steps=steps, sampler=name)
  columns = (_ddim if name == "ddim" else _dpm_solver)(schedule, t)
  return StepTable(t.astype(np.int32), *(np.asarray(c, np.float32) for c in columns))


def resolve_sampler(schedule: NoiseSchedule, sampler: str) -> str:
  """One of SAMPLERS. 'default' is the sampler of the class that the scheduler config names."""
  if sampler == "default":
    if schedule.class_name not in _OF_CLASS:
      raise UserError(
        f"the base names the scheduler {schedule.class_name or 'nothing'}, which we lack; "
        f"choose a sampler: {', '.join(SAMPLERS)}"
      )
    return _OF_CLASS[schedule.class_name]
  if sampler not in SAMPLERS:
    raise UserError(f"unknown sampler {sampler!r}; we have {', '.join(SAMPLERS)}, default")
  return sampler


def timesteps(schedule: NoiseSchedule, *, steps: int, sampler: str = "default") -> np.ndarray:
  """[steps] int64, falling, as diffusers' set_timesteps of the two schedulers gives them.

  The spacings are those of Table 2 of arXiv 2305.08891. Where the config is silent each scheduler
  has its own default: DDIM 'leading', DPM-Solver++ 'linspace'. One difference: for 62 step counts
  (61, 103, ...) float rounding makes diffusers' 'trailing' append a timestep -1, which we drop.
  """
  name = resolve_sampler(schedule, sampler)
  spacing = schedule.option("timestep_spacing", "leading" if name == "ddim" else "linspace")
  offset = schedule.option("steps_offset", 0)
  total = schedule.num_train_timesteps
  steps = _count(steps, total)
  if name == "ddim":
    last, points = total, steps
  else:
    # DPM-Solver++ ends at sigma = 0 and so leaves out the timestep nearest to it; and it may start
    # later, where log(alpha / sigma) first exceeds lambda_min_clipped.
    last, points = total - _clipped(schedule), steps + 1

  if spacing == "linspace":
    t = np.linspace(0, last - 1, points).round()[::-1][:steps]
  elif spacing == "leading":
    t = (np.arange(points) * (last // points))[::-1][:steps] + offset
  elif spacing == "trailing":
    t = np.arange(last, 0, -total / steps).round()[:steps] - 1
  else:
    raise UserError(
      f"the scheduler config has timestep_spacing={spacing!r}; we have {', '.join(SPACINGS)}"
    )
  t = t.astype(np.int64)
  if t[0] >= total or t[-1] < 0 or np.any(np.diff(t) >= 0):
    raise UserError(
      f"{steps} steps do not fit into {total} timesteps with {spacing} spacing and steps_offset="
      f"{offset}; take fewer"
    )
  return t


def _count(steps: int, total: int) -> int:
  try:
    count = 0 if isinstance(steps, bool) else operator.index(steps)
  except TypeError:
    count = 0
  if not 1 <= count <= total:
    raise UserError(f"steps={steps!r}: a sampler takes between 1 and {total} steps")
  return count


def _clipped(schedule: NoiseSchedule) -> int:
  alpha_bar = _positive_alpha_bar(schedule)
  log_snr = 0.5 * np.log(alpha_bar / (1.0 - alpha_bar))
  return int(np.searchsorted(log_snr[::-1], schedule.option("lambda_min_clipped", -np.inf)))


def _clip_range(schedule: NoiseSchedule) -> float | None:
  """Clipping of x_0 to a range, off unless the config asks for it.

  DDIMScheduler's own default is on, but diffusers' Stable Diffusion pipelines switch it off:
  latents have no such range.
  """
  on = schedule.option("clip_sample", False)
  return float(schedule.option("clip_sample_range", 1.0)) if on else None


def _positive_alpha_bar(schedule: NoiseSchedule) -> np.ndarray:
  """alpha_bar with diffusers' stand-in for a zero at the end, so that sigma / alpha is finite."""
  least = SMALLEST_ALPHA_BAR if schedule.rescale_betas_zero_snr else 0.0
  return np.maximum(schedule.alphas_cumprod_f64, least)


def _x0_of(kind: str, alpha: np.ndarray, sigma: np.ndarray):
  """x_0 as (factor of the state, factor of the prediction)."""
  if kind == "epsilon":
    return 1 / alpha, -sigma / alpha
  if kind == "v_prediction":
    return alpha, -sigma
  return np.zeros_like(alpha), np.ones_like(alpha)


def _eps_of(kind: str, alpha: np.ndarray, sigma: np.ndarray):
  """The noise as (factor of the state, factor of the prediction)."""
  if kind == "epsilon":
    return np.zeros_like(alpha), np.ones_like(alpha)
  if kind == "v_prediction":
    return sigma, alpha
  return 1 / sigma, -alpha / sigma


def _ddim(schedule: NoiseSchedule, t: np.ndarray):
  """DDIM with eta = 0, formula (12) of arXiv 2010.02502; diffusers' scheduling_ddim.py."""
  alpha_bar = schedule.alphas_cumprod_f64
  if schedule.prediction_type == "epsilon" and alpha_bar[t[0]] == 0.0:
    raise UserError(
      "a base with epsilon prediction cannot start at zero SNR; set timestep_spacing to 'leading' "
      "or rescale_betas_zero_snr to false in its scheduler config"
    )
  # The step back is constant (as in diffusers), even where rounding makes the timesteps uneven.
  before = t - schedule.num_train_timesteps // len(t)
  final = 1.0 if schedule.option("set_alpha_to_one", True) else alpha_bar[0]
  alpha_bar_next = np.where(before >= 0, alpha_bar[np.maximum(before, 0)], final)

  alpha, sigma = np.sqrt(alpha_bar[t]), np.sqrt(1.0 - alpha_bar[t])
  x0_state, x0_prediction = _x0_of(schedule.prediction_type, alpha, sigma)
  eps_state, eps_prediction = _eps_of(schedule.prediction_type, alpha, sigma)
  sigma_next = np.sqrt(1.0 - alpha_bar_next)
  return (
    x0_state,
    x0_prediction,
    sigma_next * eps_state,
    sigma_next * eps_prediction,
    np.sqrt(alpha_bar_next),
    np.zeros_like(alpha),
  )


def _dpm_solver(schedule: NoiseSchedule, t: np.ndarray):
  """DPM-Solver++(2M), Algorithm 2 of arXiv 2211.01095, midpoint, last step to sigma = 0.

  diffusers' scheduling_dpmsolver_multistep.py with its defaults. There, and here, noise is measured
  by r = sigma / alpha = exp(-lambda). The first step and, since it ends at r = 0, the last step are
  of first order; so lower_order_final and euler_at_final change nothing.
  """
  alpha_bar = _positive_alpha_bar(schedule)
  r_all = np.sqrt((1.0 - alpha_bar) / alpha_bar)
  r, r_next = r_all[t], np.append(r_all[t[1:]], 0.0)
  alpha, alpha_next = 1 / np.sqrt(1 + r**2), 1 / np.sqrt(1 + r_next**2)
  sigma, sigma_next = r * alpha, r_next * alpha_next

  gain = alpha_next * (1.0 - r_next / r)  # alpha_next (1 - exp(-h))
  extrapolation = np.zeros_like(gain)  # 1 / (2 r0), r0 = last h / this h
  h = np.log(r[:-1] / r[1:])
  extrapolation[1:-1] = 0.5 * h[1:] / h[:-1]

  x0_state, x0_prediction = _x0_of(schedule.prediction_type, alpha, sigma)
  return (
    x0_state,
    x0_prediction,
    sigma_next / sigma,
    np.zeros_like(gain),
    gain * (1.0 + extrapolation),
    -gain * extrapolation,
  )
