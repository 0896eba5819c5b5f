"""The card's measured rate of bf16 products: the denominator of every share of it.

Random numbers, not zeros, on which cards run faster. The mean of ten products after three.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp

from benchmarks.gpu.record import record


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  side = 256 if parser.parse_args().tiny else 8192
  a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (0, 1))
  product = jax.jit(jnp.matmul)
  for _ in range(3):
    product(a, b).block_until_ready()
  began = time.perf_counter()
  for _ in range(10):
    c = product(a, b)
  c.block_until_ready()
  seconds = (time.perf_counter() - began) / 10
  device = jax.devices()[0]
  record("rate", device=device.device_kind, platform=device.platform, jax=jax.__version__,
         side=side, tflops=2 * side**3 / seconds / 1e12)


if __name__ == "__main__":
  main()
