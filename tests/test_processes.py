"""Several processes (gloo) against one that holds the same mesh, each in a process of its own."""

import contextlib
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


def free_port(candidates=(0,)):
  """A port that nobody has, among `candidates`; 0 stands for any."""
  for port in candidates:
    with contextlib.suppress(OSError), socket.socket() as free:
      free.bind(("localhost", port))
      return free.getsockname()[1]


def start(base, workdir, *, count, environments=None, flags=None, then=None):
  """The training command in `count` processes with 8 devices in all; `then` in a second workdir."""
  port = free_port()
  flags = {**FLAGS, "mesh.processes": count, "mesh.cpu_devices": 8 // count, **(flags or {})}
  flags = [f"--config.{key}={value}" for key, value in flags.items()]
  command = [sys.executable, SCRIPT, base, workdir, *flags]
  processes = []
  for index in range(count):
    environment = {**os.environ, "FLOAT64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"SHARDS": str(workdir.parent), "THEN": str(then or "")}
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
  """The runs of two processes, of which one gets SIGTERM, and of one, which then goes on there."""
  folder = tmp_path_factory.mktemp("processes")
  cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
  for name in ("one", "two", "after"):
    (folder / name).mkdir()
  term = {1: {"KILL": "term:2", "SLOW": "1"}}
  outputs = finish(start(tiny_folder, folder / "two" / "run", count=2, environments=term), 143)
  (folder / "two" / "out.json").write_text(json.dumps(outputs))
  shutil.copytree(folder / "two" / "run", folder / "after" / "run")
  (stopped,) = os.listdir(folder / "two" / "run" / "checkpoints")
  finish(start(tiny_folder, folder / "one" / "run", count=1, environments={0: cache},
               then=folder / "after" / "run"))
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


# What launchers set: of process {i}, with a port of their choice. -> variables, processes.
CLUSTERS = {
  "slurm": (
    dict(
      SLURM_JOB_ID="{job}", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2",
      SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="{i}", SLURM_LOCALID="0",
    ),
    2,
  ),
  "ompi": (
    dict(
      OMPI_MCA_orte_hnp_uri="{orte}.0;tcp://127.0.0.1:1", OMPI_COMM_WORLD_SIZE="2",
      OMPI_COMM_WORLD_RANK="{i}", OMPI_COMM_WORLD_LOCAL_RANK="0",
    ),
    2,
  ),
  "gketpu": (
    dict(
      TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", JAX_COORDINATOR_PORT="{port}",
      TPU_SKIP_MDS_QUERY="1", MEGASCALE_COORDINATOR_ADDRESS="localhost", MEGASCALE_NUM_SLICES="1",
      MEGASCALE_SLICE_ID="0",
    ),
    1,
  ),
  "jobset": (
    dict(KUBERNETES_SERVICE_HOST="x", JOB_COMPLETION_INDEX="0", HOSTNAME="localhost",
         JAX_COORDINATOR_ADDRESS="localhost:{port}"),
    1,
  ),
  "nothing": ({}, 1),
}  # fmt: skip
JOIN = """if True:
  import os, sys, types
  import jax, ml_collections
  from jax._src.clusters import cloud_tpu_cluster, k8s_cluster
  # A TPU's machine and Kubernetes' service, as far as JAX asks them.
  cloud_tpu_cluster.running_in_cloud_tpu_vm = "TPU_WORKER_ID" in os.environ
  sys.modules["kubernetes"] = types.SimpleNamespace(
    config=types.SimpleNamespace(load_incluster_config=lambda: None),
    client=types.SimpleNamespace(CoreV1Api=object, BatchV1Api=object,
                                 exceptions=types.SimpleNamespace(ApiException=RuntimeError)))
  job = types.SimpleNamespace(spec=types.SimpleNamespace(parallelism=1))
  k8s_cluster.K8sCluster._job = lambda: job
  from cc_jax.parallel import distributed
  distributed.JOIN_TIMEOUT = 60
  table = distributed.initialize_distributed(ml_collections.ConfigDict({"processes": -1}))
  print(jax.distributed.is_initialized(), jax.process_count(), jax.process_index(), table)
"""


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_cluster_says_how_many_there_are(cluster):  # C11, mesh.processes = -1
  variables, count = CLUSTERS[cluster]
  first = 65535 - 2**12 + 1  # JAX takes Slurm's and Open MPI's ports from here on
  port = free_port(range(first + os.getpid() % 2**11, 65535))
  job = port - first
  processes = []
  for i in range(count):
    own = {k: v.format(i=i, job=job, orte=job * 2**12, port=port) for k, v in variables.items()}
    processes.append(subprocess.Popen(
      [sys.executable, "-c", JOIN], env={**os.environ, **own}, cwd=SCRIPT.parent.parent,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ))  # fmt: skip
  for i, out in enumerate(finish(processes)):
    said = out.splitlines()[-count if count > 1 else -1 :]
    if cluster == "nothing":
      assert said == ["False 1 0 mesh.processes=-1: JAX found no cluster, so this is one process"]
      continue
    assert said[0].startswith(f"True {count} {i} process 0 on ")
    assert [f"process {k} on " in line for k, line in enumerate(said)] == [True] * count


def test_more_processes_than_the_config_says_are_an_error(tiny_folder, tmp_path):  # C11
  """Before anything is read: each would take the workdir for its own."""
  alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
  alone |= {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
  flags = {"mesh.processes": 2}
  run = start(tiny_folder, tmp_path / "run", count=1, environments={0: alone}, flags=flags)
  _, err = run[0].communicate(timeout=300)
  assert run[0].returncode == 1, err
  assert err == (
    "error: mesh.processes is 2, but JAX_NUM_PROCESSES says that 1 were started; set "
    "mesh.processes=1, or -1 to take what the cluster says\n"
  )
