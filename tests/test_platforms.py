"""What depends on the operating system, the C library, and what is installed."""

import ast
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import ml_collections
import pytest

from cc_jax.parallel import distributed
from data_pipeline.cores import available_cores

ROOT = Path(__file__).parents[1]


def in_a_process(script, **environment):
  """The last line that a script prints, in a fresh process."""
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300,
    env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()[-1]


def test_the_cores_are_those_that_we_may_use(monkeypatch):
  assert available_cores() == len(os.sched_getaffinity(0))
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
  assert available_cores() == 1


def test_macos_has_no_affinity():  # C3
  """The first command's first steps, where `os.sched_getaffinity` does not exist."""
  script = """if True:
    import os
    del os.sched_getaffinity
    os.cpu_count = lambda: 3
    import jax, ml_collections
    from cc_jax.parallel.distributed import set_cpu_devices
    from data_pipeline.cores import available_cores
    set_cpu_devices(ml_collections.ConfigDict(dict(data=-1, cpu_devices=-1)), 32)
    print(available_cores(), len(jax.devices()))
  """
  assert in_a_process(script, XLA_FLAGS="") == "3 2"  # 3 devices do not divide a batch of 32


def test_only_the_helper_asks_for_affinity():
  files = [f for d in ("cc_jax", "data_pipeline", "configs", "benchmarks")
           for f in (ROOT / d).rglob("*.py") if "sched_" in f.read_text()]  # fmt: skip
  assert files == [ROOT / "data_pipeline" / "cores.py"]


PAGES = """if True:
  import ctypes, resource, threading
  import ml_collections
  from cc_jax.parallel.distributed import set_cpu_devices
  set_cpu_devices(ml_collections.ConfigDict(dict(data=-1, cpu_devices=-1)), 4)
  libc = ctypes.CDLL("libc.so.6")
  libc.malloc.restype = ctypes.c_void_p
  faults = []
  def compute():  # as a thread of XLA's does, whose program has temporary buffers of 100 MiB
    for _ in range(8):
      buffer = ctypes.c_void_p(libc.malloc(100 << 20))
      ctypes.memset(buffer, 1, 100 << 20)
      libc.free(buffer)
      faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
  threads = [threading.Thread(target=compute) for _ in range(2)]
  for thread in threads:
    thread.start()
    thread.join()
  print(faults[-1] - faults[-5])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_buffers_are_not_mapped_again():  # C10
  """Without M_ARENA_MAX the four uses of 25,600 pages that are counted cost 102,404 page faults."""
  assert float(in_a_process(PAGES)) < 1000


def test_memory_settings_are_for_cpu_runs(monkeypatch):
  installed = set()
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name in installed)

  def with_platforms(platforms):
    config = types.SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(distributed, "jax", types.SimpleNamespace(config=config))
    return distributed._will_run_on_cpu()

  assert with_platforms("cpu") and not with_platforms("cuda,cpu") and with_platforms(None)
  installed.add("jax_plugins")  # what jax[cuda13] brings
  assert not with_platforms(None) and with_platforms("cpu")


# ---- packaging


def requirements():
  """(install_requires, extras_require) as setup.py passes them to setuptools."""
  script = """if True:
    import json, setuptools
    setuptools.setup = lambda **kw: print(
      json.dumps([kw["install_requires"], kw["extras_require"]]))
    exec(open("setup.py").read(), {"__file__": "setup.py", "__name__": "__main__"})
  """
  return json.loads(in_a_process(script))


def normal(name):
  return re.split(r"[\[<>=!~ ;]", name)[0].lower().replace("_", "-")


def test_every_imported_package_is_declared():
  imported = set()
  for folder in ("cc_jax", "data_pipeline", "configs"):
    for file in (ROOT / folder).rglob("*.py"):
      for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
          imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
          imported.add(node.module.split(".")[0])
  imported -= set(sys.stdlib_module_names) | {"cc_jax", "data_pipeline", "configs"}
  owners = importlib.metadata.packages_distributions()
  runtime, extras = requirements()
  optional = ("notebooks", "heif", "objects", "segment", "prepare")
  declared = {normal(name) for group in (runtime, *map(extras.get, optional)) for name in group}
  for name in imported:
    assert {normal(owner) for owner in owners.get(name, [name])} & declared, name


def test_extras():
  runtime, extras = requirements()
  assert {"cuda12", "cuda13", "tpu", "notebooks", "test"} <= extras.keys()
  needed = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "diffusers",
            "tensorflow-datasets", "ml-collections")  # fmt: skip
  names = [normal(name) for name in runtime]
  assert set(needed) <= set(names) and "torch" not in names
  for name in ("cuda12", "cuda13", "tpu"):
    assert any(f"jax[{name}]" in line for line in extras[name])
  # A cap says beside it what breaks above it.
  text = (ROOT / "setup.py").read_text()
  for line in re.findall(r'^\s*"[\w\[\]-]+[^"\n]*<[^"\n]*".*$', text, re.MULTILINE):
    assert "#" in line, line
  for line in re.findall(r'^ {8}"[^"]+",.*$', text.split("extras_require")[0], re.MULTILINE):
    assert "#" in line, line  # what it is for here


def test_wrong_process_counts(monkeypatch):
  """Found before anything is joined."""
  for name in (*distributed._COUNTS, *distributed._TPU_HOSTS, "MEGASCALE_NUM_SLICES"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: pytest.fail("it joined"))

  def join(count):
    return distributed.initialize_distributed(ml_collections.ConfigDict({"processes": count}))

  for count in (0, -2):
    with pytest.raises(distributed.UserError, match=f"mesh.processes is {count}; use the number"):
      join(count)
  assert join(1) == ""
  for variables, said in (
    ({"JAX_NUM_PROCESSES": "4"}, "JAX_NUM_PROCESSES says that 4"),
    ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS says that 8"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE says that 2"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, "HOSTNAMES says that 4"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is no number of processes"),
  ):
    with monkeypatch.context() as patch:
      for name, value in variables.items():
        patch.setenv(name, value)
      for count in (1, 3):
        with pytest.raises(distributed.UserError, match=said):
          join(count)
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
  assert join(1) == join(-1) == ""
