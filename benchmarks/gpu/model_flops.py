"""The model FLOPs of our training step, an image, on any machine; nothing is compiled.

By `cc_jax.plan.model_flops`, which training's `mfu` uses; in a build without it, by XLA's count of
the lowered program, where nothing is recomputed (train.remat_* is none) and attention is XLA's.
"""

from __future__ import annotations

import argparse

import jax

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import training_config
from cc_jax.parallel.mesh import make_mesh
from cc_jax.plan import lower


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  tiny, batch = parser.parse_args().tiny, 4
  config = training_config(batch, tiny=tiny)
  config.train.remat_unet, config.train.remat_text = ("none",), "none"
  if "attention" in config.train:
    config.train.attention = "xla"
  program = lower.train_program(config, make_mesh(config.mesh, batch))
  try:
    from cc_jax.plan.model_flops import model_flops

    flops, counted = model_flops(program.function, *program.arguments), "cc_jax.plan.model_flops"
  except ImportError:
    flops = program.function.lower(*program.arguments).cost_analysis()["flops"]
    counted = "XLA, of the lowered program"
  record("model-flops", images=batch, gflops_an_image=flops / batch / 1e9, counted=counted,
         jax=jax.__version__)


if __name__ == "__main__":
  main()
