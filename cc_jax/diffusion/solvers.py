"""What each sampler does, as numbers: float64 numpy, made on the host before anything is compiled.

Every sampler of ours is linear in the state x, the network's prediction, the x_0 that it implies,
fresh noise and a few tensors that it remembers. So a sampler is a path (timesteps and noise levels,
paths.py) and, for every call of the network, a matrix. DDPM, Euler, Euler ancestral and
DPM-Solver++ are even the same step, `_one_step`, along different paths.

The state is always x = alpha x_0 + sigma noise with alpha² + sigma² = 1, what the network sees.
"""

from math import factorial
from typing import NamedTuple

import numpy as np

from cc_jax.diffusion import paths
from cc_jax.diffusion.paths import Path
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError

# Columns of a matrix: what a step may take. Its rows: what it makes, the next state and memory.
STATE, PREDICTION, X0, NOISE, MEMORY = range(5)
SLOTS = 4  # tensors remembered; UniPC of order 3 and PNDM need them all


class Calls(NamedTuple):
  """A trajectory: one row per call of the network; float64.

  `mix` [calls, 1 + SLOTS, MEMORY + SLOTS] takes (state, prediction, x_0, noise, memory) to (state,
  memory). The first state is start[0] image + start[1] noise.
  """

  t: np.ndarray
  step: np.ndarray  # which step of the user's a call belongs to
  alpha: np.ndarray  # of the state that is passed in
  sigma: np.ndarray
  mix: np.ndarray
  start: tuple[float, float]


def calls(
  schedule: NoiseSchedule, name: str, *, steps: int, eta: float = 0.0, skip: int | None = None
) -> Calls:
  """The trajectory of the sampler `name` (samplers.SAMPLERS).

  Args:
    eta: DDIM's.
    skip: None starts from noise alone. A number leaves out as many steps and starts from an image,
      noised to the first level that is left.

  Raises:
    UserError: the steps do not fit, or divide by zero (zero SNR, or options that do not go
      together).
  """
  path = Path(*(column[skip or 0 :] for column in paths.path(schedule, name, steps)))
  needs_alpha = name == "pndm" or schedule.prediction_type == "epsilon"
  if needs_alpha and path.alpha[0] == 0.0:
    what = "pndm" if name == "pndm" else "a base with epsilon prediction"
    raise UserError(
      f"{what} cannot start at zero SNR; set timestep_spacing to 'leading' or "
      "rescale_betas_zero_snr to false in its scheduler config"
    )
  with np.errstate(divide="ignore", invalid="ignore"):
    made = _SOLVERS[name](schedule, path, eta=eta, steps=steps, skip=skip or 0, name=name)
  if not np.isfinite(made.mix).all():
    raise UserError(
      f"the scheduler config's options lead {name} to a division by zero in {steps} steps; leave "
      "out final_sigmas_type and lower_order_final, or choose another sampler"
    )
  return made._replace(start=paths.start(schedule, name, path, skip is not None))


def x0_of(kind: str, alpha: np.ndarray, sigma: np.ndarray):
  """x_0 as (factor of the state, factor of the prediction), by prediction type."""
  if kind == "epsilon":
    return 1 / alpha, -sigma / alpha
  if kind == "v_prediction":
    return alpha, -sigma
  return np.zeros_like(alpha), np.ones_like(alpha)


def eps_of(kind: str, alpha: np.ndarray, sigma: np.ndarray):
  """The noise as (factor of the state, factor of the prediction), by prediction type."""
  if kind == "epsilon":
    return np.zeros_like(alpha), np.ones_like(alpha)
  if kind == "v_prediction":
    return sigma, alpha
  return 1 / sigma, -alpha / sigma


def _empty(path: Path) -> Calls:
  """One call per step; nothing is made yet."""
  mix = np.zeros((len(path.t), 1 + SLOTS, MEMORY + SLOTS))
  return Calls(path.t, np.arange(len(path.t)), path.alpha, path.sigma, mix, (0.0, 1.0))


def _toward(path: Path, share: float):
  """(x_0's factor, the predicted noise's, fresh noise's) of a step of first order, (12) and (16) of
  arXiv 2010.02502: the next state is alpha_next x_0 + noise of sigma_next, the `share` of which is
  fresh: 0 is an ODE's step (DDIM, Euler), 1 the posterior's (DDPM, Euler ancestral, SDE).
  """
  fresh = share * path.sigma_next / path.sigma * np.sqrt(1 - (path.alpha / path.alpha_next) ** 2)
  return path.alpha_next, np.sqrt(path.sigma_next**2 - fresh**2), fresh


def _ddim(schedule, path, *, eta, **_) -> Calls:
  """DDIM (diffusers' scheduling_ddim.py); the noise is the predicted one, whatever clips x_0."""
  made = _empty(path)
  to_x0, to_eps, fresh = _toward(path, eta)
  eps_state, eps_prediction = eps_of(schedule.prediction_type, path.alpha, path.sigma)
  made.mix[:, 0, STATE] = to_eps * eps_state
  made.mix[:, 0, PREDICTION] = to_eps * eps_prediction
  made.mix[:, 0, X0] = to_x0
  made.mix[:, 0, NOISE] = fresh
  return made


def _one_step(path: Path, share: float, second_order: np.ndarray | float = 0.0) -> Calls:
  """`_toward` x_0 + second_order (x_0 - the last x_0), with the noise that x and x_0 imply."""
  made = _empty(path)
  to_x0, to_eps, fresh = _toward(path, share)
  gain = to_x0 - to_eps * path.alpha / path.sigma
  made.mix[:, 0, STATE] = to_eps / path.sigma
  made.mix[:, 0, X0] = gain * (1 + second_order)
  made.mix[:, 0, MEMORY] = -gain * second_order
  made.mix[:, 0, NOISE] = fresh
  made.mix[:, 1, X0] = 1
  return made


def _ddpm(schedule, path, **_) -> Calls:
  """Ancestral sampling, (7) of arXiv 2006.11239; diffusers' scheduling_ddpm.py."""
  made = _one_step(path, 1.0)
  if schedule.option("variance_type", "fixed_small") == "fixed_large":
    beta = 1 - (path.alpha / path.alpha_next) ** 2
    made.mix[:, 0, NOISE] = np.where(path.t > 0, np.sqrt(beta), 0.0)
  return made


def _euler(schedule, path, *, name, **_) -> Calls:
  """diffusers' scheduling_euler_discrete.py and _ancestral_discrete.py, in our units of x."""
  made = _one_step(path, float(name == "euler_ancestral"))
  made.mix[-1, 0] /= path.alpha_next[-1]  # what diffusers returns is not scaled back
  return made


def _heun(schedule, path, **_) -> Calls:
  """Heun's method (Algorithm 1 of arXiv 2206.00364 without churn); diffusers'
  scheduling_heun_discrete.py. Two calls a step, but one in the last, which ends at r = 0.
  """
  first = _one_step(path, 0.0)
  count = 2 * len(path.t) - 1
  step, later = np.arange(count) // 2, (np.arange(count) + 1) // 2
  mix = first.mix[step]
  mix[:, 1] = 0
  mix[0::2, 1, STATE] = 1  # the state before
  mix[0::2, 2, X0] = 1
  mix[1::2] = 0
  # Half of each derivative, (x / alpha - x_0) / r; all but the last step.
  alpha, sigma, alpha_next, sigma_next = (column[:-1] for column in path[1:])
  r, r_next = sigma / alpha, sigma_next / alpha_next
  half = (r_next - r) / 2
  mix[1::2, 0, MEMORY] = (1 + half / r) * alpha_next / alpha
  mix[1::2, 0, MEMORY + 1] = -half / r * alpha_next
  mix[1::2, 0, STATE] = half / r_next
  mix[1::2, 0, X0] = -half / r_next * alpha_next
  return Calls(path.t[later], step, path.alpha[later], path.sigma[later], mix, first.start)


def _dpm_solver(schedule, path, *, steps, name, **_) -> Calls:
  """DPM-Solver++(2M), Algorithm 2 of arXiv 2211.01095, or its SDE; diffusers'
  scheduling_dpmsolver_multistep.py.

  A first-order step whose x_0 is extrapolated along lambda = -log r from this one and the last.
  """
  share = float(name == "sde-dpmsolver++")
  order = np.zeros_like(path.t)  # what is added to the first
  if schedule.option("solver_order", 2) == 2:
    h = np.log(path.sigma * path.alpha_next / (path.alpha * path.sigma_next))
    weight = 0.5
    if schedule.option("solver_type", "midpoint") == "heun":
      c = (1 + share) * h[1:]
      weight = np.nan_to_num(1 / -np.expm1(-c) - 1 / c)
    order[1:] = weight * h[1:] / h[:-1]
    few = schedule.option("lower_order_final", True) and steps < 15
    if few or schedule.option("euler_at_final", False) or path.sigma_next[-1] == 0.0:
      order[-1] = 0.0
  return _one_step(path, share, order)


def _unipc(schedule, path, *, skip, **_) -> Calls:
  """UniPC, Algorithms 5 and 7 of arXiv 2302.04867 for x_0; diffusers'
  scheduling_unipc_multistep.py.

  Memory: the corrected state of the last step, and the last three x_0.
  """
  made = _empty(path)
  count, order = len(path.t), schedule.option("solver_order", 2)
  falling = schedule.option("lower_order_final", True)
  uncorrected = schedule.option("disable_corrector", ())
  kind = schedule.option("solver_type", "bh2")
  r = np.append(path.sigma / path.alpha, path.sigma_next[-1] / path.alpha_next[-1])
  log_snr = -np.log(r)
  used = [min(order, i + 1, count - i if falling else order) for i in range(count)]

  def advance(start: int, order: int, corrects: bool, newest_x0: int):
    """The state at start + 1 from the one at `start`: (its factor, {column: factor}).

    `newest_x0` is the column of x_0 at `start`; older ones follow from MEMORY + 1 on, or, when
    correcting, from MEMORY + 2 on, and x_0 at start + 1 is in the column X0.
    """
    alpha, h = path.alpha_next[start], log_snr[start + 1] - log_snr[start]
    older = log_snr[start - order + 1 : start][::-1]
    nodes = np.append((older - log_snr[start]) / h, 1.0)
    scale = -h if kind == "bh1" else np.expm1(-h)
    columns = [MEMORY + 1 + corrects + j for j in range(order - 1)]
    if corrects:
      columns.append(X0)
      weights = _unipc_weights(nodes, -h, scale)
      weights = np.array([0.5]) if order == 1 else weights
    else:
      weights = _unipc_weights(nodes[:-1], -h, scale) if order > 2 else np.full(order - 1, 0.5)
      nodes = nodes[:-1]
    weights = -alpha * scale * weights / nodes if len(nodes) else weights
    factors = {newest_x0: -alpha * np.expm1(-h) - weights.sum()}
    for column, weight in zip(columns, weights, strict=True):
      factors[column] = factors.get(column, 0.0) + weight
    return path.sigma_next[start] / path.sigma[start], factors

  for i, mix in enumerate(made.mix):
    here = mix[1]  # the corrected state
    if i and skip + i - 1 not in uncorrected:
      here[MEMORY], factors = advance(i - 1, used[i - 1], True, MEMORY + 1)
      for column, factor in factors.items():
        here[column] = factor
    else:
      here[STATE] = 1
    keep, factors = advance(i, used[i], False, X0)
    mix[0] = keep * here
    for column, factor in factors.items():
      mix[0, column] += factor
    mix[2, X0] = mix[3, MEMORY + 1] = mix[4, MEMORY + 2] = 1
  return made


def _unipc_weights(nodes: np.ndarray, h: float, scale: float) -> np.ndarray:
  """Solves R a = b of Theorem 3.1: weights of the differences at `nodes`, in units of h."""
  count, phi, b = len(nodes), np.expm1(h) / h - 1, []
  for k in range(1, count + 1):
    b.append(factorial(k) * phi / scale)
    phi = phi / h - 1 / factorial(k + 1)
  return np.linalg.solve(nodes ** np.arange(count)[:, None], np.array(b))


def _pndm(schedule, path, *, steps, **_) -> Calls:
  """PNDM without its Runge-Kutta start (PLMS; arXiv 2202.09778); diffusers' scheduling_pndm.py with
  skip_prk_steps. The first step is made twice, so that there is one call more than steps.

  The combined predictions of up to four calls become noise at the state that a step starts from.
  Memory: the last three predictions, and the state before the first step.
  """
  back, alpha_bar = schedule.num_train_timesteps // steps, schedule.alphas_cumprod_f64
  count = len(path.t) + (len(path.t) > 1)
  step = np.maximum(np.arange(count) - 1, 0)
  call = np.arange(count)
  call[2:] -= 1  # whose timestep it is: 0, 1, 1, 2, ...
  made = _empty(Path(*(column[call] for column in path)))._replace(step=step)
  weights = [[1], [0.5, 0.5], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
  weights += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * count
  source = np.arange(count) * 0 + STATE
  for i, mix in enumerate(made.mix):
    at = call[i]
    alpha, sigma = path.alpha[at], path.sigma[at]
    alpha_next, sigma_next = path.alpha_next[at], path.sigma_next[at]
    if i == 1:  # the first step again, with the mean of the predictions at both its ends
      source[i] = MEMORY + 3
      alpha_next, sigma_next = alpha, sigma
      level = alpha_bar[int(path.t[at]) + back]
      alpha, sigma = np.sqrt(level), np.sqrt(1 - level)
    to_eps = sigma_next - alpha_next * sigma / alpha
    eps_state, eps_prediction = eps_of(schedule.prediction_type, alpha, sigma)
    mix[0, source[i]] = alpha_next / alpha + to_eps * eps_state
    columns = [PREDICTION, MEMORY, MEMORY + 1, MEMORY + 2]
    for column, weight in zip(columns, weights[i]):
      mix[0, column] = to_eps * eps_prediction * weight
    if i == 1:
      mix[1, MEMORY] = 1
    else:
      mix[1, PREDICTION] = mix[2, MEMORY] = mix[3, MEMORY + 1] = 1
    mix[4, STATE] = i == 0
  return made


def _lcm(schedule, path, **_) -> Calls:
  """Multistep consistency sampling (arXiv 2310.04378); diffusers' scheduling_lcm.py."""
  made = _empty(path)
  scaled, data = path.t * schedule.option("timestep_scaling", 10.0), 0.5
  made.mix[:, 0, X0] = path.alpha_next * scaled / np.sqrt(scaled**2 + data**2)
  made.mix[:, 0, STATE] = path.alpha_next * data**2 / (scaled**2 + data**2)
  made.mix[:, 0, NOISE] = path.sigma_next
  return made


_SOLVERS = {
  "ddim": _ddim,
  "ddpm": _ddpm,
  "pndm": _pndm,
  "lcm": _lcm,
  "euler": _euler,
  "euler_ancestral": _euler,
  "heun": _heun,
  "dpmsolver++": _dpm_solver,
  "sde-dpmsolver++": _dpm_solver,
  "unipc": _unipc,
}
