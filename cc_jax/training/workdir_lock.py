"""One training per workdir: who has it, told by host and process."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from cc_jax.errors import UserError
from cc_jax.training.checkpoint import ANSWER_TIMEOUT, reason, within

FILE = "in_use.json"
# A kill on another machine frees the file of a network file system only after a lease.
LEASE = 120  # seconds


@contextlib.contextmanager
def lock_workdir(workdir: epath.PathLike) -> Iterator[Callable[[], None]]:
  """Holds a folder or bucket for this process, and yields a check that it still does.

  On file systems the lock is the kernel's: it ends with the process, however that ends, so a run
  that was killed can be resumed at once. Buckets have no locks: there the latest start owns the
  workdir, and an earlier one that is still alive learns of it by the check, before it saves.

  Raises:
    UserError: at the start or by the check: another process trains here. At the start: the folder
      cannot be written.
  """
  file = epath.Path(workdir) / FILE
  mine = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
  with contextlib.ExitStack() as stack:
    try:
      within(ANSWER_TIMEOUT, lambda: file.parent.mkdir(parents=True, exist_ok=True))
      if "://" not in os.fspath(file):
        _lock_file(os.fspath(file), mine, stack)
      within(ANSWER_TIMEOUT, lambda: file.write_text(json.dumps(mine)))
    except OSError as error:
      raise UserError(
        f"cannot write to {workdir}: {reason(error)}; choose another --workdir"
      ) from error

    def check() -> None:
      if file.exists() and (owner := _read(file)) != mine:
        raise UserError(_in_use(file.parent, owner))

    yield check
    if _read(file) == mine:
      file.unlink(missing_ok=True)


def _lock_file(name: str, mine: dict[str, Any], stack: contextlib.ExitStack) -> None:
  """Locks the file until `stack` ends; waits for a lease if its owner is on another host."""
  try:
    import fcntl
  except ImportError:  # Windows without WSL
    return
  handle = stack.enter_context(open(name, "a"))
  last_try = time.monotonic() + LEASE
  while True:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return
    except BlockingIOError:
      owner = _read(epath.Path(name))
      if owner.get("host") == mine["host"] or time.monotonic() > last_try:
        raise UserError(_in_use(epath.Path(name).parent, owner)) from None
      logging.log_first_n(
        logging.WARNING, "process %s on %s has the workdir; waiting up to %d s for it to end", 1,
        owner.get("process", "?"), owner.get("host", "?"), LEASE)
      time.sleep(5)
    except OSError:  # a file system without locks
      return


def _read(file: epath.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError):  # it is just being written
    return {}


def _in_use(workdir: epath.Path, owner: dict[str, Any]) -> str:
  return (
    f"{workdir} is in use: process {owner.get('process', '?')} on {owner.get('host', '?')} has "
    f"trained there since {owner.get('since', '?')}; stop that process, or choose another --workdir"
  )
