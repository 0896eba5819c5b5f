"""Which timesteps and noise levels a sampler visits: float64 numpy, computed on the host.

Noise is measured by alpha and sigma with alpha² + sigma² = 1, or by r = sigma / alpha (what Euler's
scheduler calls sigma).

There are three kinds of path, `strided`, `consecutive` and `interpolated`; registry.py says which a
sampler takes. `spacing` is the sampler's default where the config states no timestep_spacing. All
raise a UserError if the steps do not fit or the config asks for a spacing that we lack.
"""

from typing import NamedTuple

import numpy as np

from cc_jax.diffusion.schedule import SMALLEST_ALPHA_BAR, NoiseSchedule
from cc_jax.errors import UserError

SPACINGS = ("leading", "trailing", "linspace")


class Path(NamedTuple):
  """Steps, each from (alpha, sigma) at timestep t to (alpha_next, sigma_next); all [n]."""

  t: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  alpha_next: np.ndarray
  sigma_next: np.ndarray


def strided(schedule: NoiseSchedule, steps: int, spacing: str, *, set_alpha_to_one: bool) -> Path:
  """Over the training's own noise levels; alpha may start at exactly 0.

  The step back is constant (as in diffusers), even where rounding makes the timesteps uneven.
  `set_alpha_to_one` is the default of that option.
  """
  t = _timesteps(schedule, steps, spacing)
  t_next = t - schedule.num_train_timesteps // steps
  to_one = schedule.option("set_alpha_to_one", set_alpha_to_one)
  return _training_levels(schedule, t, t_next, 1.0 if to_one else schedule.alphas_cumprod_f64[0])


def consecutive(schedule: NoiseSchedule, steps: int, spacing: str, *, lcm: bool = False) -> Path:
  """As `strided`, but from each timestep to the next, and then to alpha = 1.

  `lcm`: the timesteps are some of those that an LCM was distilled at, whatever the spacing.
  """
  t = _lcm_timesteps(schedule, steps) if lcm else _timesteps(schedule, steps, spacing)
  return _training_levels(schedule, t, np.append(t[1:], -1), 1.0)


def interpolated(
  schedule: NoiseSchedule, steps: int, spacing: str, *, multistep: bool = False,
  dpm: bool = False, respaces: bool = True, ends_at_zero: bool = False,
) -> Path:
  """Over noise levels r that may lie between the training's, ending at 0 or at the smallest.

  Karras: (5) of arXiv 2206.00364 with rho = 7. Lu's uniform lambdas and exponential sigmas are both
  even in log r; diffusers rounds the timesteps of the former.

  Args:
    multistep: visits whole timesteps, without the nearest to the data; respacing starts from all of
      the training's levels instead of the visited ones.
    dpm: reads use_lu_lambdas and lambda_min_clipped, too.
    respaces: reads use_karras_sigmas and use_exponential_sigmas, whose levels lie from sigma_max to
      sigma_min, whatever class wrote them.
    ends_at_zero: whatever final_sigmas_type says.
  """
  alpha_bar = _positive_alpha_bar(schedule)
  all_r = np.sqrt((1.0 - alpha_bar) / alpha_bar)
  clipped = _clipped(schedule) if dpm else 0
  t = _timesteps(schedule, steps, spacing, unvisited=multistep, clipped=clipped, rounded=multistep)
  r = np.interp(t, np.arange(len(all_r)), all_r)
  final = all_r[0]

  keys = ("use_karras_sigmas", "use_exponential_sigmas")
  requested = [key for key in keys if respaces and schedule.option(key, False)]
  if len(requested) > 1:
    raise UserError(f"the scheduler config sets {' and '.join(requested)}; keep one")
  if dpm and schedule.option("use_lu_lambdas", False) and requested != ["use_karras_sigmas"]:
    requested = ["use_lu_lambdas"]  # in diffusers it gives way to Karras and outranks the other
  if requested:
    high, low = (all_r[-1], all_r[0]) if multistep else (r[0], r[-1])
    if requested != ["use_lu_lambdas"]:
      high, low = schedule.option("sigma_max", high), schedule.option("sigma_min", low)
      if not low > 0 or (steps > 1 and low >= high):
        raise UserError(
          f"the scheduler config gives sigma_min={low:g} and sigma_max={high:g}; sigma_min lies "
          "between 0 and sigma_max"
        )
    if requested == ["use_karras_sigmas"]:
      r = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    else:
      r = np.exp(np.linspace(np.log(high), np.log(low), steps))
    t = np.interp(np.log(r), np.log(all_r), np.arange(len(all_r)))
    if multistep:
      cosine = schedule.beta_schedule == "squaredcos_cap_v2" and dpm
      rounded = requested != ["use_exponential_sigmas"] and not cosine
      # diffusers truncates, even just below a whole number; we allow for that rounding error.
      t = t.round() if rounded else np.floor(t + 1e-3)
      if not dpm:
        final = r[-1]
  if ends_at_zero or schedule.option("final_sigmas_type", "zero") == "zero":
    final = 0.0
  r_next = np.append(r[1:], final)
  alpha, alpha_next = 1 / np.sqrt(1 + r**2), 1 / np.sqrt(1 + r_next**2)
  return Path(t, alpha, r * alpha, alpha_next, r_next * alpha_next)


def spacing_of(schedule: NoiseSchedule, default: str) -> str:
  """timestep_spacing; where the config is silent diffusers' schedulers differ in the `default`."""
  spacing = schedule.option("timestep_spacing", default)
  if spacing not in SPACINGS:
    raise UserError(
      f"the scheduler config has timestep_spacing={spacing!r}; we have {', '.join(SPACINGS)}"
    )
  return spacing


def _timesteps(schedule, steps, spacing, *, unvisited=0, clipped=0, rounded=True) -> np.ndarray:
  """[steps] float64, falling, as diffusers' set_timesteps gives them (before Karras and the like).

  The spacings are those of Table 2 of arXiv 2305.08891. One difference: for 62 step counts (61,
  103, ...) float rounding makes diffusers' 'trailing' append a timestep -1, which we drop.
  `clipped` timesteps are left out at the noisy end, and `unvisited` of the result at the other.
  """
  spacing, total = spacing_of(schedule, spacing), schedule.num_train_timesteps
  offset = schedule.option("steps_offset", 0)
  last, points = total - clipped, steps + unvisited
  if spacing == "linspace":
    t = np.linspace(0, last - 1, points)[::-1][:steps]
    t = t.round() if rounded else t
  elif spacing == "leading":
    t = (np.arange(points) * (last // points))[::-1][:steps] + offset
  else:
    t = np.arange(last, 0, -total / steps).round()[:steps] - 1
  if len(t) < steps or t[0] >= total or t[-1] < 0 or np.any(np.diff(t) >= 0):
    raise UserError(
      f"{steps} steps do not fit into {total} timesteps with {spacing} spacing and steps_offset="
      f"{offset}; take fewer"
    )
  return t.astype(np.float64)


def _lcm_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
  """[steps], evenly spaced among the original_inference_steps timesteps of the distillation."""
  original = schedule.option("original_inference_steps", 50)
  if original > schedule.num_train_timesteps:
    raise UserError(
      f"the scheduler config has original_inference_steps={original}, more than its "
      f"{schedule.num_train_timesteps} timesteps; take the published config"
    )
  if steps > original:
    raise UserError(
      f"{steps} steps are more than the {original} (original_inference_steps) that this base was "
      "distilled at; take fewer, usually 4"
    )
  distilled = np.arange(original, 0, -1) * (schedule.num_train_timesteps // original) - 1
  return distilled[np.linspace(0, original, steps, endpoint=False).astype(int)].astype(np.float64)


def _training_levels(schedule, t: np.ndarray, t_next: np.ndarray, final: float) -> Path:
  """From timesteps t to t_next; `final` is the alpha_bar where t_next is negative."""
  index, index_next = t.astype(int), t_next.astype(int)
  alpha_bar = schedule.alphas_cumprod_f64
  following = np.where(index_next >= 0, alpha_bar[np.maximum(index_next, 0)], final)
  levels = (alpha_bar[index], 1 - alpha_bar[index], following, 1 - following)
  return Path(t, *(np.sqrt(level) for level in levels))


def _positive_alpha_bar(schedule: NoiseSchedule) -> np.ndarray:
  """alpha_bar with diffusers' substitute for a zero at the end, so that sigma / alpha is finite."""
  smallest = SMALLEST_ALPHA_BAR if schedule.rescale_betas_zero_snr else 0.0
  return np.maximum(schedule.alphas_cumprod_f64, smallest)


def _clipped(schedule: NoiseSchedule) -> int:
  """The number of timesteps before log(alpha / sigma) first exceeds lambda_min_clipped."""
  alpha_bar = _positive_alpha_bar(schedule)
  log_snr = 0.5 * np.log(alpha_bar / (1.0 - alpha_bar))
  return int(np.searchsorted(log_snr[::-1], schedule.option("lambda_min_clipped", -np.inf)))
