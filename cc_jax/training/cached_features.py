"""Training with stored features (`data.cached`): which it needs, and what it then does without."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from cc_jax.bases.base import Base
from cc_jax.models.params import Params
from cc_jax.training.inputs import encode_role
from cc_jax.training.step_context import StepContext
from data_pipeline.feature_cache import ROLES, Networks

ENCODERS = ("vae", "image_encoder")  # fields of Base and of CustomContrast


def needed_features(config: ml_collections.ConfigDict, base: Base) -> Networks:
  """What features must have been made with to serve this run."""
  encoder, train = config.encoder, config.train
  settings = dict(
    **{name: base.hashes[name] for name in ENCODERS},
    image_processor=dict(base.image_processor), image_layers=list(encoder.image_layers),
    dtype=train.dtype, base_dtype=train.base_dtype,
  )
  labels = {"vae": base.name, "image_encoder": encoder.image_encoder or base.name}
  return Networks(settings, labels, _command())


def _command() -> str:
  """The command that makes the features of a run: with the flags of its config."""
  given, takes_next = [], False
  for argument in sys.argv[1:]:
    is_config = argument.lstrip("-").removeprefix("no").split("=")[0].split(".")[0] == "config"
    if takes_next or (is_config and argument.startswith("-")):
      given.append(argument)
      takes_next = is_config and not takes_next and argument in ("-config", "--config")
  return shlex.join(["python", "-m", "cc_jax.cache", *(given or ["--config=..."])])


def is_of_encoder(name: str) -> bool:
  """Whether a frozen parameter is the VAE's or the image encoder's."""
  return name.split(".")[0] in ENCODERS


def without_encoders(
  context: StepContext, frozen: Mapping[str, Any]
) -> tuple[StepContext, Params, Params]:
  """(the context of steps that read stored features, frozen without the encoders, the encoders').

  Arrays may be abstract.
  """
  encoders = {name: x for name, x in frozen.items() if is_of_encoder(name)}
  rest = {name: x for name, x in frozen.items() if name not in encoders}
  return dataclasses.replace(context, unread=shapes_of(encoders)), rest, encoders


def shapes_of(tree: Any) -> Any:
  """The tree with shapes in place of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def move_to_host(encoders: Params, base: Base) -> tuple[Params, Base]:
  """(the encoders' weights in the host's memory, the base whose encoders are shapes alone).

  Pictures need them now and then. Of several processes none draws, and none keeps them.
  """
  abstract = {}
  for name in ENCODERS:
    definition, state = nnx.split(getattr(base, name))
    abstract[name] = nnx.merge(definition, shapes_of(state))
  on_host = jax.tree.map(np.asarray, encoders) if jax.process_count() == 1 else {}
  return on_host, dataclasses.replace(base, **abstract)


def feature_shapes(
  config: ml_collections.ConfigDict, context: StepContext, *params: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """What a batch of one has in place of pictures; `params` are the model's, perhaps abstract."""
  size = config.data.image_size
  pictures = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
  shapes = {"target_mask": jax.ShapeDtypeStruct((1, size, size), np.uint8)}
  for role in dict.fromkeys(ROLES.values()):
    encode = lambda params, x, role=role: encode_role(context.model(*params), role, x)  # noqa: E731
    shapes |= jax.eval_shape(encode, params, pictures)
  return {name: shapes[name] for name in ROLES}
