"""Plans on eight virtual devices: python tests/run_plan.py BASE OUT.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import tiny  # noqa: E402

from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.plan import __main__ as plan
from cc_jax.plan import (
  chips,  # noqa: E402
  hlo,
)
from cc_jax.plan import estimate as cost
from cc_jax.plan.report import describe_truth
from cc_jax.plan.topology import Slice

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
    place = Slice(devices[:count], chip, (count,))
    found, work = plan.plan_for(config, place, "train", 1)
    kinds = hlo.by_kind(found.program.collectives)
    results[f"data {count}"] = {kind: size for kind, (_, size) in kinds.items()}
  results["trained bytes"] = cost.all_bytes(work.parts["adapter"])
  # CSCL: both CLS tokens; MACL: two sets of L layers' tokens; S; the subject's number. Floats.
  layers, width, embed = 4, config.encoder.width, tiny.VISION["projection_dim"]
  results["keys of a sample"] = 4 * (2 * width + 2 * layers * width + embed + 1)

  truth = plan.run_here(found, work, steps=1)
  results["measured"] = {**truth, "told": describe_truth(found, truth)}

  config = tiny.tiny_config(base, sample__steps=4)
  found, _ = plan.plan_for(config, Slice(devices, chip, (DEVICES,)), "generate", 1)
  numbers = found.numbers()
  results["generate"] = {key: numbers[key] for key in ("images", "fits", "flops")}
  turns: dict[float, float] = {}
  for step in found.program.steps:
    turns[step.times] = turns.get(step.times, 0) + step.flops
  results["generate"]["flops of a turn"] = turns

  Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
  main(*sys.argv[1:])
