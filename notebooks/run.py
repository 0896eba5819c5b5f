"""Runs notebooks from top to bottom, in this process, and keeps their outputs.

    python notebooks/run.py                               # all, in place
    python notebooks/run.py 02_decoupling STEPS=8         # one, with another value of a parameter

A notebook's cell that is tagged `parameters` (as papermill has it) says what may be changed.
Jupyter is not needed: magics such as %pip are left out, a cell's last expression is its output.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).parent
NOTEBOOKS = ("01_first_run", "02_decoupling", "03_plan_a_tpu_run", "04_bring_your_own_subject")


def read(name: str) -> dict[str, Any]:
  """A notebook of this folder."""
  return json.loads((HERE / f"{name}.ipynb").read_text())


def run(notebook: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
  """The notebook with new outputs.

  Raises:
    KeyError: a parameter that the notebook does not have.
    RuntimeError: a cell that failed; the failure is its cause.
  """
  scope: dict[str, Any] = {"__name__": "__main__"}
  cells, count, unknown = [], 0, set(parameters)
  for cell in notebook["cells"]:
    if cell["cell_type"] != "code":
      cells.append(cell)
      continue
    count += 1
    source, said = "".join(cell["source"]), io.StringIO()
    try:
      with contextlib.redirect_stdout(said):
        value = execute(source, scope)
    except Exception as error:
      raise RuntimeError(f"cell {count} failed:\n{source}") from error
    if "parameters" in cell["metadata"].get("tags", ()):
      unknown -= scope.keys()
      scope.update(parameters)
    outputs = [stream(said.getvalue())] if said.getvalue() else []
    if value is not None:
      outputs.append(display(value, count))
    cells.append({**cell, "execution_count": count, "outputs": outputs})
  if unknown:
    raise KeyError(f"no such parameter: {', '.join(sorted(unknown))}")
  return {**notebook, "cells": cells}


def execute(source: str, scope: dict[str, Any]) -> Any:
  """Runs a cell; returns the value of its last expression, None if it ends otherwise."""
  tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))
  last = None
  if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
    last = ast.Expression(tree.body.pop().value)
  exec(compile(tree, "<cell>", "exec"), scope)
  return None if last is None else eval(compile(last, "<cell>", "eval"), scope)


def stream(text: str) -> dict[str, Any]:
  return dict(output_type="stream", name="stdout", text=text.splitlines(keepends=True))


def display(value: Any, count: int) -> dict[str, Any]:
  """What Jupyter would show of a value; pictures as small PNGs."""
  data = {"text/plain": [repr(value)] if not isinstance(value, Image.Image | Figure) else [""]}
  if isinstance(value, Figure):
    file = io.BytesIO()
    value.savefig(file, format="png", dpi=80, bbox_inches="tight")
    value = Image.open(file).convert("RGB")
  if isinstance(value, Image.Image):
    file = io.BytesIO()
    value.quantize(128).save(file, format="PNG", optimize=True)
    data["image/png"] = base64.b64encode(file.getvalue()).decode()
  return dict(output_type="execute_result", data=data, execution_count=count, metadata={})


def main(arguments: list[str]) -> None:
  given = dict(a.split("=", 1) for a in arguments if "=" in a)
  parameters = {key: ast.literal_eval(value) for key, value in given.items()}
  sys.modules["ipywidgets"] = None  # menus, where it is installed, would draw where nobody looks
  for name in [a for a in arguments if "=" not in a] or NOTEBOOKS:
    found = run(read(name), parameters)
    (HERE / f"{name}.ipynb").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"notebooks/{name}.ipynb")


if __name__ == "__main__":
  main(sys.argv[1:])
