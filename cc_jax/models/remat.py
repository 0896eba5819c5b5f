"""Memory for time: layers whose backward pass computes again what it would have to keep."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from cc_jax.errors import UserError

_policies = jax.checkpoint_policies
# 'none' keeps everything. 'dots' keeps the results of convolutions and of products with weights
# and computes attention, norms and activations again. 'full' keeps a layer's input alone.
POLICIES = {
  "none": None,
  "dots": _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable,
    lambda primitive, *_, **__: primitive.name == "conv_general_dilated",
  ),
  "full": _policies.nothing_saveable,
}


def rematerialised(policy: str, function: Callable) -> Callable:
  """`function` of arrays with one of POLICIES; what it closes over is kept in any case."""
  return function if policy == "none" else jax.checkpoint(function, policy=POLICIES[policy])


def set_policies(modules: Sequence[nnx.Module], policies: Sequence[str]) -> None:
  """Gives each module (which must have a field `remat`) its policy, or all of them the only one."""
  words = list(policies) * len(modules) if len(policies) == 1 else policies
  for module, word in zip(modules, words, strict=True):
    module.remat = word


def check_policies(key: str, policies: Sequence[str], count: int | None = None) -> None:
  """Raises UserError for unknown words, or, if `count` is given, for another number of them."""
  for word in policies:
    if word not in POLICIES:
      raise UserError(f"{key} has {word!r}; use {', '.join(POLICIES)}")
  if count is not None and len(policies) not in (1, count):
    raise UserError(f"{key} has {len(policies)} words for {count} blocks; give one, or one a block")
