"""One table of what every key of a training's config may be, and what must hold between keys.

Whatever a config says is checked here before anything is loaded or written, also what only the
pictures at the end read. Choices come from whoever owns them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

import data_pipeline
from cc_jax.bases.files import ASSETS, locate_base
from cc_jax.cli import flatten_config, refuse_old_names
from cc_jax.customcontrast import injection, mfi_encoder
from cc_jax.diffusion.registry import REGISTRY
from cc_jax.diffusion.samplers import step_table
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models import attention_kinds
from cc_jax.models.params import DTYPES
from cc_jax.models.remat import POLICIES, check_policies
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKLConfig
from cc_jax.objectives.contrast import KINDS
from cc_jax.objectives.macl import POOLINGS
from cc_jax.objectives.pair_scaling import SCALINGS
from cc_jax.parallel.mesh import AXES
from cc_jax.training.config_rules import (
  boolean,
  check_values,
  filled,
  note,
  one_of,
  real,
  several,
  shown,
  text,
  whole,
  with_noun,
)
from cc_jax.training.optimizer import SCHEDULES
from cc_jax.training.step_context import CSCL_FRAMES
from data_pipeline import layouts, sampling, triples

_POSITIVE = real(above=0)
_NOT_NEGATIVE = real(0)
_DEVICES = note(whole(1, or_value=-1), "-1 = what the other axes leave")
_NEVER = note(whole(0), "0 = never")

RULES = {
  "seed": whole(),
  "base": filled,
  "data.source": one_of(*data_pipeline.SOURCES),
  "data.name": text,
  "data.layout": one_of(*layouts.CHOICES),
  "data.data_dir": text,
  "data.image_size": whole(8),
  "data.reference_ratio": real(above=0, high=1),
  "data.reference_jitter": real(0, below=1),
  "data.positive_ratio": note(several(real(above=0, high=1), count=2), "such as (0.4, 0.9)"),
  "data.reference_layout": one_of(*triples.LAYOUTS),
  "data.placements": note(whole(0), "0 = a fresh one each time"),
  "data.cached": boolean,
  "data.cache_dir": text,
  "data.frames": one_of(*sampling.FRAMES),
  "data.caption_drop_detail_prob": real(0, 1),
  "data.group": one_of(*sampling.GROUPS),
  "data.group_ratio": real(0, 1),
  "data.holdout_subjects": note(whole(0), "0 = none"),
  "data.decoder": one_of(*data_pipeline.DECODERS),
  "data.max_bad_share": note(real(0, below=1), "0 = each is an error"),
  "encoder.image_encoder": text,
  "encoder.image_layers": several(whole(), least=1),
  "encoder.width": whole(1),
  "encoder.depth": whole(1),
  "encoder.heads": whole(1),
  "encoder.visual_queries": whole(1),
  "encoder.textual_queries": whole(1),
  "encoder.s_words": whole(1),
  **{f"encoder.{key}": one_of(*words) for key, words in mfi_encoder.CHOICES.items()},
  "encoder.layer_groups": note(several(whole(1)), "() = a group for every layer"),
  "encoder.contrast_head": note(whole(0), "0 = no projection head"),
  **{f"injection.{key}": one_of(*words) for key, words in injection.CHOICES.items()},
  "injection.location": boolean,
  "injection.location_width": note(whole(1), "for no map set config.injection.location=False"),
  "injection.low_rank": note(whole(0), "0 = full rank"),
  "injection.gate_start": real(),
  "objective.lambda_cscl": note(_NOT_NEGATIVE, "0 = without CSCL"),
  "objective.cscl_temperature": _POSITIVE,
  "objective.cscl_frame": one_of(*CSCL_FRAMES),
  "objective.lambda_macl": note(_NOT_NEGATIVE, "0 = without MACL"),
  "objective.macl_temperature": _POSITIVE,
  "objective.macl_scaling": one_of(*SCALINGS),
  "objective.macl_soft_temperature": _POSITIVE,
  "objective.macl_symmetric": boolean,
  "objective.macl_pooling": one_of(*POOLINGS),
  "objective.contrast": one_of(*KINDS),
  "objective.tile": whole(1),
  "objective.min_snr_gamma": note(_NOT_NEGATIVE, "0 = plain loss"),
  "objective.timestep_shift": note(_POSITIVE, "1 = uniform"),
  "objective.subject_weight": note(_NOT_NEGATIVE, "0 = plain loss"),
  "objective.drop_text": real(0, 1),
  "objective.drop_image": real(0, 1),
  "objective.drop_both": real(0, 1),
  "train.steps": whole(1),
  "train.batch_size": whole(1),
  "train.grad_accum_steps": whole(1),
  "train.learning_rate": _NOT_NEGATIVE,
  "train.gate_lr_mult": _NOT_NEGATIVE,
  "train.schedule": one_of(*SCHEDULES),
  "train.warmup_steps": whole(0),
  "train.weight_decay": _NOT_NEGATIVE,
  "train.beta1": real(0, below=1),
  "train.beta2": real(0, below=1),
  "train.clip_norm": note(_NOT_NEGATIVE, "0 = no clipping"),
  "train.ema": real(0, below=1),
  "train.dtype": one_of(*DTYPES),
  "train.base_dtype": one_of(*DTYPES),
  "train.attention": one_of(*attention_kinds.KINDS),
  "train.remat_unet": several(one_of(*POLICIES), least=1),
  "train.remat_text": one_of(*POLICIES),
  "train.warm_start": text,
  "train.max_bad_steps": whole(1),
  "train.log_every": whole(1),
  "train.save_every": note(whole(0), "0 = only at the end"),
  "train.keep": whole(1),
  "train.keep_every": note(whole(0), "0 = none"),
  "train.sample_every": note(whole(0), "0 = only at the end"),
  "train.prompt_sensitivity_every": _NEVER,
  **{f"mesh.{axis}": _DEVICES for axis in AXES},
  "mesh.processes": note(whole(1, or_value=-1), "-1 = what the cluster says"),
  "mesh.cpu_devices": note(whole(1, or_value=-1), "-1 = one per core"),
  "sample.split": filled,
  "sample.subjects": whole(1),
  "sample.sampler": one_of(*REGISTRY, "default"),
  "sample.steps": whole(1),
  "sample.guidance": note(_NOT_NEGATIVE, "usually 5"),
  "sample.image_guidance": note(real(), "negative = one guidance for both"),
  "sample.scale": note(_NOT_NEGATIVE, "0 = the base, usually 1"),
  "sample.prompts": note(several(with_noun), "such as ('a {noun} on the beach',)"),
}
# Sections of adapter files and older configs lack keys that have come later with a default that
# means what it was before; a mesh's axes are 1 unless it says otherwise.
OPTIONAL = {"data.decoder", "data.layout", "mesh.fsdp", "mesh.tensor", "mesh.processes"} | {
  f"{section}.{field.name}"
  for section, cls in (
    ("encoder", mfi_encoder.MFIEncoderConfig), ("injection", injection.InjectionConfig))
  for field in dataclasses.fields(cls)
  if field.default is not dataclasses.MISSING and field.name != "image_encoder"
}  # fmt: skip


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises UserError, in one line with a remedy, for the first thing that is wrong in a config.

  A base that is a folder on this machine is looked at, too (`check_with_base`); of others the
  training does so once they are loaded. Nothing is loaded or written here.
  """
  values = config.to_dict()
  refuse_old_names(flatten_config(values))
  check_values(values, RULES, explained_by="configs/subjects3d.py", optional=OPTIONAL)
  mfi_encoder.MFIEncoderConfig.from_config(values["encoder"])  # they know more of themselves
  injection.InjectionConfig.from_config(values["injection"])
  for problem in (_wrong_data, _wrong_objective, _wrong_train, _wrong_mesh, _wrong_sample):
    if message := problem(values):
      raise UserError(message)
  if any(path.is_dir() for path in (Path(values["base"]), ASSETS / values["base"])):
    files = locate_base(values["base"], None)
    check_with_base(config, files.configs["unet"], files.configs["vae"], files.scheduler)


def _wrong_data(config: Mapping[str, Any]) -> str | None:
  if config["data"]["source"] != "render" and filled(config["data"]["name"]):
    return "config.data.name is ''; name a TFDS data set or a folder of subjects"
  low, high = config["data"]["positive_ratio"]
  if low > high:
    return f"config.data.positive_ratio is {(low, high)}; give the smaller number first"
  return None


def _wrong_objective(config: Mapping[str, Any]) -> str | None:
  names = ("drop_text", "drop_image", "drop_both")
  drops = {name: config["objective"][name] for name in names}
  if sum(drops.values()) > 1:
    text = ", ".join(f"config.objective.{name}={share}" for name, share in drops.items())
    return f"{text}: they must sum to at most 1"
  return None


def _wrong_train(config: Mapping[str, Any]) -> str | None:
  size, parts = config["train"]["batch_size"], config["train"]["grad_accum_steps"]
  if size % parts:
    return (
      f"config.train.batch_size={size} does not divide into train.grad_accum_steps={parts} parts; "
      f"use a multiple of {parts}"
    )
  return None


def _wrong_mesh(config: Mapping[str, Any]) -> str | None:
  free = [f"config.mesh.{axis}" for axis in AXES if config["mesh"].get(axis, 1) == -1]
  if len(free) > 1:
    return f"{' and '.join(free)} are -1; only one axis can take what the others leave"
  return None


def _wrong_sample(config: Mapping[str, Any]) -> str | None:
  """The rendered world has known splits; those of other data are its own."""
  data, sample = ml_collections.ConfigDict(config["data"]), config["sample"]
  if not data_pipeline.is_subjects3d(data):
    return None
  counts = data_pipeline.subjects_per_split()
  if must := one_of(*counts)(sample["split"]):
    return f"config.sample.split is {shown(sample['split'])}; it must {must}"
  count = counts[sample["split"]]
  if sample["subjects"] > count:
    return (
      f"config.sample.subjects is {sample['subjects']}; it must be at most {count}, which the "
      f"split {sample['split']} has"
    )
  return None


def check_with_base(
  config: ml_collections.ConfigDict, unet: UNetConfig, vae: AutoencoderKLConfig,
  scheduler: Mapping[str, Any],
) -> None:
  """Raises UserError for values that do not go with the base: its networks and its scheduler."""
  size, factor = config.data.image_size, vae.factor
  if size % factor:
    raise UserError(
      f"config.data.image_size is {size}, of which the base's VAE makes latents of 1/{factor}; use "
      f"a multiple of {factor}, such as {max(1, round(size / factor)) * factor}"
    )
  blocks = 2 * len(unet.block_out_channels) + 1
  remat = config.train.remat_unet
  check_policies(f"config.train.remat_unet={shown(tuple(remat))}", remat, blocks)
  sample = config.sample
  try:
    step_table(NoiseSchedule.from_config(scheduler), steps=sample.steps, sampler=sample.sampler)
  except UserError as error:
    raise UserError(
      f"config.sample.sampler={sample.sampler}, config.sample.steps={sample.steps} draw nothing "
      f"with this base: {error}"
    ) from error
