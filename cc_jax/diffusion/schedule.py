"""The discrete noise schedule of a Stable Diffusion base, read from its scheduler_config.json."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# What diffusers writes in place of a zero terminal alpha_bar before it divides by it
# (scheduling_dpmsolver_multistep.py): the smallest positive fp16 number.
SMALLEST_ALPHA_BAR = 2.0**-24

# Keys of scheduler configs that are numbers.
_NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "trained_betas", "steps_offset",
            "clip_sample_range", "sigma_min", "sigma_max", "lambda_min_clipped", "timestep_scaling",
            "original_inference_steps")  # fmt: skip

# Classes of diffusers whose default betas differ from the fields' defaults below.
_CLASS_BETAS = {
  "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
  "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """x_t = alpha_t x_0 + sigma_t noise with alpha_t² + sigma_t² = 1, for integer t in [0, T).

  Fields carry the names and defaults of diffusers' schedulers. Hashable, so it can be a static
  argument or be closed over. Coefficients are computed in float64 and only then rounded, because
  1 - alpha_bar loses three digits in float32 at small t; every method returns float32.

  A `t` has the shape of the leading axes of its arrays: [b], or [] if all share it. It must lie
  in [0, T): under jit an index out of range is clamped, not reported.

  Raises (when constructed):
    UserError: an unknown prediction type or beta schedule, or betas that do not fit.
  """

  num_train_timesteps: int = 1000
  beta_start: float = 0.0001
  beta_end: float = 0.02
  beta_schedule: str = "linear"
  trained_betas: tuple[float, ...] | None = None
  prediction_type: str = "epsilon"
  rescale_betas_zero_snr: bool = False
  class_name: str = ""  # the scheduler that the base names
  sampler_options: tuple[tuple[str, Any], ...] = ()  # the other keys of the config, sorted

  @classmethod
  def from_config(cls, config: Mapping[str, Any], *, prediction_type: str | None = None) -> Self:
    """Reads the dict of a scheduler_config.json.

    Keys that are not fields are kept for the samplers, which check them when a step table is
    computed: training does not refuse a base because of an option that it never uses.

    Args:
      config: the dict.
      prediction_type: the one in another file of the same checkpoint, if that states one.

    Raises:
      UserError: as above, or two prediction types contradict each other.
    """
    config = {k: v for k, v in config.items() if v is not None}
    _check_numbers(config)
    name = config.get("_class_name", "")
    config = {**_CLASS_BETAS.get(name, {}), **config}
    default = cls()
    betas = config.get("trained_betas")
    fields = cls.__dataclass_fields__
    options = {k: v for k, v in config.items() if k not in fields and not k.startswith("_")}
    return cls(
      num_train_timesteps=int(config.get("num_train_timesteps", default.num_train_timesteps)),
      beta_start=float(config.get("beta_start", default.beta_start)),
      beta_end=float(config.get("beta_end", default.beta_end)),
      beta_schedule=config.get("beta_schedule", default.beta_schedule),
      trained_betas=None if betas is None else tuple(float(b) for b in betas),
      prediction_type=_agreed_prediction_type(config, prediction_type),
      rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
      class_name=name,
      sampler_options=_hashable(options),
    )

  def __post_init__(self):
    _one_of(self.prediction_type, PREDICTION_TYPES, "prediction_type")
    if self.num_train_timesteps < 1:
      raise UserError(
        f"the scheduler config has num_train_timesteps={self.num_train_timesteps}; usual is 1000"
      )
    for beta in (self.beta_start, self.beta_end, *(self.trained_betas or ())):
      if not 0 <= beta <= 1:
        raise UserError(f"the scheduler config has a beta of {beta:g}; betas lie between 0 and 1")
    if self.trained_betas is None:
      _one_of(self.beta_schedule, BETA_SCHEDULES, "beta_schedule")
    elif len(self.trained_betas) != self.num_train_timesteps:
      raise UserError(
        f"the scheduler config has {len(self.trained_betas)} trained_betas for "
        f"num_train_timesteps={self.num_train_timesteps}; make the two agree"
      )

  def option(self, key: str, default: Any) -> Any:
    """A sampler's key of the config, or the sampler's `default` where the config has none."""
    return dict(self.sampler_options).get(key, default)

  @functools.cached_property
  def betas_f64(self) -> np.ndarray:
    """[T] float64."""
    steps = self.num_train_timesteps
    if self.trained_betas is not None:
      betas = np.asarray(self.trained_betas, np.float64)
    elif self.beta_schedule == "linear":
      betas = np.linspace(self.beta_start, self.beta_end, steps)
    elif self.beta_schedule == "scaled_linear":
      betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
    else:
      betas = _cosine_betas(steps)
    return _rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

  @functools.cached_property
  def alphas_cumprod_f64(self) -> np.ndarray:
    """alpha_bar_t, [T] float64; exactly 0 at the end where the config asks for zero SNR."""
    return np.cumprod(1.0 - self.betas_f64)

  @property
  def alphas_cumprod(self) -> Float[np.ndarray, "t"]:
    """alpha_bar_t, [T] float32."""
    return self.alphas_cumprod_f64.astype(np.float32)

  def snr(self, t: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """alpha_t² / sigma_t² (Min-SNR, arXiv 2303.09556; diffusers training_utils.compute_snr)."""
    ratio = self.alphas_cumprod_f64 / (1.0 - self.alphas_cumprod_f64)
    return jnp.asarray(ratio, jnp.float32)[t]

  def add_noise(
    self, x0: Float[Array, "*b h w c"], noise: Float[Array, "*b h w c"], t: Int[Array, "*b"]
  ) -> Float[Array, "*b h w c"]:
    """x_t (diffusers DDPMScheduler.add_noise)."""
    alpha, sigma = self._alpha_sigma(t, x0)
    return alpha * _f32(x0) + sigma * _f32(noise)

  def velocity(
    self, x0: Float[Array, "*b h w c"], noise: Float[Array, "*b h w c"], t: Int[Array, "*b"]
  ) -> Float[Array, "*b h w c"]:
    """v = alpha noise - sigma x_0 (arXiv 2202.00512; diffusers DDPMScheduler.get_velocity)."""
    alpha, sigma = self._alpha_sigma(t, x0)
    return alpha * _f32(noise) - sigma * _f32(x0)

  def target(
    self, x0: Float[Array, "*b h w c"], noise: Float[Array, "*b h w c"], t: Int[Array, "*b"]
  ) -> Float[Array, "*b h w c"]:
    """What the network should predict, by the base's prediction type."""
    if self.prediction_type == "epsilon":
      return _f32(noise)
    if self.prediction_type == "v_prediction":
      return self.velocity(x0, noise, t)
    return _f32(x0)

  def to_x0(
    self, prediction: Float[Array, "*b h w c"], x_t: Float[Array, "*b h w c"], t: Int[Array, "*b"]
  ) -> Float[Array, "*b h w c"]:
    """The clean latents that a prediction at x_t implies.

    With epsilon prediction and alpha_t = 0 the result is finite but meaningless.
    """
    alpha, sigma = self._alpha_sigma(t, x_t)
    if self.prediction_type == "epsilon":
      return (_f32(x_t) - sigma * _f32(prediction)) / jnp.maximum(alpha, SMALLEST_ALPHA_BAR**0.5)
    if self.prediction_type == "v_prediction":
      return alpha * _f32(x_t) - sigma * _f32(prediction)
    return _f32(prediction)

  def to_eps(
    self, prediction: Float[Array, "*b h w c"], x_t: Float[Array, "*b h w c"], t: Int[Array, "*b"]
  ) -> Float[Array, "*b h w c"]:
    """The noise that a prediction at x_t implies."""
    alpha, sigma = self._alpha_sigma(t, x_t)
    if self.prediction_type == "epsilon":
      return _f32(prediction)
    if self.prediction_type == "v_prediction":
      return alpha * _f32(prediction) + sigma * _f32(x_t)
    return (_f32(x_t) - alpha * _f32(prediction)) / sigma

  def _alpha_sigma(self, t, like):
    """alpha_t and sigma_t, shaped to multiply `like`."""
    t = jnp.asarray(t)
    shape = t.shape + (1,) * (like.ndim - t.ndim)
    alpha_bar = self.alphas_cumprod_f64
    return tuple(
      jnp.asarray(np.sqrt(square), jnp.float32)[t].reshape(shape)
      for square in (alpha_bar, 1.0 - alpha_bar)
    )


def _f32(x: Array) -> Array:
  return jnp.asarray(x, jnp.float32)


def _one_of(value: str, known: tuple[str, ...], key: str) -> None:
  if value not in known:
    raise UserError(f"the scheduler config has {key}={value!r}; we have {', '.join(known)}")


def _check_numbers(config: Mapping[str, Any]) -> None:
  """Raises UserError where text or the like stands for a number."""
  for key in _NUMBERS:
    values = config.get(key, 0)
    several = key == "trained_betas" and isinstance(values, list | tuple)
    for value in values if several else [values]:
      if not isinstance(value, numbers.Real) or isinstance(value, bool) or math.isnan(value):
        raise UserError(f"the scheduler config has {key}={value!r}; write a number")


def _hashable(value: Any) -> Any:
  if isinstance(value, Mapping):
    return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
  return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _agreed_prediction_type(config: Mapping[str, Any], checkpoint: str | None) -> str:
  """The prediction type that all sources agree on: the config's keys and the checkpoint's files.

  `predict_epsilon` is the key of diffusers before 0.10 for epsilon (true) or sample (false), and
  Euler's scheduler also accepts original_sample for sample.
  """
  sources = {}
  if "prediction_type" in config:
    sources["prediction_type"] = config["prediction_type"]
  if "predict_epsilon" in config:
    sources["predict_epsilon"] = "epsilon" if config["predict_epsilon"] else "sample"
  if checkpoint is not None:
    sources["checkpoint"] = checkpoint
  sources = {k: "sample" if v == "original_sample" else v for k, v in sources.items()}
  if len(set(sources.values())) > 1:
    listed = ", ".join(f"{v} ({k})" for k, v in sources.items())
    raise UserError(
      f"contradicting prediction types: {listed}; set prediction_type in the scheduler config to "
      "the one that the network was trained with"
    )
  return next(iter(sources.values()), NoiseSchedule.prediction_type)


def _cosine_betas(steps: int, max_beta: float = 0.999) -> np.ndarray:
  """squaredcos_cap_v2 (Improved DDPM, arXiv 2102.09672; diffusers' betas_for_alpha_bar)."""

  def alpha_bar(u):
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

  ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
  return np.minimum(1.0 - np.asarray(ratios), max_beta)


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
  """Shifts and stretches sqrt(alpha_bar) so that it ends at 0 and starts where it did.

  Algorithm 1 of arXiv 2305.08891; diffusers' rescale_zero_terminal_snr.
  """
  root = np.sqrt(np.cumprod(1.0 - betas))
  root = (root - root[-1]) * root[0] / (root[0] - root[-1])
  alpha_bar = root**2
  return 1.0 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
