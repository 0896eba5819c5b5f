"""Small data sets in the layouts that data_pipeline/readers know, with the oddities of each.

A picture is a box of a colour on blue; subject n is red 60 + 50 n, and of its frame f the box is
12 + 2 f pixels high. Each function writes below `root` and returns {subject's name: its noun}, of
the subjects of which triples can be made, and how much was made to be left out.
"""

import csv
import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = (40, 52)  # height, width
GROUND = (0, 0, 200)
X0, X1, Y0 = 20, 36, 10  # of the box


def red(n: int) -> int:
  return 60 + 50 * n


def height(f: int) -> int:
  return 12 + 2 * f


def picture(n: int, f: int, size=SIZE) -> np.ndarray:
  image = np.zeros((*size, 3), np.uint8) + np.array(GROUND, np.uint8)
  image[Y0 : Y0 + height(f), X0:X1] = (red(n), 0, 0)
  return image


def mask(f: int, value: int = 255, rest: int = 0, size=SIZE) -> np.ndarray:
  values = np.full(size, rest, np.uint8)
  values[Y0 : Y0 + height(f), X0:X1] = value
  return values


def area(f: int) -> int:
  return height(f) * (X1 - X0)


def save(file, pixels: np.ndarray) -> None:
  """JPEGs as near to the pixels as they can be."""
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(file, **jpeg(file.name))


def jpeg(name: str) -> dict:
  return dict(quality=100, subsampling=0) if name.endswith("jpg") else {}


def encoded(pixels: np.ndarray, kind: str) -> bytes:
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "JPEG" if kind == "jpg" else kind, **jpeg(kind))
  return out.getvalue()


def mvimgnet(root):
  """Numbered classes; 001.jpg.png; a name that is misspelt; a class without one."""
  root.mkdir(parents=True, exist_ok=True)
  (root / "mvimgnet_category.txt").write_text("2,wahser\n17,mug\n180,Cucumber\n")
  for n, instance in enumerate(("17/0a001b", "17/0a001c", "2/00002e", "999/000001")):
    for f in range(3):
      save(root / instance / "images" / f"{f + 1:03}.jpg", picture(n, f))
      save(root / instance / f"{f + 1:03}.jpg.png", mask(f))
    (root / instance / "sparse" / "0").mkdir(parents=True)
  return {"2/00002e": "washer", "17/0a001b": "mug", "17/0a001c": "mug"}, 1


def mvimgnet2(root):
  """Masks in a folder of their own; a JSON table with a name of two parts."""
  root.mkdir(parents=True, exist_ok=True)
  (root / "mvimgnet2_category.json").write_text(json.dumps({"360": "Marker,  Highlighter"}))
  for n in range(2):
    for f in range(3):
      save(root / "360" / f"0{n}" / "images" / f"{f:03}.jpg", picture(n, f))
      save(root / "360" / f"0{n}" / "masks" / f"{f:03}.png", mask(f))
  return {"360/00": "marker", "360/01": "marker"}, 0


def co3d(root):
  """Frame numbers that are not those of the files, sizes [H, W], masks of probabilities."""
  frames, sequences = [], []
  for n, (name, score) in enumerate((("110_1", 1.4), ("110_2", None), ("189_3", 0.1))):
    sequences.append(dict(sequence_name=name, category="teddybear", video=None, point_cloud=None,
                          viewpoint_quality_score=score))  # fmt: skip
    for f in range(4):
      files = [f"teddybear/{name}/{kind}/frame{2 * f + 5:06}.{end}"
               for kind, end in (("images", "jpg"), ("masks", "png"))]  # fmt: skip
      save(root / files[0], picture(n, f))
      save(root / files[1], mask(f, value=140, rest=60))
      frames.append(dict(
        sequence_name=name, frame_number=40 + f, frame_timestamp=0.1 * f, depth=None, viewpoint={},
        image=dict(path=files[0], size=list(SIZE)),
        mask=None if (n, f) == (1, 3) else dict(path=files[1], mass=area(f) * 0.5)))
  frames[3]["mask"]["mass"] = 2.0
  for name, values in (("frame", frames[::-1]), ("sequence", sequences)):
    content = gzip.compress(json.dumps(values).encode())
    (root / "teddybear" / f"{name}_annotations.jgz").write_bytes(content)
  (root / "teddybear" / "set_lists").mkdir()
  return {"teddybear/110_1": "teddy bear", "teddybear/110_2": "teddy bear"}, 3


def wildrgbd(root):
  """A scene of several objects."""
  for n in range(3):
    scene = root / "toy_car" / "scenes" / f"scenes_{n:03}"
    for f in range(3):
      save(scene / "rgb" / f"{f:05}.png", picture(n, f))
      save(scene / "masks" / f"{f:05}.png", mask(f))
      save(scene / "depth" / f"{f:05}.png", mask(f))
    (scene / "metadata").write_text(json.dumps({"w": SIZE[1], "h": SIZE[0], "K": [1] * 9}))
  kinds = {"single": ["scenes_000", "scenes/scenes_001"], "multi": ["scenes_002"], "hand": []}
  (root / "toy_car" / "types.json").write_text(json.dumps(kinds))
  names = [f"toy_car/scenes/scenes_{n:03}" for n in range(2)]
  return dict.fromkeys(names, "toy car"), 1


def omniobject3d(root):
  """Numbers with gaps; one object is rendered on black, without alpha, the other with it."""
  for n, name in enumerate(("toy_train_001", "toy_train_004")):
    for f in range(3):
      pixels = picture(n, f) * (mask(f)[..., None] > 0)
      pixels = np.dstack([pixels, mask(f)]) if n else pixels
      folder = root / "blender_renders" / "toy_train" / name / "render"
      save(folder / "images" / f"r_{f * 6}.png", pixels.astype(np.uint8))
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": []}))
  return {f"toy_train/toy_train_00{n}": "toy train" for n in (1, 4)}, 0


def openimages(root):
  """XMax before YMin, masks of another size, a turned picture, groups, a class without a name."""
  (root / "annotations").mkdir(parents=True)
  labels = {"/m/02jvh9": "Mug", "/m/01s105": "Cabinetry"}
  names = [["LabelName", "DisplayName"], *labels.items()]
  segments = [["MaskPath", "ImageID", "LabelName", "BoxID", "BoxXMin", "BoxXMax", "BoxYMin",
               "BoxYMax", "PredictedIoU", "Clicks"]]  # fmt: skip
  boxes = [["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
            "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]]  # fmt: skip
  turns, good = [["ImageID", "Subset", "License", "Author", "Rotation"]], {}
  for n, label in enumerate(("/m/02jvh9", "/m/01s105", "/m/02jvh9", "/m/0zzzz")):
    image = f"{n}f3a{n}"
    file = f"{image}_{label[1:].replace('/', '')}_5b{n}.png"
    pixels, values = picture(n, 0), mask(0)
    if n == 1:  # stored so that it has to be turned by 90 degrees counter-clockwise
      pixels, values = np.rot90(pixels, -1), np.rot90(values, -1)
    save(root / "train" / f"{image}.jpg", np.ascontiguousarray(pixels))
    save(root / "masks" / image[0] / file, np.kron(values, np.ones((2, 2), np.uint8)))
    box = [X0 / SIZE[1], X1 / SIZE[1], Y0 / SIZE[0], (Y0 + height(0)) / SIZE[0]]
    segments.append([file, image, label, f"5b{n}", *box, 0.9, ""])
    boxes.append([image, "xclick", label, 1, *box, 0, -1, int(n == 2), 0, 0])
    turns.append([image, "train", "CC-BY", f"author {n}", 90 if n == 1 else ""])
    if n < 2:
      good[file.removesuffix(".png")] = ("mug", "cabinetry")[n]
  files = {"oidv7-class-descriptions-boxable": names, "train-annotations-bbox": boxes,
           "train-annotations-object-segmentation": segments,
           "train-images-boxable-with-rotation": turns}  # fmt: skip
  for name, rows in files.items():
    with (root / "annotations" / f"{name}.csv").open("w", newline="") as file:
      csv.writer(file).writerows(rows)
  return good, 2


def openimages_boxes(root):
  """Boxes alone: the frame is the box, one of them in a picture that has to be turned."""
  openimages(root)
  (root / "annotations" / "train-annotations-object-segmentation.csv").unlink()
  file = root / "annotations" / "train-annotations-bbox.csv"
  rows = list(csv.reader(file.open()))
  x0, x1, y0, y1 = (float(rows[2][n]) for n in range(4, 8))
  rows[2][4:8] = 1 - y1, 1 - y0, x0, x1  # in the stored picture
  with file.open("w", newline="") as table:
    csv.writer(table).writerows(rows)
  return {"0f3a0 box 0": "mug", "1f3a1 box 1": "cabinetry"}, 2


def subjects200k(root):
  """Two halves of 512 in 1056 x 528; quality and description may be null."""
  good, rows = {}, []
  for n in range(4):
    wide = np.full((528, 1056, 3), 255, np.uint8)
    for f in range(2):
      x = 16 + 528 * f
      wide[16:528, x : x + 512] = (red(n), 0, 100 * f)
    quality = dict(compositeStructure=5, objectConsistency=4 if n == 3 else 5, imageQuality=5)
    rows.append(dict(
      image=dict(bytes=encoded(wide, "png"), path=None), collection="collection_2",
      quality_assessment=None if n == 2 else quality,
      description=dict(item=f"Mug No. {n}", description_0="This item is on a shelf.",
                       description_1=f"A mug no. {n} in the snow.", category="Kitchen",
                       description_valid=True)))  # fmt: skip
  (root / "data").mkdir(parents=True)
  name = "train-00000-of-00001"
  table = pa.Table.from_pylist(rows)
  pq.write_table(table, root / "data" / f"{name}.parquet", row_group_size=3)
  good = {f"{name} 0 {n}": f"mug no. {n}" for n in range(2)}
  return good, 2


def syncd(root):
  """JPEG masks of another size; a near copy of all others."""
  groups = []
  for n in range(2):
    files = [f"rigid/{n}_{f}.jpg" for f in range(3 + n)]
    scores = np.full((len(files), len(files)), 0.8) + 0.2 * np.eye(len(files))
    for f, file in enumerate(files):
      save(root / file, picture(n, f))
      small = mask(f)[::2, ::2]
      save(root / "rigid" / "masks" / f"{n}_{f}.jpg", small)
    if n:
      scores[3], scores[:, 3] = 0.99, 0.99
    groups.append(dict(filenames=files, prompts=[f"a red box, picture {f}" for f in range(3 + n)],
                       dino_scores=scores.tolist(), aesthetics_scores={}))  # fmt: skip
  (root / "rigid_metadata_with_scores.json").write_text(json.dumps(groups))
  return {f"rigid_metadata_with_scores {n}": "object" for n in range(2)}, 1


def uno(root):
  """Labels of a split; a low score, and a pair without one."""
  pairs, good = [], {}
  for n, score in enumerate((4.0, 3.5, 2.0, None)):
    paths = [f"split1/object365_Mug_{n}_{f}_52x40.png" for f in range(2)]
    for f, path in enumerate(paths):
      save(root / "images" / path, picture(n, f))
    caption = dict(img_path1="A blue mug on a table.", img_path2="It stands in the snow.",
                   judgment="same", subject=["Blue mug"])  # fmt: skip
    cot = dict(score_part={}) | ({} if score is None else {"score_final": score})
    pairs.append(dict(img_path1=paths[0], img_path2=paths[1], caption=caption, vlm_filter_cot=cot))
    if score and score >= 3.5:
      good[paths[0].removesuffix(".png")] = "blue mug"
  (root / "labels").mkdir()
  (root / "labels" / "split1.json").write_text(json.dumps(pairs))
  return good, 2


def webdataset(root):
  """A subject over two shards; keys with dots in a folder's name; a member of no frame."""
  root.mkdir(parents=True, exist_ok=True)
  for shard in range(2):
    with tarfile.open(root / f"data-{shard:06}.tar", "w") as archive:
      for n in range(2):
        for f in (2 * shard, 2 * shard + 1):
          said = dict(class_noun="mug", caption=f"a mug, view {f}", licence="CC0")
          key = f"v1.0/mug {n}/{f:04}"
          add(archive, f"{key}.jpg", encoded(picture(n, f), "jpg"))
          add(archive, f"{key}.json", json.dumps(said).encode())
          add(archive, f"{key}.mask.png", encoded(mask(f), "png"))
      add(archive, "README", b"no frame")
  return {f"v1.0/mug {n}": "mug" for n in range(2)}, 0


def pictures(root):
  """Any folder: nouns are the folders' names, captions lie in text files, masks beside."""
  for n, name in enumerate(("blue_mug_01", "blue_mug_02", "007")):
    for f in range(3):
      save(root / name / f"view{f}.jpg", picture(n, f))
      save(root / name / f"view{f}_mask.png", mask(f))
    (root / name / "view1.txt").write_text("a blue mug in the snow\n")
  return dict.fromkeys(("blue_mug_01", "blue_mug_02"), "blue mug"), 1


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
  member = tarfile.TarInfo(name)
  member.size = len(content)
  archive.addfile(member, io.BytesIO(content))


ALL = {make.__name__: make for make in (
  mvimgnet, mvimgnet2, co3d, wildrgbd, omniobject3d, openimages, openimages_boxes, subjects200k,
  syncd, uno, webdataset, pictures)}  # fmt: skip
