"""Results: one JSON object a line, written at once, so that a part that is ended loses nothing.

    python -m benchmarks.gpu.record PART KEY=VALUE...
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def record(part: str, **values: Any) -> None:
  """Appends a line to $GPU_RESULTS, and prints it."""
  line = json.dumps({"part": part, **values})
  with open(os.environ["GPU_RESULTS"], "a") as file:
    file.write(line + "\n")
  print(line, flush=True)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines so far."""
  with open(path) as file:
    return [json.loads(line) for line in file]


if __name__ == "__main__":
  part, *pairs = [argument for argument in sys.argv[1:] if argument != "--tiny"]
  record(part, **dict(pair.split("=", 1) for pair in pairs))
