"""The programs of a run without its weights, and the devices that they are compiled for.

What is built here is what `cc_jax.train` and `cc_jax.generate` run: the same functions, given
shapes in place of arrays. cc_jax.plan compiles and reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from cc_jax.bases.base import Base
from cc_jax.diffusion.samplers import adds_noise, step_table
from cc_jax.models.unet import cross_attention_layers
from cc_jax.parallel.mesh import batch_sharding, replicated_sharding
from cc_jax.parallel.rules import abstract_params
from cc_jax.sampling.prompts import Prompts
from cc_jax.sampling.sample import SamplerInputs, SamplingConfig, guidance_branches, sample_images
from cc_jax.training.context import StepContext
from cc_jax.training.setup import build_abstract, make_step_context
from cc_jax.training.step import init_state, make_train_step


class AbstractProgram(NamedTuple):
  """A program and the shapes and placements of what it takes."""

  function: Callable  # jitted
  arguments: tuple[Any, ...]  # pytrees of ShapeDtypeStruct with shardings
  parts: dict[str, Any]  # name -> pytree: what the arguments are, for the table of memory
  images: int  # made or learned from in one run, on all chips


def train_program(config: ml_collections.ConfigDict, mesh: Mesh | AbstractMesh) -> AbstractProgram:
  """The training step of `cc_jax.train`, without weights."""
  method, trainable, frozen, _ = _method(config)
  state = jax.eval_shape(lambda t: init_state(t, config), trainable)
  state, frozen = abstract_params((state, frozen), mesh)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
    for name, (shape, dtype, _) in _batch(config, len(method.empty_prompt)).items()
  }
  parts = {
    "frozen base": frozen,
    "adapter": state.trainable,
    "Adam": state.opt_state,
    "average": state.ema,
    "batch": batch,
  }
  seed = jax.ShapeDtypeStruct((), np.uint32, sharding=replicated_sharding(mesh))
  step = make_train_step(method, mesh, state, frozen)
  return AbstractProgram(step, (state, frozen, batch, seed), parts, config.train.batch_size)


def generate_program(config: ml_collections.ConfigDict, mesh: Mesh) -> AbstractProgram:
  """The sampler of `cc_jax.generate` with a reference, as config.sample has it."""
  method, trainable, frozen, base = _method(config)
  sample, size = config.sample, config.train.batch_size
  table = step_table(method.schedule, steps=sample.steps, sampler=sample.sampler)
  apart = sample.image_guidance if sample.image_guidance >= 0 else None
  fixed = SamplingConfig(guidance_branches(sample.guidance, apart), adds_noise(table))

  def cut(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=batch_sharding(mesh))

  def whole(shape, dtype=np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated_sharding(mesh))

  tokens = [tower.config.max_position_embeddings for tower in base.text_encoders]
  pixels, layers = config.data.image_size, len(cross_attention_layers(base.unet))
  side = pixels // base.vae.config.factor
  request = SamplerInputs(
    prompts=Prompts(
      tuple(cut((t,), np.int32) for t in tokens), cut((), np.int32), cut((2,), np.int32)
    ),
    negative=tuple(whole((1, t), np.int32) for t in tokens),
    references=cut((1, pixels, pixels, 3), np.uint8),
    use_image=cut((), bool),
    noise=cut((side, side, base.vae.config.latent_channels), np.float32),
    image=None,
    scale=whole((sample.steps, layers)),
    guidance=whole(()),
    image_guidance=whole(()),
    table=jax.tree.map(lambda x: whole(x.shape, x.dtype), table),
    time_ids=whole((6,)),
  )
  parts = {
    "frozen base": abstract_params(frozen, mesh),
    "adapter": abstract_params(trainable, mesh),
    "batch": request,
  }
  function = jax.jit(
    lambda trainable, frozen, request: sample_images(
      lambda params: method.model(*params), (trainable, frozen), request, fixed
    ),
    out_shardings=batch_sharding(mesh),
  )
  return AbstractProgram(function, (parts["adapter"], parts["frozen base"], request), parts, size)


def _method(config: ml_collections.ConfigDict) -> tuple[StepContext, Any, Any, Base]:
  """(method, abstract trainable and frozen parameters, base) of a config, without weights."""
  config, base, (definition, trainable, frozen) = build_abstract(config)
  return make_step_context(config, definition, base), trainable, frozen, base


def _batch(config: ml_collections.ConfigDict, tokens: int) -> dict[str, tuple]:
  """name -> (shape, dtype, a value that makes sense) of the loader's arrays."""
  size, side = config.train.batch_size, config.data.image_size
  pictures = {
    name: ((size, side, side, 3), np.uint8, 100) for name in ("positive", "reference", "target")
  }
  return pictures | {
    "target_mask": ((size, side, side), np.uint8, 255),
    "input_ids": ((size, tokens), np.int32, 1),
    "slot": ((size,), np.int32, 3),
    "noun_span": ((size, 2), np.int32, (2, 3)),
    "subject_id": ((size,), np.int32, -1),
    "family_id": ((size,), np.int32, 0),
    "class_id": ((size,), np.int32, 0),
  }
