"""From a config to the parts of a training run: adapter, step context, data, metrics."""

import dataclasses
import hashlib
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

import data_pipeline
from cc_jax.bases.base import Base, abstract_base
from cc_jax.bases.download import short_name
from cc_jax.bases.files import ASSETS
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.models.params import Params
from cc_jax.parallel.mesh import local_rows
from cc_jax.training.cached_features import needed_features
from cc_jax.training.config_checks import check_config, check_with_base
from cc_jax.training.prompt_sensitivity import make_prompt_sensitivity, wrong_nouns, wrong_phrases
from cc_jax.training.step_context import StepContext
from data_pipeline.tokens import tokenize


def adapter_configs(config: ml_collections.ConfigDict) -> tuple[MFIEncoderConfig, InjectionConfig]:
  """The adapter's two sections, checked. Raises UserError for a wrong key, type or choice."""
  return MFIEncoderConfig.from_config(config.encoder), InjectionConfig.from_config(config.injection)


def base_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Arguments of `load_base`: dtypes of compute and storage, the image encoder."""
  return dict(
    dtype=jnp.dtype(config.train.dtype), param_dtype=jnp.dtype(config.train.base_dtype),
    image_encoder=config.encoder.image_encoder or None,
  )


def make_step_context(
  config: ml_collections.ConfigDict, definition: nnx.GraphDef, base: Base
) -> StepContext:
  """What the step depends on besides arrays. Raises UserError for settings that contradict."""
  check_with_base(config, base.unet.config, base.vae.config, base.scheduler_config)
  if base.tokenizers:
    empty = tuple(tuple(map(int, tokenize(t, "").ids[0])) for t in base.tokenizers)
  else:  # known architectures have none (`build_abstract`), and a plan needs no words
    empty = tuple((0,) * tower.config.max_position_embeddings for tower in base.text_encoders)
  schedule = NoiseSchedule.from_config(base.scheduler_config)
  return StepContext(definition, schedule, ml_collections.FrozenConfigDict(config), empty)


def step_seed(config: ml_collections.ConfigDict) -> np.ndarray:
  """The seed as the step takes it."""
  return np.asarray(config.seed % 2**32, np.uint32)


def make_batches(
  config: ml_collections.ConfigDict, base: Base, seed: int, start: int, mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of every batch from step `start` on."""
  return data_pipeline.make_loader(
    config.data, base.tokenizers, batch_size=config.train.batch_size, seed=seed,
    start_step=start, rows=local_rows(mesh, config.train.batch_size),
    s_words=config.encoder.s_words,
    networks=needed_features(config, base) if config.data.cached else None,
  )


def heldout_prompt_sensitivity(
  config: ml_collections.ConfigDict, base: Base, context: StepContext, mesh: Mesh
) -> Callable[[Params, Params], dict[str, float]]:
  """Wrong-word gaps on one batch that training does not see: class noun and, if known, scene."""
  batch = next(make_batches(config, base, config.seed + 1, 0, mesh))
  tokenizers, words = base.tokenizers, config.encoder.s_words
  wrong = {"class": wrong_nouns(batch, tokenizers, words)}
  if scenes := data_pipeline.context_phrases(config.data):
    wrong["scene"] = wrong_phrases(batch, scenes, tokenizers, words)
  context = dataclasses.replace(context, mesh=mesh)  # whose attention it then uses
  return make_prompt_sensitivity(context, mesh, batch, wrong)


def build_abstract(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, Base, tuple[nnx.GraphDef, Params, Params]]:
  """(config with paths of folders, abstract base, `build_customcontrast` of it).

  The base needs no weights, and a known one not even a folder: its config.json files are in
  assets/architectures.
  """
  check_config(config)
  config = config.copy_and_resolve_references()
  config.base = known_architecture(config.base)
  config.encoder.image_encoder = known_architecture(config.encoder.image_encoder)
  base = abstract_base(config.base, **base_options(config))
  adapter, dtype = adapter_configs(config), config.train.dtype
  return config, base, build_customcontrast(base, *adapter, dtype=dtype, transform=eval_shape_only)


def known_architecture(name: str) -> str:
  """The folder itself or, if there is none, that of the known architecture of this name.

  Known are the hub ids in the configs, at any revision, and the same without their owner.
  """
  known = ASSETS / "architectures" / short_name(name)
  return str(known) if name and not epath.Path(name).is_dir() and known.is_dir() else name


def use_compilation_cache(workdir: epath.Path) -> None:
  """Keeps compiled programs in the workdir, so that a run which is resumed there starts at once.

  One folder for each kind of processor, since XLA compiles for it. JAX's own settings, such as
  JAX_COMPILATION_CACHE_DIR, take precedence.
  """
  if jax.config.jax_compilation_cache_dir is None:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    features = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    machine = platform.machine() + (features[0] if features else platform.processor())
    folder = workdir / "compiled" / hashlib.sha256(machine.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folder))
