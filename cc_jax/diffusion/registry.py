"""The samplers that we have, one entry each. Nothing else lists them.

To add a sampler, write its solver (solvers.py) and one entry of `REGISTRY`. Its name on the command
line, 'default', the checks of its options, its timesteps and noise levels follow from the entry.
Only the betas of configs that state none are elsewhere: training needs them, too (schedule.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cc_jax.diffusion import solvers, timesteps


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A sampler, and the scheduler class of diffusers that it agrees with.

  A class may have several samplers; algorithm_type in its config names one, by default the first.
  """

  name: str
  scheduler_class: str  # 'default' means this sampler where the scheduler config names the class
  solver: Callable[..., solvers.Calls]  # (schedule, path, steps=, eta=, skip=)
  path: Callable[..., timesteps.Path]  # (schedule, steps, spacing)
  _: dataclasses.KW_ONLY
  spacing: str = "leading"  # timestep_spacing where the config states none
  # Values that we implement, the default first. An option that is not listed is either read in full
  # or unknown to diffusers' class, too.
  options: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  # Defaults in configs that name the class, where those differ from ours.
  class_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  clips_x0: bool = False  # reads clip_sample
  takes_eta: bool = False  # the user chooses the share of fresh noise
  divides_by_alpha: bool = False  # cannot start at zero SNR, whatever the prediction type
  # Starts from sigma noise unless the spacing is 'leading' (diffusers' init_noise_sigma): Euler's
  # schedulers know that some of the first state is signal.
  scales_noise: bool = False


# fmt: off
_NO_THRESHOLDING = {"thresholding": (False,)}
_FINAL_SIGMAS = {"final_sigmas_type": ("zero", "sigma_min")}
_NO_BETA_SIGMAS = {"use_beta_sigmas": (False,)}
_MULTISTEP = {**_NO_THRESHOLDING, **_FINAL_SIGMAS, **_NO_BETA_SIGMAS, "use_flow_sigmas": (False,)}

_EULER = Sampler(
  "euler", "EulerDiscreteScheduler", partial(solvers.euler, fresh_share=0.0),
  timesteps.interpolated, spacing="linspace", scales_noise=True,
  options={**_FINAL_SIGMAS, **_NO_BETA_SIGMAS,
           "interpolation_type": ("linear",), "timestep_type": ("discrete",)})
_DPM_SOLVER = Sampler(
  "dpmsolver++", "DPMSolverMultistepScheduler", partial(solvers.dpm_solver, fresh_share=0.0),
  partial(timesteps.interpolated, multistep=True, dpm=True), spacing="linspace",
  # diffusers reads other solvers' types as midpoint, and no fixed variance, which DDPM's configs
  # state.
  options={**_MULTISTEP, "solver_order": (2, 1, 3),
           "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large",
                             "fixed_large_log"),
           "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")})

REGISTRY = {sampler.name: sampler for sampler in (
  Sampler(
    "ddim", "DDIMScheduler", solvers.ddim, partial(timesteps.strided, set_alpha_to_one=True),
    options=_NO_THRESHOLDING, clips_x0=True, takes_eta=True),
  Sampler(
    "ddpm", "DDPMScheduler", solvers.ddpm, timesteps.consecutive, clips_x0=True,
    options={**_NO_THRESHOLDING,
             "variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}),
  Sampler(
    "pndm", "PNDMScheduler", solvers.pndm, partial(timesteps.strided, set_alpha_to_one=False),
    options={"skip_prk_steps": (True,), "prediction_type": ("epsilon", "v_prediction")},
    class_defaults={"skip_prk_steps": False}, divides_by_alpha=True),
  Sampler(
    "lcm", "LCMScheduler", solvers.lcm, partial(timesteps.consecutive, lcm=True),
    options=_NO_THRESHOLDING, clips_x0=True),
  _EULER,
  dataclasses.replace(
    _EULER, name="euler_ancestral", scheduler_class="EulerAncestralDiscreteScheduler",
    solver=partial(solvers.euler, fresh_share=1.0), options={},
    path=partial(timesteps.interpolated, respaces=False, ends_at_zero=True)),
  dataclasses.replace(
    _EULER, name="heun", scheduler_class="HeunDiscreteScheduler", solver=solvers.heun,
    path=partial(timesteps.interpolated, ends_at_zero=True), options=_NO_BETA_SIGMAS,
    clips_x0=True),
  _DPM_SOLVER,
  Sampler(
    "unipc", "UniPCMultistepScheduler", solvers.unipc,
    partial(timesteps.interpolated, multistep=True), spacing="linspace",
    # diffusers reads other solvers' types as bh2.
    options={**_MULTISTEP, "predict_x0": (True,), "solver_p": (None,), "solver_order": (2, 1, 3),
             "use_dynamic_shifting": (False,), "shift_terminal": (None,),
             "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho")}),
  dataclasses.replace(
    _DPM_SOLVER, name="sde-dpmsolver++", solver=partial(solvers.dpm_solver, fresh_share=1.0),
    # diffusers 0.42.1 has a wrong sign in the third order.
    options={**_DPM_SOLVER.options, "solver_order": (2, 1)}),
)}
# fmt: on
