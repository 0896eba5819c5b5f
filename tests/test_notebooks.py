"""The notebooks: each runs from top to bottom, on the toy base and at the smallest size."""

import base64
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cc_jax.bases.base import load_base
from cc_jax.customcontrast.adapter_file import save_adapter
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.lab import notebook
from cc_jax.lab.toy import toy_base
from cc_jax.training.setup import adapter_configs
from configs import subjects3d

pytestmark = pytest.mark.usefixtures("quick_compile")

spec = importlib.util.spec_from_file_location(
  "notebooks_run", Path(__file__).parents[1] / "notebooks" / "run.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)

TOY = {
  "encoder.image_layers": (1, 2), "encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2,
  "encoder.visual_queries": 3, "injection.location_width": 4, "mesh.data": 1,
  "mesh.cpu_devices": 1, "train.steps": 2, "train.warmup_steps": 1, "train.batch_size": 4,
  "train.log_every": 1, "train.save_every": 0, "train.sample_every": 0,
  "train.prompt_sensitivity_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  """(a toy base, a random adapter of it, a folder of subjects to train on)."""
  folder = tmp_path_factory.mktemp("toy")
  base_folder, adapter = toy_base(folder / "base"), folder / "adapter.safetensors"
  config = subjects3d.get_config()
  config.update_from_flattened_dict(TOY)
  base, (encoder, injection) = load_base(base_folder), adapter_configs(config)
  _, trainable, _ = build_customcontrast(base, encoder, injection, transform=eval_shape_only)
  rng = np.random.default_rng(0)
  values = {name: rng.normal(0, 0.05, x.shape).astype(x.dtype) for name, x in trainable.items()}
  save_adapter(adapter, values, encoder=encoder, injection=injection,
               base_name=str(base_folder), base_hash=base.hash)
  return str(base_folder), str(adapter), str(notebook.example_subjects(folder / "subjects"))


def pictures(cells) -> list[int]:
  """The numbers of the cells that show a picture; each must be one."""
  found = []
  for number, cell in enumerate(cells):
    for output in cell.get("outputs", ()):
      if "image/png" in output.get("data", {}):
        image = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        assert np.asarray(image.convert("RGB")).std() > 1, number  # not one colour
        found.append(number)
  return found


def small(name: str, base: str, adapter: str, subjects: str) -> dict:
  """The parameters with which a notebook takes seconds."""
  where = dict(CHECKPOINT=adapter, BASE=base, STEPS=2)
  return {
    # Of a folder: to render a batch, the program of nearly every class would be compiled.
    "01_first_run": where | dict(
      SUBJECTS=2, TRAIN=TOY | {"data.source": "folder", "data.name": subjects}),
    "02_decoupling": where | dict(SUBJECTS=1, VIEWS=3),
    "03_plan_a_tpu_run": dict(CONFIG="subjects3d", TOPOLOGIES=["local"],
                              CHANGES=TOY | {"base": base}),
    "04_bring_your_own_subject": where | dict(TRAIN=TOY),
  }[name]


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[pytest.mark.slow] * (name[:2] != "01")) for name in runner.NOTEBOOKS],
)
def test_a_notebook_runs_from_top_to_bottom(name, toy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "ipywidgets", None)  # menus draw where nobody looks
  committed = runner.read(name)["cells"]
  found = runner.run(runner.read(name), small(name, *toy))["cells"]
  assert len(pictures(found)) == dict(zip(runner.NOTEBOOKS, (3, 7, 1, 4)))[name]
  said = "".join(line for cell in found for output in cell.get("outputs", ())
                 for line in output.get("text", ()))
  if name.startswith("03"):
    assert "frozen base" in said and "activations" in said
  elif name.startswith("01"):
    assert "loss/macl" in said and Path("runs/notebook/adapter.safetensors").exists()
  assert pictures(committed) == pictures(found)  # what is committed shows what a run shows


def test_notebooks_are_for_people():
  """Short cells, one install cell, a title, nothing that bloats the repository."""
  installs = set()
  for name in runner.NOTEBOOKS:
    nb = runner.read(name)
    code = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    assert nb["nbformat"] == 4 and len({cell["id"] for cell in nb["cells"]}) == len(nb["cells"])
    assert max(len(cell["source"]) for cell in code) <= 20
    assert nb["cells"][0]["source"][0].startswith("# ")
    installs |= {"".join(c["source"]).replace("cc_jax[tpu]", "cc_jax")
                 for c in code if "%pip" in "".join(c["source"])}
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1
    assert (runner.HERE / f"{name}.ipynb").stat().st_size < 800_000
  assert len(installs) == 1


def test_the_runner_says_which_cell_failed():
  def nb(*sources):
    return dict(cells=[dict(cell_type="code", metadata={}, source=[s]) for s in sources])

  found = runner.run(nb("x = 2\nprint('said')", "%pip install x\nx + 1", "x;"), {})["cells"]
  assert found[0]["outputs"][0]["text"] == ["said\n"]
  assert found[1]["outputs"][0]["data"]["text/plain"] == ["3"] and not found[2]["outputs"]
  with pytest.raises(RuntimeError, match="cell 2 failed"):
    runner.run(nb("x = 2", "x / 0"), {})
  with pytest.raises(KeyError, match="STEPZ"):
    runner.run(nb("x = 2"), {"STEPZ": 1})


def test_choices_are_menus_where_there_are_widgets(monkeypatch):
  calls = []
  monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
  assert notebook.choose(lambda a, b: (a, b), a=range(3, 5), b=["x", "y"]) == (3, "x")
  widgets = types.SimpleNamespace(interact=lambda draw, **menus: calls.append(menus))
  monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
  assert notebook.choose(lambda a, b: None, a=[3, 3, 4], b=["x", "y"]) is None
  assert calls == [dict(a=[3, 4], b=["x", "y"])]


def test_example_subjects_can_be_trained_on(tmp_path):
  from data_pipeline.sources.folder import read_folder

  folder = notebook.example_subjects(tmp_path / "mine", count=1, frames=2)
  (subject,) = read_folder(folder)
  assert len(subject.frames) == 2
  picture, mask = subject.frames[0].load()
  assert picture.shape == (64, 64, 3) and 200 < (mask > 127).sum() < 3000
  listing = json.loads((folder / f"{subject.noun.replace(' ', '_')}_1/captions.json").read_text())
  assert all(subject.noun in caption for caption in listing["captions"].values())
  assert notebook.folder_sheet(folder).width > 2 * 96
