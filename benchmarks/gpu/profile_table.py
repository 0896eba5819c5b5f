"""A trace as a table: where the device's time goes, by kind of kernel and by kernel."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from benchmarks.gpu.record import record

# The first that matches a kernel's name, in lower case.
KINDS = (
  ("attention", r"flash|fmha|sdpa|attention|splash"),
  ("convolution", r"conv(?!ert)|wgrad|dgrad|fprop|implicit_gemm"),
  ("product", r"gemm|matmul|\bdot|dot_|cublas|cutlass|nvjet|xmma"),
  ("copy or transpose", r"transpose|copy|memcpy|memset|concatenate|pad"),
  ("reduction", r"reduce|norm"),
  ("fusion", r"fusion|loop_|input_|wrapped"),
)
MOST_ROWS = 15


def profile(part: str, what: str, run: Callable[[], object]) -> None:
  """Traces `run()` and writes shares of the device's busy time."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
      record(part, profile=what, skipped="the profiler wrote no trace")
      return
    data = jax.profiler.ProfileData.from_file(str(files[-1]))
    kernels = device_kernels(data.planes)
  total = sum(kernels.values())
  if not total:
    record(part, profile=what, skipped="the trace has no events of the device")
    return
  kinds = collections.Counter()
  for name, seconds in kernels.items():
    kinds[kind_of(name)] += seconds
  record(part, profile=what, device_seconds=total,
         kinds={name: seconds / total for name, seconds in kinds.most_common()},
         kernels={name: seconds / total for name, seconds in kernels.most_common(MOST_ROWS)})


def device_kernels(planes: Iterable) -> collections.Counter:
  """Kernel -> seconds. On a GPU its streams' events; on the CPU what XLA's threads ran."""
  planes = list(planes)
  gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
  kernels = collections.Counter()
  for plane in gpu or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
    lines = list(plane.lines)
    # A GPU's plane has its streams, and the same time once more by XLA's operations.
    streams = [line for line in lines if line.name.startswith("Stream")]
    if not gpu:
      lines = [line for line in lines if re.search("XLA|Eigen", line.name)]
    for line in streams or lines:
      for event in line.events:
        name = re.sub(r"[._]\d+$", "", event.name.partition("(")[0])
        if gpu or re.match(r"[a-z][\w.-]*$", event.name):  # not the runtime's own C++
          kernels[name] += event.duration_ns / 1e9
  return kernels


def kind_of(kernel: str) -> str:
  return next((kind for kind, words in KINDS if re.search(words, kernel.lower())), "other")
