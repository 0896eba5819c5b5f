#!/usr/bin/env bash
# ml_collections 1.1.0: overriding a tuple on the command line checks neither its length nor a type.
#
# One would guess that `--config.betas=0.5` for a pair of numbers is an error, as a text for a number
# is: ConfigDict is said to be type safe.
# What happens: the value becomes a tuple of one, of whatever it is: (0.5,), (None,), ('abc',).
# Why it matters: the mistake shows much later, as an unpacking error or a wrong default.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" ml_collections==1.1.0 absl-py==2.5.1
PYTHONPATH=$folder python3 - <<'PY'
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

def override(*arguments):
  sys.argv = ["command", *arguments]  # read as soon as the flag is defined
  values = flags.FlagValues()
  default = ml_collections.ConfigDict({"betas": (0.9, 0.999), "rate": 0.1})
  config = config_flags.DEFINE_config_dict("config", default, flag_values=values)
  values(sys.argv)
  return config.value

results = [override(f"--config.betas={text}").betas for text in ("0.5", "None", "abc", "1,2,3")]
print(*results)
assert results == [(0.5,), (None,), ("abc",), (1, 2, 3)], "it has changed"
try:
  override("--config.rate=abc")
except Exception as error:
  print("a number is checked:", type(error).__name__)
else:
  raise AssertionError("a number is no longer checked")
PY
# (0.5,) (None,) ('abc',) (1, 2, 3)
# a number is checked: IllegalFlagValueError
