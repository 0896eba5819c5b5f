"""The schedule, the samplers and guidance against diffusers and against values known by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr

from cc_jax.diffusion import guidance, samplers
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True}
BETAS = {
  "linear": {"beta_schedule": "linear"},
  "scaled_linear": SD,
  "cosine": COSINE,
  "zero_snr": ZERO_SNR,
  "trained": {"trained_betas": np.linspace(1e-3, 2e-2, 1000).tolist()},
}
SCHEDULERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


def model(xp, x, t):
  """Nonlinear in x, mixes channels and depends on t; the same line in torch and in jax."""
  mixed = x + 0.3 * xp.sin(2.0 * x + t / 300.0) * x[:, :, :, 1:2]
  return xp.tanh(mixed * (0.5 + t / 1000.0)) + 0.1 * xp.cos(t / 100.0 + x)


def jax_model(x, t):
  return model(jnp, x, t.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="clip")
def trajectory(latents, table, clip=None):
  return samplers.integrate(jax_model, latents, table, clip=clip, return_trajectory=True)[1]


def torch_trajectory(scheduler, latents, steps):
  scheduler.set_timesteps(steps)
  x, states = torch.from_numpy(latents), []
  for t in scheduler.timesteps:
    x = scheduler.step(model(torch, x, t.float()), t, x).prev_sample
    states.append(x.numpy())
  return np.stack(states)


def relative(ours, theirs):
  return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def worst_state(ours, theirs):
  return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def latents():
  return np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_trajectory_is_diffusers(name, spacing, prediction, steps, latents):
  for betas, offset in [(SD, 1), (COSINE, 0), (ZERO_SNR, 0)]:
    if betas is ZERO_SNR and (name, prediction) == ("ddim", "epsilon") and spacing != "leading":
      continue  # diffusers divides by zero; ours is an error, see test_bad_sampling
    config = {
      **betas,
      "prediction_type": prediction,
      "timestep_spacing": spacing,
      "steps_offset": offset,
    }
    extra = {"clip_sample": False, "set_alpha_to_one": offset == 0} if name == "ddim" else {}
    theirs = SCHEDULERS[name](**config, **extra)
    schedule = NoiseSchedule.from_config(dict(theirs.config))
    table = samplers.step_table(schedule, steps=steps, sampler=name)
    reference = torch_trajectory(theirs, latents, steps)
    np.testing.assert_array_equal(table.timestep, theirs.timesteps.numpy())
    assert worst_state(trajectory(latents, table), reference) < 1e-4


def test_clipped_sample_is_diffusers(latents):
  config = {**SD, "clip_sample": True, "clip_sample_range": 0.5, "_class_name": "DDIMScheduler"}
  ours = samplers.sample(
    jax_model, latents, NoiseSchedule.from_config(config), steps=5, return_trajectory=True
  )[1]
  config.pop("_class_name")
  theirs = torch_trajectory(DDIMScheduler(**config), latents, 5)
  assert worst_state(ours, theirs) < 1e-4
  assert np.abs(theirs[-1]).max() <= 0.5


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
def test_timesteps_are_diffusers(name, spacing):
  """Every step count that is plausible, and each scheduler's own spacing where none is stated."""
  config = {**COSINE, **({"timestep_spacing": spacing} if spacing else {})}
  schedule = NoiseSchedule.from_config(config)
  theirs = SCHEDULERS[name](**config)
  for steps in [*range(1, 60), 61, 103, 250]:
    theirs.set_timesteps(steps)
    expected = theirs.timesteps.numpy()
    ours = samplers.timesteps(schedule, steps=steps, sampler=name)
    assert len(ours) == steps
    np.testing.assert_array_equal(ours, expected[expected >= 0])


def test_lambda_min_clipped_is_diffusers(latents):
  config = {**COSINE, "prediction_type": "v_prediction", "lambda_min_clipped": -5.1}
  theirs = DPMSolverMultistepScheduler(**config)
  table = samplers.step_table(NoiseSchedule.from_config(config), steps=5, sampler="dpmsolver++")
  reference = torch_trajectory(theirs, latents, 5)
  np.testing.assert_array_equal(table.timestep, theirs.timesteps.numpy())
  assert table.timestep[0] < 999
  assert worst_state(trajectory(latents, table), reference) < 1e-4


def test_one_ddim_step_by_hand():
  """alpha_bar 0.64 and then 1: with v = 0 the step returns x_0 = 0.8 x."""
  config = {"num_train_timesteps": 1, "trained_betas": [0.36], "prediction_type": "v_prediction"}
  schedule = NoiseSchedule.from_config(config)
  x = jnp.full((1, 1, 1, 1), 2.0)
  ours = samplers.sample(lambda x, t: jnp.zeros_like(x), x, schedule, steps=1, sampler="ddim")
  np.testing.assert_allclose(ours, 1.6, rtol=1e-6)


def test_state_is_float32_whatever_the_model(latents):
  """A bf16 model only rounds its prediction; the state is never rounded to bf16."""
  schedule = NoiseSchedule.from_config({**SD, "prediction_type": "v_prediction"})
  seen = []

  def half_model(x, t):
    seen.append((x.dtype, t.dtype, t.shape))
    return jax_model(x, t).astype(jnp.bfloat16)

  half = jnp.asarray(latents, jnp.bfloat16)
  ours = samplers.sample(half_model, half, schedule, steps=5, sampler="dpmsolver++")
  exact = samplers.sample(jax_model, half, schedule, steps=5, sampler="dpmsolver++")
  assert ours.dtype == jnp.float32 and seen[0] == (jnp.float32, jnp.int32, ())
  assert 0 < relative(ours, np.asarray(exact)) < 0.02


@pytest.mark.parametrize("betas", list(BETAS))
def test_schedule_is_diffusers(betas, latents):
  config = BETAS[betas]
  theirs = DDPMScheduler(**config)
  schedule = NoiseSchedule.from_config(dict(theirs.config))
  assert schedule.alphas_cumprod.dtype == np.float32
  # diffusers rounds betas to float32: the last cosine beta, 0.999, costs its alpha_bar 5e-5.
  np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4)

  noise = np.random.default_rng(1).standard_normal(latents.shape).astype(np.float32)
  for t in ([0, 999], [17, 500]):
    x0_, noise_, t_ = torch.from_numpy(latents), torch.from_numpy(noise), torch.tensor(t)
    t = jnp.asarray(t)
    noisy = schedule.add_noise(latents, noise, t)
    assert relative(noisy, theirs.add_noise(x0_, noise_, t_).numpy()) < 1e-4
    velocity = theirs.get_velocity(x0_, noise_, t_).numpy()
    assert relative(schedule.velocity(latents, noise, t), velocity) < 1e-4
  t = np.arange(10, 999)  # nearer to 0 float32's 1 - alpha_bar has lost the digits
  np.testing.assert_allclose(
    schedule.snr(t), compute_snr(theirs, torch.from_numpy(t)).numpy(), rtol=2e-4
  )


def test_snr_at_the_ends():
  """Known in closed form: cosine alpha_bar at t = 0, where float32 would be off by 1e-3."""
  alpha_bar = (np.cos((0.001 + 0.008) / 1.008 * np.pi / 2) ** 2) / (
    np.cos(0.008 / 1.008 * np.pi / 2) ** 2
  )
  cosine = NoiseSchedule.from_config(COSINE)
  np.testing.assert_allclose(cosine.snr(jnp.array(0)), alpha_bar / (1 - alpha_bar), rtol=1e-6)
  zero = NoiseSchedule.from_config(ZERO_SNR)
  assert zero.snr(jnp.array(999)) == 0.0
  plain = NoiseSchedule.from_config(SD)
  np.testing.assert_allclose(zero.snr(jnp.array(0)), plain.snr(jnp.array(0)), rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_inverts(prediction, latents):
  """The right prediction gives back x_0 and the noise, and is what `target` says it is."""
  schedule = NoiseSchedule.from_config({**SD, "prediction_type": prediction})
  noise = np.random.default_rng(2).standard_normal(latents.shape).astype(np.float32)
  t = jnp.array([50, 700])
  x_t = schedule.add_noise(latents, noise, t)
  target = schedule.target(latents, noise, t)
  expected = {
    "epsilon": noise,
    "v_prediction": schedule.velocity(latents, noise, t),
    "sample": latents,
  }
  np.testing.assert_array_equal(target, expected[prediction])
  assert relative(schedule.to_x0(target, x_t, t), latents) < 1e-5
  assert relative(schedule.to_eps(target, x_t, t), noise) < 1e-5


def test_half_latents_are_noised_in_float32(latents):
  schedule = NoiseSchedule.from_config(SD)
  half = jnp.asarray(latents, jnp.bfloat16)
  noisy = schedule.add_noise(half, half, jnp.array([3, 4]))
  assert noisy.dtype == jnp.float32
  exact = schedule.add_noise(half.astype(jnp.float32), half.astype(jnp.float32), jnp.array([3, 4]))
  np.testing.assert_array_equal(noisy, exact)


def test_guidance_by_hand():
  uncond, text, full = (jnp.full((1, 1, 1, 1), v) for v in (1.0, 2.0, 5.0))
  joint = guidance.classifier_free(uncond, full, 3.0)
  assert joint.item() == 13.0
  apart = guidance.classifier_free(uncond, full, 3.0, text_only=text, image_guidance=2.0)
  assert apart.item() == 1.0 + 3.0 * 1.0 + 2.0 * 3.0
  equal = guidance.classifier_free(uncond, full, 3.0, text_only=text, image_guidance=3.0)
  assert equal.item() == joint.item()
  assert guidance.classifier_free(uncond, full, 1.0).item() == 5.0
  half = guidance.classifier_free(uncond.astype(jnp.bfloat16), full.astype(jnp.bfloat16), 3.0)
  assert half.dtype == jnp.float32
  with pytest.raises(ValueError):
    guidance.classifier_free(uncond, full, 3.0, image_guidance=2.0)


def test_default_sampler_is_the_one_the_base_names():
  def resolve(name):
    config = {**SD, "_class_name": name}
    return samplers.resolve_sampler(NoiseSchedule.from_config(config), "default")

  assert resolve("DDIMScheduler") == "ddim"
  assert resolve("DPMSolverMultistepScheduler") == "dpmsolver++"
  with pytest.raises(UserError, match="PNDMScheduler.*ddim, dpmsolver"):
    resolve("PNDMScheduler")


def test_schedule_is_a_static_argument():
  a, b = NoiseSchedule.from_config(dict(SD)), NoiseSchedule.from_config(dict(SD))
  assert a == b and hash(a) == hash(b)
  assert a != NoiseSchedule.from_config(COSINE)


@pytest.mark.parametrize(
  ("config", "match"),
  [
    ({"prediction_type": "flow_prediction"}, "flow_prediction.*epsilon, v_prediction, sample"),
    ({"beta_schedule": "laplace"}, "laplace.*linear, scaled_linear, squaredcos_cap_v2"),
    ({"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
  ],
)
def test_bad_schedules(config, match):
  with pytest.raises(UserError, match=match):
    NoiseSchedule.from_config(config)


@pytest.mark.parametrize(
  ("config", "sampler", "steps", "match"),
  [
    ({}, "ddim", 0, "steps=0.*between 1 and 1000"),
    ({}, "ddim", -3, "steps=-3"),
    ({}, "ddim", 2.5, "steps=2.5"),
    ({}, "ddim", 1001, "steps=1001"),
    ({}, "dpmsolver++", 1000, "1000 steps do not fit"),
    ({}, "euler", 5, "'euler'.*ddim, dpmsolver"),
    ({"timestep_spacing": "karras"}, "ddim", 5, "karras.*leading, trailing, linspace"),
    ({"thresholding": True}, "ddim", 5, "thresholding=True"),
    ({"solver_order": 3}, "dpmsolver++", 5, "solver_order=3"),
    ({"use_karras_sigmas": True}, "dpmsolver++", 5, "use_karras_sigmas=True"),
    ({"algorithm_type": "sde-dpmsolver++"}, "dpmsolver++", 5, "sde-dpmsolver"),
    (
      {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
      "ddim",
      5,
      "epsilon prediction cannot start at zero SNR",
    ),
  ],
)
def test_bad_sampling(config, sampler, steps, match):
  schedule = NoiseSchedule.from_config(config)  # training does not mind a sampler's option
  with pytest.raises(UserError, match=match):
    samplers.step_table(schedule, steps=steps, sampler=sampler)
