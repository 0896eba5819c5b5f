"""3D models become captures: against analytic projections, and bytes against bytes."""

import concurrent.futures
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull
from test_triples import make_tokenizer

import data_pipeline
from data_pipeline.errors import DataError
from data_pipeline.objects import __main__ as command
from data_pipeline.objects import catalogue, dataset, mesh, nouns, scene, worker
from data_pipeline.subjects3d import factors
from data_pipeline.words import with_article

trimesh = pytest.importorskip("trimesh", reason="trimesh reads 3D models; pip install trimesh")
ROOT = Path(__file__).parents[1]
SIZE = 96


@pytest.fixture(scope="module")
def gl():
  """A process that renders: in that of the tests tensorflow's LLVM and Mesa's would meet."""
  pool = concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn"), initializer=worker._end_with_parent
  )
  try:
    pool.submit(worker.check_renderer, SIZE).result()
  except DataError as error:
    pool.shutdown()
    pytest.skip(str(error))
  yield lambda *args, **options: pool.submit(worker.render_views, *args, **options).result()
  pool.shutdown()


def model(path, **fields):
  values = dict(key="k", path=str(path), member="", name="n", noun="n", licence="", creator="")
  return catalogue.Model(**(values | fields))


def view(**changes):
  """From the front and a little above, in the middle."""
  first = scene.draw_view(0, "k", "box", 0, 4)
  values = dict(azimuth=0.0, elevation=0.3, roll=0.0, distance=4.0, share=0.7, place=(0.5, 0.5))
  return first._replace(**(values | changes))


def textured_box(folder: Path) -> Path:
  """A cube of edge 2; its front (+z) has red, green, blue and yellow quarters, all else is grey."""
  colors = [[(220, 130, 130), (130, 200, 130)], [(130, 130, 210), (220, 210, 130)]]
  picture = Image.fromarray(np.array(colors, np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
  picture.save(folder / "quarters.png")
  (folder / "box.mtl").write_text(
    "newmtl front\nKd 0 0 0\nmap_Kd quarters.png\nnewmtl rest\nKd 0.5 0.5 0.5\n"
  )
  corners = [(x, y, z) for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)]
  lines = ["mtllib box.mtl", *("v {} {} {}".format(*corner) for corner in corners)]
  lines += ["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1", "usemtl front", "f 5/1 6/2 8/3 7/4"]
  lines += ["usemtl rest", "f 1 3 4 2", "f 1 2 6 5", "f 3 7 8 4", "f 1 5 7 3", "f 2 4 8 6"]
  (folder / "box.obj").write_text("\n".join(lines))
  return folder / "box.obj"


def test_colours_lie_where_the_texture_has_them(gl, tmp_path):
  """OBJ puts (0, 0) at the lower left, pictures their first row on top."""
  box = model(textured_box(tmp_path))
  front = view(elevation=0.0, ambient=0.6, sun=(0.0, 0.0, 0.0))
  image, _, camera = gl(box, [front], SIZE, white=True)[0]
  half = 1 / np.sqrt(3)  # of the edge, where the corners are at radius 1
  linear = {}
  for name, (x, y) in dict(red=(-1, 1), green=(1, 1), blue=(-1, -1), yellow=(1, -1)).items():
    point = np.array([x * half / 2, half + y * half / 2, half, 1])
    u, v, w = camera.intrinsics @ (camera.world_to_camera @ point)
    linear[name] = (image[int(v / w), int(u / w)] / 255.0) ** 2.2
  albedo = dict(red=(220, 130, 130), green=(130, 200, 130), blue=(130, 130, 210),
                yellow=(220, 210, 130))  # fmt: skip
  # Without sun all quarters are lit alike, but for what the surface mirrors; in linear light.
  light = {name: linear[name] / (np.array(color) / 255) ** 2.2 for name, color in albedo.items()}
  lit = np.array(list(light.values()))
  # The floor's colour is in the light: channels differ, quarters do not.
  np.testing.assert_allclose(lit, np.broadcast_to(lit.mean(0), lit.shape), rtol=0.06)
  assert (lit > 0.2).all()


def test_the_front_is_seen_from_azimuth_0_and_grows_to_plus_x(gl, tmp_path):
  box = model(textured_box(tmp_path))
  views = [view(azimuth=a, elevation=0.1) for a in (0.0, np.pi / 4, np.pi, -np.pi / 4)]
  seen = []
  for image, mask, _ in gl(box, views, SIZE, white=True):
    colored = (np.ptp(image.astype(int), axis=-1) > 35) & (mask == 255)
    seen.append((colored.mean(), np.nonzero(colored)[1].mean() if colored.any() else 0))
  assert seen[0][0] > 0.2 and seen[2][0] == 0
  # Seen from the right (+x), the front is on the left.
  assert seen[1][1] < SIZE / 2 < seen[3][1]


def test_area_of_a_sphere(gl, tmp_path):
  """A sphere of radius 1 at distance d is a disc of radius f / sqrt(d^2 - 1) from its centre."""
  trimesh.creation.icosphere(subdivisions=4).export(tmp_path / "sphere.obj")
  for distance in (2.5, 5.0):
    chosen = view(distance=distance, place=(0.45, 0.56), roll=0.4)
    _, mask, camera = gl(model(tmp_path / "sphere.obj"), [chosen], SIZE)[0]
    area = np.pi * camera.intrinsics[0, 0] ** 2 / (distance**2 - 1)
    assert mask.sum() / 255 == pytest.approx(area, rel=0.01)
    # share: the longer side of the subject over that of the frame
    assert 2 * np.sqrt(area / np.pi) == pytest.approx(0.7 * SIZE, rel=0.01)
    rows, columns = (mask.sum(axis) @ (np.arange(SIZE) + 0.5) / mask.sum() for axis in (1, 0))
    assert (columns / SIZE, rows / SIZE) == pytest.approx((0.45, 0.56), abs=0.003)


def test_masks_and_poses_of_a_cube_are_exact(gl, tmp_path):
  trimesh.creation.box().export(tmp_path / "cube.glb")
  cube = model(tmp_path / "cube.glb")
  half = 1 / np.sqrt(3)
  corners = np.array([(x, y + half, z, 1 / half) for x in (-half, half) for y in (-half, half)
                      for z in (-half, half)]) * (1, 1, 1, half)  # fmt: skip
  views = scene.draw_views(3, "cube", "cube", 6)
  for chosen, (_, mask, camera) in zip(views, gl(cube, views, SIZE), strict=True):
    pixels = (camera.intrinsics @ (camera.world_to_camera @ corners.T)).T
    pixels = pixels[:, :2] / pixels[:, 2:]
    hull = ConvexHull(pixels)
    assert mask.sum() / 255 == pytest.approx(hull.volume, rel=0.01)
    fine = Image.new("L", (SIZE * 8, SIZE * 8))
    ImageDraw.Draw(fine).polygon([tuple(p * 8 - 0.5) for p in pixels[hull.vertices]], fill=255)
    coverage = np.asarray(fine).reshape(SIZE, 8, SIZE, 8).mean((1, 3))
    off = np.abs(coverage - mask)
    assert off.max() < 255 * 0.45 and off[(coverage == 0) | (coverage == 255)].max() < 70
    assert set(np.unique(mask)) <= {0, 63, 64, 127, 128, 191, 255}  # four samples a pixel
    # The camera is where azimuth, elevation and distance say: away from the cube's middle.
    eye = -camera.world_to_camera[:, :3].T @ camera.world_to_camera[:, 3]
    offset = eye - (0, half, 0)
    assert np.linalg.norm(offset) == pytest.approx(chosen.distance)
    assert np.arctan2(offset[0], offset[2]) % (2 * np.pi) == pytest.approx(
      chosen.azimuth % (2 * np.pi))
    assert np.arcsin(offset[1] / chosen.distance) == pytest.approx(chosen.elevation)
    np.testing.assert_allclose(
      camera.world_to_camera[:, :3] @ camera.world_to_camera[:, :3].T, np.eye(3), atol=1e-12
    )


def test_pictures_are_mask_times_subject_over_the_background(gl, tmp_path):
  box, chosen = model(textured_box(tmp_path)), view(scene="meadow", azimuth=0.5)
  image, mask, _ = gl(box, [chosen], SIZE)[0]
  alone, same_mask, _ = gl(box, [chosen], SIZE, white=True)[0]
  np.testing.assert_array_equal(mask, same_mask)
  np.testing.assert_array_equal(image[mask == 255], alone[mask == 255])
  assert (alone[mask == 0] == 255).all() and image[mask == 0].std() > 10
  # A floor has shadow: it is darker where the sun is behind the subject than where it is not.
  tall = view(scene="studio", light=(0.6, 0.6, 0.529), elevation=0.5)
  picture = gl(box, [tall], SIZE)[0]
  left, right = (picture.image[60:80, cut].mean() for cut in (slice(2, 18), slice(78, 94)))
  assert left < right - 3


def test_transparent_materials_cover_their_share_of_the_samples(gl, tmp_path):
  path = textured_box(tmp_path)
  lines = path.read_text().splitlines()
  plain = [line.replace("/1", "").replace("/2", "").replace("/3", "").replace("/4", "")
           if line.startswith("f") else line for line in lines]
  path.write_text("\n".join(line for line in plain if not line.startswith("vt")))
  (tmp_path / "box.mtl").write_text("newmtl front\nKd 1 0 0\nd 0.5\nnewmtl rest\nKd 0 1 0\nTr 1\n")
  _, mask, _ = gl(model(path), [view(elevation=0.0)], SIZE)[0]
  assert set(np.unique(mask[20:-20, 20:-20])) <= {127, 128}  # the front; all else is invisible


def test_edges_stay_sharp_and_round_things_round():
  box = trimesh.creation.box()
  vertices, faces = mesh._smoothed(
    np.asarray(box.vertices, np.float32), box.faces, np.zeros((8, 2), np.float32)
  )
  np.testing.assert_allclose(
    vertices[faces][:, :, 3:6], np.repeat(box.face_normals[:, None], 3, 1), atol=1e-6
  )
  ball = trimesh.creation.icosphere(subdivisions=3)
  vertices, faces = mesh._smoothed(
    np.asarray(ball.vertices, np.float32), ball.faces, np.zeros((len(ball.vertices), 2))
  )
  used = vertices[np.unique(faces)]
  np.testing.assert_allclose(used[:, 3:6], used[:, :3], atol=0.02)
  assert len(used) == len(ball.vertices)


def test_views_depend_on_seed_model_and_view_alone():
  first = scene.draw_views(0, "a", "chair", 24)
  assert scene.draw_view(0, "a", "chair", 7, 24) == first[7]
  assert len({*first, scene.draw_view(1, "a", "chair", 7, 24),
              scene.draw_view(0, "b", "chair", 7, 24)}) == 26  # fmt: skip
  azimuths = np.array([v.azimuth for v in first])
  np.testing.assert_array_equal(np.floor(azimuths / (2 * np.pi / 24)), np.arange(24))
  for v in first:
    assert "chair" in v.caption and any(p in v.caption for p in scene.SCENES[v.scene].phrases)


@pytest.mark.parametrize(
  ("name", "noun"),
  [("Wooden desk", "desk"), ("Armchair", "armchair"), ("redArm_chair-02", "chair"),
   ("Plate, glasses and cutlery", "plate"), ("Bowl with fruits", "bowl"), ("Sofa 2 seats", "sofa"),
   ("Clothes washing machine", "washing machine"), ("MP3 base", "base"), ("Bill 10€", "bill"),
   ("Woman shoes", "shoes"), ("3f2a", "object"), ("Rubik's cube", "rubik's cube"),
   ("Black table", "table"),
   ("Chair with cushion", "chair")],
)  # fmt: skip
def test_nouns(name, noun):
  assert nouns.class_noun(nouns.spaced(name)) == noun


def test_articles():
  words = ["armchair", "umbrella", "unicycle", "scissors", "glass", "bus", "teapot", "hourglass"]
  assert [with_article(word) for word in words] == [
    "an armchair", "an umbrella", "a unicycle", "scissors", "a glass", "a bus", "a teapot",
    "an hourglass",
  ]  # fmt: skip
  for noun in factors.CLASSES:  # the captions of the rendered world stay what they were
    assert with_article(noun) == f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


CATALOGUE = """
license=Creative Commons Attribution 3.0 Unported license
id#1=Shop#chair
name#1=Red ch\\u00e4ir
model#1=/shop/chair/chair.obj
creator#1=Ann
doorOrWindow#1=false
modelRotation#1=1 0 0 0 0 1 0 -1 0
width#1=20
height#1=60
depth#1=40
id#2=Shop#door
name#2=Door
model#2=/shop/door/door.obj
doorOrWindow#2=true
id#3=Shop#woman
name#3=Woman
category#3=Characters
model#3=/shop/woman/woman.obj
"""


def write_catalogue(file: Path) -> None:
  """A .sh3f with a cone along z, which its rotation sets upright: 20 wide, 60 high, 40 deep."""
  cone = trimesh.creation.cone(radius=1, height=2)
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("PluginFurnitureCatalog.properties", CATALOGUE.encode("latin-1"))
    archive.writestr("shop/chair/chair.obj", cone.export(file_type="obj"))


def test_a_catalogue_of_sweet_home_3d(tmp_path):
  write_catalogue(tmp_path / "Shop.sh3f")
  models, left_out = catalogue.find_models(tmp_path)
  assert [(m.key, m.name, m.noun, m.licence, m.creator) for m in models] == [
    ("Shop/chair", "Red chäir", "chäir", "CC-BY-3.0", "Ann")
  ]
  assert [entry.key for entry in left_out] == ["Shop/door", "Shop/woman"]
  parts = mesh.load(models[0])
  places = np.concatenate([part.vertices[:, :3] for part in parts])
  extent = np.ptp(places, axis=0)
  np.testing.assert_allclose(extent / extent[0], (1, 3, 2), rtol=1e-5)
  assert np.linalg.norm(places - (0, extent[1] / 2, 0), axis=1).max() == pytest.approx(1)
  np.testing.assert_allclose(places.min(0), (-extent[0] / 2, 0, -extent[2] / 2), atol=1e-6)
  top = places[places[:, 1] > extent[1] * 0.99]  # the tip alone: the cone stands on its base
  np.testing.assert_allclose(top, np.broadcast_to((0, extent[1], 0), top.shape), atol=1e-6)


def test_numbers_of_a_catalogue_that_are_none(tmp_path):
  for n, (before, after) in enumerate((("width#1=20", "width#1=20 cm"),
                                       ("modelRotation#1=1 0", "modelRotation#1=1 O"))):
    with zipfile.ZipFile(tmp_path / f"{n}.sh3f", "w") as archive:
      text = CATALOGUE.replace(before, after).encode("latin-1")
      archive.writestr("PluginFurnitureCatalog.properties", text)
  (tmp_path / "a.obj").write_text("v 0 0 0\n")
  models, left_out = catalogue.find_models(tmp_path)
  assert [m.key for m in models] == ["a.obj"]
  reasons = [entry.reason for entry in left_out if entry.key.endswith("chair")]
  assert reasons == ["its width '20 cm' is no number",
                     "its modelRotation '1 O 0 0 0 1 0 -1 0' is no number"]


@pytest.mark.parametrize(("arguments", "message"), [
  (["--sheet=s.png", "--count=0"], "error: --count=0 must be 1 or more"),
  (["--sheet=s.png", "--size=0"], "error: --size=0 must lie between"),
  (["--sheet=s.png", "--seed=-1"], "error: --seed=-1 must be 0 or more"),
  (["--out=o", "--seed=-1"], "error: --seed=-1 must be 0 or more"),
  (["--out=o", "--max_bad_share=2"], "error: .*max_bad_share=2.0 must be"),
  (["--sheet=/proc/none/s.png"], "error: --sheet=/proc/none/s.png cannot be written"),
  (["--sheet=sheet"], "error: --sheet=sheet .* end in .png"),
  (["--out=made"], "error: made/objects/1.0.0 has no recipe.json; choose another --out"),
  (["--models=stop", "--out=o"], "interrupted; the same command goes on"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
  def find_models(place, licences):
    if place == "stop":
      raise KeyboardInterrupt
    return [model(tmp_path / "a.obj")], []

  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.obj").write_text("v 0 0 0\n")
  (tmp_path / "made/objects/1.0.0").mkdir(parents=True)
  for module in (catalogue, dataset):
    monkeypatch.setattr(module, "find_models", find_models)
  monkeypatch.setattr(sys, "argv", ["objects", "--models=.", *arguments])
  with pytest.raises(SystemExit, match=f"^{message}") as error:
    command.main()
  assert "\n" not in str(error.value) and not (tmp_path / "s.png").exists()


def write_glb(file: Path, **extras) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  data = trimesh.creation.box().export(file_type="gltf")
  for name, content in data.items():
    if name == "model.gltf":
      tree = json.loads(content)
      tree["asset"]["extras"] = extras
      content = json.dumps(tree).encode()
      name = file.name
    (file.parent / name).write_bytes(content)


def test_licences_of_files_and_models_json(tmp_path):
  license = "CC-BY-4.0 (http://creativecommons.org/licenses/by/4.0/)"
  write_glb(tmp_path / "lamp/scene.gltf", title="Old Lamp", author="Bo", license=license)
  write_glb(tmp_path / "cat/scene.gltf", license="CC-BY-NC-4.0 (http://creativecommons.org/...)")
  for name in ("plain", "free"):
    trimesh.creation.box().export(tmp_path / f"{name}.obj")
  said = {"free.obj": {"name": "Crate", "licence": "CC0 1.0", "creator": "Cy"}}
  (tmp_path / "models.json").write_text(json.dumps(said))
  found = {which: catalogue.find_models(tmp_path, which) for which in catalogue.LICENCES}
  assert [m.key for m in found["cc0"][0]] == ["free.obj"]
  assert [m.key for m in found["cc-by"][0]] == ["free.obj", "lamp/scene.gltf"]
  by_key = {m.key: m for m in found["any"][0]}
  assert {key: (m.noun, m.licence, m.creator) for key, m in by_key.items()} == {
    "cat/scene.gltf": ("cat", "CC-BY-NC-4.0", ""), "free.obj": ("crate", "CC0", "Cy"),
    "lamp/scene.gltf": ("lamp", "CC-BY-4.0", "Bo"), "plain.obj": ("plain", "", ""),
  }  # fmt: skip
  assert [entry.key for entry in found["cc0"][1]] == ["cat/scene.gltf", "lamp/scene.gltf",
                                                      "plain.obj"]


@pytest.mark.parametrize(
  ("text", "name"),
  [("Creative Commons Attribution-NonCommercial-ShareAlike", "CC-BY-NC-SA"),
   ("CC0 1.0 Universal", "CC0"), ("Public domain (CC-0)", "CC0"), ("CC BY 4.0", "CC-BY-4.0"),
   ("CC Attribution 4.0", "CC-BY-4.0"), ("cc-by-sa 3.0", "CC-BY-SA-3.0"),
   ("All rights reserved by Accme", "All rights reserved by Accme")],
)  # fmt: skip
def test_licence_names(text, name):
  assert catalogue.licence_name(text) == name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Mugs, boxes, a ball; a broken file and an empty one."""
  folder = tmp_path_factory.mktemp("models")
  for n in range(5):
    trimesh.creation.cylinder(0.2 + 0.1 * n, 1).export(folder / f"mug_{n}.obj")
    trimesh.creation.box((1, 1 + n, 1)).export(folder / f"box {n}.glb")
  (folder / "broken.glb").write_bytes(b"glTF no more")
  (folder / "empty.obj").write_text("v 0 0 0\n")
  said = {"mug_0.obj": {"licence": "CC0", "creator": "Dee"}}
  (folder / "models.json").write_text(json.dumps(said))
  return folder


OPTIONS = dict(views=3, size=32, max_bad_share=0.2, progress=False)


@pytest.fixture(scope="module")
def built(gl, models, tmp_path_factory):
  """The data set of two workers that nobody disturbed."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dataset, "SHARD", 1)
    return dataset.build(models, tmp_path_factory.mktemp("data"), workers=2, **OPTIONS)


def contents(folder: Path) -> dict[str, bytes]:
  return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Stopped(Exception):
  """As if the power went."""


def test_a_stopped_run_goes_on_and_one_worker_writes_what_two_write(
  built, models, tmp_path, monkeypatch
):
  monkeypatch.setattr(dataset, "SHARD", 1)
  write_shard, written = dataset._write_shard, []

  def write_four(work, name, *args):
    if len(written) == 4:
      (work / f"{name}.tmp").write_bytes(b"half a record")
      raise Stopped
    written.append(name)
    write_shard(work, name, *args)

  with monkeypatch.context() as patch, pytest.raises(Stopped):
    patch.setattr(dataset, "_write_shard", write_four)
    dataset.build(models, tmp_path, workers=1, **OPTIONS)
  assert not (tmp_path / "objects/1.0.0").exists()

  again = []

  def write_rest(work, name, *args):
    again.append(name)
    write_shard(work, name, *args)

  monkeypatch.setattr(dataset, "_write_shard", write_rest)
  resumed = dataset.build(models, tmp_path, workers=1, **OPTIONS)
  assert len(again) == 8 and not {*again} & {*written}  # 12 models, each a shard of its own
  assert contents(resumed) == contents(built)
  assert [f.name for f in (tmp_path / "objects").iterdir()] == ["1.0.0"]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_disturbs_the_next(built, models, tmp_path):
  script = (
    "from data_pipeline.objects import dataset; dataset.SHARD = 1\n"
    f"dataset.build({str(models)!r}, {str(tmp_path)!r}, workers=2, **{OPTIONS})"
  )
  command = [sys.executable, "-c", script]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  work = tmp_path / "objects/incomplete.1.0.0"
  for count in (1, 5, 9):
    process, deadline = subprocess.Popen(command, env=environment), time.monotonic() + 120
    while len(list(work.glob("t*.json"))) < count:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "objects/1.0.0").exists()
  subprocess.run(command, env=environment, check=True)
  assert contents(tmp_path / "objects/1.0.0") == contents(built)


def test_broken_models_are_listed_and_credits_written(built):
  rows = list(csv.DictReader((built / "left_out.csv").open()))
  assert [row["model"] for row in rows] == ["broken.glb", "empty.obj"]
  assert rows[1]["reason"] == "has no triangles"
  credits = {row["subject"]: row for row in csv.DictReader((built / "CREDITS.csv").open())}
  assert len(credits) == 10
  assert credits["mug_0.obj"]["licence"] == "CC0" and credits["mug_0.obj"]["creator"] == "Dee"
  assert {key: row["split"] for key, row in credits.items()} == {
    key: dataset.split_of(key) for key in credits
  }
  assert "10 subjects" in dataset.summary(built)


def config(built, **changes):
  fields = dict(
    source="tfds", name="objects", data_dir=str(built.parents[1]), image_size=32,
    reference_ratio=0.8, reference_jitter=0.0, positive_ratio=(0.4, 0.9), group="class",
    group_ratio=1.0, reference_layout="centred", frames="multi_view",
    caption_drop_detail_prob=0.0, holdout_subjects=0, max_bad_share=0.0, placements=0,
    cached=False, cache_dir="",
  )  # fmt: skip
  return types.SimpleNamespace(**fields | changes)


def test_training_reads_it_with_classes_as_hard_negatives(built, tmp_path):
  tokenizer = make_tokenizer(tmp_path, max_length=160)
  loader = data_pipeline.make_loader(config(built), tokenizer, batch_size=3, seed=0)
  for _ in range(3):
    batch = next(loader)
    assert len(set(batch["class_id"])) == 1 and len(set(batch["subject_id"])) == 3
    assert batch["target"].std() > 10 and (batch["target_mask"].mean((1, 2)) > 5).all()
    assert (batch["reference"][:, 0, 0] == 255).all()  # cut out, on white
  loader.close()


def test_what_is_stored_are_the_pictures_of_the_renderer(built, models, gl):
  from data_pipeline.sources.tfds_source import SubjectRecords, open_builder

  records = SubjectRecords(open_builder("objects", str(built.parents[1])), "train")
  record = records[records.names.index("box 2.glb")]
  found = {m.key: m for m in catalogue.find_models(models)[0]}["box 2.glb"]
  views = scene.draw_views(0, "box 2.glb", "box", 3)
  pictures = gl(found, views, 32)
  for f, (chosen, picture) in enumerate(zip(views, pictures, strict=True)):
    image, mask = record.frame(f)
    np.testing.assert_array_equal(image, picture.image)
    np.testing.assert_array_equal(mask, picture.mask)
    assert record.captions(f) == [chosen.caption]
  poses = np.array(record.values("world_to_camera")).reshape(3, 3, 4)
  np.testing.assert_allclose(poses, [p.camera.world_to_camera for p in pictures], rtol=1e-6)


def test_too_many_broken_models_are_an_error_that_names_them(models, tmp_path, monkeypatch):
  bad = lambda found, workers, **_: (worker.Rendered(m, reason="is bad") for m in found)  # noqa: E731
  monkeypatch.setattr(worker, "render_models", bad)
  with pytest.raises(DataError, match=r"^3 of 12 models .*\w+ is bad; \w+") as caught:
    dataset.build(models, tmp_path, workers=1, **OPTIONS)
  assert "\n" not in str(caught.value) and not (tmp_path / "objects/1.0.0").exists()


def test_mistakes_are_told_in_one_line(built, models, tmp_path):
  wrong = [
    (dict(place=tmp_path / "none"), "does not exist"), (dict(place=tmp_path), "no 3D models"),
    (dict(views=1), "--views=1"), (dict(size=8), "--size=8"), (dict(licences="mit"), "unknown"),
    (dict(workers=0), "--workers=0"), (dict(licences="cc-by", place=models / "box 1.glb"), "none"),
    (dict(out=built.parents[1], seed=4), "other arguments"),
  ]  # fmt: skip
  for changes, message in wrong:
    arguments = dict(place=models, out=tmp_path / "out", workers=1) | OPTIONS | changes
    with pytest.raises(DataError, match=message) as caught:
      dataset.build(**arguments)
    assert "\n" not in str(caught.value)
  (tmp_path / "bad.sh3f").write_bytes(b"PK")
  with pytest.raises(DataError, match="not a Sweet Home 3D catalogue"):
    catalogue.find_models(tmp_path)
