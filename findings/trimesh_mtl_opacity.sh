#!/usr/bin/env bash
# trimesh 5.2.0: a material's opacity (d of an MTL file) is not in its colour.
#
# One would guess that a glass pane of an OBJ model, whose MTL says "d 0.5", has main_color with alpha 127,
# as a GLB's baseColorFactor of 0.5 has.
# What happens: main_color's alpha is 255; the value is kept as text in material.kwargs["d"]. Of a GLB the
# alpha is in main_color.
# Why it matters: rendered data sets from OBJ catalogues show opaque lamps, windows and bottles, and
# masks that hide what is behind them, unless the reader looks at kwargs itself.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder/packages" trimesh==5.2.0 numpy==2.4.6 pillow==12.3.0
cat > "$folder/pane.mtl" <<'MTL'
newmtl glass
Kd 0.2 0.4 0.6
d 0.5
MTL
cat > "$folder/pane.obj" <<'OBJ'
mtllib pane.mtl
v 0 0 0
v 1 0 0
v 0 1 0
usemtl glass
f 1 2 3
OBJ
FOLDER=$folder PYTHONPATH=$folder/packages python3 - <<'PY'
import os

import trimesh

scene = trimesh.load_scene(os.path.join(os.environ["FOLDER"], "pane.obj"), process=False)
(mesh,) = scene.geometry.values()
material = mesh.visual.material
print("OBJ", material.main_color.tolist(), material.kwargs.get("d"))
assert material.main_color[3] == 255 and material.kwargs["d"] == ["0.5"], "it has changed"
mesh.visual.material = trimesh.visual.material.PBRMaterial(
  baseColorFactor=[51, 102, 153, 127], alphaMode="BLEND")
again = trimesh.load_scene(trimesh.util.wrap_as_stream(mesh.export(file_type="glb")), file_type="glb")
(mesh,) = again.geometry.values()
print("GLB", mesh.visual.material.main_color.tolist())
assert mesh.visual.material.main_color[3] == 127, "it has changed"
PY
# OBJ [51, 102, 153, 255] ['0.5']
# GLB [51, 102, 153, 127]
