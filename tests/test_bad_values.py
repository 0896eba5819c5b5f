"""Bad values of a config, each refused in one line with a remedy before anything begins.

C17, C19, P12, P21 and P27 of the issue on the first hour. All go through the real commands' flags,
`cli.run` and checks, in this process; good values, which must go on working, are at the end.
"""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import cc_jax.lab.__main__ as lab_command
import cc_jax.plan.__main__ as plan_command
import cc_jax.pretrain.__main__ as pretrain_command
from cc_jax import cli, evaluate
from cc_jax import train as train_command
from cc_jax.bases.files import ASSETS
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.errors import UserError, expand_user
from cc_jax.lab.arms import arm_config, first_phase
from cc_jax.lab.config_checks import check_lab_config
from cc_jax.pretrain.config_checks import check_pretrain_config
from cc_jax.training import loop
from cc_jax.training.config_checks import OPTIONAL, RULES, check_config
from cc_jax.training.loop import train
from configs import lab as lab_config
from configs import subjects3d
from data_pipeline.errors import DataError

ROOT = Path(__file__).parent.parent


class Passed(Exception):
  """A command has found nothing wrong, and would begin its work."""


def begin(*_, **__):
  raise Passed


@pytest.fixture
def run_command(monkeypatch, capsys):
  """A function (command, arguments) -> the error line, '' where the command would begin."""
  handlers, level = list(logging.root.handlers), logging.root.level
  monkeypatch.chdir(ROOT)

  def run(command, *arguments, main=None):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    sys.modules.pop("config_config", None)  # ml_collections reads a file into the module before
    with flagsaver.flagsaver():
      try:
        cli.run(main or command.main, command.define_flags)
      except Passed:
        return ""
      except SystemExit as end:
        out, err = capsys.readouterr()
        if not end.code:
          return ""
        assert end.code == 1 and not out, (end.code, out)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

  def train_checked(config, *_):
    check_config(config)  # what `train` does first: test_bad_values_leave_a_workdir_as_it_is
    raise Passed

  monkeypatch.setattr(train_command, "train", train_checked)
  monkeypatch.setattr(train_command, "use_compilation_cache", lambda _: None)
  for command in (lab_command, plan_command, pretrain_command):
    monkeypatch.setattr(command, "set_cpu_devices", begin)
  yield run
  logging.root.handlers[:] = handlers
  logging.root.setLevel(level)


# Dotted key and value -> words of the remedy. `key=value` is what stands on the command line.
BAD = {
  # types
  "seed=first": "a whole number",
  "seed=1.5": "a whole number",
  "seed=9223372036854775808": "64 bits",
  "train.steps=many": "a whole number",
  "train.steps=2.5": "a whole number",
  "train.steps=None": "a whole number",
  "train.learning_rate=fast": "a number",
  "train.learning_rate=": "a number",
  "injection.location=maybe": "True or False",
  "objective.macl_symmetric=2": "True or False",
  "mesh=3": "a section",
  "mesh=None": "a section",
  "data=render": "a section",
  # numbers
  "train.steps=0": "at least 1",
  "train.batch_size=-4": "at least 1",
  "train.grad_accum_steps=0": "at least 1",
  "train.grad_accum_steps=3": "a multiple of 3",
  "train.learning_rate=-0.001": "not be negative",
  "train.learning_rate=inf": "finite",
  "train.gate_lr_mult=-1": "not be negative",
  "train.warmup_steps=-1": "not be negative",
  "train.weight_decay=-0.1": "not be negative",
  "train.weight_decay=nan": "finite",
  "train.beta1=1.0": r"in \[0, 1\)",
  "train.beta2=-0.5": r"in \[0, 1\)",
  "train.clip_norm=nan": "finite",  # P27: switched clipping off
  "train.clip_norm=-1": "0 = no clipping",
  "train.ema=1.5": r"in \[0, 1\)",
  "train.max_bad_steps=0": "at least 1",
  "train.log_every=0": "at least 1",
  "train.save_every=-1": "0 = only at the end",
  "train.keep=0": "at least 1",
  "train.keep_every=-2": "0 = none",
  "train.sample_every=-1": "not be negative",
  "train.prompt_sensitivity_every=-5": "0 = never",
  "data.image_size=4": "at least 8",
  "data.image_size=70": "a multiple of 4, such as 72",  # C19: the VAE's factor
  "data.reference_ratio=1.5": r"in \(0, 1\]",
  "data.reference_ratio=0": r"in \(0, 1\]",
  "data.reference_jitter=1": r"in \[0, 1\)",
  "data.caption_drop_detail_prob=1.01": r"in \[0, 1\]",
  "data.group_ratio=-0.5": r"in \[0, 1\]",
  "data.group_ratio=nan": "finite",
  "encoder.width=0": "at least 1",
  "encoder.depth=0": "at least 1",
  "encoder.heads=3": "multiple of",
  "encoder.s_words=9": "raise config.encoder.textual_queries",
  "encoder.contrast_head=-1": "0 = no projection head",
  "injection.low_rank=-1": "0 = full rank",
  "injection.location_width=0": "location=False",
  "injection.gate_start=nan": "finite",
  "objective.lambda_cscl=-0.1": "0 = without CSCL",  # C19
  "objective.lambda_macl=inf": "finite",
  "objective.cscl_temperature=0": "positive",
  "objective.macl_temperature=-1": "positive",
  "objective.macl_soft_temperature=0": "positive",
  "objective.tile=0": "at least 1",
  "objective.min_snr_gamma=-1": "0 = plain loss",
  "objective.timestep_shift=0": "positive",
  "objective.subject_weight=-1": "not be negative",
  "objective.drop_text=-0.1": r"in \[0, 1\]",
  "objective.drop_image=0.95": "sum to at most 1",
  "mesh.data=0": "at least 1, or -1",
  "mesh.fsdp=-1": "only one axis",
  "mesh.tensor=-2": "at least 1, or -1",
  "mesh.processes=0": "-1 = what the cluster says",
  "mesh.cpu_devices=0": "-1 = one per core",
  # words
  "base=": "not be empty",
  "data.source=web": "tfds, render, folder",
  "data.name=": "a folder of subjects",
  "data.reference_layout=center": "did you mean centred",
  "data.frames=multiview": "did you mean multi_view",
  "data.group=colour": "class, family",
  "encoder.fusion=tv": "tv_fusion, visual_tokens",
  "encoder.s_plus_space=layer": "per_layer, shared, none",
  "encoder.timestep_layer=mlp": "fourier_mlp, none",
  "injection.form=complement": "did you mean complementary",
  "objective.cscl_frame=same": "same_frame, cross_frame",
  "objective.macl_scaling=soft": "two_minus, .*soft_target",
  "objective.macl_pooling=max": "mean, per_token",
  "objective.contrast=fast": "auto, naive, tiled, ring",
  "train.schedule=linear": "cosine, constant",
  "train.dtype=float16": "float32, bfloat16",
  "train.base_dtype=float": "did you mean float32",
  "train.remat_text=all": "none, dots, full",
  "train.attention=flash": "auto, xla, cudnn, pallas",
  # tuples (P27)
  "data.positive_ratio=0.5": "have 2 values",
  "data.positive_ratio=(0.1,0.2,0.3)": "have 2 values",
  "data.positive_ratio=wide": "have 2 values",
  "data.positive_ratio=None": "have 2 values",
  "data.positive_ratio=('a','b')": "each must be a number",
  "data.positive_ratio=(0.9,0.4)": "the smaller number first",
  "data.positive_ratio=(0.4,1.5)": r"in \(0, 1\]",
  "encoder.image_layers=()": "at least 1 value",
  "encoder.image_layers=(1,2.5)": "a whole number",
  "encoder.image_layers=(True,2)": "a whole number",
  "encoder.layer_groups=(0,2)": "at least 1",
  "train.remat_unet=(some,": "a tuple",
  "train.remat_unet=('some',)": "none, dots, full",
  "train.remat_unet=('none','full')": "one a block",
  # what only the pictures at the end read (C19, P12)
  "sample.split=tset": "did you mean test",
  "sample.subjects=0": "at least 1",
  "sample.subjects=600": "at most 520",
  "sample.sampler=dpm": "dpmsolver\\+\\+.*default",
  "sample.steps=0": "at least 1",
  "sample.steps=2000": "between 1 and 1000",
  "sample.guidance=-1": "usually 5",
  "sample.guidance=nan": "finite",
  "sample.image_guidance=inf": "finite",
  "sample.scale=-0.5": "0 = the base",
  # sections, and keys that are not there
  'mesh={"data":1}': "cpu_devices is missing",
  'mesh={"datas":1}': "did you mean data",
  'sample={"steps":20}': "missing; take it from configs/subjects3d.py",
  "train.stepz=3": "steps",
  "trian.steps=3": "train",
  "train.steps.more=3": "a value, not a section",
}


def test_there_are_enough_of_them():
  assert len(BAD) >= 60 and {key.split("=")[0].split(".")[0] for key in BAD} >= {
    key.split(".")[0] for key in RULES}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_value_is_one_line(run_command, tmp_path, override):
  """C19, P12, P27: it names key and value, says what would be right, and touches nothing."""
  file = tmp_path / "notes.txt"
  file.write_text("mine")
  err = run_command(train_command, f"--workdir={tmp_path}", f"--config.{override}")
  assert err, "found nothing wrong"
  key, _, value = override.partition("=")
  assert key.split(".")[-1] in err and re.search(BAD[override], err), err
  if "no key" not in err and "missing" not in err and "no such key" not in err:
    assert f"config.{key}" in err or key in err, err
    number = re.fullmatch(r"-?[\d.]+", value)
    shown = re.escape(value.strip("()").replace(",", ", ").split(",")[0])
    assert re.search(rf"{float(value)}|{shown}" if number else shown, err), err
  assert os.listdir(tmp_path) == ["notes.txt"] and file.read_text() == "mine"


def test_bad_values_leave_a_workdir_as_it_is(tmp_path):
  """P12: the training itself looks first, whoever calls it."""
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  config = subjects3d.get_config()
  config.sample.sampler = "dpm"
  with pytest.raises(UserError, match="config.sample.sampler is 'dpm'"):
    train(config, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
  assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_a_scheduler_that_the_sampler_refuses_is_found_before_the_first_step(tmp_path):
  """P12: it died at the first picture, and again at every start."""
  base = tmp_path / "base"
  shutil.copytree(ASSETS / "subjects3d-base", base, ignore=shutil.ignore_patterns("*.safetensors"))
  scheduler = base / "scheduler" / "scheduler_config.json"
  scheduler.write_text(scheduler.read_text().replace("DPMSolverMultistep", "KDPM2Discrete"))
  config = subjects3d.get_config()
  config.base, config.sample.sampler = str(base), "default"
  with pytest.raises(UserError, match="config.sample.sampler=default.*KDPM2.*choose a sampler"):
    train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config.sample.sampler = "ddim"
  check_config(config)


# Text of a config file, what goes before its `return c` -> what is said of it. {file} is its path.
FILES = {
  "  c.train.steps = int(np.sqaure(3))\n":
    "{file}, line 6: AttributeError: module 'numpy' has no attribute 'sqaure'",
  "  c.train.steps = c.train.stepz\n": "{file}, line 6: AttributeError: .*stepz",
  "  c.train.steps = 'many'\n": "{file}, line 6: TypeError: .*steps.*many",
  "  c.train.steps = (3\n": "{file}, line 6: SyntaxError: .*never closed",
  "  raise KeyError('x')\n": "{file}, line 6: KeyError: 'x'",
  "  open('nowhere.json')\n": "{file}, line 6: FileNotFoundError: .*nowhere.json",
  "  import nompy\n": "{file}, line 6: ModuleNotFoundError: .*nompy",
  "  helper.scale()\n": "helper.py, line 3: ZeroDivisionError: division by zero",
  "  c = None\n": r"{file}: get_config\(\) returns NoneType; it must return",
  "  c.train.lerning_rate = 3e-4\n": "train.lerning_rate is 0.0003.*did you mean learning_rate",
  "  c.trian = c.train\n": "config.trian.*did you mean train",
  "  del c.train.ema\n": "config.train.ema is missing; take it from configs/subjects3d.py",
  "  del c.sample\n": "config.sample is missing",
  "  c.train = 3\n": "{file}, line 6: TypeError: .*train.* 3 is of",
  "  c.train = {'steps': 3}\n": "config.train.batch_size is missing",
  "  c.encoder.image_layers = [1, 'two']\n": "each must be a whole number",
  "  c.seed = True\n": "config.seed is True; it must be a whole number",
  "  c.base = ml_collections.config_dict.required_placeholder(str)\n": "required_placeholder",
  "  c.train.clip_norm = float('nan')\n": "config.train.clip_norm is nan; .*finite",
}  # fmt: skip


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_inside_a_config_file(run_command, tmp_path, monkeypatch, text):
  """C17, P27: told with file and line and the exception's own words, or by the key's name."""
  (tmp_path / "helper.py").write_text("\ndef scale():\n  return 1 / 0\n")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "helper", raising=False)
  monkeypatch.setattr("ml_collections.config_flags.config_flags.logging.warning", lambda *_: None)
  file = tmp_path / "mine.py"
  file.write_text(
    "import ml_collections, helper\nimport numpy as np\nfrom configs import subjects3d\n"
    f"def get_config():\n  c = subjects3d.get_config()\n{text}  return c\n")
  err = run_command(train_command, f"--workdir={tmp_path}/run", f"--config={file}")
  assert re.search(FILES[text].replace("{file}", str(file)), err), err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("import nompy\n", "mine.py, line 1: ModuleNotFoundError"),
    ("c = 3\n", r"mine.py has no function get_config\(\)"),
    ("def get_config(:\n", "mine.py, line 1: SyntaxError"),
    ("def get_config(size): return size\n", "mine.py: TypeError: get_config"),
    (None, "mine.py is no file"),
  ],
)
def test_a_config_file_that_cannot_be_read(run_command, tmp_path, text, wanted):
  """C17."""
  if text:
    (tmp_path / "mine.py").write_text(text)
  for flag in ((f"--config={tmp_path}/mine.py",), ("--config", f"{tmp_path}/mine.py")):
    assert re.search(wanted, run_command(train_command, *flag)), flag


@pytest.mark.parametrize(
  ("command", "argument", "wanted"),
  [
    (plan_command, "--config.train.dtype=float16", "config.train.dtype is 'float16'"),
    (plan_command, '--config.mesh={"data":1}', "config.mesh.cpu_devices is missing"),
    (lab_command, "--config.run.sample.sampler=dpm", "config.run.sample.sampler is 'dpm'"),
    (lab_command, "--config.run.train.ema=2", r"config.run.train.ema is 2.0; it must lie in \["),
    (lab_command, "--config.score.subjects=0", "config.score.subjects is 0; .*at least 1"),
    (lab_command, "--config.score.subjects=400", "config.score.subjects is 400; .*at most 360"),
    (lab_command, "--config.score.sweep_arms=('methd',)", "config.score.sweep_arms.*mean method"),
    (lab_command, "--config.seeds=()", "config.seeds is .*at least 1 value"),
    (lab_command, "--budget=-3", "config.run.train.steps is -3; .*at least 1"),
    (lab_command, "--config=configs/subjects3d.py", "no such key; .*configs/lab.py"),
    (pretrain_command, "--config.stages=('vea',)", r"config.stages is \('vea',\).*mean vae"),
    (pretrain_command, "--config.vae.train.steps=-1", "config.vae.train.steps is -1; .*least 1"),
    (pretrain_command, "--config.clip.train.batch=0", "config.clip.train.batch is 0"),
    (pretrain_command, "--config.world.split=tset", "config.world.split is 'tset'; .*mean test"),
    (pretrain_command, "--config.unet.drop_caption=1.5", "config.unet.drop_caption is 1.5"),
    (pretrain_command, "--config=configs/subjects3d.py", "config.stages is None"),
  ],
)
def test_the_other_commands_look_first_too(run_command, command, argument, wanted):
  """P12, P27."""
  assert re.search(wanted, run_command(command, argument))


def test_the_real_command(tmp_path):
  """C17 and P27, as typed."""
  mine = tmp_path / "mine.py"
  mine.write_text("import numpy as np\ndef get_config():\n  return np.sqaure(3)\n")
  cases = [
    ([f"--config={mine}"], f"error: {mine}, line 3: AttributeError: module 'numpy' has no attr"),
    (['--config.mesh={"data":1}'], "error: config.mesh.cpu_devices is missing"),
  ]
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "cc_jax.train", f"--workdir={tmp_path}/run", *arguments], cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for arguments, _ in cases]
  for (_, wanted), process in zip(cases, started):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and not out and err.count("\n") == 1 and wanted in err, err
  assert not (tmp_path / "run").exists()


# ---- ~ (P21)


def test_home_is_found_in_flags_and_configs(run_command, monkeypatch, tmp_path):
  """P21: --workdir=~/x made a folder called ~."""
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text(
    "from configs import subjects3d\ndef get_config():\n  c = subjects3d.get_config()\n"
    "  c.data.data_dir = '~/data'\n  c.train.warm_start = '~'\n  return c\n")
  seen = {}

  def look(_):
    names = [name for name in ("workdir", "checkpoint", "base", "results") if name in flags.FLAGS]
    seen.update({name: flags.FLAGS[name].value for name in names})
    seen["config"] = flags.FLAGS["config"].value if "config" in flags.FLAGS else None

  run_command(
    train_command, "--config=~/mine.py", "--workdir=~/x", "--config.base=~/b",
    "--config.encoder.image_encoder=~/clip", "--config.data.name=gs://bucket/~x", main=look)
  config = seen["config"]
  assert seen["workdir"] == f"{tmp_path}/x" and config.base == f"{tmp_path}/b"
  assert config.encoder.image_encoder == f"{tmp_path}/clip"
  assert config.data.data_dir == f"{tmp_path}/data" and config.train.warm_start == str(tmp_path)
  assert config.data.name == "gs://bucket/~x"
  run_command(evaluate, "--checkpoint=~/a.safetensors", "--base", "~/b", "--workdir=~/e", main=look)
  assert seen["checkpoint"] == f"{tmp_path}/a.safetensors" and seen["base"] == f"{tmp_path}/b"
  assert seen["workdir"] == f"{tmp_path}/e"
  run_command(pretrain_command, "--workdir=~/p", "--config.init_from=~/b", main=look)
  assert seen["workdir"] == f"{tmp_path}/p" and seen["config"].init_from == f"{tmp_path}/b"
  run_command(plan_command, "--config.base=~/b", main=look)
  assert seen["config"].base == f"{tmp_path}/b"
  run_command(
    lab_command, "--results=~/r", "--config.run.base=~/b", "--workdir=gs://b/x", main=look)
  assert seen["results"] == f"{tmp_path}/r" and seen["config"].run.base == f"{tmp_path}/b"
  assert seen["workdir"] == "gs://b/x"
  assert expand_user(None) is None and expand_user("gs://b/~") == "gs://b/~"


# ---- what must go on working


def test_every_key_has_a_rule():
  config = subjects3d.get_config()
  assert set(RULES) == set(cli.flatten_config(config.to_dict())) and set(RULES) > OPTIONAL


@pytest.mark.parametrize("name", ["subjects3d", "sd15", "sd21", "sdxl"])
def test_shipped_configs_pass(name):
  check_config(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("setting", ["cut_outs", "photographs"])
def test_all_arms_of_the_laboratory_pass(setting):
  for name, arm in lab_config.ARMS.items():
    for value in arm.tune[1] if arm.tune else (None,):
      config = arm_config(lab_config.get_config(setting), name, 0, value)
      check_lab_config(config)
      if arm.first:
        check_config(first_phase(config.run, *arm.first))
  check_lab_config(lab_config.fast(lab_config.get_config(setting)))


@pytest.mark.parametrize("name", ["subjects3d_base", "subjects3d_judge"])
def test_configs_of_pretraining_pass(name):
  check_pretrain_config(importlib.import_module(f"configs.{name}").get_config())


GOOD = [
  "seed=-1", "train.clip_norm=0", "train.learning_rate=0", "train.gate_lr_mult=0", "train.ema=0",
  "train.save_every=0", "train.remat_unet=full",
  "train.remat_unet=('none','dots','full','dots','none')",
  "train.remat_text=dots", "train.attention=pallas", "train.batch_size=30", "mesh.processes=4",
  "mesh.data=2",
  "mesh.cpu_devices=8", "objective.lambda_macl=0", "objective.subject_weight=0",
  "objective.drop_both=0.9", "data.positive_ratio=(0.5,0.5)", "data.reference_ratio=1",
  "data.source=render", "encoder.image_layers=-2", "encoder.layer_groups=()",
  "injection.gate_start=1", "noinjection.location", "sample.sampler=default", "sample.guidance=0",
  "sample.image_guidance=2", "sample.image_guidance=-1", "sample.scale=0", "sample.subjects=520",
  "sample.split=train", 'mesh={"data":1,"cpu_devices":1}', "base=stable-diffusion-v1-5",
]  # fmt: skip


@pytest.mark.parametrize("override", GOOD)
def test_good_values_pass(run_command, override):
  no = "no" * override.startswith("no")
  assert run_command(
    train_command, "--workdir=x", f"--{no}config.{override.removeprefix(no)}") == ""


def test_splits_of_other_data_are_their_own():
  config = importlib.import_module("configs.sd15").get_config()
  config.sample.split, config.sample.subjects = "held_out", 100_000
  check_config(config)


def test_whole_numbers_are_fine_where_numbers_are_meant():
  config = subjects3d.get_config().to_dict()
  config["injection"]["gate_start"], config["train"]["clip_norm"] = 1, 2
  check_config(ml_collections.ConfigDict(config))
  gate = InjectionConfig.from_config({"gate_start": 1}).gate_start
  assert gate == 1.0 and isinstance(gate, float)


def test_a_section_that_is_none():
  """P27: in Python nothing guards a section."""
  config = ml_collections.ConfigDict(subjects3d.get_config().to_dict() | {"train": 3})
  with pytest.raises(UserError, match="config.train is 3; it must be a section with steps, batch"):
    train(config, "nowhere")
  assert not Path("nowhere").exists()


def test_keys_that_came_later_may_be_missing():
  """Sections of older configs, whose defaults mean what they did."""
  config = subjects3d.get_config()
  del config.encoder.contrast_head, config.injection.gate_start, config.mesh.fsdp
  check_config(config)


@pytest.mark.parametrize("data, said", [
  (dict(name="nowhere"), "nowhere is not a folder"),
  (dict(name="subjects"), "captions.json is missing"),
])
def test_a_wrong_folder_is_found_before_the_base_is_fetched(tmp_path, monkeypatch, data, said):
  """A base may be gigabytes of download."""
  (tmp_path / "subjects" / "duck").mkdir(parents=True)
  (tmp_path / "subjects" / "duck" / "0.png").touch()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(loop, "load_base", lambda *_, **__: pytest.fail("the base is loaded"))
  config = subjects3d.get_config()
  config.data.update(source="folder", **data)
  with pytest.raises(DataError, match=said):
    loop.train(config, tmp_path / "workdir")
  assert not (tmp_path / "workdir").exists()


def test_more_held_out_than_there_are_is_found_before_the_base_is_fetched(
    tmp_path, monkeypatch):
  folder = tmp_path / "subjects" / "duck"
  folder.mkdir(parents=True)
  for name in ("0.png", "1.png"):
    Image.new("RGBA", (8, 8), (200, 0, 0, 128)).save(folder / name)
  captions = {"0.png": "a duck", "1.png": "a duck in a bath"}
  (folder / "captions.json").write_text(json.dumps(dict(class_noun="duck", captions=captions)))
  monkeypatch.setattr(loop, "load_base", lambda *_, **__: pytest.fail("the base is loaded"))
  config = subjects3d.get_config()
  config.data.update(source="folder", name=str(folder.parent), holdout_subjects=1)
  with pytest.raises(DataError, match="holdout_subjects=1 leaves nothing to train on"):
    loop.train(config, tmp_path / "workdir")
