"""The model FLOPs of our training step, an image, on any machine; nothing is compiled.

By `cc_jax.plan.model_flops`, which training's `mfu` uses.
"""

from __future__ import annotations

import argparse

import jax

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import training_config
from cc_jax.parallel.mesh import make_mesh
from cc_jax.plan import lower
from cc_jax.plan.model_flops import model_flops


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  tiny, batch = parser.parse_args().tiny, 4
  config = training_config(batch, tiny=tiny)
  program = lower.train_program(config, make_mesh(config.mesh, batch))
  flops = model_flops(program.plain, *program.arguments)
  record("model-flops", images=batch, gflops_an_image=flops / batch / 1e9,
         counted="cc_jax.plan.model_flops", jax=jax.__version__)


if __name__ == "__main__":
  main()
