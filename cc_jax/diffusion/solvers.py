"""Solvers: each sampler's step as numbers, float64 numpy, computed before anything is compiled.

All of our samplers are linear in the state x, the network's prediction, the x_0 that it implies,
fresh noise and a few tensors of memory. So a sampler is a path (timesteps and noise levels,
timesteps.py) and, for every call of the network, a matrix. DDPM, Euler, Euler ancestral and
DPM-Solver++ even share one step, `_x0_step`, along different paths.

The state is always x = alpha x_0 + sigma noise with alpha² + sigma² = 1, what the network sees.

A solver takes the schedule, a path and the keywords `steps`, `eta` (DDIM's share of fresh noise)
and `skip` (steps left out before the path begins), and returns `Calls`. registry.py lists them.
"""

from math import factorial
from typing import NamedTuple

import numpy as np

from cc_jax.diffusion.timesteps import Path

# Columns of a matrix: a call's inputs. Its rows are the outputs: the next state and memory.
STATE, PREDICTION, X0, NOISE, MEMORY = range(5)
SLOTS = 4  # tensors of memory; UniPC of order 3 and PNDM need them all


class Calls(NamedTuple):
  """A trajectory: one row per call of the network; float64.

  `mix` [calls, 1 + SLOTS, MEMORY + SLOTS] takes (state, prediction, x_0, noise, memory) to (state,
  memory).
  """

  t: np.ndarray
  step: np.ndarray  # the step that a call belongs to; Heun's and PNDM's may have two calls
  alpha: np.ndarray  # of the state that the network sees
  sigma: np.ndarray
  mix: np.ndarray


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


def _zeros(path: Path) -> Calls:
  """One call per step, with `mix` still to be filled in."""
  mix = np.zeros((len(path.t), 1 + SLOTS, MEMORY + SLOTS))
  return Calls(path.t, np.arange(len(path.t)), path.alpha, path.sigma, mix)


def _first_order_factors(path: Path, fresh_share: float):
  """Factors of x_0, of the predicted noise and of fresh noise in a first-order step, (12) and (16)
  of arXiv 2010.02502. The next state is alpha_next x_0 + noise of sigma_next. `fresh_share` is eta
  there: 0 is an ODE's step (DDIM, Euler), 1 the posterior's (DDPM, Euler ancestral, SDE).
  """
  beta = 1 - (path.alpha / path.alpha_next) ** 2
  fresh = fresh_share * path.sigma_next / path.sigma * np.sqrt(beta)
  return path.alpha_next, np.sqrt(path.sigma_next**2 - fresh**2), fresh


def ddim(schedule, path, *, eta, **_) -> Calls:
  """DDIM (diffusers' scheduling_ddim.py); clipping x_0 does not change the predicted noise."""
  calls = _zeros(path)
  to_x0, to_eps, fresh = _first_order_factors(path, eta)
  eps_state, eps_prediction = eps_of(schedule.prediction_type, path.alpha, path.sigma)
  calls.mix[:, 0, STATE] = to_eps * eps_state
  calls.mix[:, 0, PREDICTION] = to_eps * eps_prediction
  calls.mix[:, 0, X0] = to_x0
  calls.mix[:, 0, NOISE] = fresh
  return calls


def _x0_step(path: Path, fresh_share: float, second_order: np.ndarray | float = 0.0) -> Calls:
  """A first-order step with x_0 + second_order (x_0 - previous x_0) in place of x_0, and with the
  noise that x and x_0 imply.
  """
  calls = _zeros(path)
  to_x0, to_eps, fresh = _first_order_factors(path, fresh_share)
  gain = to_x0 - to_eps * path.alpha / path.sigma
  calls.mix[:, 0, STATE] = to_eps / path.sigma
  calls.mix[:, 0, X0] = gain * (1 + second_order)
  calls.mix[:, 0, MEMORY] = -gain * second_order
  calls.mix[:, 0, NOISE] = fresh
  calls.mix[:, 1, X0] = 1
  return calls


def ddpm(schedule, path, **_) -> Calls:
  """Ancestral sampling, (7) of arXiv 2006.11239; diffusers' scheduling_ddpm.py."""
  calls = _x0_step(path, 1.0)
  if schedule.option("variance_type", "fixed_small") == "fixed_large":
    beta = 1 - (path.alpha / path.alpha_next) ** 2
    calls.mix[:, 0, NOISE] = np.where(path.t > 0, np.sqrt(beta), 0.0)
  return calls


def euler(schedule, path, *, fresh_share, **_) -> Calls:
  """diffusers' scheduling_euler_discrete.py and _ancestral_discrete.py, in our units of x."""
  calls = _x0_step(path, fresh_share)
  calls.mix[-1, 0] /= path.alpha_next[-1]  # what diffusers returns is not scaled back
  return calls


def heun(schedule, path, **_) -> Calls:
  """Heun's method (Algorithm 1 of arXiv 2206.00364 without churn); diffusers'
  scheduling_heun_discrete.py. Two calls per step, but one in the last, which ends at r = 0.
  """
  first = _x0_step(path, 0.0)
  count = 2 * len(path.t) - 1
  step, level = np.arange(count) // 2, (np.arange(count) + 1) // 2
  mix = first.mix[step]
  mix[:, 1] = 0
  mix[0::2, 1, STATE] = 1  # the state at the start of the step
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
  return Calls(path.t[level], step, path.alpha[level], path.sigma[level], mix)


def dpm_solver(schedule, path, *, fresh_share, steps, **_) -> Calls:
  """DPM-Solver++ (2M, 3M), Algorithm 2 of arXiv 2211.01095, or its SDE; diffusers'
  scheduling_dpmsolver_multistep.py.

  A first-order step whose x_0 is extrapolated along lambda = -log r from this and the previous x_0.
  """
  second_order, order = np.zeros_like(path.t), schedule.option("solver_order", 2)
  if order > 1:
    h = np.log(path.sigma * path.alpha_next / (path.alpha * path.sigma_next))
    weight = 0.5
    if schedule.option("solver_type", "midpoint") == "heun":
      c = (1 + fresh_share) * h[1:]
      weight = np.nan_to_num(1 / -np.expm1(-c) - 1 / c)
    second_order[1:] = weight * h[1:] / h[:-1]
    lower_order = schedule.option("lower_order_final", True) and steps < 15
    if lower_order or schedule.option("euler_at_final", False) or path.sigma_next[-1] == 0.0:
      second_order[-1] = 0.0
  calls = _x0_step(path, fresh_share, second_order)
  if order == 3:
    lower = max(int(second_order[-1] == 0.0), 2 * lower_order)  # steps at the end
    _third_order(calls, path, h, np.arange(2, len(h) - lower))
  return calls


def _third_order(calls: Calls, path: Path, h: np.ndarray, rows: np.ndarray) -> None:
  """Makes these steps of DPM-Solver++ third-order: (4.6) of arXiv 2206.00927, for x_0.

  Memory: the previous two x_0.
  """
  calls.mix[:, 2, MEMORY] = 1
  h, r0, r1 = h[rows], h[rows - 1] / h[rows], h[rows - 2] / h[rows]
  alpha, decay = path.alpha_next[rows], np.expm1(-h)
  slope, curvature = alpha * (decay / h + 1), -alpha * ((decay + h) / h**2 - 0.5)
  # Factors of (x_0 - previous x_0) and of (previous x_0 - the one before).
  newer = (slope + (slope * r0 + curvature) / (r0 + r1)) / r0
  older = -(slope * r0 + curvature) / (r0 + r1) / r1
  calls.mix[rows, 0, X0] = newer - alpha * decay
  calls.mix[rows, 0, MEMORY] = older - newer
  calls.mix[rows, 0, MEMORY + 1] = -older


def unipc(schedule, path, *, skip, **_) -> Calls:
  """UniPC, Algorithms 5 and 7 of arXiv 2302.04867 for x_0; diffusers'
  scheduling_unipc_multistep.py.

  Memory: the corrected state at the start of the previous step, and the previous three x_0.
  """
  calls = _zeros(path)
  count, order = len(path.t), schedule.option("solver_order", 2)
  lower_order_final = schedule.option("lower_order_final", True)
  uncorrected = schedule.option("disable_corrector", ())
  solver_type = schedule.option("solver_type", "bh2")
  r = np.append(path.sigma / path.alpha, path.sigma_next[-1] / path.alpha_next[-1])
  log_snr = -np.log(r)
  orders = [min(order, i + 1, count - i if lower_order_final else order) for i in range(count)]

  def advance(start: int, order: int, corrects: bool, newest_x0: int):
    """The state at start + 1 from the one at `start`: (its factor, {column: factor}).

    `newest_x0` is the column of x_0 at `start`; older ones follow from MEMORY + 1 on, or, when
    correcting, from MEMORY + 2 on, and x_0 at start + 1 is in the column X0.
    """
    alpha, h = path.alpha_next[start], log_snr[start + 1] - log_snr[start]
    older = log_snr[start - order + 1 : start][::-1]
    nodes = np.append((older - log_snr[start]) / h, 1.0)
    scale = -h if solver_type == "bh1" else np.expm1(-h)
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

  for i, mix in enumerate(calls.mix):
    corrected = mix[1]
    if i and skip + i - 1 not in uncorrected:
      corrected[MEMORY], factors = advance(i - 1, orders[i - 1], True, MEMORY + 1)
      for column, factor in factors.items():
        corrected[column] = factor
    else:
      corrected[STATE] = 1
    state_factor, factors = advance(i, orders[i], False, X0)
    mix[0] = state_factor * corrected
    for column, factor in factors.items():
      mix[0, column] += factor
    mix[2, X0] = mix[3, MEMORY + 1] = mix[4, MEMORY + 2] = 1
  return calls


def _unipc_weights(nodes: np.ndarray, h: float, scale: float) -> np.ndarray:
  """Solves R a = b of Theorem 3.1: weights of the differences at `nodes`, in units of h."""
  count, phi, b = len(nodes), np.expm1(h) / h - 1, []
  for k in range(1, count + 1):
    b.append(factorial(k) * phi / scale)
    phi = phi / h - 1 / factorial(k + 1)
  try:
    return np.linalg.solve(nodes ** np.arange(count)[:, None], np.array(b))
  except np.linalg.LinAlgError:  # two nodes are one: there is no step to the last level, or no end
    return np.full(count, np.nan)


def pndm(schedule, path, *, steps, **_) -> Calls:
  """PNDM without its Runge-Kutta start (PLMS; arXiv 2202.09778); diffusers' scheduling_pndm.py with
  skip_prk_steps. The first step is taken twice, so that there is one call more than steps.

  The combined predictions of up to four calls become noise at the state that a step starts from.
  Memory: the previous three predictions, and the state at the start of the first step.
  """
  stride, alpha_bar = schedule.num_train_timesteps // steps, schedule.alphas_cumprod_f64
  count = len(path.t) + (len(path.t) > 1)
  step = np.maximum(np.arange(count) - 1, 0)
  row = np.arange(count)  # of the path, for each call
  row[2:] -= 1  # 0, 1, 1, 2, ...
  calls = _zeros(Path(*(column[row] for column in path)))._replace(step=step)
  weights = [[1], [0.5, 0.5], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
  weights += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * count
  source = np.arange(count) * 0 + STATE
  for i, mix in enumerate(calls.mix):
    start = row[i]
    alpha, sigma = path.alpha[start], path.sigma[start]
    alpha_next, sigma_next = path.alpha_next[start], path.sigma_next[start]
    if i == 1:  # the first step again, with the mean of the predictions at both its ends
      source[i] = MEMORY + 3
      alpha_next, sigma_next = alpha, sigma
      level = alpha_bar[int(path.t[start]) + stride]
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
  return calls


def lcm(schedule, path, **_) -> Calls:
  """Multistep consistency sampling (arXiv 2310.04378); diffusers' scheduling_lcm.py."""
  calls = _zeros(path)
  scaled, data = path.t * schedule.option("timestep_scaling", 10.0), 0.5
  calls.mix[:, 0, X0] = path.alpha_next * scaled / np.sqrt(scaled**2 + data**2)
  calls.mix[:, 0, STATE] = path.alpha_next * data**2 / (scaled**2 + data**2)
  calls.mix[:, 0, NOISE] = path.sigma_next
  return calls
