"""The programs of a run, abstractly: without weights, for devices that need not be there.

They are those of `cc_jax.train` and `cc_jax.generate`: the same functions, given shapes in place of
arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from cc_jax.bases.base import Base
from cc_jax.diffusion.samplers import adds_noise, step_table
from cc_jax.models.attention_kernels import with_kernels
from cc_jax.models.unet import cross_attention_layers
from cc_jax.parallel.attention import mesh_kernels
from cc_jax.parallel.mesh import batch_sharding, make_mesh, replicated_sharding
from cc_jax.parallel.rules import abstract_params
from cc_jax.plan.topology import Slice
from cc_jax.sampling.prompts import Prompts
from cc_jax.sampling.sample import SamplerInputs, SamplingConfig, guidance_branches, sample_images
from cc_jax.training.cached_features import feature_shapes, without_encoders
from cc_jax.training.setup import build_abstract, make_step_context
from cc_jax.training.step import init_state, make_train_step, train_step
from cc_jax.training.step_context import StepContext
from cc_jax.training.utilisation import plain_context
from data_pipeline.example import PICTURES, signature
from data_pipeline.tokens import prompt_keys


class AbstractProgram(NamedTuple):
  """A program, and the shapes and shardings of its arguments."""

  function: Callable  # jitted
  plain: Callable  # the same in the plainest words, whose FLOPs are the model's; never compiled
  arguments: tuple[Any, ...]  # pytrees of ShapeDtypeStruct with shardings
  parts: dict[str, Any]  # name -> pytree: the arguments as rows of the table of memory
  images: int  # generated or trained on in one run, on all chips
  chips: int = 1


def make_program(
  config: ml_collections.ConfigDict, slice_: Slice, what: str, batch_per_chip: int
) -> AbstractProgram:
  """The sampler for `what` = 'generate', else the training step.

  Args:
    batch_per_chip: images a chip; 0 = the config's own global batch.
  """
  config = config.copy_and_resolve_references()
  if batch_per_chip:
    config.train.batch_size = batch_per_chip * len(slice_.devices)
  mesh = make_mesh(config.mesh, config.train.batch_size, devices=slice_.devices)
  return (generate_program if what == "generate" else train_program)(config, mesh)


def train_program(config: ml_collections.ConfigDict, mesh: Mesh | AbstractMesh) -> AbstractProgram:
  """The training step of `cc_jax.train`, without weights."""
  context, trainable, frozen, _ = _build(config)
  batch_size, side = config.train.batch_size, config.data.image_size
  shapes = dict.fromkeys(PICTURES, (side, side, 3)) | {"target_mask": (side, side)}
  dtypes = PICTURES
  if config.data.cached:
    features = feature_shapes(config, context, trainable, frozen)
    shapes = {name: x.shape[1:] for name, x in features.items()}
    dtypes = {name: x.dtype for name, x in features.items()}
    context, frozen, _ = without_encoders(context, frozen)
  state = jax.eval_shape(lambda t: init_state(t, config), trainable)
  state, frozen = abstract_params((state, frozen), mesh)
  towers = len(context.empty_prompt)
  for (ids, _, span), empty in zip(prompt_keys(towers), context.empty_prompt):
    shapes |= {ids: (len(empty),), span: (2,)}
  batch = {
    name: jax.ShapeDtypeStruct(
      (batch_size, *shapes.get(name, ())), dtype, sharding=batch_sharding(mesh)
    )
    for name, dtype in signature(towers, dtypes).items()
  }
  parts = {
    "frozen base": frozen,
    "adapter": state.trainable,
    "Adam": state.opt_state,
    "average": state.ema,
    "batch": batch,
    "next batch": batch,  # the loop transfers it while a step runs
  }
  seed = jax.ShapeDtypeStruct((), np.uint32, sharding=replicated_sharding(mesh))
  step = make_train_step(context, mesh, state, frozen)
  arguments = (state, frozen, batch, seed)
  plain = functools.partial(train_step, plain_context(context))
  return AbstractProgram(step, plain, arguments, parts, batch_size, mesh.size)


def generate_program(config: ml_collections.ConfigDict, mesh: Mesh) -> AbstractProgram:
  """The sampler of `cc_jax.generate` with a reference, as config.sample has it."""
  context, trainable, frozen, base = _build(config)
  kernels = mesh_kernels(config.train.attention, mesh, dtype=config.train.dtype, training=False)
  sample, batch_size = config.sample, config.train.batch_size
  table = step_table(context.schedule, steps=sample.steps, sampler=sample.sampler)
  image_guidance = sample.image_guidance if sample.image_guidance >= 0 else None
  settings = SamplingConfig(guidance_branches(sample.guidance, image_guidance), adds_noise(table))

  def sharded(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding(mesh))

  def replicated(shape, dtype=np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated_sharding(mesh))

  tokens = [tower.config.max_position_embeddings for tower in base.text_encoders]
  pixels, layers = config.data.image_size, len(cross_attention_layers(base.unet))
  side = pixels // base.vae.config.factor
  ids = tuple(sharded((t,), np.int32) for t in tokens)
  inputs = SamplerInputs(
    prompts=Prompts(ids, *((sharded(s, np.int32),) * len(ids) for s in ((), (2,)))),
    negative=None if base.force_zeros_for_empty_prompt
    else tuple(replicated((1, t), np.int32) for t in tokens),
    references=sharded((1, pixels, pixels, 3), np.uint8),
    use_image=sharded((), bool),
    noise=sharded((side, side, base.vae.config.latent_channels), np.float32),
    image=None,
    scale=replicated((sample.steps, layers)),
    guidance=replicated(()),
    image_guidance=replicated(()),
    table=jax.tree.map(lambda x: replicated(x.shape, x.dtype), table),
    time_ids=replicated((6,)),
  )
  trainable, frozen = abstract_params(trainable, mesh), abstract_params(frozen, mesh)
  parts = {"frozen base": frozen, "adapter": trainable, "batch": inputs}

  def generate_by(make_model: Callable) -> Callable:
    return lambda trainable, frozen, inputs: sample_images(
      lambda params: make_model(*params), (trainable, frozen), inputs, settings
    )

  attending = generate_by(lambda *params: with_kernels(context.model(*params), kernels))
  function = jax.jit(attending, out_shardings=batch_sharding(mesh))
  plain = generate_by(context.model)
  return AbstractProgram(function, plain, (trainable, frozen, inputs), parts, batch_size, mesh.size)


def _build(config: ml_collections.ConfigDict) -> tuple[StepContext, Any, Any, Base]:
  """(context, abstract trainable and frozen parameters, base) of a config, without weights."""
  config, base, (definition, trainable, frozen) = build_abstract(config)
  return make_step_context(config, definition, base), trainable, frozen, base
