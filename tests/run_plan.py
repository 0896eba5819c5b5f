"""Plans on eight virtual devices: python tests/run_plan.py BASE OUT.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import tiny  # noqa: E402

from cc_jax.parallel.distributed import set_cpu_devices  # noqa: E402
from cc_jax.plan import chips  # noqa: E402
from cc_jax.plan.collectives import by_kind  # noqa: E402
from cc_jax.plan.estimate import all_bytes, make_plan  # noqa: E402
from cc_jax.plan.lower import make_program  # noqa: E402
from cc_jax.plan.measure import measure_program  # noqa: E402
from cc_jax.plan.report import describe_measured  # noqa: E402
from cc_jax.plan.topology import Slice  # noqa: E402

DEVICES = 8
# config, slice, images a chip, overrides: the plans of docs/scale.md.
FULL = [
  ("sd15", "v5e:4x4", 4, ()),
  ("sd15", "v6e:4x4", 8, ()),
  ("sdxl", "v5p:2x2x4", 4, ("--config.mesh.fsdp=4",)),
  ("sdxl", "v5e:8x8", 1, ("--config.mesh.fsdp=8",)),
]


def main(base: str, out: str) -> None:
  jax.config.update("jax_disable_most_optimizations", True)
  set_cpu_devices(tiny.tiny_config(base, mesh__cpu_devices=DEVICES).mesh, DEVICES)
  devices, chip, results = jax.devices(), chips.find("v5e"), {}
  assert len(devices) == DEVICES

  for count in (4, 8):
    config = tiny.tiny_config(base)
    slice_ = Slice(devices[:count], chip, (count,))
    program = make_program(config, slice_, "train", 1)
    plan = make_plan(program, slice_)
    kinds = by_kind(plan.program.collectives)
    results[f"data {count}"] = {kind: size for kind, (_, size) in kinds.items()}
  results["trained bytes"] = all_bytes(program.parts["adapter"])
  # CSCL: both CLS tokens; MACL: two sets of L layers' tokens; S; the subject's number. Floats.
  layers, width, embed = 4, config.encoder.width, tiny.VISION["projection_dim"]
  results["keys of a sample"] = 4 * (2 * width + 2 * layers * width + embed + 1)

  measured = measure_program(plan.compiled, program.arguments, repeats=1)
  results["measured"] = {**measured, "text": describe_measured(plan, measured)}

  config = tiny.tiny_config(base, sample__steps=4)
  slice_ = Slice(devices, chip, (DEVICES,))
  plan = make_plan(make_program(config, slice_, "generate", 1), slice_)
  numbers = plan.numbers()
  results["generate"] = {key: numbers[key] for key in ("images", "fits", "flops")}
  by_trip_count: dict[float, float] = {}
  for step in plan.program.steps:
    by_trip_count[step.runs] = by_trip_count.get(step.runs, 0) + step.flops
  results["generate"]["flops by trip count"] = by_trip_count

  Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
  main(*sys.argv[1:])
