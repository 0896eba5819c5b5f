"""The model FLOPs of our training step, an image: those of its lowered program, on any machine.

Nothing is recomputed in it (train.remat_* is none) and attention is XLA's, so that every product is
in the text. Products and convolutions only, forward and backward.
"""

from __future__ import annotations

import argparse

import jax

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import training_config
from cc_jax.parallel.mesh import make_mesh
from cc_jax.plan import hlo, lower


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  tiny, batch = parser.parse_args().tiny, 4
  config = training_config(batch, tiny=tiny)
  config.train.remat_unet, config.train.remat_text = ("none",), "none"
  if "attention" in config.train:
    config.train.attention = "xla"
  program = lower.train_program(config, make_mesh(config.mesh, batch))
  lowered = program.function.lower(*program.arguments)
  flops = hlo.Program(lowered.as_text(dialect="hlo")).flops
  record("model-flops", images=batch, gflops_an_image=flops / batch / 1e9,
         xla_gflops_an_image=(lowered.cost_analysis() or {}).get("flops", 0.0) / batch / 1e9,
         jax=jax.__version__)


if __name__ == "__main__":
  main()
