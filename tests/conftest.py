"""Before any test imports jax: the CPU, no network, and quiet libraries."""

import os
from importlib.metadata import version

# An installed libtpu or CUDA must not slow the suite down; tests that need more devices start
# processes of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_GCE_CHECK"] = "true"  # TFDS would look for cloud storage at import
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TQDM_DISABLE", "1")
# As set_cpu_devices sets it, but from the start, so that all processes share compiled programs.
_FLAGS = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"  # tests run side by side: less work in all
if version("jaxlib").startswith("0.10."):  # XLA's older emitters compile in 2/5 of the time
  _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

import pytest  # noqa: E402

# What takes longest begins first, or one worker would be left with it at the end.
LONGEST = ("test_train", "test_processes", "test_formats", "test_real_bases", "test_sharded",
           "test_lab", "test_generate", "test_unet", "test_subjects3d", "test_compatibility",
           "test_notebooks", "test_sources", "test_plan", "test_two_subjects", "test_vae",
           "test_config_keys", "test_conditioning", "test_customcontrast", "test_global_objectives",
           "test_objects", "test_readers", "test_graph_input")  # fmt: skip


def pytest_collection_modifyitems(items):
  rank = {name: index for index, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.module.__name__, len(rank)))


# Files whose tests cost much each and share little: either worker takes the next of them.
SPREAD = ("test_real_bases.py",)


def pytest_xdist_make_scheduler(config, log):
  from xdist.scheduler import LoadFileScheduling

  class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid):
      file = super()._split_scope(nodeid)
      return nodeid if file.endswith(SPREAD) else file

  return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


# Modules that compute more than they compile: they render.
RENDERING = ("test_subjects3d", "test_sources", "test_evaluate")


@pytest.fixture(scope="module", autouse=True)
def few_optimizations(request):
  """Most tests compile much and compute little: XLA may leave out most of its optimizations."""
  import jax

  quick = request.module.__name__ not in RENDERING
  jax.config.update("jax_disable_most_optimizations", quick)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
  """A random base in the hub's layout; see tests/tiny.py."""
  import tiny

  return tiny.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def quick_compile(tmp_path_factory):
  """A test compiles more than it computes: few optimizations, and never the same program twice.

  Returns the folder of compiled programs, for processes that the test starts. It is that of all
  workers; what one has half written, another compiles for itself.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
  folder.mkdir(exist_ok=True)
  changes = {
    "jax_disable_most_optimizations": (True, False),
    "jax_compilation_cache_dir": (str(folder), None),
    "jax_persistent_cache_min_compile_time_secs": (0.2, 1.0),
  }
  for key, (now, _) in changes.items():
    jax.config.update(key, now)
  compilation_cache.reset_cache()
  yield folder
  for key, (_, after) in changes.items():
    jax.config.update(key, after)
  compilation_cache.reset_cache()
