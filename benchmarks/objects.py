"""Speed of the mesh world: `python benchmarks/objects.py --models=FOLDER [--count 40]`.

Prints views per second of one process, in wall and in processor time, and the parts of it: loading
models, rendering, PNG. On N idle cores `python -m data_pipeline.objects --workers=N` makes about N
times as many.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from data_pipeline.objects import catalogue, mesh, scene, worker
from data_pipeline.objects.renderer import Renderer


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--models", required=True)
  parser.add_argument("--count", type=int, default=40, help="models, drawn at random")
  parser.add_argument("--views", type=int, default=24)
  parser.add_argument("--size", type=int, default=128)
  args = parser.parse_args()

  models, _ = catalogue.find_models(args.models)
  chosen = np.random.default_rng(0).permutation(len(models))[: args.count]
  renderer = Renderer(args.size)
  worker.render_model(models[chosen[0]], views=args.views, size=args.size, seed=0)  # imports
  spent = dict.fromkeys(("load", "render", "png"), 0.0)
  wall, done, bad = time.perf_counter(), 0, 0
  for n in chosen:
    model, start = models[n], time.process_time()
    try:
      parts = mesh.load(model, args.size)
    except worker.DataError:
      bad += 1
      continue
    loaded = time.process_time()
    views = scene.draw_views(0, model.key, model.noun, args.views)
    pictures = list(renderer.render(parts, views))
    rendered = time.process_time()
    for picture in pictures:
      worker.png(picture.image)
      worker.png(picture.mask)
    for name, seconds in zip(
      spent, (loaded - start, rendered - loaded, time.process_time() - rendered), strict=True
    ):
      spent[name] += seconds
    done += len(pictures)
  wall = time.perf_counter() - wall
  info = renderer.device
  processor = sum(spent.values())
  print(f"device: {info}; {args.size} x {args.size} pixels, {done} views of {len(chosen) - bad} "
        f"models, {bad} broken")
  parts = ", ".join(f"{name} {1e3 * seconds / done:.1f}" for name, seconds in spent.items())
  print(f"one process: {done / wall:.1f} views/s; {1e3 * processor / done:.1f} ms of processor a "
        f"view ({parts})")


if __name__ == "__main__":
  main()
