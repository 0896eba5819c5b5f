"""What README and CONTRIBUTING tell people to type, and the numbers that they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typed import run_typed

from cc_jax.lab import judge as factors
from cc_jax.sampling.pipeline import ADAPTER
from data_pipeline.subjects3d.factors import CLASSES, SCENES

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))
# Commands that are not run below, and where they are.
ELSEWHERE = {
  "pip install -e .": "every new environment",
  "pip install -e '.[cuda13]'": "needs a GPU; tests/test_platforms.py has the extras",
  "pip install -e '.[tpu]'": "needs a TPU; tests/test_platforms.py has the extras",
  "pip install -e '.[test]' && pytest": ".ci/run",
  "pytest -m slow": "by hand, before an issue is resolved",
  "ruff check .": "before a commit",
  "python -m cc_jax.train --config=configs/sd15.py --workdir=runs/mine "
  "--config.data.name=my_subjects": "tests/test_real_bases.py, with a hub of toy weights",
  "python -m cc_jax.generate --checkpoint=runs/mine --reference=a.png --class_noun=\"teapot\" "
  "--prompt=\"a teapot on the beach\" --out=out.png": "tests/test_real_bases.py",
  "python -m cc_jax.evaluate --checkpoint=runs/mine": "tests/test_real_bases.py",
  "python -m cc_jax.train --config=configs/sdxl.py --abstract":
    "tests/test_train.py: test_the_tables_of_stable_diffusion_need_no_weights",
  "python -m cc_jax.cache": "tests/test_cache.py, with its config",
  "python -m data_pipeline.inspect PATH": "tests/test_readers.py",
  "python -m cc_jax.plan --config=configs/sdxl.py --topology=v5e:8x8 --config.mesh.fsdp=8":
    "tests/test_plan.py, slow, where libtpu is",
}  # fmt: skip
DRAW = 'python -m cc_jax.generate --prompt="a teapot on the beach" --out=out.png'
DRAW_SUBJECT = (
  "python -m cc_jax.generate --checkpoint=runs/first --reference=a.png --class_noun=\"teapot\" "
  "--prompt=\"a teapot on the beach\" --scale=1.0 --guidance=3 --steps=20 --seed=0 --out=out.png"
)
HELP = "python -m cc_jax.generate --help"
MAIN_JOB = "python -m cc_jax.train --config=configs/subjects3d.py --workdir=runs/first"
SLOW = (DRAW, MAIN_JOB, "python -m cc_jax.evaluate", "python -m cc_jax.lab --suite=ablation --fast")


def commands(page: Path) -> list[str]:
  """The commands of a page, in blocks and in backticks, without comments, each on one line."""
  text = page.read_text()
  blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
  lines = [re.sub(r"\s+#.*", "", line) for line in blocks.splitlines()]
  prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
  lines += [t for t in re.findall(r"`([^`]+)`", prose) if re.match(r"(python|pytest|pip) ", t)]
  return [" ".join(line.split()).removeprefix("pip install -e . && ") for line in lines if line]


def test_every_command_is_run_somewhere():
  known = {*ELSEWHERE, *SLOW, DRAW_SUBJECT, HELP}
  typed = {*commands(README), *commands(CONTRIBUTING)}
  tests = {c for c in typed if c.startswith("pytest tests/")}
  for command in tests:
    assert all((ROOT / name).is_file() for name in command.split()[1:])
  assert typed - tests == known


def run(command: str, folder: Path) -> str:
  """The output of a command, typed in `folder`."""
  arguments = [sys.executable if word == "python" else word for word in shlex.split(command)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
  assert done.returncode == 0 or "--help" in command, done.stderr  # absl's exit code of --help
  assert "arning" not in done.stderr, done.stderr
  return done.stdout


@pytest.fixture
def checkout(tmp_path):
  """A folder with what the commands expect: configs/, a training's workdir, a reference."""
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  (tmp_path / "runs" / "first").mkdir(parents=True)
  (tmp_path / "runs" / "first" / "adapter.safetensors").symlink_to(ADAPTER)
  image = np.full((64, 64, 4), 255, np.uint8)
  image[..., 3] = 0
  image[16:52, 12:50] = (200, 40, 30, 255)
  Image.fromarray(image).save(tmp_path / "a.png")
  return tmp_path


def test_a_subject_is_drawn(checkout, quick_compile, monkeypatch, capsys):
  """As typed, but in this process."""
  monkeypatch.chdir(checkout)
  _, err = run_typed("generate", shlex.split(DRAW_SUBJECT)[3:], capsys)
  assert "arning" not in err
  assert reads(checkout / "out.png")[1] == "beach"


def test_help_has_the_flags(tmp_path):
  text = run(HELP, tmp_path)
  for flag in ("reference", "mask", "class_noun", "strict_base", "long_prompts"):
    assert f"--{flag}" in text or f"--[no]{flag}" in text


def reads(file: Path) -> tuple[str, str]:
  """Class and scene, as the judge sees them."""
  reading = factors.read(factors.load_judge()[0], np.asarray(Image.open(file))[None])
  return CLASSES[int(reading["class_id"][0])], SCENES[int(reading["scene"][0])]


def test_four_lines_draw_a_teapot_on_the_beach(tmp_path, quick_compile, monkeypatch):
  code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
  assert len(code.splitlines()) == 4
  monkeypatch.chdir(tmp_path)
  exec(code, {})
  assert reads(tmp_path / "out.png") == ("teapot", "beach")


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW)
def test_commands_that_take_minutes(command, tmp_path):
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  run(command, tmp_path)


# ---- numbers; those of parameters, in GB, are in tests/test_train.py


def test_readme_says_what_the_documents_say():
  """Its numbers of results, and of plans."""
  results, plans = ((ROOT / "docs" / name).read_text() for name in ("results.md", "scale.md"))
  text = README.read_text()
  table = text.split("| question | answer |")[1].split("\n\n")[0]
  for number in re.findall(r"\d\.\d{3}", table):
    assert number in results, number
  totals = re.findall(r"^total +([\d.]+)", plans, re.MULTILINE)
  planned = {round(float(total), 1) for total in totals}
  for number in re.findall(r"([\d.]+) GiB a chip", text):
    assert float(number) in planned, number
  assert len(text.splitlines()) <= 140
  order = ["![", "**A few pictures", "## Install", "## Draw", "## Train", "own pictures",
           "## Results", "## Further"]  # fmt: skip
  assert sorted(order, key=text.index) == order
