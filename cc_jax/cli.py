"""What every command does: flags, a user's mistake in one line, config keys that were renamed."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from cc_jax.errors import UserError, one_line
from data_pipeline.errors import DataError

# Config keys that had another name at commit 0d5bef4: dotted key of then -> today's.
RENAMED_KEYS = {
  "data.reference_share": "data.reference_ratio",
  "data.reference_place": "data.reference_layout",
  "data.positive_share": "data.positive_ratio",
  "data.terse_captions": "data.caption_drop_detail_prob",
  "data.group_share": "data.group_ratio",
  "train.accumulate": "train.grad_accum_steps",
  "train.gate_rate": "train.gate_lr_mult",
  "train.gaps_every": "train.prompt_sensitivity_every",
  "world.calm_share": "world.calm_ratio",
  "world.plain_share": "world.plain_ratio",
  "clip.white_share": "clip.white_ratio",
  "clip.mirror_share": "clip.mirror_ratio",
  "unet.calm_share": "unet.calm_ratio",
  "judge.fresh": "judge.test_images",
}
RENAMED_KEYS |= {f"run.{old}": f"run.{new}" for old, new in RENAMED_KEYS.items()}  # configs/lab.py
ORIGINAL_KEYS = {new: old for old, new in RENAMED_KEYS.items()}
RENAMED_REMAT = {"products": "dots"}  # words of train.remat_unet and train.remat_text


def run(main: Callable[[Sequence[str]], None], define: Callable[[], None] = lambda: None) -> None:
  """Runs `main(argv)` under absl; a user's mistake becomes one line on stderr and exit code 1.

  Everything else keeps its traceback: it is our mistake, and the traceback is how it gets fixed.

  Args:
    main: the program.
    define: defines its flags. Do it here: a config flag with a default file reads the overrides
      on the command line as soon as it is defined.
  """

  def wrapped(argv: Sequence[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax tells its every step at INFO
    if len(argv) > 1:
      _stop(f"unexpected argument {argv[1]!r}; flags are written --name=value")
    try:
      main(argv)
    except (UserError, DataError) as error:
      _stop(str(error))
    except KeyboardInterrupt:
      _stop("interrupted; the same command goes on from the last save")

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      overrides = re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE)
      refuse_old_names(dict.fromkeys(overrides))
      define()
      rest = flags.FLAGS(list(argv))
      if "config" in flags.FLAGS:
        # A file that cannot be read fails when its config is used for the first time.
        refuse_old_names(flatten_config(flags.FLAGS.config.to_dict()))
      return rest
    except (AttributeError, KeyError) as error:
      # ml_collections' error for an unknown key, quoted twice: 'stepz' Did you mean "steps" ...?
      text = one_line(error).replace("\\n", " ")
      key, _, hint = text.replace("\\", "").replace("'", "").partition(" ")
      _stop(f"the config has no key {key}. {hint or 'The config file lists all keys.'}")
    except (UserError, flags.Error, TypeError, ValueError, OSError, SyntaxError) as error:
      _stop(one_line(error))

  app.run(wrapped, flags_parser=parse)


def flatten_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested config as dotted key -> value."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten_config(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def with_current_names(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The flattened config of an older run, with today's names."""
  return {RENAMED_KEYS.get(key, key): _current_value(key, value) for key, value in flat.items()}


def refuse_old_names(flat: Mapping[str, Any]) -> None:
  """Raises UserError for an old name in a flattened config; it says the name of today."""
  for key, value in flat.items():
    if key in RENAMED_KEYS:
      raise UserError(f"the config key {key} is now {RENAMED_KEYS[key]}")
    if (now := _current_value(key, value)) != value:
      raise UserError(f"config.{key} is {value!r}; that policy is now called {now!r}")


def original_value(key: str, value: Any) -> Any:
  """The value of a key as it was written at commit 0d5bef4."""
  return _translate(key, value, {new: old for old, new in RENAMED_REMAT.items()})


def _current_value(key: str, value: Any) -> Any:
  return _translate(key, value, RENAMED_REMAT)


def _translate(key: str, value: Any, words: Mapping[str, str]) -> Any:
  if ".remat_" not in key:
    return value
  if isinstance(value, list | tuple):
    return type(value)(words.get(word, word) for word in value)
  return words.get(value, value)


def _stop(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)
