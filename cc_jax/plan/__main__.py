"""Says, before a chip is rented, whether a run fits on it and what a step costs.

    python -m cc_jax.plan --config=configs/sdxl.py --topology=v5e:8x8 --config.mesh.fsdp=4
    python -m cc_jax.plan --config=configs/sd15.py --topology=v6e:4x4 --batch_per_chip=8 --json
    python -m cc_jax.plan --config=... --topology=v5e:2x2 --what=generate
    python -m cc_jax.plan --config=... --topology=v5e:2x2 --what=state
    python -m cc_jax.plan --topology=local

Compiles the real training step, or the sampler, for a TPU slice on a machine that has none (libtpu:
`pip install -e '.[tpu]'`), or for the local devices. Needs no weights. `--what=state` compiles
nothing: it prints what lies on every chip between two steps. `--topology=local` also runs the step
and sets the truth beside the estimate. The exit code is 1 if the program does not fit; the largest
batch that does is then looked for.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from ml_collections import config_flags

from cc_jax import errors
from cc_jax.errors import UserError
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.parallel.mesh import make_mesh
from cc_jax.plan.batch_search import largest_batch
from cc_jax.plan.estimate import CompiledPlan, Overflow, make_plan
from cc_jax.plan.lower import AbstractProgram, generate_program, train_program
from cc_jax.plan.report import describe_plan, describe_refusal, describe_truth, state_table
from cc_jax.plan.topology import Slice, find_slice

WHATS = ("train", "generate", "state")


# The truth.


def run_here(plan: CompiledPlan, work: AbstractProgram, *, steps: int = 5) -> dict[str, Any]:
  """Runs the compiled program on this machine: the best of some steps, and its peak of memory.

  The weights are constants: what a step costs does not depend on them.
  """

  def fill(leaf):
    value = 0.02 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
    return jnp.full(leaf.shape, value, leaf.dtype)

  places = jax.tree.map(lambda leaf: leaf.sharding, work.arguments)
  create = jax.jit(lambda: jax.tree.map(fill, work.arguments), out_shardings=places)
  first, *rest = create()
  times = []
  for _ in range(steps + 1):
    began = time.perf_counter()
    out = jax.block_until_ready(plan.compiled(first, *rest))
    times.append(time.perf_counter() - began)
    if isinstance(out, tuple) and jax.tree.structure(out[0]) == jax.tree.structure(first):
      first = out[0]  # the state was donated
  stats = jax.local_devices()[0].memory_stats() or {}
  return {"seconds": min(times[1:]), "memory": stats.get("peak_bytes_in_use")}


# The command line.


def plan_for(
  config: ml_collections.ConfigDict, place: Slice, what: str, batch_per_chip: int
) -> tuple[CompiledPlan | Overflow, AbstractProgram]:
  """Plans one batch; 0 images a chip means the config's own global batch."""
  work, count = work_for(config, place, what, batch_per_chip)
  return make_plan(work, place, count), work


def work_for(
  config: ml_collections.ConfigDict, place: Slice, what: str, batch_per_chip: int
) -> tuple[AbstractProgram, int]:
  """(the program, how many chips it runs on)."""
  config = config.copy_and_resolve_references()
  if batch_per_chip:
    config.train.batch_size = batch_per_chip * len(place.devices)
  mesh = make_mesh(config.mesh, config.train.batch_size, devices=place.devices)
  return (generate_program if what == "generate" else train_program)(config, mesh), mesh.size


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  settings = flags.FLAGS
  config, what, topology = settings.config, settings.what, settings.topology
  asked = settings.batch_per_chip
  if asked < 0:
    raise UserError(f"--batch_per_chip={asked}; it must be at least 1")
  local = topology == "local"
  if local:
    set_cpu_devices(config.mesh, config.train.batch_size)
  elif jax.config.jax_platforms is None:
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here; there is no TPU to look for
  place = find_slice(topology, config.train.dtype)
  if what == "state":
    print(state_table(work_for(config, place, what, asked)[0]))
    return

  plan, work = plan_for(config, place, what, asked)
  if isinstance(plan, CompiledPlan) and plan.fits:
    numbers, text = plan.numbers(), describe_plan(plan, what)
    if local:
      truth = run_here(plan, work)
      numbers["measured"], text = truth, f"{text}\n\n{describe_truth(plan, truth)}"
    print(json.dumps(numbers, indent=2) if settings.json else text)
    return

  needed, limit = _need(plan)
  each = work.images // len(place.devices)

  def need(batch: int) -> float:
    print(f"compiling for {batch} images a chip ...", file=sys.stderr)
    return _need(plan_for(config, place, what, batch)[0])[0]

  search = largest_batch(each, needed, limit, need)
  refusal = {
    "fits": False,
    "images_per_chip": each,
    "memory": {"total": needed, "chip": limit},
    "largest_images_per_chip": search.largest,
    "tried": {str(batch): size for batch, size in search.tried.items()},
  }
  print(json.dumps(refusal, indent=2) if settings.json else describe_refusal(refusal, place))
  sys.exit(1)


def _need(plan: CompiledPlan | Overflow) -> tuple[float, float]:
  """(bytes needed, bytes there are)."""
  if isinstance(plan, Overflow):
    return plan.needed, plan.limit
  return plan.memory.total, plan.chip.memory


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/subjects3d.py")
  flags.DEFINE_string("topology", "local", "A slice, such as v5e:4x4 or v5p:2x2x4, or local.")
  flags.DEFINE_enum("what", "train", WHATS, "The program; state compiles nothing.")
  flags.DEFINE_integer("batch_per_chip", 0, "Images a chip; 0 = the config's own global batch.")
  flags.DEFINE_bool("json", False, "Print JSON, in bytes and seconds.")


if __name__ == "__main__":
  errors.run(main, define_flags)
