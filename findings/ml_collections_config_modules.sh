#!/usr/bin/env bash
# ml_collections 1.1.0: a config file without get_config answers with that of the file loaded before it.
#
# One would guess that a config file that lacks get_config (misspelt, say) always raises an error.
# What happens: all config files of a process are loaded into one module of a fixed name, and what the
# first file defined is still there when the second runs. So the second file's missing function is the
# first file's; there is an error only where no other file was loaded before.
# Why it matters: a test that goes through all configs, or a command with two config flags, uses the wrong
# config without a word.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" ml_collections==1.1.0 absl-py==2.5.1
cat > "$folder/first.py" <<'PY'
from ml_collections import ConfigDict
get_config = lambda: ConfigDict({"name": "first"})
PY
cat > "$folder/second.py" <<'PY'
from ml_collections import ConfigDict
get_confg = lambda: ConfigDict({"name": "second"})
PY
cat > "$folder/load.py" <<'PY'
import os, sys

from absl import flags
from ml_collections import config_flags

def load(path):
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file("config", flag_values=values)
  try:
    values(["command", f"--config={path}"])
    return config.value.name
  except Exception as error:
    return type(error).__name__

print(*(load(os.path.join(os.path.dirname(__file__), name)) for name in sys.argv[1:]))
PY
load() { PYTHONPATH=$folder python3 "$folder/load.py" "$@" 2> /dev/null; }
alone=$(load second.py) after=$(load first.py second.py)
echo "second alone: $alone   first, then second: $after"
[ "$alone" = AttributeError ] && [ "$after" = "first first" ]
# second alone: AttributeError   first, then second: first first
