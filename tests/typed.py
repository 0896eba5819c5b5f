"""Commands as one types them, in this process: imports are half of a small command."""

import runpy
import sys
import warnings

from absl import flags, logging


def run_typed(command: str, words: list[str], capsys) -> tuple[str, str]:
  """(stdout, stderr) of `python -m cc_jax.COMMAND WORDS`, which must succeed."""
  argv, verbosity = sys.argv, logging.get_verbosity()
  sys.argv = [f"cc_jax/{command}.py", *words]
  capsys.readouterr()
  try:
    with warnings.catch_warnings():  # runpy: the commands are imported by one another
      warnings.filterwarnings("ignore", "'cc_jax.*found in sys.modules", RuntimeWarning)
      runpy.run_module(f"cc_jax.{command}", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    out, err = capsys.readouterr()
    assert not end.code, (words, err)
    return out, err
  finally:
    sys.argv = argv
    logging.set_verbosity(verbosity)
    flags.FLAGS.unparse_flags()
    by_module = flags.FLAGS.flags_by_module_dict().items()
    names = {flag.name for module, defined in by_module for flag in defined
             if "cc_jax" in module or flag.name.startswith("config")}  # fmt: skip
    for flag in names & set(flags.FLAGS):
      delattr(flags.FLAGS, flag)
  raise AssertionError("a command ends with an exit code")
