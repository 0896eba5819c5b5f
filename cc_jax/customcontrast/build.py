"""From modules to plain pytrees and back: the border between NNX and everything around it.

`build_customcontrast` splits CustomContrast into its definition and two flat dictionaries
`dotted path -> array`, the adapter's and the frozen base's. `merge_params`, inside a jitted
function, is its inverse.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cc_jax.bases.base import Base
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.customcontrast.param_groups import is_trainable
from cc_jax.models.params import Params
from cc_jax.models.rngs import StatelessRngs


def split_params(model: CustomContrast) -> tuple[nnx.GraphDef, Params, Params]:
  """(definition, trainable, frozen); the parts flat: dotted path -> array or abstract array."""
  definition, *states = nnx.split(model, is_trainable, ...)
  return definition, *(
    {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    for state in states
  )


def merge_params(definition: nnx.GraphDef, *parts: Params) -> CustomContrast:
  """The inverse of `split_params`."""
  tree: dict[Any, Any] = {}
  for part in parts:
    for name, leaf in part.items():
      *folders, last = (int(k) if k.isdigit() else k for k in name.split("."))
      node = tree
      for folder in folders:
        node = node.setdefault(folder, {})
      node[last] = leaf
  return nnx.merge(definition, tree)


def build_customcontrast(
  base: Base, encoder: MFIEncoderConfig, injection: InjectionConfig, *, dtype: Any = jnp.float32,
  seed: int = 0, transform: Callable[[Callable], Callable] = jax.jit,
) -> tuple[nnx.GraphDef, Params, Params]:
  """A new adapter around the base: (definition, trainable, frozen), as of `split_params`.

  The frozen arrays are the base's own, not copies; the base's modules stay as they are.

  Args:
    dtype: in which the adapter computes; it is stored in float32.
    transform: jax.jit compiles all initialisers at once; `eval_shape_only` is for a base without
      weights or an adapter whose values come from a file.

  Raises:
    UserError: the encoder's or the injection's settings do not fit the base.
  """
  structure, arrays = nnx.split((base.unet, base.vae, base.text_encoders, base.image_encoder))
  inputs = jax.tree.leaves(arrays)
  traced: dict[str, Any] = {}

  def create(arrays, seed) -> tuple[Params, Params]:
    unet, vae, text_encoders, image_encoder = nnx.merge(structure, arrays)
    networks = dict(unet=unet, vae=vae, text_encoders=text_encoders, image_encoder=image_encoder)
    model = CustomContrast(
      dataclasses.replace(base, **networks), encoder, injection, dtype=jnp.dtype(dtype),
      param_dtype=jnp.float32, rngs=StatelessRngs(seed),
    )
    traced["definition"], trainable, frozen = split_params(model)
    # A jitted function copies what it only passes on, so the frozen arrays stay outside.
    number = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(arrays))}
    traced["frozen"] = {path: number[id(x)] for path, x in frozen.items() if id(x) in number}
    return trainable, {path: x for path, x in frozen.items() if path not in traced["frozen"]}

  # The seed is an argument, not a constant: one compiled program serves all seeds.
  trainable, new = transform(create)(arrays, np.uint32(seed % 2**32))
  old = {path: inputs[i] for path, i in traced["frozen"].items()}
  return traced["definition"], trainable, {**old, **new}


def eval_shape_only(function: Callable) -> Callable:
  """A function that returns the shapes and dtypes of `function`'s results, and computes nothing."""
  return lambda *args: jax.eval_shape(function, *args)
