"""Whether the device computes what it should, each against something computed elsewhere.

Attention kinds, forward and gradient, and losses: against numpy in float64. A training step in
bf16: against float32 on the same device, whose loss is compared with the CPU's.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import RandomWeights, training_config
from benchmarks.train_step import noise
from cc_jax.models.attention_kernels import dot_product_attention
from cc_jax.models.attention_kinds import KINDS, choose_kernels
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.diffusion import diffusion_loss
from cc_jax.parallel.mesh import make_mesh, shard_batch
from cc_jax.parallel.rules import shard_params
from cc_jax.plan import lower
from cc_jax.training.step import init_state

# (tokens, keys, heads, width of a head) in SD 1.5 at 512 px and SDXL at 1024 px; odd lengths, too.
SHAPES = ((4096, 4096, 8, 40), (1024, 1024, 8, 80), (256, 256, 8, 160), (64, 64, 8, 160),
          (4096, 77, 8, 40), (4096, 4096, 10, 64), (1024, 1024, 20, 64), (1023, 77, 8, 40))
TINY_SHAPES = ((64, 64, 2, 8), (63, 77, 2, 8))
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative, in norm; tf32 products are near 3e-4


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  tiny = parser.parse_args().tiny
  check_losses()
  check_step(tiny)
  for shape in TINY_SHAPES if tiny else SHAPES:
    check_attention(*shape)


def relative(ours, exact) -> float:
  """||ours - exact|| / ||exact||; NaN stays NaN."""
  ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
  return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def verdict(error: float, limit: float) -> dict:
  return dict(error=error, limit=limit, ok=bool(error < limit))


# ---- losses


def check_losses() -> None:
  rng = np.random.default_rng(0)
  v, t = rng.standard_normal((2, 64, 96)) + 0.3
  ids = np.arange(64) // 2
  tau = 0.07
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  logits = unit(v) @ unit(t).T / tau
  same = (ids[:, None] == ids) & ~np.eye(64, dtype=bool)
  logits[same] = -np.inf

  def cross_entropy(rows):
    most = rows.max(-1, keepdims=True)
    return np.mean(np.log(np.exp(rows - most).sum(-1)) + most[:, 0] - np.diag(rows))

  exact = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
  ours = jax.jit(lambda v, t: cscl(
    v, t, temperature=tau, subject_ids=jnp.asarray(ids, jnp.int32))[0])
  found = ours(*(jnp.asarray(x, jnp.float32) for x in (v, t)))
  record("correct", what="CSCL, float32", **verdict(relative(found, exact), 1e-3))

  prediction, target = rng.standard_normal((2, 4, 8, 8, 4))
  weights, mask = rng.uniform(0.5, 2, 4), rng.uniform(0, 1, (4, 8, 8))
  error = np.square(prediction - target).mean(-1)
  exact = np.mean(weights * (error * mask).sum((1, 2)) / mask.sum((1, 2)))
  single = (jnp.asarray(x, jnp.float32) for x in (prediction, target, weights, mask))
  found = jax.jit(lambda *x: diffusion_loss(*x)[0])(*single)
  record("correct", what="diffusion loss, float32", **verdict(relative(found, exact), 1e-5))


# ---- attention


def attention_kinds(dtype) -> dict[str, object]:
  """Kind -> function(q, k, v [b s n h]) where this device has it, or the reason why not."""
  kinds = {}
  for kind in KINDS:
    if kind == "auto":  # is one of the others
      continue
    try:
      kernels = choose_kernels(kind, jax.devices()[0], dtype=dtype, training=True)
      kinds[kind] = functools.partial(dot_product_attention, kernels=kernels)
    except Exception as error:  # says what the kind needs
      kinds[kind] = str(error)
  return kinds


def check_attention(queries: int, keys: int, heads: int, width: int) -> None:
  rng = np.random.default_rng(queries + keys)
  q, upstream = rng.standard_normal((2, 1, queries, heads, width))
  k, v = rng.standard_normal((2, 1, keys, heads, width))
  exact = exact_attention(q, k, v, upstream)
  for dtype in (jnp.float32, jnp.bfloat16):
    name = jnp.dtype(dtype).name
    given = [jnp.asarray(x, dtype) for x in (q, k, v)]
    for kind, function in attention_kinds(dtype).items():
      label = f"attention {kind}, {name}, {queries} x {keys}, {heads} heads of {width}"
      if isinstance(function, str):
        record("correct", what=label, skipped=function)
        continue
      try:
        out, backward = jax.vjp(jax.jit(function), *given)
        found = (out, *backward(jnp.asarray(upstream, dtype)))
      except Exception as error:
        record("correct", what=label, failed=str(error).splitlines()[0][:200], ok=False)
        continue
      errors = [relative(x, y) for x, y in zip(found, exact)]
      record("correct", what=label, **verdict(float(np.max(errors)), TOLERANCE[name]),
             errors=dict(zip(("out", "dq", "dk", "dv"), errors)))


def exact_attention(q, k, v, upstream):
  """(out, dq, dk, dv) in float64, of [1, s, n, h]; head by head, to spare memory."""
  results = [np.zeros_like(x) for x in (q, q, k, v)]
  for n in range(q.shape[2]):
    a, b, c, g = (x[0, :, n] for x in (q, k, v, upstream))
    scale = a.shape[-1] ** -0.5
    logits = scale * a @ b.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ c.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    for result, x in zip(results, (p @ c, ds @ b, ds.T @ a, p.T @ g)):
      result[0, :, n] = x
  return results


# ---- the step


def check_step(tiny: bool) -> None:
  """A tiny base's step on the CPU, and on the device in float32 and bf16."""
  losses = {}
  cpu = jax.devices("cpu")[0]
  for label, device, dtype in (("CPU, float32", cpu, "float32"),
                               ("device, float32", jax.devices()[0], "float32"),
                               ("device, bfloat16", jax.devices()[0], "bfloat16")):
    config = training_config(4, tiny=True)
    config.train.dtype = config.train.base_dtype = dtype
    mesh = make_mesh(config.mesh, 4, devices=[device])
    program = lower.train_program(config, mesh)
    state, frozen, shapes, _ = program.arguments
    weights = RandomWeights()
    trainable = jax.tree_util.tree_map_with_path(weights, state.trainable)
    state = shard_params(init_state(trainable, config), mesh)
    frozen = jax.tree_util.tree_map_with_path(weights, frozen)
    # The CPU's program runs once.
    jax.config.update("jax_disable_most_optimizations", tiny or device is cpu)
    batch = noise(4, config.data.image_size, [[0] * 77])
    batch = {name: np.asarray(x, shapes[name].dtype) for name, x in batch.items() if name in shapes}
    _, metrics = program.function(
      state, frozen, shard_batch(batch, mesh), shard_params(np.uint32(0), mesh))
    losses[label] = {name: float(metrics[name]) for name in ("loss", "norm/gradient")}
    jax.config.update("jax_disable_most_optimizations", tiny)
  reference = losses["CPU, float32"]
  for label, limit in (("device, float32", 2e-3), ("device, bfloat16", 5e-2)):
    for name, value in losses[label].items():
      record("correct", what=f"step, {name}, {label} against the CPU's float32", value=value,
             **verdict(abs(value / reference[name] - 1), limit))


if __name__ == "__main__":
  main()
