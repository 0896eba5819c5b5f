"""Writes tables and figures of the result files of one split."""

from pathlib import Path

from cc_jax.lab.comparison import load_results
from cc_jax.lab.figures import FIGURES
from cc_jax.lab.tables import tables


def report(results: Path, folder: Path, *, split: str = "validation",
           setting: str = "cut_outs") -> None:
  """Writes `tables.md` and the figures to `folder`; `setting` is said in the tables' first line.

  Raises:
    UserError: no results of this split, or of different budgets or scorings.
  """
  arms = load_results(results, split)
  folder.mkdir(parents=True, exist_ok=True)
  ending = "" if split == "validation" else f"-{split}"
  (folder / f"tables{ending}.md").write_text(tables(arms, split, setting))
  for name, draw in FIGURES.items():
    figure = draw(arms)
    if figure is not None:
      figure.savefig(folder / f"{name}{ending}.png", dpi=110, bbox_inches="tight")
  print(f"{folder}: tables{ending}.md and figures of {sum(map(len, arms.values()))} results")
