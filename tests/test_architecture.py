"""Imports run one way through the rooms, and files stay of a size one can hold in the head."""

import ast
import functools
from pathlib import Path

from data_pipeline.subjects3d import factors

ROOT = Path(__file__).parent.parent
# Rooms of cc_jax; each imports only from rooms that come later, or from its own.
ORDER = (
  "train", "evaluate", "generate", "pretrain", "lab", "plan", "cache", "benchmark", "sampling",
  "training", "parallel", "customcontrast", "metrics", "bases", "objectives", "diffusion", "models",
  "cli", "errors",
)  # fmt: skip
# The loop asks the planner's tables what a chip can do; the planner compiles what the loop runs.
LEAVES = ("cc_jax.plan.chips", "cc_jax.plan.hlo", "cc_jax.plan.hlo_text",
          "cc_jax.plan.model_flops")


@functools.cache
def modules() -> dict[str, Path]:
  """Every module of the library by its dotted name."""
  found = {}
  for folder in ("cc_jax", "configs", "data_pipeline"):
    for file in (ROOT / folder).rglob("*.py"):
      name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
      found[name.removesuffix(".__init__")] = file
  return found


def imports(file: Path) -> set[str]:
  """Dotted names that a file imports, at any depth: also inside functions.

  `from package import module` imports the module alone.
  """
  names, files = set(), modules()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found = {f"{node.module}.{alias.name}" for alias in node.names}
      names |= found if found <= files.keys() else found | {node.module}
  return names


def graph() -> dict[str, set[str]]:
  """Module -> the library's modules that it imports."""
  files = modules()
  return {name: {other for other in imports(file) if other in files and other != name}
          for name, file in files.items()}  # fmt: skip


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
  """One circle for each module that reaches itself."""

  def path(start: str) -> list[str] | None:
    todo, seen = [[start]], set()
    while todo:
      trail = todo.pop()
      for name in sorted(edges[trail[-1]]):
        if name == start:
          return trail
        if name not in seen:
          seen.add(name)
          todo.append([*trail, name])
    return None

  return [trail for trail in map(path, edges) if trail]


def test_a_circle_would_be_found():
  assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
    ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]
  ]  # fmt: skip


def test_no_file_imports_one_that_imports_it():
  assert cycles(graph()) == []


def test_rooms_import_downwards():
  wrong = []
  for name, others in graph().items():
    for other in others - set(LEAVES):
      if name.count(".") and other.count(".") and {name[:6], other[:6]} == {"cc_jax"}:
        here, there = name.split(".")[1], other.split(".")[1]
        if ORDER.index(here) > ORDER.index(there):
          wrong.append(f"{name} imports {other}")
  assert wrong == []


def test_tensorflow_stays_in_data_pipeline_which_stands_alone():
  for name, file in modules().items():
    roots = {other.split(".")[0] for other in imports(file)}
    forbidden = "cc_jax" if name.startswith("data_pipeline") else "tensorflow"
    assert forbidden not in roots, name


def test_only_data_pipeline_and_the_laboratory_know_the_rendered_world():
  values = {*factors.SCENES, *factors.STYLES}
  tables = ("SCENES", "CLASSES", "STYLES", "COLORS", "PATTERNS")
  for name, file in modules().items():
    if name.startswith(("data_pipeline", "cc_jax.lab", "configs")):
      continue
    for node in ast.walk(ast.parse(file.read_text())):
      identifier = getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
      assert identifier not in tables, (name, identifier)
      assert not (isinstance(node, ast.Constant) and node.value in values), (name, node.value)
    # Pretraining takes its pictures, captions and likenesses from there.
    if not name.startswith("cc_jax.pretrain"):
      assert not any("subjects3d." in other for other in imports(file)), name


def test_files_are_short_and_the_top_is_empty():
  lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
  assert sum(length > 300 for length in lengths.values()) <= 8
  assert {name for name, length in lengths.items() if length > 400} == set()
  assert len(list((ROOT / "cc_jax").glob("*.py"))) <= 6


def test_architecture_names_every_room():
  text = (ROOT / "docs" / "architecture.md").read_text()
  rooms = {path.parent.name for path in (ROOT / "cc_jax").glob("*/__init__.py")}
  assert rooms == {room for room in rooms if f"`{room}/`" in text}
  assert rooms <= set(ORDER)
