#!/usr/bin/env bash
# diffusers 0.42.1: a scheduler made from another's config obeys settings that its class does not have.
#
# One would guess that from_config takes what the class's constructor takes and leaves the rest aside:
# HeunDiscreteScheduler(sigma_max=10) is a TypeError.
# What happens: the keys of the other class stay in the config, and the Karras timetable of Heun, DPM-Solver
# and DEIS reads sigma_min and sigma_max there if it finds them. Given the config of an
# EulerDiscreteScheduler with these two, they begin and end at Euler's values.
# Why it matters: the same class with the same arguments gives other pictures, depending on which scheduler
# the pipeline had before.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" diffusers==0.42.1 torch==2.13.0
PYTHONPATH=$folder python3 - <<'PY'
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True)
euler = EulerDiscreteScheduler(**settings, sigma_min=0.1, sigma_max=10.0)

def ends(scheduler):
  scheduler.set_timesteps(4)
  sigmas = scheduler.sigmas[scheduler.sigmas > 0]
  return round(sigmas[0].item(), 3), round(sigmas[-1].item(), 3)

for kind in (HeunDiscreteScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler):
  try:
    kind(**settings, sigma_min=0.1, sigma_max=10.0)
  except TypeError:
    made, converted = ends(kind(**settings)), ends(kind.from_config(euler.config))
  else:
    raise AssertionError("the constructor takes them now")
  print(f"{kind.__name__}: made {made}, from Euler's config {converted}")
  assert made == (14.615, 0.029) and converted == (10, 0.1), "it has changed"
PY
# HeunDiscreteScheduler: made (14.615, 0.029), from Euler's config (10.0, 0.1)
# DPMSolverMultistepScheduler: made (14.615, 0.029), from Euler's config (10.0, 0.1)
# DEISMultistepScheduler: made (14.615, 0.029), from Euler's config (10.0, 0.1)
