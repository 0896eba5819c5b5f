"""Comparing one of our networks with the PyTorch original: outputs and all gradients at once."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from cc_jax.bases.torch_names import to_torch, torch_shapes
from cc_jax.models.rngs import StatelessRngs

TOLERANCE = 1e-4


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Moves every parameter off its start: norms of ones and biases of zeros would hide a mix-up."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def to_nchw(array: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def to_nhwc(tensor: torch.Tensor) -> np.ndarray:
  return np.moveaxis(tensor.detach().numpy(), 1, -1)


def abstract(cls, config) -> nnx.Module:
  return nnx.eval_shape(lambda: cls(config, rngs=StatelessRngs(0)))


def relative_error(ours, theirs, floor: float = 0.0) -> float:
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), floor, 1e-30)


def assert_same(ours_fn, module, inputs, theirs_fn, torch_model) -> None:
  """Outputs, gradients of the inputs and of every parameter agree.

  Args:
    ours_fn: (module, *inputs) -> list of arrays.
    inputs: numpy float32 arrays, of which gradients are taken.
    theirs_fn: (*tensors, one per input and with its shape) -> list of tensors, in our layout.
  """
  graph, params = nnx.split(module)
  rng = np.random.default_rng(7)
  tensors = [torch.from_numpy(x).requires_grad_() for x in inputs]
  theirs = theirs_fn(*tensors)
  weights = [rng.standard_normal(out.shape).astype(np.float32) for out in theirs]
  torch_model.zero_grad()
  sum((out * torch.from_numpy(w)).sum() for out, w in zip(theirs, weights)).backward()

  @jax.jit
  def value_and_grads(params, inputs):
    def loss(params, inputs):
      outs = ours_fn(nnx.merge(graph, params), *inputs)
      return sum((out * w).sum() for out, w in zip(outs, weights, strict=True)), outs

    (_, outs), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, inputs)
    return outs, grads

  with jax.default_matmul_precision("highest"):
    outs, (param_grads, input_grads) = value_and_grads(params, [jnp.asarray(x) for x in inputs])
  for index, (out, wanted) in enumerate(zip(outs, theirs, strict=True)):
    assert relative_error(out, wanted.detach()) < TOLERANCE, f"output {index}"
  for index, (grad, tensor) in enumerate(zip(input_grads, tensors, strict=True)):
    assert relative_error(grad, tensor.grad) < TOLERANCE, f"gradient of input {index}"

  wanted = {name: tensor.grad for name, tensor in named_as_ours(module, torch_model).items()}
  grads = to_torch(param_grads)
  assert grads.keys() == wanted.keys()
  # The gradient of a key's bias is zero but for rounding; what counts is its size among the rest.
  floor = 1e-3 * max(float(grad.norm()) for grad in wanted.values())
  errors = {name: relative_error(grads[name], wanted[name], floor) for name in wanted}
  worst = max(errors, key=errors.get)
  assert errors[worst] < TOLERANCE, f"gradient of {worst}: {errors[worst]:.1e}"


def assert_same_names(cls, config, torch_model_fn) -> None:
  """Names and shapes of our abstract model are those of PyTorch's model on the meta device."""
  module = abstract(cls, config)
  with torch.device("meta"):
    theirs = named_as_ours(module, torch_model_fn())
  wanted = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
  assert torch_shapes(nnx.state(module, nnx.Param)) == wanted


def named_as_ours(module, torch_model) -> dict[str, torch.nn.Parameter]:
  """Inside transformers 5 some parameters are called otherwise than in the hub's files."""
  hub_name = getattr(type(module), "hub_name", lambda name: name)
  named = {hub_name(name): tensor for name, tensor in torch_model.named_parameters()}
  named.pop(None, None)
  return named
