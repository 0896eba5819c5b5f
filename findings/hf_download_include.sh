#!/usr/bin/env bash
# huggingface_hub 2.4.0: `hf download REPO --include A B` fetches the file B, and forgets the pattern A.
#
# One would guess that --include takes several patterns, as it did in huggingface-cli, whose commands
# stand in many model cards.
# What happens: the option takes one; the second pattern becomes the name of a file, and since a file is
# named the pattern is ignored, with a warning. Each pattern wants an --include of its own.
# Why it matters: an old command for "config and weights of one folder" downloads something else.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" huggingface_hub==2.4.0
download() { # offline: the command fails, but says before what it wants
  HF_HUB_OFFLINE=1 HF_HOME=$folder/home PYTHONPATH=$folder python3 -c \
    'import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = "hf"; main()' \
    download gpt2 "$@" 2>&1 || true
}
two=$(download --include config.json '*.txt') each=$(download --include config.json --include '*.txt')
echo "$two" | grep -io 'ignoring.*' | head -1
echo "$two" | grep -qi 'ignoring.*include' && ! echo "$each" | grep -qi 'ignoring'
# Ignoring `--include` since filenames have been explicitly set.
