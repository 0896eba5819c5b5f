"""Several processes (gloo) against one that holds the same mesh, each in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from orbax.checkpoint import v1 as ocp

from cc_jax import telemetry
from cc_jax.models.tokenizer import load_tokenizer

SCRIPT = Path(__file__).parent / "run_train.py"
SIZE, STEPS = 16, 12
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
  """The runs of one process and of two, one of which gets SIGTERM, and four that go on from there.
  """
  folder = tmp_path_factory.mktemp("processes")
  for name in ("one", "two", "four"):
    (folder / name).mkdir()
  finish(start(tiny_folder, folder / "one" / "run", count=1))
  term = {1: {"KILL": "term:2", "SLOW": "1"}}
  outputs = finish(start(tiny_folder, folder / "two" / "run", count=2, environments=term), 143)
  (folder / "two" / "out.json").write_text(json.dumps(outputs))
  (folder / "two" / "run").rename(folder / "four" / "run")
  (stopped,) = os.listdir(folder / "four" / "run" / "checkpoints")
  outputs = finish(start(tiny_folder, folder / "four" / "run", count=4))
  (folder / "four" / "out.json").write_text(json.dumps(outputs))
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
  batches = tiny.batches(load_tokenizer(tiny_folder / "tokenizer"), SIZE)
  for step in range(STEPS):
    batch = next(batches)
    runs = {"one": step, "two": step} if step < stopped else {"one": step, "four": step - stopped}
    for run, number in runs.items():
      found = shards(folder / run, number)
      assert found.keys() == batch.keys()
      for key in batch:
        assert found[key].tobytes() == batch[key].tobytes(), (run, step, key)
  own = [set(np.load(folder / "two" / f"0.{i}.npz")) for i in range(2)]
  assert not own[0] & own[1]  # disjoint


def test_numbers_do_not_depend_on_the_number_of_processes(folders):
  """Losses of all steps; gradients, parameters and averages after the last."""
  folder, stopped = folders
  assert 2 < stopped < STEPS
  one, several = (folder / name / "run" for name in ("one", "four"))
  lines = [telemetry.read(run / "metrics.jsonl") for run in (one, several)]
  assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))  # each written once
  for ours, wanted in zip(lines[1], lines[0]):
    assert ours.keys() == wanted.keys()
    for key in wanted:
      np.testing.assert_allclose(ours[key], wanted[key], rtol=1e-5, atol=1e-12, err_msg=key)
  a, b = (ocp.load(run / "checkpoints" / str(STEPS)) for run in (several, one))
  assert a.keys() == b.keys() and any(key.startswith("opt_state/trace") for key in a)
  for key in a:
    x, y = np.asarray(a[key], np.float64), np.asarray(b[key], np.float64)
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), key
  assert (several / "adapter.safetensors").exists()


def test_one_process_speaks_and_lists_all(folders):
  folder, stopped = folders
  outputs = json.loads((folder / "two" / "out.json").read_text())
  assert [f"process {i} on " in outputs[0] for i in range(3)] == [True, True, False]
  assert "4 x cpu, devices" in outputs[0] and f"SIGTERM: step {stopped} is saved" in outputs[0]
  assert outputs[1] == ""
  outputs = json.loads((folder / "four" / "out.json").read_text())
  assert all(f"process {i} on " in outputs[0] for i in range(4)) and outputs[1:] == [""] * 3


def test_a_process_that_is_missing_is_an_error_with_the_table(tiny_folder, tmp_path):
  alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
  alone |= {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
  flags = {"mesh.processes": 2}
  run = start(tiny_folder, tmp_path / "run", count=1, environments={0: alone}, flags=flags)
  _, err = run[0].communicate(timeout=300)
  assert run[0].returncode == 1, err
  assert "error: 1 of 2 processes (mesh.processes) joined; start the others" in err
  assert "process 0 on" in err and err.count("\n") == 1
