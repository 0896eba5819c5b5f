"""Checkpoints, telemetry and the optimizer on toy trees: no network is built here."""

import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import logging as absl_logging
from etils import epath

from cc_jax.errors import UserError
from cc_jax.training import optimizer, telemetry
from cc_jax.training.checkpoint import Checkpoints, config_changes, jsonable
from cc_jax.training.telemetry import read_log

BASE = "b" * 64
ROOT = Path(__file__).parent.parent


@pytest.fixture
def config():
  c = ml_collections.ConfigDict({"base": "mini", "encoder": {"width": 8, "layers": (1, 2)}})
  c.injection = {"form": "shared"}
  c.train = {"steps": 10}
  return c


def tree(value, width=4):
  return {
    "trainable": {"a.0/x.kernel": jnp.full((3, width), value, jnp.float32)},
    "opt_state": (jnp.asarray(value, jnp.int32), jnp.full(5, value, jnp.bfloat16)),
  }


def record(config):
  return {"base_hash": BASE, "config": jsonable(config), "telemetry": {"sums": {}, "count": 0}}


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


def test_keeps_the_last_and_restores_what_was_saved(tmp_path, config):
  checkpoints = Checkpoints(tmp_path / "c", keep=2)
  assert checkpoints.latest_step() is None
  for step in (3, 6, 9):
    checkpoints.save(step, tree(step), record(config))
  checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [6, 9]
  again = Checkpoints(tmp_path / "c", keep=2)
  restored, note = again.restore(tree(0), base_hash=BASE, config=config)
  assert equal(restored, tree(9)) and note["step"] == 9
  assert restored["opt_state"][1].dtype == jnp.bfloat16
  again.close()


def test_a_relative_workdir(tmp_path, config, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoints = Checkpoints("runs/first", keep=1)
  checkpoints.save(1, tree(1.0), record(config))
  checkpoints.wait()
  checkpoints.close()
  assert (tmp_path / "runs" / "first" / "1").is_dir()


def test_keeps_every_nth_for_good(tmp_path, config):
  checkpoints = Checkpoints(tmp_path / "c", keep=1, keep_every=4)
  for step in range(2, 11, 2):
    checkpoints.save(step, tree(step), record(config))
  checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [4, 8, 10]


def test_a_save_survives_the_donation_of_its_buffers(tmp_path, config):
  """The loop donates the state to the next step while the save still runs."""
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = step({"x": jnp.zeros((1000, 1000))})
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, state, record(config))
  for _ in range(5):
    state = step(state)
  checkpoints.wait()
  restored, _ = checkpoints.restore({"x": jnp.zeros((1000, 1000))}, base_hash=BASE, config=config)
  assert float(restored["x"].min()) == float(restored["x"].max()) == 1.0
  checkpoints.close()


@pytest.fixture
def saved(tmp_path, config):
  checkpoints = Checkpoints(tmp_path / "c", keep=3)
  checkpoints.save(3, tree(3), record(config))
  checkpoints.save(4, tree(4), record(config))
  checkpoints.close()
  return tmp_path / "c"


def restore(folder, config, *, base=BASE, width=4, state=None):
  checkpoints = Checkpoints(folder, keep=3)
  try:
    return checkpoints.restore(state or tree(0, width), base_hash=base, config=config)
  finally:
    checkpoints.close()


def test_another_base_is_refused(saved, config):
  with pytest.raises(UserError, match="belongs to the base mini.*bbbb.*has hash cccc"):
    restore(saved, config, base="c" * 64)


def test_another_model_is_refused_by_key(saved, config):
  config.train.steps = 20  # fine
  restore(saved, config)
  config.encoder.layers = (1, 3)
  with pytest.raises(UserError, match=r"encoder.layers=\[1, 2\] .* now says \[1, 3\]"):
    restore(saved, config)


def test_other_shapes_and_keys_are_refused_by_name(saved, config):
  with pytest.raises(
    UserError, match=r"holds trainable/a.0/x.kernel float32\[3, 4\] instead of float32\[3, 7\]"
  ):
    restore(saved, config, width=7)
  other = tree(0)
  other["trainable"] = {"b": jnp.zeros(1)}
  with pytest.raises(UserError, match="lacks trainable/b; it has trainable/a.0/x.kernel, unknown"):
    restore(saved, config, state=other)


def test_a_damaged_checkpoint_is_an_error_and_the_one_before_it_stays(saved, config):
  for path in (saved / "4").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(path.read_bytes()[:10])
  with pytest.raises(UserError, match="cannot read checkpoint .*/4: .*delete that folder") as error:
    restore(saved, config)
  assert "\n" not in str(error.value)
  for path in sorted((saved / "4").rglob("*"), reverse=True):
    path.unlink() if path.is_file() else path.rmdir()
  (saved / "4").rmdir()
  assert equal(restore(saved, config)[0], tree(3))


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write to .*file.*choose another --workdir"):
    Checkpoints(tmp_path / "file" / "c", keep=1)


def test_no_room_leaves_earlier_checkpoints_intact(saved, config, capfd):
  """A limit on file size stands for a full disk: both fail in the background thread's write."""
  checkpoints = Checkpoints(saved, keep=3)
  big = {"x": jnp.asarray(np.random.default_rng(0).normal(size=500_000), jnp.float32)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(UserError, match="step 4 is intact; make room") as error:
      checkpoints.save(5, big, record(config))
      checkpoints.wait()
    assert "\n" not in str(error.value)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
  assert equal(restore(saved, config)[0], tree(4))
  assert "Traceback" not in capfd.readouterr().err


def test_only_orbax_is_silenced(tmp_path, config, caplog):
  """C2: a checkpoint may not switch off what everybody else tells, in a notebook neither."""
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  before = [logger.level for logger in loggers]
  with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "absl"):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, tree(1), record(config))
    checkpoints.close()
    absl_logging.warning("%s: not used: safety_checker/", "a base")
    absl_logging.error("an error of somebody else")
    loggers[1].error("Task exception was never retrieved")
  assert [logger.level for logger in loggers] == before
  assert [entry.getMessage() for entry in caplog.records] == [
    "a base: not used: safety_checker/", "an error of somebody else",
    "Task exception was never retrieved"]


def in_a_disk(size, folder, body):
  """Runs Python with a disk of `size` bytes at `folder`; skips where that is not allowed."""
  folder.mkdir()
  mount = "mount -t tmpfs -o size=$0 disk $1"
  unshare = ["unshare", "-rm", "sh", "-c"]
  if subprocess.run([*unshare, mount, size, folder], capture_output=True).returncode:
    pytest.skip("no mounts in this container")
  command = mount + ' && exec "$2" -c "$3" "$1"'
  return subprocess.run(
    [*unshare, command, size, folder, sys.executable, textwrap.dedent(body)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=200,
  )


def test_a_full_and_a_read_only_disk(tmp_path):
  """The same errors of the system as elsewhere; one process for both, since imports take long."""
  disk = tmp_path / "disk"
  done = in_a_disk(
    "4m",
    disk,
    """
    import os, subprocess, sys
    import jax.numpy as jnp, ml_collections, numpy as np
    from cc_jax.training.checkpoint import Checkpoints
    from cc_jax.errors import UserError

    disk = sys.argv[1]
    config = ml_collections.ConfigDict({"base": "x", "encoder": {}, "injection": {}})
    record = {"base_hash": "b", "config": config.to_dict(), "telemetry": {}}
    checkpoints = Checkpoints(disk + "/c", keep=3)
    checkpoints.save(1, {"x": jnp.ones(5)}, record)
    checkpoints.wait()
    big = np.random.default_rng(0).normal(size=4_000_000)
    try:
      checkpoints.save(2, {"x": jnp.asarray(big, jnp.float32)}, record)
      checkpoints.wait()
    except UserError as error:
      print("full:", error)
    again = Checkpoints(disk + "/c", keep=3)
    state, note = again.restore({"x": jnp.zeros(5)}, base_hash="b", config=config)
    print("restored:", note["step"], float(state["x"].sum()))
    again.close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
      Checkpoints(disk + "/c", keep=3)
    except UserError as error:
      print("read-only:", error)
    print(sorted(name for name in os.listdir(disk + "/c") if name.isdigit()))
    os._exit(0)
    """,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == 4, done.stderr
  full = "full: .*(space|ENOSPC|RESOURCE_EXHAUSTED).* step 1 is intact; make room"
  assert re.match(full, lines[0]), lines[0]
  assert lines[1] == "restored: 1 5.0"
  refused = f"read-only: cannot write to {disk}/c: .*Read-only.*choose another --wo"
  assert re.match(refused, lines[2]), lines[2]
  assert lines[3] == "['1']"


def test_a_bucket_that_does_not_answer(tmp_path):
  """A proxy that takes the request and is silent: an error in time, and the process can end."""
  with socket.create_server(("localhost", 0)) as silent:
    proxy = f"http://localhost:{silent.getsockname()[1]}"
    body = """
    from cc_jax import cli
    from cc_jax.training import checkpoint
    checkpoint.ANSWER_TIMEOUT = 3
    cli.run(lambda argv: checkpoint.Checkpoints("gs://nobody/run/checkpoints", keep=1))
    """
    proxies = {key: proxy for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(body)],
      env={**os.environ, **proxies, "no_proxy": "", "NO_PROXY": ""},
      capture_output=True,
      text=True,
      cwd=ROOT,
      timeout=200,
    )
  assert done.returncode == 1
  wanted = "error: cannot write to gs://nobody/run/checkpoints: no answer within 3 s; choose"
  assert wanted in done.stderr and "Traceback" not in done.stderr


def test_config_changes_name_dotted_keys(config):
  before = jsonable(config)
  config.train.steps = 11
  config.encoder.extra = True
  assert config_changes(before, config) == {"train.steps": (10, 11), "encoder.extra": (None, True)}


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def follow(folder, start, stop, sums=None):
  log = telemetry.Telemetry(
    epath.Path(folder), start=start, steps=10, every=4, batch_size=2, sums=sums
  )
  for step in range(start + 1, stop + 1):
    log.step(step, {"loss": 0.1 * step, "bad_steps": 0, "learning_rate": step})
  state = log.state()
  log.close()
  return state


def test_a_log_that_was_cut_equals_one_that_was_not(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  follow(tmp_path / "a", 0, 10)
  sums = json.loads(json.dumps(follow(tmp_path / "b", 0, 7)))  # as a checkpoint's record
  follow(tmp_path / "b", 7, 9, sums)  # lost, and with it the line of step 8
  with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 9, "lo')
  follow(tmp_path / "b", 7, 10, sums)
  a, b = (read_log(tmp_path / x / "metrics.jsonl") for x in "ab")
  assert a == b
  assert [line["step"] for line in a] == [4, 8]
  assert a[1]["loss"] == pytest.approx(0.65) and a[1]["learning_rate"] == 8
  times = {"seconds", "images_per_second", "images_per_second_per_chip", "share/data"}
  assert lines(tmp_path / "a")[0].keys() >= times and not a[0].keys() & times


def test_what_a_step_costs_and_where_the_rest_of_the_time_went(tmp_path, monkeypatch):
  clock = {"now": 0.0}
  monkeypatch.setattr(telemetry.time, "perf_counter", lambda: clock["now"])
  log = telemetry.Telemetry(epath.Path(tmp_path), start=0, steps=4, every=2, batch_size=6, chips=3)

  def pass_by(seconds):
    clock["now"] += seconds

  log.program(model_flops=30.0, compiled_flops=40.0, peak=20.0)
  with log.spent("compiling"):
    pass_by(6)
  pass_by(3)
  log.waited(2)
  with log.spent("saving"):
    pass_by(3)
  log.step(1, {"loss": 1.0, "bad_steps": 0})
  pass_by(8)
  log.step(2, {"loss": 1.0, "bad_steps": 0})
  pass_by(4)
  log.step(3, {"loss": 1.0, "bad_steps": 0})
  log.step(4, {"loss": 1.0, "bad_steps": 0})
  log.close()
  first, second = lines(tmp_path)
  # 20 s, of them 9 outside of the steps: two steps took 11.
  assert first["seconds"] == 5.5 and first["images_per_second"] == pytest.approx(12 / 11)
  assert first["images_per_second_per_chip"] == pytest.approx(4 / 11)
  assert first["mfu"] == pytest.approx(30 / 5.5 / 20)
  assert first["hfu"] == pytest.approx(40 / 5.5 / 20)
  shares = {key: first[f"share/{key}"] for key in ("data", "saving", "compiling")}
  assert shares == {"data": 0.1, "saving": 0.15, "compiling": 0.3}
  assert second["seconds"] == 2.0 and second["share/saving"] == 0.0


def test_a_skipped_step_stays_out_of_the_averages(tmp_path):
  log = telemetry.Telemetry(epath.Path(tmp_path), start=0, steps=4, every=4, batch_size=2)
  for step, loss in enumerate([1.0, float("nan"), 3.0, 2.0], start=1):
    log.step(step, {"loss": loss, "bad_steps": float(loss != loss)})
  log.write(4, {"gap": float("inf")})
  log.close()
  first, second = lines(tmp_path)
  assert first["loss"] == 2.0 and first["skipped"] == 0.25
  assert second["gap"] == "inf"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_log_that_finds_no_room_is_one_line(tmp_path):
  """P13"""
  log = telemetry.Telemetry(epath.Path(tmp_path), start=0, steps=4, every=1, batch_size=2)
  log._file = open("/dev/full", "a")  # noqa: SIM115 (the log closes it)
  with pytest.raises(UserError, match="cannot write .*metrics.jsonl: .*No space left.*; make room"):
    log.step(1, {"loss": 1.0, "bad_steps": 0})
  log.close()  # the error that is on its way stays the first


def test_adamw_and_ema_against_numpy():
  train = ml_collections.ConfigDict(
    dict(
      learning_rate=0.1, schedule="cosine", warmup_steps=2, steps=6, weight_decay=0.1,
      beta1=0.9, beta2=0.99, clip_norm=0.5, ema=0.2, gate_lr_mult=4.0,
    )
  )  # fmt: skip
  rng = np.random.default_rng(0)
  params = {"mfi_encoder.kernel": rng.normal(size=(3, 2)), "mfi_encoder.bias": rng.normal(size=2),
            "attn2.gate": np.float64(0.3)}  # fmt: skip
  gradients = [{k: rng.normal(size=np.shape(v)) for k, v in params.items()} for _ in range(6)]

  ours = average = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  tx = optimizer.make_optimizer(train)
  state = tx.init(ours)
  for n, g in enumerate(gradients):
    directions, state = tx.update(jax.tree.map(jnp.asarray, g), state, ours)
    rate = optimizer.learning_rate(train, n)
    ours, change = optimizer.apply_update(ours, directions, rate, train)
    average = optimizer.update_ema(average, ours, train.ema, n)

  m = {k: 0.0 for k in params}
  v = {k: 0.0 for k in params}
  mean = dict(params)
  for n, g in enumerate(gradients):
    norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
    cosine = 1.0 if n < 2 else 0.5 * (1 + np.cos(np.pi * (n - 2) / 4))
    rate = 0.1 * min((n + 1) / 2, 1) * cosine
    for k in params:
      x = g[k] * min(1, 0.5 / norm)
      m[k] = 0.9 * m[k] + 0.1 * x
      v[k] = 0.99 * v[k] + 0.01 * x**2
      direction = m[k] / (1 - 0.9 ** (n + 1)) / (np.sqrt(v[k] / (1 - 0.99 ** (n + 1))) + 1e-8)
      decay = 0.1 if k == "mfi_encoder.kernel" else 0.0
      own = 4 * rate if k == "attn2.gate" else rate
      params[k] = params[k] - own * (direction + decay * params[k])
      d = min(0.2, (1 + n) / (10 + n))
      mean[k] = d * mean[k] + (1 - d) * params[k]
  for k in params:
    np.testing.assert_allclose(ours[k], params[k], rtol=2e-5)
    np.testing.assert_allclose(average[k], mean[k], rtol=2e-5)


def test_constant_schedule_and_a_typo():
  train = ml_collections.ConfigDict(
    {"learning_rate": 2.0, "schedule": "constant", "warmup_steps": 0, "steps": 5}
  )
  assert float(optimizer.learning_rate(train, 4)) == 2.0
  train.schedule = "cosin"
  with pytest.raises(UserError, match="cosin"):
    optimizer.learning_rate(train, 4)
