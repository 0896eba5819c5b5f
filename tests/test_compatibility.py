"""What older versions wrote: a checkpoint and an adapter of commit 0d5bef4, and old config keys."""

import dataclasses
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import data_pipeline
from cc_jax.cli import (
  ORIGINAL_KEYS,
  RENAMED_KEYS,
  flatten_config,
  original_value,
  refuse_old_names,
  with_current_names,
)
from cc_jax.customcontrast.adapter_file import load_adapter
from cc_jax.errors import UserError
from cc_jax.models import remat
from cc_jax.sampling.pipeline import load
from cc_jax.training.checkpoint import config_changes, jsonable
from cc_jax.training.loop import train
from cc_jax.training.telemetry import read_log
from configs import lab, sd15, sd21, sdxl, subjects3d, subjects3d_base, subjects3d_judge

ROOT = Path(__file__).parent.parent
OLD = ROOT / "tests" / "data" / "0d5bef4"
pytestmark = pytest.mark.usefixtures("quick_compile")


def test_training_goes_on_from_an_older_checkpoint(tiny_folder, tmp_path, monkeypatch, capsys):
  def loader(_, tokenizer, *, batch_size, seed, start_step=0, **kwargs):
    return tiny.batches(tokenizer, batch_size, seed=seed, start=start_step)

  monkeypatch.setattr(data_pipeline, "make_loader", loader)
  monkeypatch.chdir(tmp_path)
  Path("base").symlink_to(tiny_folder)
  log = Path("run/metrics.jsonl")
  with tarfile.open(OLD / "checkpoint.tar.xz") as tar:
    tar.extractall("run", filter="data")
  lines = (OLD / "metrics.jsonl").read_text().splitlines(keepends=True)
  log.write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))
  changes = with_current_names(json.loads((OLD / "config.json").read_text()))
  changes["train.max_bad_steps"] = 1  # the default, then
  config = tiny.tiny_config("base", **{k.replace(".", "__"): v for k, v in changes.items()})

  train(config, "run")

  printed = capsys.readouterr().out
  assert "config change" not in printed, printed  # old names stand for today's
  # Equal to the bit on the machine that wrote them; other processors add in another order.
  old, new = read_log(OLD / "metrics.jsonl"), read_log(log)
  assert [line["step"] for line in old] == [2, 4, 4, 6, 8, 8]
  assert [line.keys() for line in new] == [line.keys() for line in old]
  for before, now in zip(old, new, strict=True):
    for key, value in before.items():
      np.testing.assert_allclose(now[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
  # What is written now could be read then.
  before, now = load_adapter(OLD / "adapter.safetensors"), load_adapter("run/adapter.safetensors")
  shapes = [{name: x.shape for name, x in file.tensors.items()} for file in (before, now)]
  assert shapes[0] == shapes[1]
  new = dict(prediction_type="", base_hashes={}, base_shapes={})  # what version 1 has since gained
  assert now.prediction_type == "v_prediction" and now.base_hashes and now.base_shapes
  now = dataclasses.replace(now, tensors={}, **new)
  assert dataclasses.replace(before, tensors={}) == now


def test_an_older_adapter_draws(tiny_folder, tmp_path):
  pipe = load(OLD / "adapter.safetensors", tiny_folder)
  assert pipe.adapter.notes["reference_share"] == "0.6"
  reference = np.full((16, 16, 4), 200, np.uint8)
  reference[:4, :, 3] = 0
  Image.fromarray(reference).save(tmp_path / "reference.png")
  how = dict(class_noun="duck", references=[tmp_path / "reference.png"], steps=2, seed=0)
  drawn, plain = (np.asarray(pipe("a duck", scale=scale, **how)[0]) for scale in (1.0, 0.0))
  assert drawn.shape == (16, 16, 3) and not np.array_equal(drawn, plain)


# Old keys.


def test_the_table_of_old_keys_is_of_the_configs():
  configs = [file.get_config() for file in (
    lab, sd15, sd21, sdxl, subjects3d, subjects3d_base, subjects3d_judge)]
  keys = {key for config in configs for key in flatten_config(config.to_dict())}
  assert not keys & RENAMED_KEYS.keys()
  # `run.` are the keys of the laboratory's training, which is of one config.
  missing = {key for key in RENAMED_KEYS.values() if not key.startswith("run.")} - keys
  assert not missing and len(ORIGINAL_KEYS) == len(RENAMED_KEYS)
  for config in configs:
    refuse_old_names(flatten_config(config.to_dict()))


def test_records_of_older_runs_are_compared_by_todays_names():
  config = subjects3d.get_config()
  saved = {}
  for key, value in flatten_config(jsonable(config)).items():
    section, _, name = ORIGINAL_KEYS.get(key, key).rpartition(".")
    (saved.setdefault(section, {}) if section else saved)[name] = value
  assert "reference_share" in saved["data"]
  assert config_changes(saved, config) == {}
  saved["data"]["reference_share"], saved["train"]["remat_unet"] = 0.5, ["none", "products"]
  config.train.remat_unet = ("none", "dots")
  del saved["data"]["holdout_subjects"], saved["data"]["max_bad_share"]  # that run knew neither
  config.data.max_bad_share = 0.1
  changes = {"data.reference_ratio": (0.5, 0.8), "data.max_bad_share": (0.0, 0.1)}
  assert config_changes(saved, config) == changes


def command(tmp_path, *arguments, text=""):
  """What a command with a config says of these arguments: (exit code, stderr, stdout)."""
  file = tmp_path / "mine.py"
  file.write_text(
    f"from configs import subjects3d\ndef get_config():\n  c = subjects3d.get_config()\n{text}"
    "  return c\n")
  code = """if True:
    from absl import flags
    from ml_collections import config_flags
    from cc_jax import cli
    define = lambda: config_flags.DEFINE_config_file("config", "configs/subjects3d.py")
    cli.run(lambda argv: print(flags.FLAGS.config.data.reference_ratio), define)"""
  arguments = [a.replace("MINE", str(file)) for a in arguments]
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=100)
  return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize(
  ("arguments", "text", "wanted"),
  [
    (["--config.data.reference_share=0.5"], "", "data.reference_share is now data.reference_ratio"),
    (["--config.train.gaps_every", "0"], "",
     "train.gaps_every is now train.prompt_sensitivity_every"),
    (["--config=MINE"], "  c.data.terse_captions = 0.5\n",
     "data.terse_captions is now data.caption_drop_detail_prob"),
    (["--config=MINE"], "  c.train.update_from_flattened_dict({'gate_rate': 1.0})\n",
     "gate_rate"),
  ],
)  # fmt: skip
def test_an_old_key_is_one_line(tmp_path, arguments, text, wanted):
  code, stderr, stdout = command(tmp_path, *arguments, text=text)
  assert code == 1 and not stdout
  assert wanted in stderr and stderr.startswith("error: ") and len(stderr.splitlines()) == 1


def test_todays_key_is_taken(tmp_path):
  assert command(tmp_path, "--config.data.reference_ratio=0.5") == (0, "", "0.5\n")


def test_old_keys_in_python_and_old_words(tmp_path):
  config = tiny.tiny_config("base")
  config.train.gate_rate = 1.0
  with pytest.raises(UserError, match="the config key train.gate_rate is now train.gate_lr_mult"):
    train(config, tmp_path)
  config = tiny.tiny_config("base", train__remat_text="products")
  with pytest.raises(UserError, match="remat_text is 'products'; that policy is now called 'dots'"):
    train(config, tmp_path)
  with pytest.raises(UserError, match="use none, dots, full"):
    remat.check_policies("train.remat_unet", ["products"])
  with pytest.raises(UserError, match="run.data.reference_place is now run.data.reference_layout"):
    refuse_old_names({"run.data.reference_place": "frame"})


def test_renamed_remat_policies_are_hashed_under_their_first_name():
  assert original_value("train.remat_unet", ("dots", "full")) == ("products", "full")
  assert original_value("run.train.remat_text", "dots") == "products"
  assert original_value("data.name", "dots") == "dots"
