"""What every key of the laboratory's config may be: configs/lab.py."""

import re

import ml_collections

from cc_jax.cli import flatten_config, refuse_old_names
from cc_jax.errors import UserError
from cc_jax.training.config_checks import check_config
from cc_jax.training.config_rules import (
  check_values,
  note,
  one_of,
  real,
  section,
  several,
  shown,
  whole,
)
from configs.lab import ARMS
from data_pipeline.subjects3d import factors

_NONE = note(whole(0), "0 = none")
RULES = {
  "setting": one_of("cut_outs", "photographs"),
  "seeds": several(whole(), least=1),
  "side_seeds": several(whole(), least=1),
  "run": section,  # a training's config, which `check_config` checks
  "score.split": one_of(*factors.SPLITS),
  "score.subjects": whole(1),
  "score.styled": _NONE,
  "score.hatted": _NONE,
  "score.rounds": whole(1),
  "score.interventions": _NONE,
  "score.curve_subjects": whole(1),
  "score.curve_interventions": _NONE,
  "score.probe_subjects": _NONE,
  "score.probe_views": whole(1),
  "score.timestep": whole(0),
  "score.batch": whole(1),
  "score.sweep_arms": several(one_of(*ARMS)),
  "score.sweep_scales": several(real(0)),
  "score.sweep_subjects": whole(1),
}


def check_lab_config(config: ml_collections.ConfigDict) -> None:
  """Raises UserError, in one line with a remedy, for the first thing that is wrong in a config."""
  values = config.to_dict()
  refuse_old_names(flatten_config(values))
  check_values(values, RULES, explained_by="configs/lab.py")
  try:
    check_config(config.run)
  except UserError as error:  # its keys are config.run's
    text = re.sub(r"\bconfig\.(?!json)", "config.run.", str(error))
    raise UserError(text) from error
  split = values["score"]["split"]
  available = len(factors.subjects(split).subject_id)
  for key in ("subjects", "interventions", "probe_subjects"):
    if (count := values["score"][key]) > available:
      raise UserError(
        f"config.score.{key} is {shown(count)}; it must be at most {available}, which the split "
        f"{split} has")
