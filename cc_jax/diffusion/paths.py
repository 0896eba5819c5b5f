"""Which timesteps and noise levels each sampler visits: float64 numpy, made on the host.

Noise is measured by alpha and sigma with alpha² + sigma² = 1, or by r = sigma / alpha (what Euler's
scheduler calls sigma).
"""

from typing import NamedTuple

import numpy as np

from cc_jax.diffusion.schedule import SMALLEST_ALPHA_BAR, NoiseSchedule
from cc_jax.errors import UserError

SPACINGS = ("leading", "trailing", "linspace")

_EULER = ("euler", "euler_ancestral", "heun")
_DPM = ("dpmsolver++", "sde-dpmsolver++")
_MULTISTEP = (*_DPM, "unipc")  # these leave out the timestep nearest to the data: they end at r = 0


class Path(NamedTuple):
  """Steps, each from (alpha, sigma) at timestep t to (alpha_next, sigma_next); all [n]."""

  t: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  alpha_next: np.ndarray
  sigma_next: np.ndarray


def path(schedule: NoiseSchedule, name: str, steps: int) -> Path:
  """The path of the sampler `name` (samplers.SAMPLERS).

  Raises:
    UserError: the steps do not fit, or the scheduler config asks for a spacing that we lack.
  """
  looked_up = name in ("ddim", "ddpm", "pndm", "lcm")
  return (_looked_up if looked_up else _levelled)(schedule, name, steps)


def start(schedule: NoiseSchedule, name: str, path: Path, from_image: bool) -> tuple[float, float]:
  """The first state as (factor of an image, factor of unit normal noise)."""
  if from_image:
    return path.alpha[0], path.sigma[0]
  # diffusers' init_noise_sigma: Euler's schedulers know that some of the first state is signal.
  scaled = name in _EULER and _spacing(schedule, name) != "leading"
  return 0.0, path.sigma[0] if scaled else 1.0


def _spacing(schedule: NoiseSchedule, name: str) -> str:
  """Where the config is silent each of diffusers' schedulers has a default of its own."""
  own = "linspace" if name in (*_EULER, *_MULTISTEP) else "leading"
  spacing = schedule.option("timestep_spacing", own)
  if spacing not in SPACINGS:
    raise UserError(
      f"the scheduler config has timestep_spacing={spacing!r}; we have {', '.join(SPACINGS)}"
    )
  return spacing


def _timesteps(schedule: NoiseSchedule, name: str, steps: int) -> np.ndarray:
  """[steps] float64, falling, as diffusers' set_timesteps gives them (before Karras and the like).

  The spacings are those of Table 2 of arXiv 2305.08891. One difference: for 62 step counts (61,
  103, ...) float rounding makes diffusers' 'trailing' append a timestep -1, which we drop.
  """
  spacing, total = _spacing(schedule, name), schedule.num_train_timesteps
  offset = schedule.option("steps_offset", 0)
  # DPM-Solver++ may start later, where log(alpha / sigma) first exceeds lambda_min_clipped.
  last = total - _clipped(schedule) if name in _DPM else total
  points = steps + (name in _MULTISTEP)
  if spacing == "linspace":
    t = np.linspace(0, last - 1, points)[::-1][:steps]
    t = t if name in _EULER else t.round()
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
  """[steps] of the original_inference_steps timesteps that an LCM was distilled at; evenly."""
  original = schedule.option("original_inference_steps", 50)
  if steps > original:
    raise UserError(
      f"{steps} steps are more than the {original} (original_inference_steps) that this base was "
      "distilled at; take fewer, usually 4"
    )
  distilled = np.arange(original, 0, -1) * (schedule.num_train_timesteps // original) - 1
  return distilled[np.linspace(0, original, steps, endpoint=False).astype(int)].astype(np.float64)


def _looked_up(schedule: NoiseSchedule, name: str, steps: int) -> Path:
  """A path over the training's own noise levels; alpha may start at exactly 0."""
  lcm = name == "lcm"
  t = _lcm_timesteps(schedule, steps) if lcm else _timesteps(schedule, name, steps)
  alpha_bar, total = schedule.alphas_cumprod_f64, schedule.num_train_timesteps
  index = t.astype(int)
  if name in ("ddim", "pndm"):
    # The step back is constant (as in diffusers), even where rounding makes the timesteps uneven.
    before = index - total // steps
  else:
    before = np.append(index[1:], -1)
  to_one = name in ("ddpm", "lcm") or schedule.option("set_alpha_to_one", name == "ddim")
  final = 1.0 if to_one else alpha_bar[0]
  after = np.where(before >= 0, alpha_bar[np.maximum(before, 0)], final)
  levels = (alpha_bar[index], 1 - alpha_bar[index], after, 1 - after)
  return Path(t, *(np.sqrt(level) for level in levels))


def _levelled(schedule: NoiseSchedule, name: str, steps: int) -> Path:
  """A path over noise levels r that may lie between the training's, ending at 0 or at its least.

  Karras: (5) of arXiv 2206.00364 with rho = 7. Lu's uniform lambdas and exponential sigmas are both
  even in log r; diffusers rounds the timesteps of the former.
  """
  alpha_bar = _positive_alpha_bar(schedule)
  all_r = np.sqrt((1.0 - alpha_bar) / alpha_bar)
  t = _timesteps(schedule, name, steps)
  r = np.interp(t, np.arange(len(all_r)), all_r)
  final = all_r[0]

  respaced = [
    key
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
    if schedule.option(key, False)
    and name != "euler_ancestral"
    and (key != "use_lu_lambdas" or name in _DPM)
  ]
  if len(respaced) > 1:
    raise UserError(f"the scheduler config sets {' and '.join(respaced)}; keep one")
  if respaced:
    high, low = (all_r[-1], all_r[0]) if name in _MULTISTEP else (r[0], r[-1])
    if name in ("euler", "unipc"):
      high, low = schedule.option("sigma_max", high), schedule.option("sigma_min", low)
    if respaced == ["use_karras_sigmas"]:
      r = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    else:
      r = np.exp(np.linspace(np.log(high), np.log(low), steps))
    t = np.interp(np.log(r), np.log(all_r), np.arange(len(all_r)))
    if name in _MULTISTEP:
      cosine = schedule.beta_schedule == "squaredcos_cap_v2" and name in _DPM
      rounded = respaced != ["use_exponential_sigmas"] and not cosine
      # diffusers cuts the rest off, whatever rounding made of a whole number; we do not.
      t = t.round() if rounded else np.floor(t + 1e-3)
    if name == "unipc":
      final = r[-1]
  ends_at_zero = name in ("euler_ancestral", "heun")
  if ends_at_zero or schedule.option("final_sigmas_type", "zero") == "zero":
    final = 0.0
  r_next = np.append(r[1:], final)
  alpha, alpha_next = 1 / np.sqrt(1 + r**2), 1 / np.sqrt(1 + r_next**2)
  return Path(t, alpha, r * alpha, alpha_next, r_next * alpha_next)


def _positive_alpha_bar(schedule: NoiseSchedule) -> np.ndarray:
  """alpha_bar with diffusers' stand-in for a zero at the end, so that sigma / alpha is finite."""
  least = SMALLEST_ALPHA_BAR if schedule.rescale_betas_zero_snr else 0.0
  return np.maximum(schedule.alphas_cumprod_f64, least)


def _clipped(schedule: NoiseSchedule) -> int:
  alpha_bar = _positive_alpha_bar(schedule)
  log_snr = 0.5 * np.log(alpha_bar / (1.0 - alpha_bar))
  return int(np.searchsorted(log_snr[::-1], schedule.option("lambda_min_clipped", -np.inf)))
