"""Says, before a chip is rented, whether a run fits on it and what a step costs.

    python -m cc_jax.plan --config=configs/sdxl.py --topology=v5e:8x8 --config.mesh.fsdp=4
    python -m cc_jax.plan --config=configs/sd15.py --topology=v6e:4x4 --batch_per_chip=8 --json
    python -m cc_jax.plan --config=... --topology=v5e:2x2 --what=generate
    python -m cc_jax.plan --config=... --topology=v5e:2x2 --what=state
    python -m cc_jax.plan --config=configs/sd15.py --topology=v5e:4x4 --suggest
    python -m cc_jax.plan --topology=local

Compiles the real training step, or the sampler, for a TPU slice on a machine that has none (libtpu:
`pip install -e '.[tpu]'`), or for the local devices. Needs no weights. `--what=state` compiles
nothing: it prints what every chip keeps between two steps. `--topology=local` also runs the step
and prints measurements beside the estimate. If the program does not fit, the largest batch that
does is looked for, and the exit code is 1. `--suggest` looks for the fastest training that fits: it
tries batches, what the backward pass computes again and attention kinds, and prints the command.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from cc_jax import cli
from cc_jax.errors import UserError
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.plan import suggest
from cc_jax.plan.batch_search import largest_batch
from cc_jax.plan.estimate import CompiledPlan, Overflow, make_plan
from cc_jax.plan.lower import make_program
from cc_jax.plan.measure import measure_program
from cc_jax.plan.report import describe_measured, describe_plan, describe_refusal, state_table
from cc_jax.plan.topology import Slice, find_slice
from cc_jax.training.config_checks import check_config
from cc_jax.training.setup import build_abstract

DEFAULT_CONFIG = "configs/subjects3d.py"


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  args = flags.FLAGS
  config, what, local = args.config, args.what, args.topology == "local"
  if args.batch_per_chip < 0:
    raise UserError(f"--batch_per_chip={args.batch_per_chip}; it must be at least 1")
  check_config(config)
  if local:
    set_cpu_devices(config.mesh, config.train.batch_size)
  elif jax.config.jax_platforms is None:
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here; there is no TPU to look for
  slice_ = find_slice(args.topology, config.train.dtype)
  if args.suggest:
    print_suggestion(config, slice_, args)
    return
  program = make_program(config, slice_, what, args.batch_per_chip)
  if what == "state":
    print(state_table(program))
    return

  plan = make_plan(program, slice_)
  if not isinstance(plan, CompiledPlan) or not plan.fits:
    compile_for = lambda n: make_plan(make_program(config, slice_, what, n), slice_)  # noqa: E731
    refusal = refuse(plan, program.images // len(slice_.devices), compile_for)
    print(json.dumps(refusal, indent=2) if args.json else describe_refusal(refusal, slice_))
    sys.exit(1)
  numbers, text = plan.numbers(), describe_plan(plan, what)
  if local:
    measured = measure_program(plan.compiled, program.arguments)
    numbers["measured"], text = measured, f"{text}\n\n{describe_measured(plan, measured)}"
  print(json.dumps(numbers, indent=2) if args.json else text)


def print_suggestion(config: ml_collections.ConfigDict, slice_: Slice, args: Any) -> None:
  """The fastest training that fits, as a command; exit code 1 if nothing does."""
  if args.what != "train" or args.compiles < 1:
    raise UserError("--suggest is for --what=train, and needs --compiles of at least 1")
  chips, base = len(slice_.devices), build_abstract(config)[1]
  images = args.batch_per_chip or max(1, config.train.batch_size // chips)
  ladder = suggest.policies(2 * len(base.unet.config.block_out_channels) + 1)
  # A CPU has but one kind.
  attentions = ("auto", "xla") if slice_.chip.kinds else (config.train.attention,)
  evaluate = suggest.evaluate_by(config, slice_, lambda line: print(line, file=sys.stderr))
  trials = suggest.search(evaluate, images, ladder, attentions, args.compiles)
  choice = suggest.fastest(trials)
  if args.json:
    print(json.dumps(suggest.to_json(trials, chips), indent=2))
  else:
    print(suggest.describe_trials(trials))
  if choice is None:
    raise UserError(
      "nothing that was tried fits: shard more (--config.mesh.fsdp), or take a chip with more "
      "memory"
    )
  if not args.json:
    print(f"\n{suggest.command(choice, chips, sys.argv[1:], DEFAULT_CONFIG)}")


def refuse(
  plan: CompiledPlan | Overflow, images: int, compile_for: Callable[[int], CompiledPlan | Overflow]
) -> dict[str, Any]:
  """What the plan for `images` a chip needs, and the largest number that fits; for --json."""
  needed, limit = _need(plan)

  def need(batch: int) -> float:
    print(f"compiling for {batch} images a chip ...", file=sys.stderr)
    return _need(compile_for(batch))[0]

  search = largest_batch(images, needed, limit, need)
  return {
    "fits": False,
    "images_per_chip": images,
    "memory": {"total": needed, "chip": limit},
    "largest_images_per_chip": search.largest,
    "tried": {str(batch): size for batch, size in search.tried.items()},
  }


def _need(plan: CompiledPlan | Overflow) -> tuple[float, float]:
  """(bytes needed, bytes of a chip)."""
  if isinstance(plan, Overflow):
    return plan.needed, plan.limit
  return plan.memory.total, plan.chip.memory


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", DEFAULT_CONFIG)
  flags.DEFINE_string("topology", "local", "A slice, such as v5e:4x4 or v5p:2x2x4, or local.")
  whats = ("train", "generate", "state")
  flags.DEFINE_enum("what", "train", whats, "The program; state compiles nothing.")
  flags.DEFINE_integer("batch_per_chip", 0, "Images a chip; 0 = the config's own global batch.")
  flags.DEFINE_bool("suggest", False, "Look for the fastest training that fits.")
  flags.DEFINE_integer("compiles", 12, "Compiles that --suggest may make; each takes minutes.")
  flags.DEFINE_bool("json", False, "Print JSON, in bytes and seconds.")


if __name__ == "__main__":
  cli.run(main, define_flags)
