"""The files of a benchmark's result: the scores as JSON, a table in Markdown, a contact sheet."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cc_jax.benchmark.drawing import Task
from cc_jax.benchmark.scoring import IMAGE
from cc_jax.sampling.images import grid

COLUMNS = ("E CLIP-T", "E ImageReward", "R CLIP-I", "E CLIP-I", "R DINO-I", "E DINO-I")
# Of the paper's table (AAAI 2025, arXiv 2409.05606), in the order of COLUMNS. It does not say which
# prompts the first two are over.
PUBLISHED = {
  "Stable Diffusion 1.5": {
    "ELITE": (.291, -.664, .856, .762, .661, .533),
    "IP-Adapter-plus": (.295, -.611, .878, .766, .702, .558),
    "SSR-Encoder": (.303, -.894, .857, .767, .623, .524),
    "MoMA": (.313, -.243, .879, .772, .679, .550),
    "CustomContrast": (.325, .454, .919, .788, .737, .591)},
  "SDXL": {
    "IP-Adapter-plus": (.289, -.714, .918, .790, .723, .570),
    "EMU2": (.298, -.203, .914, .795, .719, .583),
    "MS-Diffusion": (.312, -.243, .901, .772, .682, .540),
    "CustomContrast": (.329, .446, .927, .796, .742, .597)},
}  # fmt: skip
_SHOWN = 4  # pictures in each row of the sheet


def to_json(result: Mapping[str, Any]) -> str:
  """The result as text: equal results are equal texts (7 digits, order of the tasks)."""
  return json.dumps(_rounded(result), indent=1, ensure_ascii=False) + "\n"


def to_markdown(result: Mapping[str, Any]) -> str:
  """Our row beside the paper's, the ceiling, copying, each score's name in full, and choices."""
  scores, best = result["summary"], result["ceiling"]
  lines = [f"# {result['benchmark']}: {result['model']}", "", _row(["", *COLUMNS]),
           _row(["---"] * (1 + len(COLUMNS)))]
  lines.append(_row([f"**{result['model']}**", *(_cell(scores.get(name)) for name in COLUMNS)]))
  lines.append(_row(["ceiling: real against real",
                     *(_cell(best.get(name[2:])) for name in COLUMNS)]))
  for base, rows in PUBLISHED.items():
    lines += [_row([f"{method} ({base}, published)", *(f"{value:.3f}" for value in values)])
              for method, values in rows.items()]
  lines += ["", "In brackets: 95 % bootstrap intervals over subjects. The published rows are the "
            "CustomContrast paper's, whose protocol is not public in full (prompts, backbones, "
            "pictures a prompt): rows compare only as far as the lines below are its own choices.",
            "", "## All scores", "", _row(["score", "mean", "subjects"]), _row(["---"] * 3)]
  lines += [_row([name, _cell(value), str(value["subjects"])])
            for name, value in scores.items()]
  if result["copying"]:
    lines += ["", "## Copying", "", _row(["score", "mean", "subjects"]), _row(["---"] * 3)]
    lines += [_row([name, _cell(value), str(value["subjects"])])
              for name, value in result["copying"].items()]
  lines += ["", "## What the scores are", ""]
  lines += [f"- {name}: {text}" for name, text in result["scorers"].items()]
  lines += ["", "## Choices", ""]
  lines += [f"- {name}: {value}" for name, value in result["choices"].items()]
  lines += [f"- note: {note}" for note in result["notes"]]
  return "\n".join(lines) + "\n"


def contact_sheet(
  tasks: Sequence[Task], rows: Sequence[Mapping[str, float]], read: Callable[[Task], np.ndarray],
) -> Image.Image | None:
  """Best, median and worst pictures by the first image score, each beside its reference.

  Of the first references alone, as the means. None without an image score.
  """
  name = next((name for name in ("DINO-I", *IMAGE.values()) if rows and name in rows[0]), None)
  if name is None:
    return None
  order = [index for index, task in enumerate(tasks) if task.reference == 0]
  order.sort(key=lambda index: -rows[index][name])
  shown = min(_SHOWN, len(order))
  middle = (len(order) - shown) // 2
  cells, captions = [], []
  for part in (order[:shown], order[middle : middle + shown], order[-shown:]):
    for index in part:
      task, drawn = tasks[index], Image.fromarray(read(tasks[index]))
      with Image.open(task.subject.pictures[task.reference]) as picture:
        real = picture.convert("RGB")
      real.thumbnail(drawn.size)
      cells += [real, drawn]
      captions += [task.subject.name, f"{rows[index][name]:.3f} {task.prompt}"]
  scale = max(1.0, 128 / max(cells[1].size))
  return grid(cells, captions, columns=2 * shown, scale=scale,
              row_headings=("best", "median", "worst"), column_headings=["real", "drawn"] * shown,
              title=f"by {name}, mean over the subject's real pictures")


def write(result: Mapping[str, Any], sheet: Image.Image | None, folder: Path) -> None:
  """Writes the three files; each is whole or as it was."""
  for name, text in (("scores.json", to_json(result)), ("table.md", to_markdown(result))):
    part = folder / f"{name}.part"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / name)
  if sheet is not None:
    part = folder / "sheet.png.part"
    sheet.save(part, format="PNG")
    part.replace(folder / "sheet.png")


def _row(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _cell(value: Mapping[str, float] | None) -> str:
  if value is None:
    return "–"
  return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _rounded(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _rounded(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(part) for part in value]
  return round(value, 7) if isinstance(value, float) else value
