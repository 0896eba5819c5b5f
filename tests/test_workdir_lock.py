"""One training per workdir."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from cc_jax.errors import UserError
from cc_jax.training import workdir_lock
from cc_jax.training.workdir_lock import FILE, lock_workdir

ROOT = Path(__file__).parents[1]
HOLD = """if True:
  import sys, time
  from cc_jax.training.workdir_lock import lock_workdir
  with lock_workdir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder):
  """A process that has the workdir."""
  command = [sys.executable, "-c", HOLD, str(folder)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


def test_a_workdir_in_use_is_refused_by_host_and_process(tmp_path, monkeypatch):  # C11
  process = hold(tmp_path)
  try:
    said = rf"is in use: process {process.pid} on {socket.gethostname()} has trained there since 20"
    with pytest.raises(UserError, match=said), lock_workdir(tmp_path):
      pass
    # Of another host: a lease may have to run out first.
    monkeypatch.setattr(workdir_lock.socket, "gethostname", lambda: "elsewhere")
    waits, words = [], []
    log = workdir_lock.logging
    monkeypatch.setattr(log, "log_first_n", lambda level, text, n, *rest: words.append(text % rest))
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(workdir_lock.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(workdir_lock.time, "sleep", waits.append)
    with pytest.raises(UserError, match=said), lock_workdir(tmp_path):
      pass
    assert len(waits) == 2
    assert re.search(rf"process {process.pid} on .* has the workdir; waiting up to 120 s", words[0])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / FILE).exists()  # a killed run leaves the file, not the lock
    with lock_workdir(tmp_path) as check:
      check()
      assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / FILE).exists()
  finally:
    process.kill()


def test_a_file_system_without_locks_tells_the_earlier_run(tmp_path, monkeypatch):
  """A bucket, or a mount without flock: the latest start has the workdir."""
  import fcntl

  def no_locks(*_):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", no_locks)
  with lock_workdir(tmp_path) as first:
    first()
    with monkeypatch.context() as patch:
      patch.setattr(workdir_lock.os, "getpid", lambda: 7)
      with lock_workdir(epath.Path(tmp_path)) as second:
        second()
        with pytest.raises(UserError, match="in use: process 7 on"):
          first()


@pytest.mark.parametrize("workdir", ["file", "file/below"])
def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, workdir):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match=rf"cannot write to \S*{workdir}: .*; choose another"):
    with lock_workdir(tmp_path / workdir):
      raise AssertionError("it is held")
  assert (tmp_path / "file").read_text() == "mine"
