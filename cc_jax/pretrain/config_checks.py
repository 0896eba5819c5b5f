"""What every key of pretraining's config may be: configs/subjects3d_base.py, ..._judge.py."""

import ml_collections

import data_pipeline
from cc_jax.cli import flatten_config, refuse_old_names
from cc_jax.errors import UserError
from cc_jax.training.config_rules import (
  Rule,
  boolean,
  check_values,
  note,
  one_of,
  real,
  section,
  several,
  shown,
  text,
  whole,
)

_RATIO = real(0, 1)
_NOT_NEGATIVE = real(0)


def _fit(name: str) -> dict[str, Rule]:
  """The keys of `pretrain.loop.fit`."""
  return {
    f"{name}.train.steps": whole(1),
    f"{name}.train.batch": whole(1),
    f"{name}.train.learning_rate": _NOT_NEGATIVE,
    f"{name}.train.ema": real(0, below=1),
    f"{name}.train.warmup": whole(0),
    f"{name}.train.beta2": real(0, below=1),
    f"{name}.train.weight_decay": _NOT_NEGATIVE,
    f"{name}.train.clip_norm": real(above=0),
    f"{name}.train.save_every": whole(1),
  }


_START = {"init_from": note(text, "'' = random")}
_CAPTIONS = {"world.captions": whole(1)}
# What a stage reads; sections in the words of other libraries' config.json are theirs to check.
STAGES = {
  "tokenizer": {"tokenizer.vocab_size": whole(1), "tokenizer.max_length": whole(1)},
  "vae": {
    **_START, **_fit("vae"), "vae.model": section, "vae.kl": _NOT_NEGATIVE,
    "vae.freeze_encoder": boolean,
  },
  "clip": {
    **_START, **_CAPTIONS, **_fit("clip"), "clip.text": section, "clip.vision": section,
    "clip.white_ratio": _RATIO, "clip.freeze_text": boolean, "clip.freeze_features": boolean,
    "clip.contrast_weight": _NOT_NEGATIVE, "clip.position_scale": _NOT_NEGATIVE,
    "clip.factor_weight": _NOT_NEGATIVE, "clip.mirror_ratio": _RATIO,
  },
  "unet": {
    **_START, **_CAPTIONS, **_fit("unet"), "unet.model": section, "unet.scheduler": section,
    "unet.noise_shift": real(above=0), "unet.mask_weight": _NOT_NEGATIVE,
    "unet.drop_caption": _RATIO, "unet.calm_until": _RATIO, "unet.calm_ratio": _RATIO,
  },
  "judge": {
    **_fit("judge"), "judge.width": whole(1), "judge.init_from": note(text, "'' = random"),
    "judge.test_images": whole(1),
  },
}  # fmt: skip


def check_pretrain_config(config: ml_collections.ConfigDict) -> None:
  """Raises UserError, in one line with a remedy, for the first thing that is wrong in a config.

  A stage's section is needed if `config.stages` names it, and checked wherever there is one.
  """
  values = config.to_dict()
  refuse_old_names(flatten_config(values))
  stages = several(one_of(*STAGES), least=1)
  if must := stages(values.get("stages")):
    raise UserError(f"config.stages is {shown(values.get('stages'))}; it must {must}")
  rules: dict[str, Rule] = {
    "seed": whole(0),
    "stages": stages,
    "world.images": whole(1),
    "world.calm_ratio": _RATIO,
    "world.plain_ratio": _RATIO,
    "world.recombine": boolean,
    "world.split": one_of(*data_pipeline.subjects_per_split()),
    "world.processes": note(whole(0), "0 = one per core"),
    "mesh.data": note(whole(1, or_value=-1), "-1 = all devices"),
    "mesh.cpu_devices": note(whole(1, or_value=-1), "-1 = one per core"),
  }
  for stage in (name for name in STAGES if name in (*values["stages"], *values)):
    rules |= STAGES[stage]
  spare = _START | _CAPTIONS  # of stages that this config may not have
  check_values(
    values, spare | rules, optional=spare.keys() - rules.keys(),
    explained_by="configs/subjects3d_base.py" if "judge" not in values["stages"] else
    "configs/subjects3d_judge.py")
