"""Triples by TensorFlow operations are those that Pillow makes, to within 2 levels of 255."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import data_pipeline
from configs.subjects3d import get_config
from data_pipeline import images, manifest, manifest_frames, triples
from data_pipeline.errors import DataError
from data_pipeline.graph import files, loader, pictures, plan, resize

tf = pytest.importorskip("tensorflow", reason="the operations are TensorFlow's")
LEVELS = 2


class Words:
  """A tokenizer of which every word is a token."""

  model_max_length, pad_token_id = 12, 0

  def __init__(self):
    self._number = {}

  def __call__(self, text, verbose=False):
    ids = [self._number.setdefault(word, len(self._number) + 3) for word in text.split()]
    return {"input_ids": [1, *ids, 2]}

  def decode(self, ids):
    words = {number: word for word, number in self._number.items()}
    return " ".join(words.get(int(n), "") for n in ids)


@pytest.fixture
def word_tokenizer():
  tokenizer = Words()
  tokenizer("a the mug 0 1 2")  # numbers do not depend on which caption comes first
  return tokenizer


def data_config(**changes):
  data = get_config().data
  data.update(changes)
  return data


def photograph(rng, height, width):
  """Smooth shapes of all sizes, sharp edges, and noise."""
  out = rng.normal(0, 4, (height, width, 3))
  for cells in (2, 6, 20, 60):
    coarse = rng.normal(0, 40 / cells**0.5, (cells, cells, 3)).astype(np.float32)
    for c in range(3):
      fine = Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC)
      out[..., c] += 2 * np.asarray(fine)
  out[height // 3 : height // 2, width // 4 :] += rng.normal(0, 90, 3)
  return np.clip(out + 128, 0, 255).astype(np.uint8)


def ellipse(rng, height, width, soft=False):
  y, x = np.mgrid[:height, :width]
  cy, cx = rng.uniform(0.35, 0.65, 2) * (height, width)
  ry, rx = rng.uniform(0.2, 0.45, 2) * (height, width)
  distance = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
  return np.clip((1.2 - distance) * (400 if soft else 1e6), 0, 255).astype(np.uint8)


def encoded(pixels, kind="jpeg", **options):
  out = io.BytesIO()
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  image.save(out, kind, **options)
  return out.getvalue()


def turned(orientation):
  exif = Image.Exif()
  exif[274] = orientation
  return exif


def write_folder(root):
  """8 subjects of 3 frames: all subsamplings, orientations, kinds of masks; two frames are odd."""
  rng = np.random.default_rng(0)
  for n in range(8):
    place = root / f"s{n}"
    place.mkdir(parents=True)
    for f in range(3):
      sides = [(150, 200), (220, 130), (97, 101)][f]
      pixels = photograph(rng, *sides)
      if (n, f) == (5, 0):
        pixels = pixels[..., 0]  # grey
      data = encoded(pixels, quality=90, exif=turned(n + 1), progressive=n % 2 == 1,
                     **({} if pixels.ndim == 2 else dict(subsampling=f)))  # fmt: skip
      mask = ellipse(rng, *sides, soft=(n + f) % 2 == 1)
      if n + 1 in (2, 3, 4):  # not sideways: the mask counts as turned already
        mask = images._turn(mask, n + 1)
      (place / f"{f}.jpg").write_bytes(data[: len(data) // 2] if (n, f) == (6, 1) else data)
      mask = Image.fromarray(mask)
      if (n, f) == (7, 2):
        mask = mask.point(lambda v: int(v > 127)).convert("P")
        mask.putpalette([0, 0, 0, 200, 0, 0])
      mask.save(place / f"{f}_mask.png")
    captions = {f"{f}.jpg": [f"a mug {f}", f"the mug {f}"] for f in range(3)}
    texts = json.dumps(dict(class_noun="mug", captions=captions))
    (place / "captions.json").write_text(texts)
  return root


def make(root, decoder, tokenizer, **options):
  data = data_config(source="folder", name=str(root), image_size=48, max_bad_share=0.1,
                     decoder=decoder)  # fmt: skip
  return data_pipeline.make_loader(data, tokenizer, **dict(batch_size=8, seed=3) | options)


def test_batches_equal_those_of_pillow(tmp_path, word_tokenizer, monkeypatch):
  by_pillow = []
  call = loader._Slow.__call__

  def noted(self, step, row):
    by_pillow.append((int(step), int(row)))
    return call(self, step, row)

  monkeypatch.setattr(loader._Slow, "__call__", noted)
  root = write_folder(tmp_path / "data")
  graph, reference = (make(root, decoder, word_tokenizer) for decoder in ("tensorflow", "pillow"))
  for _ in range(4):
    got, wanted = next(graph), next(reference)
    assert got.keys() == wanted.keys()
    for key in wanted:
      assert got[key].dtype == wanted[key].dtype and got[key].shape == wanted[key].shape
      apart = np.abs(got[key].astype(int) - wanted[key].astype(int))
      assert apart.max() <= (LEVELS if wanted[key].dtype == np.uint8 else 0), key
      assert apart.mean() < 0.05
  by_pillow = {row for row in by_pillow if row[0] < 4}
  # Those with the broken or the palette's frame alone: at most the rows of two subjects.
  assert 4 <= len(by_pillow) <= 8


@pytest.mark.parametrize(("ending", "large", "chosen"), [
  (".jpg", 1200, True), (".jpg", 1201, False), (".png", 1200, False)])
def test_auto_is_for_large_jpegs(tmp_path, monkeypatch, ending, large, chosen):
  monkeypatch.setattr(loader, "_LARGE", large)
  Image.new("RGB", (40, 30)).save(tmp_path / f"a{ending}")
  frame = manifest.FrameRow(f"a{ending}", ["a mug"])
  subject = SimpleNamespace(files=lambda f: (str(tmp_path), frame))
  maker = SimpleNamespace(cache=None, triple=SimpleNamespace(reference_layout="centred"))
  assert loader.choose("auto", maker, [subject]) is chosen
  assert loader.choose("tensorflow", maker, [subject])


def test_a_picture_that_is_too_large_to_open_is_left_to_pillow(tmp_path, monkeypatch):
  Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  assert not loader._is_large_jpeg(str(tmp_path), manifest.FrameRow("a.jpg", ["a mug"]))


@pytest.mark.parametrize("box", [(0, 0, 90, 70), (10.3, 5.6, 70.1, 65.4), (40, 30, 52, 42)])
@pytest.mark.parametrize("kernel", [resize.BICUBIC, resize.BILINEAR])
def test_resizing_equals_pillows_beside_hard_edges(box, kernel):
  pixels = np.random.default_rng(0).integers(0, 2, (7, 9, 3)).repeat(10, 0).repeat(10, 1) * 255
  pixels = pixels.astype(np.uint8)
  how = {resize.BICUBIC: Image.Resampling.BICUBIC, resize.BILINEAR: Image.Resampling.BILINEAR}
  wanted = np.asarray(Image.fromarray(pixels).resize((24, 24), how[kernel], box))
  planes = tf.transpose(tf.constant(pixels), [2, 1, 0])
  got = resize.resize(planes, tf.constant(box, tf.float64), 24, kernel).numpy()
  assert np.abs(got.astype(int) - wanted).max() <= 1


def test_turning_twice_is_one_orientation():
  pixels = np.arange(12).reshape(3, 4)
  for orientation in range(1, 9):
    for quarter in range(4):
      wanted = np.rot90(images._turn(pixels, orientation), -quarter)
      both = files.TURNED[orientation - 1, quarter]
      np.testing.assert_array_equal(images._turn(pixels, both), wanted)


def odd_files():
  pixels = photograph(np.random.default_rng(1), 40, 50)
  jpeg, grey = encoded(pixels), Image.fromarray(pixels[..., 0])
  note = PngImagePlugin.PngInfo()
  note.add_text("Raw profile type exif", "\nexif\n 4\n00000000")
  xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
  return {
    "truncated": jpeg[:-300], "more follows": jpeg + b"more", "xmp": encoded(pixels, xmp=xmp),
    "cmyk": encoded(Image.fromarray(pixels).convert("CMYK")), "webp": encoded(pixels, "webp"),
    "palette": encoded(grey.convert("P"), "png"), "empty": b"", "text": b"no picture at all",
    "16 bits": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "png"),
    "clear colour": encoded(Image.fromarray(pixels), "png", transparency=(1, 2, 3)),
    "exif": encoded(pixels, "png", exif=turned(6)), "profile": encoded(pixels, "png", pnginfo=note),
  }  # fmt: skip


@pytest.mark.parametrize("name", odd_files())
def test_what_reads_otherwise_is_left_to_pillow(name):
  with pytest.raises(tf.errors.OpError):
    files.read_header(tf.constant(odd_files()[name]))


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("orientation", [0, 3, 6, 8, 9])
def test_orientation_is_that_of_images(order, orientation):
  exif = turned(orientation)
  exif.endian = ">" if order == "big" else "<"
  exif[271] = "a maker"
  data = encoded(photograph(np.random.default_rng(1), 16, 24), exif=exif)
  wanted = images._orientation(Image.open(io.BytesIO(data)))
  assert int(files.read_header(tf.constant(data)).orientation) == wanted


FRAMES = {
  "box": dict(box=(20, 10, 120, 90)), "rotation": dict(rotation=90), "tar": dict(tar=True),
  "threshold": dict(threshold=100, soft=True), "small mask": dict(half=True),
  "no mask": dict(mask_kind="none"), "all": dict(box=(9, 30, 140, 90), rotation=270, exif=5),
  "alpha": dict(mask_kind="alpha", soft=True),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_frames_of_a_manifest(name, tmp_path):
  options = dict(FRAMES[name])
  half, tar, exif = (options.pop(key, default) for key, default in
                     (("half", False), ("tar", False), ("exif", 1)))  # fmt: skip
  rng = np.random.default_rng(2)
  pixels, mask = photograph(rng, 120, 160), ellipse(rng, 120, 160, options.pop("soft", False))
  kind = options.setdefault("mask_kind", "file")
  if kind == "alpha":
    picture = encoded(np.dstack([pixels, mask]), "png")
  else:
    picture = encoded(pixels, quality=92, exif=turned(exif))
  mask = Image.fromarray(mask)
  blobs = {"picture": picture, "mask": encoded(mask.resize((80, 60)) if half else mask, "png")}
  names = ["picture"] + ["mask"] * (kind == "file")
  if tar:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
      for key in names:
        info = tarfile.TarInfo(key)
        info.size = len(blobs[key])
        archive.addfile(info, io.BytesIO(blobs[key]))
    with tarfile.open(tmp_path / "all.tar") as archive:
      for key in names:
        options[f"{key}_offset"] = archive.getmember(key).offset_data
        options[f"{key}_length"] = len(blobs[key])
  else:
    for key in names:
      (tmp_path / key).write_bytes(blobs[key])
  row = manifest.FrameRow(**dict.fromkeys(names, "all.tar") if tar else {k: k for k in names},
                          captions=["a mug"], **options)  # fmt: skip
  pair = manifest_frames.load_frame(str(tmp_path), row)
  described = {key: tf.constant(value, tf.string if plan.FRAME[key][0] is object else
                                plan.FRAME[key][0])
               for key, value in plan.describe(str(tmp_path), row).items()}  # fmt: skip
  frame = pictures.open_frame(described)
  np.testing.assert_array_equal(frame.mask, pair[1])
  config = triples.TripleConfig(image_size=40)
  u = np.array([0.7, 0.2, 0.9])
  ratio, position = triples.positive_place(config, u)
  placed = pictures.place(frame, 40, tf.constant(ratio, tf.float64), tf.constant(position))
  for got, wanted in ((placed, triples.show_positive(*pair, config, u)),
                      *zip(pictures.square(frame, 40), triples.square(*pair, 40))):
    assert np.abs(got.numpy().astype(int) - wanted).max() <= LEVELS


def test_plans_do_not_depend_on_the_hosts(tmp_path, word_tokenizer):
  """What is read, where it is placed, and the integers: of 1 host and of 4."""
  from data_pipeline.example import Maker
  from data_pipeline.sources.folder import FolderSubjects

  subjects = FolderSubjects(str(write_folder(tmp_path)))
  data = data_config(source="folder", name=str(tmp_path), image_size=48)
  rows = [range(8)] + [range(n, n + 2) for n in range(0, 8, 2)]
  plans = [plan.Planner(Maker(data, [word_tokenizer], batch_size=8, seed=1, s_words=2), subjects,
                        np.arange(8), subjects.table, r)(5) for r in rows]  # fmt: skip
  assert plans[0]["usable"].all()
  for key, whole in plans[0].items():
    np.testing.assert_array_equal(whole, np.concatenate([part[key] for part in plans[1:]]))


def test_tensorflow_where_it_cannot_be(tmp_path, word_tokenizer):
  root = write_folder(tmp_path)
  data = data_config(source="folder", name=str(root), reference_layout="frame",
                     decoder="tensorflow")  # fmt: skip
  with pytest.raises(DataError, match="reference_layout='frame'"):
    data_pipeline.make_loader(data, word_tokenizer, batch_size=8, seed=0)


@pytest.mark.slow  # a graph is traced for each of 12 loaders
def test_batches_do_not_depend_on_hosts_and_starts(tmp_path, word_tokenizer):
  root = write_folder(tmp_path)
  one = make(root, "tensorflow", word_tokenizer)
  wanted = [next(one) for _ in range(4)][3]
  for hosts in (1, 2, 8):
    parts = [next(make(root, "tensorflow", word_tokenizer, start_step=3, process_index=n,
                       process_count=hosts)) for n in range(hosts)]  # fmt: skip
    for key, whole in wanted.items():
      np.testing.assert_array_equal(whole, np.concatenate([part[key] for part in parts]))


@pytest.mark.slow  # a million frames
def test_a_million_frames_start_in_little_memory(tmp_path):
  script = Path(__file__).parent.parent / "benchmarks" / "photographs.py"
  done = subprocess.run([sys.executable, script, "--simulated=1000000", f"--scratch={tmp_path}"],
                        capture_output=True, text=True, check=True)  # fmt: skip
  figures = json.loads(done.stdout.splitlines()[-1])
  assert figures["frames"] == 1_000_000 and figures["subjects"] == 100_000
  assert figures["peak_rss_gb"] < 1.5
