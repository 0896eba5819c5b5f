"""python -m cc_jax.plan --suggest: what it finds, and in how few compiles."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from cc_jax.errors import UserError
from cc_jax.plan import __main__ as plan
from cc_jax.plan import chips, suggest
from cc_jax.plan.suggest import Choice, Trial
from cc_jax.plan.topology import Slice
from configs import subjects3d

ROOT = Path(__file__).parent.parent
LADDER = suggest.policies(9)


class Planner:
  """A chip of 16 GB: a compiled step's memory and time by a formula; counts the compiles."""

  def __init__(self, per_image=3.0, fixed=2.0, attention_gb=1.0, overhead=0.05):
    self.asked, self.per_image, self.fixed = [], per_image, fixed
    self.attention_gb, self.overhead = attention_gb, overhead

  def memory(self, c: Choice) -> float:
    kept = (1.0, 0.7, 0.5, 0.2)[LADDER.index(c.policy)]
    scores = self.attention_gb if c.attention == "xla" else 0.0
    return self.fixed + c.images * kept * (self.per_image + scores)

  def rate(self, c: Choice) -> float:
    again = (1.0, 1.1, 1.2, 1.35)[LADDER.index(c.policy)]
    slow = 2.0 if c.attention == "xla" else 1.0
    return c.images / (self.overhead + 0.01 * c.images * again * slow)

  def __call__(self, c: Choice) -> Trial:
    self.asked.append(c)
    needed = self.memory(c) / 16
    return Trial(self.rate(c) if needed <= 1 else 0.0, needed)


def brute_force(planner: Planner, attentions) -> float:
  every = [Choice(n, p, a) for n in range(1, 200) for p in LADDER for a in attentions]
  return max(planner.rate(c) for c in every if planner.memory(c) <= 16)


@pytest.mark.parametrize("start", [1, 4, 32, 128])
@pytest.mark.parametrize("size", [dict(), dict(per_image=0.4), dict(overhead=0.0)], ids=str)
def test_nearly_the_best_in_few_compiles(start, size):
  planner = Planner(**size)
  trials = suggest.search(planner, start, LADDER, ("auto", "xla"), compiles=20)
  best = suggest.fastest(trials)
  assert trials[best].rate >= 0.9 * brute_force(planner, ("auto", "xla"))
  assert best.attention == "auto" and planner.memory(best) <= 16
  assert len(planner.asked) == len(set(planner.asked)) <= 14, len(planner.asked)


def test_the_order_of_the_search():
  planner = Planner()
  suggest.search(planner, 4, LADDER, ("auto", "xla"))
  none, outermost, dots, full = LADDER
  # 4 images fit as they are, and XLA's attention at the same; 8 need 26 GB, far too many for the
  # outermost blocks alone; with 14 GB the next policy; 16 do not pay, in between 12 neither.
  assert planner.asked == [
    Choice(4, none, "auto"), Choice(4, none, "xla"), Choice(8, none, "auto"),
    Choice(8, dots, "auto"), Choice(16, dots, "auto"), Choice(16, full, "auto"),
    Choice(32, full, "auto"), Choice(24, full, "auto"),
  ]  # fmt: skip
  # No compile more than allowed, and what was found until then.
  planner = Planner()
  trials = suggest.search(planner, 4, LADDER, ("auto", "xla"), compiles=3)
  assert len(planner.asked) == 3 and suggest.fastest(trials) == Choice(4, none, "auto")


def test_nothing_fits_and_what_cannot_be():
  trials = suggest.search(Planner(fixed=20.0), 4, LADDER)
  assert suggest.fastest(trials) is None and min(c.images for c in trials) == 1
  trials = suggest.search(lambda c: Trial(reason="cannot be"), 4, LADDER)
  assert len(trials) == 1 and suggest.fastest(trials) is None
  assert "cannot be" in suggest.describe_trials(trials)
  # A compiler's refusal without a number.
  trials = suggest.search(
    lambda c: Trial(0.0 if c.images > 2 else 1.0, math.nan if c.images > 2 else 0.5), 4, LADDER)
  assert suggest.fastest(trials).images == 2


def test_the_command_is_understood(monkeypatch):
  choice = Choice(8, LADDER[1])
  typed = ["--config=configs/sd15.py", "--config.mesh.fsdp=4", "--config.train.batch_size=3",
           "--topology=v5e:4x4", "--suggest"]  # fmt: skip
  words = shlex.split(suggest.command(choice, 16, typed, "configs/subjects3d.py"))
  assert words[:3] == ["python", "-m", "cc_jax.train"] and "--topology=v5e:4x4" not in words
  values = absl_flags.FlagValues()
  assert words[3] == "--config=configs/sd15.py" and words[-1] == "--workdir=WORKDIR"
  arguments = words[3:-1]
  arguments[0] = f"--config={ROOT / 'configs/sd15.py'}"
  monkeypatch.setattr(sys, "argv", ["train", *arguments])
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(sys.argv)
  train = values.config.train
  assert (train.batch_size, train.remat_text, values.config.mesh.fsdp) == (128, "none", 4)
  assert train.remat_unet == ("dots", *["none"] * 7, "dots")
  assert "--config=configs/subjects3d.py" in suggest.command(choice, 1, [], "configs/subjects3d.py")


def test_the_flag(monkeypatch, capsys):
  slice_, planner = Slice((None,) * 16, chips.find("v5e"), (4, 4)), Planner()
  settings = dict(config=subjects3d.get_config(), what="train", topology="v5e:4x4", suggest=True)
  settings |= dict(batch_per_chip=4, json=False, compiles=12)
  base = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(block_out_channels=[1] * 4)))
  monkeypatch.setattr(plan.flags, "FLAGS", SimpleNamespace(**settings))
  monkeypatch.setattr(plan, "find_slice", lambda *a: slice_)
  monkeypatch.setattr(plan, "build_abstract", lambda config: (config, base))
  monkeypatch.setattr(suggest, "evaluate_by", lambda *a: planner)
  monkeypatch.setattr(plan.sys, "argv", ["plan", "--config=configs/sd15.py", "--suggest"])
  plan.main([])
  out = capsys.readouterr().out
  fastest = suggest.fastest(suggest.search(Planner(), 4, LADDER, [planner.asked[0].attention]))
  assert f"--config.train.batch_size={16 * fastest.images} " in out
  plan.flags.FLAGS.json = True
  plan.main([])
  rows = json.loads(capsys.readouterr().out)
  assert max(row["images_per_second_per_chip"] for row in rows) == planner.rate(fastest)
  planner.fixed = 20.0
  with pytest.raises(UserError, match="nothing that was tried fits"):
    plan.main([])
  plan.flags.FLAGS.what = "generate"
  with pytest.raises(UserError, match="--what=train"):
    plan.main([])


@pytest.mark.slow
def test_the_mini_step(tmp_path):
  """Really, with two compiles on this machine."""
  command = [sys.executable, "-m", "cc_jax.plan", "--suggest", "--compiles=2", "--batch_per_chip=2",
             "--config.mesh.cpu_devices=1", "--json"]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  rows = json.loads(done.stdout)
  assert [row["train.batch_size"] for row in rows] == [2, 4] and all(row["fits"] for row in rows)
  assert done.stderr.count("images/s a chip") == 2
