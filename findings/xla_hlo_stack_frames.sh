#!/usr/bin/env bash
# jax 0.10.2: parent_frame_id in the text of a compiled program is not the parent's id.
#
# One would guess that "frame 1 { ... parent_frame_id=1 }" in the table StackFrames of
# compiled.as_text() names the frame's caller by its number in the same table.
# What happens: it is the caller's number plus one, and 1 stands for "no caller". Read as a plain number, frame 1 is
# its own caller, every chain of callers ends in it, and a walk that stops at "no parent" never ends.
# Why it matters: these tables say from which line of which function an instruction came; profilers that
# read them count work for the wrong function.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/program.py" <<'PY'
import re

import jax
import jax.numpy as jnp

def inner(x):
  return jnp.sin(x)

def outer(x):
  return inner(x) + 1

text = jax.jit(outer).lower(jnp.ones(3)).compile().as_text()

def table(title):
  rows = text.split(f"\n{title}\n")[1].split("\n\n")[0]
  return dict(re.findall(r"(\d+) (.*)", rows))

number = lambda row, key: re.search(rf"{key}=(\d+)", row)[1]
names, places, frames = table("FunctionNames"), table("FileLocations"), table("StackFrames")
found = []
for frame, row in frames.items():
  name = names[number(places[number(row, "file_location_id")], "function_name_id")]
  found.append(f"{frame} {name} parent_frame_id={number(row, 'parent_frame_id')}")
print(*found, sep=", ")
calls = '"<module>" parent_frame_id=1, 2 "outer" parent_frame_id=2, 3 "inner" parent_frame_id=3'
assert ", ".join(found) == "1 " + calls, "it has changed"
PY
JAX_PLATFORMS=cpu PYTHONPATH=$folder python3 "$folder/program.py"
# 1 "<module>" parent_frame_id=1, 2 "outer" parent_frame_id=2, 3 "inner" parent_frame_id=3
