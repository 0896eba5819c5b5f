"""Several processes (gloo) against one that holds the same mesh, each in a process of its own."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from orbax.checkpoint import v1 as ocp

from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.training.telemetry import read_log

SCRIPT = Path(__file__).parent / "run_train.py"
SIZE, STEPS = 16, 8
FLAGS = {
  "train.batch_size": SIZE,
  "train.steps": STEPS,
  "train.dtype": "float64",
  "train.base_dtype": "float64",
  "train.learning_rate": 0.01,
  "mesh.data": 2,
  "mesh.fsdp": 4,
  "objective.contrast": "tiled",
  "objective.tile": 3,
}


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start(base, workdir, *, count, environments=None, flags=None):
  """The training command in `count` processes with 8 devices in all."""
  port = free_port()
  flags = {**FLAGS, "mesh.processes": count, "mesh.cpu_devices": 8 // count, **(flags or {})}
  flags = [f"--config.{key}={value}" for key, value in flags.items()]
  command = [sys.executable, SCRIPT, base, workdir, *flags]
  processes = []
  for index in range(count):
    environment = {**os.environ, "FLOAT64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["SHARDS"] = str(workdir.parent)
    if count > 1:
      environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
      environment["JAX_NUM_PROCESSES"] = str(count)
      environment["JAX_PROCESS_ID"] = str(index)
    environment |= (environments or {}).get(index, {})
    processes.append(
      subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
      )
    )
  return processes


def finish(processes, code=0):
  """The processes' standard outputs, once each has ended with `code`."""
  found = [process.communicate(timeout=900) for process in processes]
  for process, (_, err) in zip(processes, found):
    assert process.returncode == code, err
  return [out for out, _ in found]


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
  """The runs of one process and of two, of which one gets SIGTERM; one goes on from there."""
  folder = tmp_path_factory.mktemp("processes")
  cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
  for name in ("one", "two", "after"):
    (folder / name).mkdir()
  finish(start(tiny_folder, folder / "one" / "run", count=1, environments={0: cache}))
  term = {1: {"KILL": "term:2", "SLOW": "1"}}
  outputs = finish(start(tiny_folder, folder / "two" / "run", count=2, environments=term), 143)
  (folder / "two" / "out.json").write_text(json.dumps(outputs))
  shutil.copytree(folder / "two" / "run", folder / "after" / "run")
  (stopped,) = os.listdir(folder / "two" / "run" / "checkpoints")
  finish(start(tiny_folder, folder / "after" / "run", count=1, environments={0: cache}))
  return folder, int(stopped)


def shards(folder, number):
  """Batch `number` of a run as it lay on the devices: name -> rows in the global order."""
  rows = {}
  for file in folder.glob(f"{number}.*.npz"):
    with np.load(file) as found:
      for key, value in found.items():
        name, first = key.split("/")
        rows.setdefault(name, {})[int(first)] = value
  return {name: np.concatenate([by[i] for i in sorted(by)]) for name, by in rows.items()}


def test_each_process_lays_its_own_rows_of_the_same_batch(folders, tiny_folder):
  folder, stopped = folders
  the_batches_are_the_loaders(folder, tiny_folder, {"one": range(STEPS), "two": range(stopped)})
  own = [set(np.load(folder / "two" / f"0.{i}.npz")) for i in range(2)]
  assert not own[0] & own[1]  # disjoint


def test_numbers_do_not_depend_on_the_number_of_processes(folders):
  """The steps of two processes, and those of one that goes on with their checkpoint."""
  folder, stopped = folders
  assert 2 < stopped < STEPS
  agree(folder / "after" / "run", folder / "one" / "run")


def test_one_process_speaks_and_lists_all(folders):
  folder, stopped = folders
  outputs = json.loads((folder / "two" / "out.json").read_text())
  assert [f"process {i} on " in outputs[0] for i in range(3)] == [True, True, False]
  assert re.search(r"trained +mfi_encoder +fsdp +\d", outputs[0])  # what is sharded how
  assert "4 x cpu, devices" in outputs[0] and f"SIGTERM: step {stopped} is saved" in outputs[0]
  assert silent(outputs[1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 1, 4)])
def test_four_processes_go_on_where_two_stopped(folders, tiny_folder, tmp_path, sizes):
  """On the same mesh; and where `tensor` reaches over two processes, which then share rows."""
  folder, stopped = folders
  shutil.copytree(folder / "two" / "run", tmp_path / "four" / "run")
  flags = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes))
  outputs = finish(start(tiny_folder, tmp_path / "four" / "run", count=4, flags=flags))
  assert all(f"process {i} on " in outputs[0] for i in range(4))
  assert all(map(silent, outputs[1:]))
  agree(tmp_path / "four" / "run", folder / "one" / "run")
  the_batches_are_the_loaders(tmp_path, tiny_folder, {"four": range(stopped, STEPS)})
  assert (tmp_path / "four" / "run" / "adapter.safetensors").exists()


def silent(output):
  """But for Gloo, which tells who is connected to whom, in pieces."""
  return not re.search(r"process \d|trained|contrast|compil|SIGTERM", output)


def the_batches_are_the_loaders(folder, base, runs):
  """runs: name -> the steps of its batches in their order."""
  batches = tiny.batches(load_tokenizer(base / "tokenizer"), SIZE)
  for step in range(STEPS):
    batch = next(batches)
    for run, numbers in runs.items():
      if step in numbers:
        found = shards(folder / run, numbers.index(step))
        assert found.keys() == batch.keys()
        for key in batch:
          assert found[key].tobytes() == batch[key].tobytes(), (run, step, key)


def agree(ours, wanted):
  """Losses and norms of all steps; gradients, parameters and EMA after the last."""
  lines = [read_log(run / "metrics.jsonl") for run in (ours, wanted)]
  assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))  # each written once
  for x, y in zip(*lines):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_allclose(x[key], y[key], rtol=1e-5, atol=1e-12, err_msg=key)
  a, b = (load(run / "checkpoints" / str(STEPS)) for run in (ours, wanted))
  assert a.keys() == b.keys() and any(key.startswith("opt_state/trace") for key in a)
  for key in a:
    x, y = np.float64(a[key]), np.float64(b[key])
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), key


def load(path):
  """A checkpoint of eight devices on this process's one, in float32."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = {
    key: jax.ShapeDtypeStruct(
      x.shape, np.float32 if x.dtype == np.float64 else x.dtype, sharding=here
    )
    for key, x in ocp.metadata(path).metadata.items()
  }
  return ocp.load(path, state)


def test_a_process_that_never_calls_is_an_error_in_time():
  script = """if True:
    import sys
    import ml_collections
    from cc_jax import cli
    from cc_jax.parallel import distributed
    distributed.JOIN_TIMEOUT = 3
    config = ml_collections.ConfigDict({"processes": 2})
    cli.run(lambda argv: distributed.initialize_distributed(config))
  """
  alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
  alone |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
  done = subprocess.run(
    [sys.executable, "-c", script],
    env={**os.environ, **alone},
    cwd=SCRIPT.parent.parent,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert done.returncode == 1
  assert "error: 2 processes did not all join at localhost:" in done.stderr


def test_a_process_that_is_missing_is_an_error_with_the_table(tiny_folder, tmp_path):
  alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
  alone |= {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
  flags = {"mesh.processes": 2}
  run = start(tiny_folder, tmp_path / "run", count=1, environments={0: alone}, flags=flags)
  _, err = run[0].communicate(timeout=300)
  assert run[0].returncode == 1, err
  assert "error: 1 of 2 processes (mesh.processes) joined; start the others" in err
  assert "process 0 on" in err and err.count("\n") == 1
