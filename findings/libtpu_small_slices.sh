#!/usr/bin/env bash
# libtpu 0.0.42 through jax 0.10.2: compiling for one chip needs to be told so, and a v4 has twice its chips.
#
# One would guess that get_topology_desc(topology_name="v5e:1x1") describes one chip, as "v5e:4x4" does
# sixteen, and that "v4:2x2x1" has four devices, as JAX on such a machine shows.
# What happens: a host is taken to have 2 x 2 x 1 chips, and a smaller slice raises an error unless
# chips_per_host_bounds says otherwise; a v4 gets eight devices, its single cores, unless
# chip_config_name="megacore" joins them.
# Why it matters: the smallest slices are what most people rent first, and a plan for a v4 would give
# every "chip" half of its memory.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
python3 -m pip install -q --no-deps --target "$folder" libtpu==0.0.42.1
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 PYTHONPATH=$folder python3 - 2> "$folder/log" <<'PY'
from jax.experimental import topologies

def devices(name, **options):
  try:
    return len(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
  except Exception as error:
    return str(error).split(":")[0]

found = [
  devices("v5e:1x1"), devices("v5e:1x1", chips_per_host_bounds=(1, 1, 1)),
  devices("v4:2x2x1"), devices("v4:2x2x1", chip_config_name="megacore"),
]
print(*found)
assert found[0].startswith("INVALID_ARGUMENT") and found[1:] == [1, 8, 4], "it has changed"
PY
# INVALID_ARGUMENT 1 8 4
