"""What it costs to give XLA more axes than two: the gradient of an MLP's weights, on this device.

    python benchmarks/linear.py [--rounds=30]

`flax` is nnx.Linear on [B, L, Q, D]; `ours` is models.layers.Linear, which makes one matrix of the
rows. The shapes are those of the mini config's textual Q-Former. Both take turns.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cc_jax.models.layers import Linear


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=30)
  rounds = parser.parse_args().rounds
  x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4, 9, 128)), jnp.float32)
  programs = {}
  for name, kind in (("flax", nnx.Linear), ("ours", Linear)):
    kinds = dict(use_bias=False, rngs=nnx.Rngs(0))  # as in the Q-Formers
    layers = kind(128, 512, **kinds), kind(512, 128, **kinds)

    def loss(layers, x):
      hidden = jax.nn.gelu(layers[0](x), approximate=False)
      return jnp.sum(jnp.square(layers[1](hidden)))

    graph, weights = nnx.split(layers)
    gradient = jax.grad(lambda weights, x, g=graph, f=loss: f(nnx.merge(g, weights), x), (0, 1))
    programs[name] = jax.jit(gradient).lower(weights, x).compile(), weights
  times = {name: [] for name in programs}
  for _ in range(rounds):
    for name, (program, weights) in programs.items():
      began = time.process_time()
      jax.block_until_ready(program(weights, x))
      times[name].append(1e3 * (time.process_time() - began))
  flax, ours = (float(np.median(times[name])) for name in programs)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: processor time of this process, "
        f"medians of {rounds}: flax {flax:.1f} ms, ours {ours:.1f} ms, ratio {ours / flax:.2f}")


if __name__ == "__main__":
  main()
