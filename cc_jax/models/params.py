"""Parameters as plain pytrees: what they are called, and in which types they are kept."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array

Params = dict[str, Array]  # dotted path -> array
DTYPES = ("float32", "bfloat16")  # to compute in, and to keep frozen weights in


class ParamOptions(NamedTuple):
  """How a parameter is trained; the module that has it declares this as `trained`."""

  decay: bool = True  # weight decay pulls it to zero, if it is a matrix
  rate: str = ""  # the key of config.train that multiplies its learning rate


def path_name(path: tuple[Any, ...], separator: str = "/") -> str:
  """The path of a leaf as JAX gives it (`tree_leaves_with_path`) -> 'ema/unet.conv_in.kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator=separator)


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by `path_name`, in the tree's own order."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
