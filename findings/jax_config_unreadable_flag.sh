#!/usr/bin/env bash
# jax 0.10.2: a setting that jax.config.update takes, and that jax.config has no attribute for.
#
# One would guess that what jax.config.update("jax_disable_most_optimizations", True) sets is read as
# jax.config.jax_disable_most_optimizations, as for jax_enable_x64 or jax_compilation_cache_dir.
# What happens: reading it raises AttributeError; jax.config.values has it.
# Why it matters: code that turns the setting on for a while and puts back what it was stops at its first line.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu PYTHONPATH=$folder python3 - <<'PY'
import jax

names = ["jax_enable_x64", "jax_compilation_cache_dir", "jax_disable_most_optimizations"]
name = names[-1]
jax.config.update(name, True)
readable = [hasattr(jax.config, each) for each in names]
print(*readable, jax.config.values.get(name))
assert readable == [True, True, False] and jax.config.values.get(name) is True, "it has changed"
PY
# True True False True
