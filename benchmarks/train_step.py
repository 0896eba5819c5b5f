"""Time of one training step of the main job, data and compiling left out.

    python benchmarks/train_step.py [--config=configs/subjects3d.py] [--base=...] [--steps=20]
    python benchmarks/train_step.py --against=CHECKOUT [--rounds=3] [--steps=20]

The batch is noise in the loader's shapes: a step's time does not depend on what it sees. `--base`
is a folder; one with config.json files alone is filled with random weights.

The peer in the same run, where torch and diffusers are installed and there is no accelerator:
diffusers' UNet of the same base, forward and backward to its input at the same batch. Our step does
more: VAE, image encoder, MFI-Encoder on three sets of images, text encoder for every layer's S+,
objectives, optimizer, average. Both may use all cores.

`--against` runs this file and that of another checkout (of another commit, say), each in its own
tree and in turns, and prints processor time and page faults of a step as well.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cc_jax.bases.base import load_base, random_base
from cc_jax.bases.files import resolve_base
from cc_jax.customcontrast.build import build_customcontrast
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.parallel.mesh import make_mesh, shard_batch
from cc_jax.parallel.rules import shard_params
from cc_jax.training import step
from cc_jax.training.setup import adapter_configs, base_options, make_step_context, step_seed
from data_pipeline.tokens import prompt_keys


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/subjects3d.py")
  parser.add_argument("--base", default="")
  parser.add_argument("--batch_size", type=int, default=0)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--against", type=Path, help="another checkout of this repository")
  parser.add_argument("--rounds", type=int, default=3)
  arguments = parser.parse_args()
  if arguments.against:
    keys = ("config", "base", "batch_size", "steps")
    compare(
      arguments.against, [f"--{key}={getattr(arguments, key)}" for key in keys], arguments.rounds)
    return
  name = Path(arguments.config).with_suffix("").as_posix().replace("/", ".")
  config = importlib.import_module(name).get_config()
  config.base = arguments.base or config.base
  config.train.batch_size = arguments.batch_size or config.train.batch_size

  size = config.train.batch_size
  set_cpu_devices(config.mesh, size)
  mesh = make_mesh(config.mesh, size)
  weights = any(resolve_base(config.base).glob("unet/*.safetensors"))
  base = (load_base if weights else random_base)(config.base, **base_options(config))
  definition, trainable, frozen = build_customcontrast(
    base, *adapter_configs(config), dtype=config.train.dtype, seed=config.seed
  )
  context = make_step_context(config, definition, base)
  state = shard_params(step.init_state(trainable, config), mesh)
  frozen = shard_params(frozen, mesh)
  batch = shard_batch(noise(size, config.data.image_size, context.empty_prompt), mesh)

  began = time.perf_counter()
  seed = shard_params(step_seed(config), mesh)
  compiled = step.make_train_step(context, mesh, state, frozen)
  compiled = compiled.lower(state, frozen, batch, seed).compile()
  print(f"{mesh.size} x {mesh.devices.flat[0].device_kind}, batch {size}, {config.train.dtype}")
  print(f"compile    {time.perf_counter() - began:8.1f} s")
  times = []
  for _ in range(arguments.steps + 2):
    began = time.perf_counter()
    state, metrics = compiled(state, frozen, batch, seed)
    jax.block_until_ready(metrics)
    times.append(time.perf_counter() - began)
  times = np.sort(times[2:])
  middle = float(np.median(times))
  print(f"step       {1e3 * middle:8.1f} ms (median of {len(times)}; best {1e3 * times[0]:.1f})")
  print(f"throughput {size / middle:8.1f} images/s")
  assert jnp.isfinite(metrics["loss"])
  if jax.default_backend() == "cpu" and weights:
    peer = diffusers_unet(resolve_base(config.base), size, arguments.steps)
    if peer:
      print(f"diffusers' UNet alone, forward and backward: {1e3 * peer:.1f} ms; "
            f"our whole step takes {middle / peer:.2f} times that")


def compare(other: Path, words: Sequence[str], rounds: int) -> None:
  """Prints medians of this tree's step and the other's, and the ratios of the rounds' medians."""
  trees = {"this": Path(__file__).parents[1], "other": other.resolve()}
  found = {name: [] for name in trees}
  for _ in range(rounds):
    for name, tree in trees.items():
      found[name].append(run_tree(tree, words))
      ms, processor, faults = found[name][-1]
      print(f"{name:6} {ms:8.1f} ms  {processor:8.1f} ms of processor  {faults:8.0f} page faults",
            flush=True)
  this, that = (np.median(found[name], axis=0) for name in trees)
  print(f"a step of {trees['this']} against {trees['other']}, medians of {rounds} rounds:")
  for label, a, b in zip(("ms", "ms of processor", "page faults"), this, that):
    print(f"{label:16} {a:10.1f} {b:10.1f}   ratio {a / b:.3f}")


# Runs a tree's own file and notes what every step took. No torch: a peer would be timed as well.
WATCH = """
import resource, runpy, statistics, sys, time
sys.modules["torch"] = None
import jax
wait, marks = jax.block_until_ready, []
def block_until_ready(x):
  x, now = wait(x), resource.getrusage(resource.RUSAGE_SELF)
  marks.append((time.perf_counter(), now.ru_utime + now.ru_stime, now.ru_minflt))
  return x
jax.block_until_ready = block_until_ready
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
steps = [[b - a for a, b in zip(*pair)] for pair in zip(marks[2:], marks[3:])]
seconds, processor, faults = map(statistics.median, zip(*steps))
print("MEDIANS", 1e3 * seconds, 1e3 * processor, faults)
"""


def run_tree(tree: Path, words: Sequence[str]) -> tuple[float, float, float]:
  """Medians of a step of a tree's own file: ms, ms of processor, page faults."""
  command = [sys.executable, "-c", WATCH, "benchmarks/train_step.py", *words]
  environment = os.environ | {"PYTHONPATH": str(tree)}
  done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{tree}: {done.stderr[-2000:]}")
  line = re.search("^MEDIANS (.*)", done.stdout, re.MULTILINE)[1]
  return tuple(float(word) for word in line.split())


def diffusers_unet(folder: Path, size: int, steps: int) -> float | None:
  """Median seconds of forward and backward of PyTorch's UNet; None where it is not installed."""
  try:
    import torch
    from diffusers import UNet2DConditionModel
  except ImportError:
    return None
  unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
  c = unet.config
  x = torch.randn(size, c.in_channels, c.sample_size, c.sample_size, requires_grad=True)
  text = torch.randn(size, 32, c.cross_attention_dim, requires_grad=True)
  t = torch.full((size,), 500)
  times = []
  for _ in range(steps + 2):
    began = time.perf_counter()
    unet(x, t, text).sample.square().mean().backward()
    times.append(time.perf_counter() - began)
  return float(np.median(times[2:]))


def noise(size: int, side: int, empty_prompt: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
  """A batch in the loader's shapes and dtypes."""
  rng = np.random.default_rng(0)
  pictures = {
    name: rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    for name in ("positive", "reference", "target")
  }
  prompts = {}
  for (ids, slot, span), empty in zip(prompt_keys(len(empty_prompt)), empty_prompt):
    prompts[ids] = rng.integers(1, 90, (size, len(empty)), dtype=np.int32)
    prompts[slot] = np.full(size, 3, np.int32)
    prompts[span] = np.tile(np.asarray([2, 3], np.int32), (size, 1))
  return pictures | prompts | {
    "target_mask": rng.integers(0, 256, (size, side, side), dtype=np.uint8),
    "subject_id": np.arange(size, dtype=np.int32),
    "family_id": np.arange(size, dtype=np.int32),
    "class_id": np.zeros(size, np.int32),
  }


if __name__ == "__main__":
  main()
