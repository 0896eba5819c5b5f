"""What every command does: flags, a user's mistake in one line, config keys that were renamed."""

import importlib.machinery
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections.config_dict import RequiredValueError

from cc_jax.errors import UserError, expand_user, one_line
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
      _stop("interrupted")  # what is saved, the training has said

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return parse_flags(argv, define)
    except UserError as error:
      _stop(str(error))

  app.run(wrapped, flags_parser=parse)


def parse_flags(argv: Sequence[str], define: Callable[[], None]) -> list[str]:
  """Defines flags and parses them; returns what is left of `argv`.

  `~` is the home folder, in flags and in texts of the config. Raises UserError for a mistake on the
  command line or inside the config file.
  """
  argv = [_with_home(argument) for argument in argv]
  try:
    refuse_old_names(dict.fromkeys(_overrides(argv)))
    define()
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      config = flags.FLAGS.config
      values = flatten_config(config.to_dict())  # a file that cannot be read fails here
      refuse_old_names(values)
      texts = {key: value for key, value in values.items() if isinstance(value, str)}
      config.update_from_flattened_dict(
        {key: expand_user(value) for key, value in texts.items() if value.startswith("~")})
    return rest
  except UserError:
    raise
  except Exception as error:
    _check_config_file(argv)
    if not isinstance(error, _OF_COMMAND_LINES):
      raise  # our mistake
    raise UserError(_command_line_mistake(error, argv)) from error


def _with_home(argument: str) -> str:
  """A flag whose value begins with `~`: a shell leaves that in the middle of a word as it is."""
  if not argument.startswith("-"):  # the value of the flag before, which a program gave unexpanded
    return expand_user(argument)
  flag, is_given, value = argument.partition("=")
  return flag + is_given + expand_user(value)


def _overrides(argv: Sequence[str]) -> list[str]:
  """Dotted keys of the config that the command line sets."""
  return re.findall(r"^--?(?:no)?config\.([\w.]+)", "\n".join(argv), re.MULTILINE)


def _check_config_file(argv: Sequence[str]) -> None:
  """Raises UserError, with file and line, if --config names a file that makes no config.

  ml_collections reports mistakes in the file and in flags by the same exceptions: the file is read
  again, alone.
  """
  text = "\n".join(argv)
  given = re.findall(r"^--?config(?:=|\n)(.*)$", text, re.MULTILINE)
  if not given:
    return
  name, *arguments = given[-1].split(":", 1)
  if not Path(name).is_file():
    raise UserError(
      f"--config={name} is no file; give a config file, such as configs/subjects3d.py")
  try:
    loader = importlib.machinery.SourceFileLoader("user_config", name)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("user_config", loader))
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise UserError(f"{name} has no function get_config(); it must return the config")
    config = module.get_config(*arguments)
  except UserError:
    raise
  except Exception as error:
    where = _place(error, name)
    raise UserError(
      f"{where}: {type(error).__name__}: {one_line(error)}; mend the config file") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"{name}: get_config() returns {type(config).__name__}; it must return an "
      "ml_collections.ConfigDict")


def _place(error: Exception, file: str) -> str:
  """'file, line 3', of the config or what it imports; libraries are not where the mistake is."""
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}, line {error.lineno}"
  libraries = (*sysconfig.get_paths().values(), str(Path(__file__).parent), "<")
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    if not frame.filename.startswith(libraries):
      return f"{frame.filename}, line {frame.lineno}"
  return file


# What absl and ml_collections raise for overrides.
_OF_COMMAND_LINES = (
  flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError, RequiredValueError)
_WANTED = {  # words of the flag parsers' errors -> what a key takes
  "invalid literal for int": "a whole number",
  "could not convert string to float": "a number",
  "Non-boolean argument": "True or False",
  "as tuple": "a tuple, such as '(1, 2)' in quotes",
  "as a ConfigDict": "a section, such as '{\"key\": 1}'; single keys are set by --{flag}.KEY=VALUE",
}


def _command_line_mistake(error: Exception, argv: Sequence[str]) -> str:
  """One line about an override that ml_collections or absl refused."""
  words = one_line(error)
  if isinstance(error, AttributeError | KeyError):
    return _unknown_key(words.replace("\\n", " "), argv)
  if isinstance(error, RequiredValueError):
    return "a required_placeholder of the config has no value; give it one by --config.KEY=VALUE"
  match = re.match(r"flag (--[\w.]+)=(.*?): ", words)
  for sign, wanted in _WANTED.items():
    if match and sign in words:
      name = match[1].removeprefix("--") if match[1].startswith("--config.") else match[1]
      return f"{name} is {match[2]!r}; it must be {wanted.replace('{flag}', name)}"
  known = isinstance(error, flags.UnrecognizedFlagError) or words.startswith("Missing value")
  return f"{words}; --help lists the flags" if known else words


def _unknown_key(words: str, argv: Sequence[str]) -> str:
  # 'stepz' Did you mean "steps" instead of "stepz"?, quoted once more; or, below a key that is no
  # section: Attribute <class 'int'>.x does not exist ... Attempting to lookup: train.steps.x
  words = words.replace("\\", "").replace("'", "").strip('"')
  if ": " in words:
    key = words.rpartition(": ")[2].strip()
    return f"the config has no key {key}: {key.rpartition('.')[0]} is a value, not a section"
  key, _, hint = words.partition(" ")
  key = key.strip('"')
  flag = next((f" in --config.{name}" for name in _overrides(argv) if key in name.split(".")), "")
  return f"the config has no key {key}{flag}. {hint or 'The config file lists all keys.'}"


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
    if (now := _current_value(key, value)) is not value and now != value:
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
