"""The programs of a run without its weights, and the devices that they are compiled for.

What is built here is what `cc_jax.train` and `cc_jax.generate` run: the same functions, given
shapes in place of arrays. cc_jax.plan compiles and reads them.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cc_jax import train
from cc_jax.bases import base as hub
from cc_jax.diffusion.samplers import adds_noise, step_table
from cc_jax.errors import UserError
from cc_jax.parallel import rules as sharding
from cc_jax.plan import chips
from cc_jax.plan.chips import Chip
from cc_jax.sampling import sample as drawing
from cc_jax.training.step import Method, init_state, make_train_step


class Work(NamedTuple):
  """A program and the shapes and placements of what it takes."""

  function: Callable  # jitted
  arguments: tuple[Any, ...]  # pytrees of ShapeDtypeStruct with shardings
  parts: dict[str, Any]  # name -> pytree: what the arguments are, for the table of memory
  images: int  # made or learned from in one run, on all chips


def train_work(config: ml_collections.ConfigDict, mesh: Mesh | AbstractMesh) -> Work:
  """The training step of `cc_jax.train`, without weights."""
  method, trainable, frozen, _ = _method(config)
  state = jax.eval_shape(lambda t: init_state(t, config), trainable)
  state, frozen = sharding.placed((state, frozen), mesh)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.over_data(mesh))
    for name, (shape, dtype, _) in _batch(config, len(method.empty_prompt)).items()
  }
  parts = {
    "frozen base": frozen,
    "adapter": state.trainable,
    "Adam": state.opt_state,
    "average": state.ema,
    "batch": batch,
  }
  seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(mesh))
  step = make_train_step(method, mesh, state, frozen)
  return Work(step, (state, frozen, batch, seed), parts, config.train.batch_size)


def generate_work(config: ml_collections.ConfigDict, mesh: Mesh) -> Work:
  """The sampler of `cc_jax.generate` with a reference, as config.sample has it."""
  method, trainable, frozen, base = _method(config)
  sample, size = config.sample, config.train.batch_size
  table = step_table(method.schedule, steps=sample.steps, sampler=sample.sampler)
  apart = sample.image_guidance if sample.image_guidance >= 0 else None
  fixed = drawing.Plan(drawing.branches(sample.guidance, apart), adds_noise(table))

  def cut(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding.over_data(mesh))

  def whole(shape, dtype=np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

  tokens = [tower.config.max_position_embeddings for tower in base.text_encoders]
  pixels, layers = config.data.image_size, len(_layers(trainable))
  side = pixels // base.vae.config.factor
  request = drawing.Request(
    prompts=drawing.Prompts(
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
    "frozen base": sharding.placed(frozen, mesh),
    "adapter": sharding.placed(trainable, mesh),
    "batch": request,
  }
  function = jax.jit(
    lambda trainable, frozen, request: drawing.draw(
      lambda params: method.model(*params), (trainable, frozen), request, fixed
    ),
    out_shardings=sharding.over_data(mesh),
  )
  return Work(function, (parts["adapter"], parts["frozen base"], request), parts, size)


def _method(config: ml_collections.ConfigDict) -> tuple[Method, Any, Any, hub.Base]:
  """(method, abstract trainable and frozen parameters, base) of a config, without weights."""
  config, base, (definition, trainable, frozen) = train.without_weights(config)
  return train.make_method(config, definition, base), trainable, frozen, base


def _layers(trainable: Mapping[str, Any]) -> list[str]:
  """The cross-attention layers, of which each has one gate."""
  return [path for path in trainable if path.rsplit(".", 1)[-1] == "gate"]


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


# Where it is compiled for.


class Slice(NamedTuple):
  """The devices that are planned for."""

  devices: Sequence[Any]
  chip: Chip
  sides: tuple[int, ...]  # of the torus


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
  """'v5e:4x4' -> the chip, and the sides of the slice.

  Raises:
    UserError: it names no TPU of chips.CHIPS, or no sides.
  """
  known = [chip.name for chip in chips.CHIPS if chip.clock]
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if not found or found[1] not in known:
    raise UserError(
      f"--topology={name!r} is no slice; write one of {', '.join(known)}, a colon and its sides, "
      "such as v5e:4x4 or v5p:2x2x4, or local"
    )
  return chips.find(found[1]), tuple(int(side) for side in found[2].split("x"))


def find_slice(name: str, dtype: str) -> Slice:
  """The devices of a topology; without a TPU they can be compiled for, and nothing more.

  Raises:
    UserError: see `parse_topology`; libtpu is missing, or knows no such slice.
  """
  if name == "local":
    devices = jax.devices()
    chip = chips.find(devices[0].device_kind) or measured_chip(devices, dtype)
    return Slice(devices, chip, (len(devices),))
  chip, sides = parse_topology(name)
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine's metadata is asked for
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except Exception as error:  # whatever the plugin raises
    text = " ".join(str(error).split())
    remedy = "is libtpu installed (pip install -e '.[tpu]')?"
    raise UserError(f"--topology={name}: {text[:200]}; {remedy}") from error
  return Slice(devices, chip, sides)


def measured_chip(devices: Sequence[Any], dtype: str) -> Chip:
  """A device that is in no table, by what all of them reach at once: a product and a copy."""
  count, side = len(devices), 1024
  mesh = Mesh(np.asarray(devices), ("d",))
  place = NamedSharding(mesh, PartitionSpec("d"))
  x = jax.device_put(jnp.ones((count, side, side), dtype), place)
  big = jax.device_put(jnp.ones((count, 2**24), jnp.float32), place)
  product = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x), out_shardings=place)
  copy = jax.jit(lambda x: x + 1, out_shardings=place)
  flops = 2 * side**3 / _seconds(product, x)
  bandwidth = 2 * 4 * 2**24 / _seconds(copy, big)
  kind = f"{devices[0].device_kind} (measured here)"
  return Chip(kind, (), math.inf, flops, bandwidth, bandwidth, None, "a product and a copy, timed")


def _seconds(function: Callable, *arguments: Any, repeats: int = 5) -> float:
  """The best of some runs, the first left out."""
  times = []
  for _ in range(repeats + 1):
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - began)
  return min(times[1:])
