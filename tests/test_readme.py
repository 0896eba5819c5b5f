"""What the README tells people to type."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from cc_jax.lab import judge as factors
from data_pipeline.subjects3d.factors import CLASSES, SCENES

README = Path(__file__).parents[1] / "README.md"


def test_four_lines_draw_a_teapot_on_the_beach(tmp_path, monkeypatch):
  code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
  assert len(code.splitlines()) == 4
  monkeypatch.chdir(tmp_path)
  exec(code, {})
  picture = np.asarray(Image.open(tmp_path / "out.png"))[None]
  reading = factors.read(factors.load_judge()[0], picture)
  assert CLASSES[int(reading["class_id"][0])] == "teapot"
  assert SCENES[int(reading["scene"][0])] == "beach"
