#!/usr/bin/env bash
# absl-py 2.5.1: a DEFINE_list flag that is given twice keeps the last value alone.
#
# One would guess that `--reference=a.png --reference=b.png` makes a list of both, as argparse's
# action="append" and absl's own DEFINE_multi_string do, or that the second is refused.
# What happens: the first value is gone, without a word.
# Why it matters: a command that takes several pictures of one subject quietly uses one of them.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" absl-py==2.5.1
PYTHONPATH=$folder python3 - <<'PY'
from absl import flags

values = flags.FlagValues()
flags.DEFINE_list("reference", [], "pictures", flag_values=values)
flags.DEFINE_multi_string("mask", [], "pictures", flag_values=values)
values(["command", "--reference=a.png", "--reference=b.png", "--mask=a.png", "--mask=b.png"])
print("DEFINE_list:", values.reference, " DEFINE_multi_string:", values.mask)
assert values.reference == ["b.png"] and values.mask == ["a.png", "b.png"], "it has changed"
PY
# DEFINE_list: ['b.png']  DEFINE_multi_string: ['a.png', 'b.png']
