"""Speed of the renderer: `python benchmarks/renderer.py [--images 8000] [--processes 4]`.

Prints images per second of `render` (in process) and of `render_many` (processes, their start and
compilation included; on an accelerator in process too), with the device.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import jax
import numpy as np

from data_pipeline.cores import available_cores
from data_pipeline.subjects3d import bulk, factors, renderer


def device_name() -> str:
  """The accelerator's name, or the processor's and the number of cores."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  cores = available_cores()
  return f"{names[0] if names else platform.processor()}, {cores} cores"


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--images", type=int, default=8000, help="pictures for render_many")
  parser.add_argument("--processes", type=int, default=None)
  parser.add_argument("--resolution", type=int, default=64)
  args = parser.parse_args()

  rng = np.random.default_rng(0)
  table = factors.subjects("train")
  drawn = factors.sample_factors(
    rng, table.take(rng.integers(len(table.class_id), size=args.images))
  )
  few = drawn.take(slice(0, min(2000, args.images)))
  print(f"device: {device_name()}; {args.resolution} x {args.resolution} pixels")

  start = time.perf_counter()
  renderer.render(few, resolution=args.resolution)
  first = time.perf_counter() - start
  start = time.perf_counter()
  renderer.render(few, resolution=args.resolution)
  again = time.perf_counter() - start
  n = len(few.class_id)
  print(f"render: {n / again:.0f} images/s (the first call compiled for {first - again:.1f} s)")

  start = time.perf_counter()
  bulk.render_many(drawn, resolution=args.resolution, processes=args.processes)
  wall = time.perf_counter() - start
  print(f"render_many: {args.images / wall:.0f} images/s over {args.images} images, start included")


if __name__ == "__main__":
  main()
