#!/usr/bin/env bash
# tensorboardX 2.6.5: it imports torch wherever torch is installed.
#
# One would guess that the package, made to write TensorBoard's files without TensorFlow and PyTorch,
# leaves PyTorch alone in a program that has nothing to do with it.
# What happens: `import tensorboardX` imports torch if it can, and goes on without where it cannot.
# Why it matters: seconds at every start, hundreds of MB of memory, and PyTorch's threads beside JAX's, on
# machines that have both. Import it late, in the process that writes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" tensorboardX==2.6.5 numpy==2.4.6
mkdir "$folder/stand_in"  # a module called torch is enough to see that it is asked for
echo 'print("torch is imported"); raise ImportError("no torch here")' > "$folder/stand_in/torch.py"
with=$(PYTHONPATH=$folder:$folder/stand_in python3 -c 'import tensorboardX; print("and tensorboardX")')
echo "$with"
[ "$(echo "$with" | head -1)" = "torch is imported" ] && echo "$with" | grep -q "and tensorboardX"
# torch is imported
# and tensorboardX
