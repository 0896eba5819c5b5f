"""Processor time until a command can begin: imports, and a picture of a second process.

    python benchmarks/startup.py [--against=CHECKOUT] [--rounds=3] [--picture]

User and system seconds of whole processes, interpreter included, the best of the rounds. With
`--against` another checkout of this repository takes turns with this one, so that both see the same
machine. `--picture` draws the README's first picture, too, with JAX's cache of compiled programs
filled by a run before (JAX_COMPILATION_CACHE_DIR, one folder for each checkout).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
COMMANDS = {
  "nothing": ["-c", "pass"],
  "import jax": ["-c", "import jax"],
  "import cc_jax.generate": ["-c", "import cc_jax.generate"],
  "generate --help": ["-m", "cc_jax.generate", "--help"],
  "generate, a wrong flag": ["-m", "cc_jax.generate", "--stepz=3"],
  "import cc_jax.train": ["-c", "import cc_jax.train"],
}
PICTURE = ["-m", "cc_jax.generate", "--prompt=a teapot on the beach"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--against", type=Path)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--picture", action="store_true")
  arguments = parser.parse_args()
  trees = {"this": HERE} | ({"against": arguments.against.resolve()} if arguments.against else {})
  with tempfile.TemporaryDirectory() as folder:
    commands = dict(COMMANDS)
    if arguments.picture:
      commands["first picture, nothing compiled"] = [*PICTURE, f"--out={folder}/out.png"]
      commands["first picture of a later process"] = commands["first picture, nothing compiled"]
    print(f"{'processor seconds':<34}" + "".join(f"{name:>10}" for name in trees))
    for label, command in commands.items():
      # What is compiled once would be found again.
      rounds = 1 if label.endswith("nothing compiled") else arguments.rounds
      best = dict.fromkeys(trees, float("inf"))
      for _ in range(rounds):
        for name, tree in trees.items():
          best[name] = min(best[name], processor_seconds(command, tree, f"{folder}/{name}"))
      print(f"{label:<34}" + "".join(f"{seconds:10.2f}" for seconds in best.values()), flush=True)


def processor_seconds(command: list[str], tree: Path, cache: str) -> float:
  """User and system time of a Python process in a checkout."""
  environment = os.environ | {"PYTHONPATH": str(tree), "JAX_COMPILATION_CACHE_DIR": cache}
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
  main()
