"""Preparation: what is written is known, what is bad is named, and bytes do not depend on how."""

import csv
import importlib.machinery
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import layouts
import numpy as np
import pytest
import tiny_onnx
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, Manifest, SubjectRow
from data_pipeline.prepare import __main__ as command
from data_pipeline.prepare import copies, inputs, parts
from data_pipeline.prepare.frames import crop_box, nearest_bucket
from data_pipeline.prepare.settings import Settings
from data_pipeline.readers import texts
from data_pipeline.words import find_noun

ROOT = Path(__file__).parent.parent
SIDES = (60, 80)  # height, width
BOX = (20, 10, 50, 40)  # x0, y0, x1, y1 of the subject


def picture(seed: int, sides=SIDES, box=BOX) -> np.ndarray:
  """A smooth background and a bright red subject with a pattern."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 120, (4, 5, 3), dtype=np.uint8)
  small[..., 0] //= 4
  pixels = np.array(Image.fromarray(small).resize(sides[::-1], Image.Resampling.BICUBIC))
  x0, y0, x1, y1 = box
  pixels[y0:y1, x0:x1] = (250, rng.integers(0, 255), rng.integers(0, 255))
  pixels[y0 : y0 + 9, x0 : x0 + 9] = (255, 255, 255)
  return pixels


def mask(sides=SIDES, box=BOX) -> np.ndarray:
  values = np.zeros(sides, np.uint8)
  values[box[1] : box[3], box[0] : box[2]] = 255
  return values


def save(array, path, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **options)


@pytest.fixture(scope="module")
def red(tmp_path_factory):
  pytest.importorskip("onnxruntime", reason="segmenters are run by onnxruntime")
  return tiny_onnx.write_red(tmp_path_factory.mktemp("network") / "red.onnx", 64)


@pytest.fixture
def prepare():
  pytest.importorskip("apache_beam", reason="the preparation runs on apache_beam")
  from data_pipeline.prepare import run

  def call(data, out, **settings):
    options = dict(name="things", encoding="png", max_side=40, min_subject=4, frames_per_shard=4)
    manifest = data if isinstance(data, Manifest) else inputs.read_manifest(str(data))
    return run.prepare(manifest, Settings(**options | settings), str(out), workers=1)

  return call


def write_subjects(root, subjects=3, frames=3):
  """Subjects with alpha channels, mask files and nothing, in turns; 'cup_0' has captions."""
  for s in range(subjects):
    for f in range(frames):
      pixels, place = picture(10 * s + f), root / f"cup_{s}"
      if s % 3 == 0:
        pixels = np.dstack([pixels, mask()])
      save(pixels, place / f"{f}.png")
      if s % 3 == 1:
        save(mask(), place / f"{f}_mask.png")
  texts = {"0.png": ["a cup here", "the Cup there"], "1.png": "in the snow", "2.png": "two cups"}
  (root / "cup_0" / "captions.json").write_text(json.dumps(dict(
    class_noun="cup", captions=texts, references=["0.png"], family="set")))
  return root


def records(folder):
  from data_pipeline.sources import tfds_source

  builder = tfds_source.open_builder(folder.parent.name, str(folder.parent.parent))
  return tfds_source.SubjectRecords(builder, "train")


def contents(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in Path(folder).iterdir()
          if not path.name.startswith("subjects_")}  # fmt: skip  (the index of a first reading)


# ---- what is written


def test_what_is_written_is_what_was_given(prepare, red, tmp_path):
  folder = prepare(write_subjects(tmp_path / "in"), tmp_path / "out", segmenter=red)
  read = records(folder)
  assert read.names == ["cup_0", "cup_1", "cup_2"] and read.pictures == 9
  assert [read[n].noun for n in range(3)] == ["cup"] * 3
  assert len(set(read.table.class_id)) == 1 and list(read.table.family_id) == [0, -1, -1]
  assert [list(read[0].captions(f)) for f in range(3)] == [
    ["a cup here", "the Cup there"], ["cup, in the snow"], ["cup, two cups"]]
  assert list(read[1].captions(2)) == ["a photo of a cup"]
  assert read[0].is_reference().tolist() == [True, False, False] and all(read[1].is_reference())
  # The subject is 30 pixels long: a margin of 15, cut off at the upper edge; 60 to 40 pixels.
  crop = (5, 0, 65, 55)
  for n in (0, 1):
    for f in range(3):
      shown, cut = read[n].frame(f)
      wanted = Image.fromarray(picture(10 * n + f)).crop(crop).resize((40, 37), Image.BICUBIC)
      np.testing.assert_array_equal(shown, wanted)
      wanted = Image.fromarray(mask()).crop(crop).resize((40, 37), Image.BILINEAR)
      np.testing.assert_array_equal(cut, wanted)
      assert read[n].values("crop")[4 * f : 4 * f + 4] == list(crop)
      assert read[n].values("original_size")[2 * f : 2 * f + 2] == list(SIDES)
  made = read[2].frame(0)[1] >= 128  # by the network, whose mask is the red channel at 64 x 64
  size = made.shape
  assert 0.9 < made.sum() / (size[0] * size[1] * 30 * 30 / 60 / 55) < 1.1
  assert read[2].texts("source") == ["cup_2/0.png", "cup_2/1.png", "cup_2/2.png"]

  notes = json.loads((folder / "manifest.json").read_text())
  assert notes["counts"] == dict(
    subjects=3, frames=9, subjects_read=3, frames_read=9,
    masks=dict(alpha=3, file=3, segmenter=3),
    captions={"given": 1, "given, noun added": 2, "template": 6},
    buckets_height_x_width=notes["counts"]["buckets_height_x_width"], licences={"unknown": 3},
    left_out={})
  assert sum(notes["counts"]["buckets_height_x_width"].values()) == 9
  assert notes["segmenter"].startswith("isnet sha256:")
  assert sorted(path.name for path in folder.parent.iterdir()) == ["1.0.0"]
  sheet = np.asarray(Image.open(folder / "contact_sheet.jpg"), float)
  assert sheet.shape == (3 * 128, 150 + 6 * 128, 3)
  shown, cut = (array.astype(float) for array in read[1].frame(2))
  pale = shown + 0.75 * (255 - shown) * (1 - cut[..., None] / 255)
  cell = sheet[128:256, 150 + 2 * 128 :][:, :128]  # in the middle of its cell: 40 x 37
  assert np.abs(cell[45:82, 44:84] - pale).mean() < 6 and cell[:40].min() > 250
  assert [p.name for p in sorted(folder.glob("things*"))] == [
    f"things-train.tfrecord-{n:05d}-of-00002" for n in range(2)]


def test_tfds_itself_and_the_training_read_it(prepare, tmp_path):
  import tensorflow_datasets as tfds
  from test_sources import config, take
  from test_triples import make_tokenizer

  root = write_subjects(tmp_path / "in", subjects=2)
  texts = {f"{f}.png": f"the cup {f}" for f in range(3)}
  (root / "cup_0" / "captions.json").write_text(json.dumps(dict(class_noun="cup", captions=texts)))
  folder = prepare(root, tmp_path / "out", encoding="jpeg")
  (first, second) = tfds.as_numpy(tfds.builder_from_directory(folder).as_dataset(split="train"))
  assert {first["subject_id"], second["subject_id"]} == {b"cup_0", b"cup_1"}
  wanted = Image.fromarray(picture(0)).crop((5, 0, 65, 55)).resize((40, 37), Image.BICUBIC)
  first = first if first["subject_id"] == b"cup_0" else second
  assert np.abs(first["frames"][0].astype(int) - np.asarray(wanted)).mean() < 3
  tokenizer = make_tokenizer(tmp_path, max_length=160)
  data = config(source="tfds", name="things", data_dir=str(tmp_path / "out"))
  (batch,) = take(data, tokenizer, 1)
  assert batch["target"].shape == (4, 32, 32, 3)
  opaque = batch["target_mask"] >= 128
  assert opaque.any((1, 2)).all() and batch["target"][opaque].mean(0)[0] > 200  # red


def test_a_manifest_with_boxes_rotations_and_credits(prepare, tmp_path):
  """The frame is a part of a turned picture, the mask has a threshold, as readers describe it."""
  save(np.rot90(picture(1)), tmp_path / "stored.png")
  save(np.rot90(mask() // 2), tmp_path / "stored_mask.png")
  save(picture(2), tmp_path / "plain.png")
  save(mask(), tmp_path / "plain_mask.png")
  turned = FrameRow("stored.png", ["cup"], "stored_mask.png", "file", threshold=100, rotation=90,
                    box=(10, 5, 70, 55))
  plain = FrameRow("plain.png", ["cup"], "plain_mask.png", "file")
  rows = [SubjectRow("a", "cup", [turned, plain], licence="CC0", creator="Ann, of Arbor")]
  manifest = Manifest.from_subjects(rows, where="here", layout="test", root=str(tmp_path))
  manifest.write(tmp_path / "manifest")
  folder = prepare(tmp_path / "manifest", tmp_path / "out", margin=np.inf, max_side=99)
  shown, cut = records(folder)[0].frame(0)
  np.testing.assert_array_equal(shown, picture(1)[5:55, 10:70])
  np.testing.assert_array_equal(cut, mask()[5:55, 10:70])
  assert list(csv.reader(io.StringIO((folder / "credits.csv").read_text()))) == [
    ["subject", "licence", "creator"], ["a", "CC0", "Ann, of Arbor"]]
  assert json.loads((folder / "manifest.json").read_text())["counts"]["licences"] == {"CC0": 1}


def test_array_records_have_the_same_subjects(prepare, tmp_path):
  root = write_subjects(tmp_path / "in", subjects=2)
  one = records(prepare(root, tmp_path / "out"))
  other = records(prepare(root, tmp_path / "out", name="others", file_format="array_record"))
  assert one.names == other.names and other.fingerprint() != one.fingerprint()
  from tensorflow.train import Example

  for n in range(2):
    assert one[n]._data == other[n]._data
    # Features in one order: TFDS' own serialization has another one in every process.
    assert Example.FromString(one[n]._data).SerializeToString(deterministic=True) == one[n]._data


def capitals(pixels, noun):
  return f"{noun.upper()} of {pixels.shape[0]} rows"


def test_a_captioner_of_ones_own(prepare, tmp_path):
  root = write_subjects(tmp_path / "in", subjects=2)
  folder = prepare(root, tmp_path / "out", captioner="test_prepare:capitals")
  assert list(records(folder)[1].captions(0)) == ["CUP of 60 rows"]
  for wrong in ("test_prepare:none", "no_module:f", "test_prepare", "test_prepare:ROOT"):
    with pytest.raises(DataError, match=f"--captioner={wrong} "):
      Settings("a", captioner=wrong).check()


# ---- what is bad, and what is left out


def spoil(root):
  """Five bad frames of 14, of a kind each, and one subject without a second frame."""
  (root / "cup_0" / "0.png").write_bytes((root / "cup_0" / "0.png").read_bytes()[:300])
  save(0 * mask(), root / "cup_1" / "0_mask.png")
  save(mask((60, 70)), root / "cup_1" / "1_mask.png")
  save(picture(7) * np.uint8([0, 1, 1]), root / "cup_2" / "0.png")  # the network sees red alone
  save(np.dstack([picture(8), mask()]), root / "cup_9" / "only.png")
  return root


def test_bad_frames_are_named_and_nothing_is_left_behind(prepare, red, tmp_path):
  root = spoil(write_subjects(tmp_path / "in", subjects=4))
  with pytest.raises(DataError, match="5 of 13 frames are bad, more than max_bad_share=0.0: "
                     ) as error:
    prepare(root, tmp_path / "out", segmenter=red)
  said = str(error.value)
  assert "\n" not in said and "raise --max_bad_share" in said
  for words in ("cup_0/0.png: unusable, .*cannot be read", "cup_1/0.png: unusable, .* is empty",
                "cup_1/1.png: unusable, .*proportions", "cup_2/0.png: no subject found",
                "cup_9/only.png: subject with one frame"):
    assert re.search(words, said), words
  assert not (tmp_path / "out" / "things" / "1.0.0").exists()
  # A higher share goes on from there.
  folder = prepare(root, tmp_path / "out", segmenter=red, max_bad_share=0.5)
  notes = json.loads((folder / "manifest.json").read_text())
  assert notes["counts"]["left_out"] == {
    "no subject found": 1, "subject with one frame": 1, "unusable": 3,
    "too few frames are left of its subject": 1}
  assert records(folder).names == ["cup_0", "cup_2", "cup_3"]
  assert {item["name"] for item in notes["left_out"]} == {
    "cup_0/0.png", "cup_1/0.png", "cup_1/1.png", "cup_1/2.png", "cup_2/0.png", "cup_9/only.png"}


def test_a_mended_frame_is_read_again(prepare, red, tmp_path):
  root = write_subjects(tmp_path / "in", subjects=2)
  whole = (root / "cup_0" / "0.png").read_bytes()
  (root / "cup_0" / "0.png").write_bytes(whole[:300])
  with pytest.raises(DataError, match="1 of 6 frames are bad"):
    prepare(root, tmp_path / "out")
  (root / "cup_0" / "0.png").write_bytes(whole)
  assert records(prepare(root, tmp_path / "out")).pictures == 6


def test_small_subjects_and_copies_are_left_out(prepare, tmp_path):
  root = write_subjects(tmp_path / "in", subjects=2)
  base = Image.fromarray(picture(11))
  base.resize((160, 120), Image.BICUBIC).save(root / "cup_0" / "copy.jpg", quality=80)
  save(np.kron(mask(), np.ones((2, 2), np.uint8)), root / "cup_0" / "copy_mask.png")
  recoloured = picture(11)[..., [1, 2, 0]].copy()
  save(recoloured, root / "cup_1" / "recoloured.png")
  save(mask(), root / "cup_1" / "recoloured_mask.png")
  far = (30, 30, 33, 33)
  save(picture(77, box=far), root / "cup_1" / "far.png")
  save(mask(box=far), root / "cup_1" / "far_mask.png")
  (root / "cup_0" / "captions.json").unlink()
  notes = json.loads((prepare(root, tmp_path / "out") / "manifest.json").read_text())
  assert notes["left_out"] == [
    dict(name="cup_1/1.png", kind="copy", reason="of cup_0/copy.jpg"),
    dict(name="cup_1/far.png", kind="tiny subject", reason="its subject is 3 pixels long")]
  again = prepare(root, tmp_path / "out", name="all", copy_bits=-1, min_subject=1)
  assert json.loads((again / "manifest.json").read_text())["left_out"] == []


def test_a_picture_that_a_subject_has_twice_is_no_copy(prepare, tmp_path):
  """Sets of one view, such as Open Images, list it so; in another subject it is a wrong label."""
  for n in range(2):
    save(np.dstack([picture(n), mask()]), tmp_path / f"{n}.png")
  a, b = (FrameRow(f"{n}.png", ["cup"], mask_kind="alpha") for n in range(2))
  rows = [SubjectRow("a", "cup", [a, a]), SubjectRow("b", "cup", [b, b, a])]
  manifest = Manifest.from_subjects(rows, where="here", layout="test", root=str(tmp_path))
  notes = json.loads((prepare(manifest, tmp_path / "out") / "manifest.json").read_text())
  assert notes["left_out"] == [dict(name="0.png", kind="copy", reason="of 0.png")]
  assert notes["counts"]["frames"] == 4
  # Two subjects of one photo, by masks of their own: neither is a copy of the other.
  for n in range(2):
    save(np.roll(mask(), 3 * n, axis=1), tmp_path / f"mask_{n}.png")
  rows = [SubjectRow(str(n), "cup", 2 * [FrameRow(
    "0.png", ["cup"], mask=f"mask_{n}.png", mask_kind="file")]) for n in range(2)]
  manifest = Manifest.from_subjects(rows, where="here", layout="test", root=str(tmp_path))
  notes = json.loads((prepare(manifest, tmp_path / "out2") / "manifest.json").read_text())
  assert notes["left_out"] == [] and notes["counts"]["subjects"] == 2


def test_what_is_seen_in_one_photograph_are_no_copies(prepare, tmp_path):
  """Segments and boxes of Open Images: their pictures are one file, their subjects are not."""
  boxes = (2, 10, 32, 40), (45, 10, 75, 40)
  both = np.maximum(*(mask(box=box) for box in boxes))
  save(np.dstack([picture(1, box=boxes[0]), both]), tmp_path / "photo.png")
  rows = []
  for n, box in enumerate(boxes):
    save(mask(box=box), tmp_path / f"{n}.png")
    segment = FrameRow("photo.png", ["a cup"], f"{n}.png", "file")
    part = FrameRow("photo.png", ["a cup"], mask_kind="alpha", box=(40 * n, 0, 40 + 40 * n, 60))
    rows += [SubjectRow(f"segment {n}", "cup", [segment, segment]),
             SubjectRow(f"box {n}", "cup", [part, part])]
  rows += [SubjectRow("wrong label", "mug", rows[0].frames)]
  manifest = Manifest.from_subjects(rows, where="here", layout="test", root=str(tmp_path))
  folder = prepare(manifest, tmp_path / "out", margin=0)
  assert records(folder).names == ["segment 0", "box 0", "segment 1", "box 1"]
  left_out = json.loads((folder / "manifest.json").read_text())["left_out"]
  assert left_out == 2 * [dict(name="photo.png", kind="copy", reason="of photo.png")]


def test_captions_that_readers_fill_in_are_missing_ones(prepare, tmp_path):
  layouts.pictures(tmp_path / "in")
  said = {}
  for name, settings in dict(template=dict(caption_template="{a} {noun}, as it is"),
                             captioner=dict(captioner="test_prepare:capitals")).items():
    folder = prepare(tmp_path / "in", tmp_path / "out", name=name, copy_bits=-1, **settings)
    said[name] = [list(records(folder)[0].captions(f)) for f in range(3)]
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["captions"] == {"given": 2, name: 4}
  assert said["template"] == [["a blue mug, as it is"], ["a blue mug in the snow"],
                              ["a blue mug, as it is"]]
  assert said["captioner"][0] == ["BLUE MUG of 40 rows"]


def test_copies_are_those_that_a_look_at_all_pairs_finds():
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 256, (300, 32), dtype=np.uint8)
  thumbs = rng.integers(0, 256, (300, 192), dtype=np.uint8)
  for n in range(100, 220):  # of an earlier one, with up to 9 other bits, some with other colours
    original = int(rng.integers(0, 100))
    bits = np.unpackbits(hashes[original])
    bits[rng.choice(256, n % 10, replace=False)] ^= 1
    hashes[n], thumbs[n] = np.packbits(bits), thumbs[original] ^ (3 if n % 7 else 63)
  bits = np.unpackbits(hashes, axis=1).astype(int)
  differing = bits.sum(1)[:, None] + bits.sum(1) - 2 * bits @ bits.T
  levels = np.abs(thumbs[:, None].astype(np.int16) - thumbs).max(-1)
  for limit in (0, 4, 7):
    copy_of = np.full(300, -1)
    for later in range(300):
      for earlier in range(later):
        alike = differing[later, earlier] <= limit and levels[later, earlier] <= 10
        if alike and copy_of[earlier] < 0:
          copy_of[later] = earlier
          break
    assert (copy_of >= 0).sum() > 5
    apart = np.arange(300), np.arange(300)[:, None], np.zeros((300, 1), int)
    np.testing.assert_array_equal(copies.find_copies(hashes, thumbs, apart, limit), copy_of)
  same = 0 * apart[0], 0 * apart[1], apart[2]
  assert (copies.find_copies(hashes, thumbs, same, 7) == -1).all()  # listed twice
  same = apart[0], 0 * apart[1], apart[1]
  assert (copies.find_copies(hashes, thumbs, same, 7) == -1).all()  # other parts of one picture
  same = apart[0], 0 * apart[1], apart[2]
  assert (copies.find_copies(hashes, thumbs, same, 7) >= 0).sum() > 5


# ---- boxes, buckets, words


def test_the_crop_has_a_margin_inside_the_picture():
  assert crop_box((20, 10, 50, 30), (60, 80), 0.5) == (5, 0, 65, 45)
  assert crop_box((20, 10, 50, 30), (60, 80), 0) == (20, 10, 50, 30)
  assert crop_box((20, 10, 50, 30), (60, 80), np.inf) == (0, 0, 80, 60)


def test_buckets_are_sdxls():
  """Rows of the table in SDXL's appendix I: (height, width) for pictures of those proportions."""
  for bucket in ((512, 2048), (576, 1792), (640, 1600), (768, 1344), (832, 1216), (896, 1152),
                 (1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (2048, 512)):
    height, width = bucket
    assert nearest_bucket(2 * height, 2 * width, 1024) == bucket
  assert nearest_bucket(100, 5000, 1024) == (512, 2048)
  assert nearest_bucket(48, 64, 64) == (56, 72)
  for side in (16, 40, 64, 512):
    height, width = nearest_bucket(300, 400, side)
    assert height * width <= side**2 and height % max(8, side // 16) == 0


def test_a_noun_counts_as_words_of_its_own():
  assert find_noun("The  Teddy Bear sits", "teddy bear") and find_noun("a cup.", "cup")
  assert not find_noun("two cups", "cup") and not find_noun("a teddy, a bear", "teddy bear")
  for noun, thing in (("orange", "an orange"), ("unicycle", "a unicycle"), ("cactus", "a cactus"),
                      ("scissors", "scissors")):
    # What readers fill in, and the template makes where they do not.
    assert Settings("a").template_caption(noun) == f"a photo of {thing}"
    assert texts.plain_caption(noun) == f"a photo of {thing}"


def test_groups_are_of_whole_subjects():
  assert parts.group_subjects(np.array([3, 3, 3, 9, 1, 1]), 4) == [
    range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
  assert parts.group_subjects(np.array([2]), 512) == [range(0, 1)]


# ---- a folder of subjects


def test_folders_without_captions(tmp_path):
  root = write_subjects(tmp_path / "in")
  save(picture(1), root / "red_tea-pot 02" / "a.jpg")
  (root / "empty").mkdir()
  save(picture(1), root / "42" / "a.jpg")
  manifest = inputs.read_manifest(str(root))
  assert manifest.subjects["noun"].to_pylist() == ["cup", "cup", "cup", "red tea pot"]
  assert [item.name for item in manifest.left_out] == ["42", "empty"]
  assert manifest.frames["mask_kind"].to_pylist() == ["alpha"] * 3 + ["file"] * 3 + ["none"] * 4
  for wrong, message in ((root / "none", "is no folder"), (root / "cup_1", "has no folders")):
    with pytest.raises(DataError, match=message):
      inputs.read_manifest(str(wrong))


def test_pictures_inside_of_tables_come_from_their_reader(prepare, red, tmp_path, monkeypatch):
  """Sets such as Subjects200K are subjects without files, and mostly without masks."""
  import data_pipeline

  class Pair:
    noun = "cup"

    def __init__(self, n):
      self._n = n

    def captions(self, f):
      return [f"a cup, {f}"]

    def is_reference(self):
      return np.array([True, False])

    def frame(self, f):
      whole = np.full(SIDES, 255, np.uint8)
      return picture(10 * self._n + f), mask() if self._n == 0 else whole

  class Pairs(list):
    names, where, fingerprint = ["a", "b"], "pairs", lambda self: "0123456789abcdef"

  modules = {name: types.ModuleType(f"data_pipeline.{name}") for name in
             ("readers", "readers.pairs")}
  for module in modules.values():
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
  readers = modules["readers"]
  readers.recognise = lambda folder: "pairs"
  readers.read = lambda name, layout, **options: types.SimpleNamespace(
    layout="pairs", subjects=Pairs([Pair(0), Pair(1)]), left_out=())
  modules["readers.pairs"].LICENCE = "Apache-2.0"
  monkeypatch.setattr(data_pipeline, "readers", readers, raising=False)
  (tmp_path / "in").mkdir()
  inputs._open_subjects.cache_clear()
  folder = prepare(tmp_path / "in", tmp_path / "out", segmenter=red, margin=np.inf, max_side=80)
  inputs._open_subjects.cache_clear()
  read = records(folder)
  for n in range(2):
    for f in range(2):
      np.testing.assert_array_equal(read[n].frame(f)[0], picture(10 * n + f))
      assert read[n].captions(f) == [f"a cup, {f}"]
  np.testing.assert_array_equal(read[0].frame(1)[1], mask())
  assert 0.9 < (read[1].frame(1)[1] >= 128).sum() / 900 < 1.1
  counts = json.loads((folder / "manifest.json").read_text())["counts"]
  assert counts["masks"] == dict(alpha=2, segmenter=2)
  assert counts["licences"] == {"Apache-2.0": 2}


# ---- mistakes, in one line and before work is spent

MISTAKES = {
  "no data": (["--data=", "--out=o"], "name it with --data=PATH"),
  "not there": (["--data=none", "--out=o"], "none is no folder"),
  "name": (["--data=in", "--out=o", "--name=My set"], "--name='My set' cannot be"),
  "margin": (["--data=in", "--out=o", "--margin=-1"], "--margin=-1.0 must be at least 0"),
  "side": (["--data=in", "--out=o", "--max_side=4"], "--max_side=4 must be at least 16"),
  "bits": (["--data=in", "--out=o", "--copy_bits=8"], "--copy_bits=8 must lie in"),
  "share": (["--data=in", "--out=o", "--max_bad_share=2"], "max_bad_share=2.0"),
  "encoding": (["--data=in", "--out=o", "--encoding=gif"], "jpeg or png"),
  "template": (["--data=in", "--out=o", "--caption_template=a photo"], "lacks {noun}"),
  "braces": (["--data=in", "--out=o", "--caption_template={noun} {x}"], "cannot be filled in"),
  "flag": (["--data=in", "--out=o", "--margn=1"], "--margn=1 is neither .*did you mean 'margin'"),
  "masks": (["--data=in", "--out=o"], "3 of 9 frames of .*in have no mask; .*--segmenter=FILE"),
  "config": (["--config=none.py", "--out=o"], "none.py is missing"),
  "workers": (["--data=in", "--out=o", "--workers=-1"], "--workers=-1 must be 0"),
  "other layout": (["--data=in", "--out=o", "--layout=co3d"], "has no subjects of two usable"),
  "source": (["--config=rendered.py", "--out=o"], "data.source='render' is no folder"),
  "no config": (["--config=empty.py", "--out=o"], "has no get_config"),
  "bucket": (["--data=in", "--out=gs://b/o", "--file_format=array_record"], "no local folder"),
  "segmenter": (["--data=in", "--out=o", "--segmenter=x.onnx"], "x.onnx is missing|onnxruntime"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path, monkeypatch):
  pytest.importorskip("apache_beam", reason="the preparation runs on apache_beam")
  monkeypatch.chdir(tmp_path)
  write_subjects(tmp_path / "in")
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "rendered.py").write_text(
    "from types import SimpleNamespace as S\n"
    "def get_config(): return S(data=S(source='render', name='', max_bad_share=0.0))\n")
  arguments, message = MISTAKES[mistake]
  with pytest.raises(SystemExit, match=f"^error: .*({message})") as error:
    command.main(arguments)
  assert "\n" not in str(error.value) and not (tmp_path / "o").exists()


def test_without_beam_there_is_a_remedy(tmp_path, monkeypatch):
  from data_pipeline.prepare import run

  monkeypatch.setitem(sys.modules, "apache_beam", None)
  root = write_subjects(tmp_path / "in", subjects=2)
  with pytest.raises(DataError, match="apache_beam, .*not installed; pip install apache-beam"):
    run.prepare(inputs.read_manifest(str(root)), Settings("things"), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_the_command_takes_a_config(tmp_path, monkeypatch, capsys):
  pytest.importorskip("apache_beam", reason="the preparation runs on apache_beam")
  monkeypatch.chdir(tmp_path)
  write_subjects(tmp_path / "My cups 3", subjects=2)
  (tmp_path / "mine.py").write_text(
    "from types import SimpleNamespace as S\n"
    "def get_config(): return S(data=S(source='folder', name='My cups 3', max_bad_share=0.1))\n")
  command.main(["--config=mine.py", "--out=o", "--workers=1", "--min_subject=8"])
  said = capsys.readouterr()
  assert said.out == ("--config.data.source=tfds --config.data.name=my_cups_3 "
                      "--config.data.data_dir=o\n")
  assert "2 subjects, 6 frames; left out: nothing" in said.err
  notes = json.loads((tmp_path / "o" / "my_cups_3" / "1.0.0" / "manifest.json").read_text())
  assert notes["settings"]["max_bad_share"] == 0.1
  with pytest.raises(SystemExit, match="made of other data or settings; choose another --name"):
    command.main(["--config=mine.py", "--out=o", "--workers=1", "--min_subject=9"])
  command.main(["--config=mine.py", "--out=o", "--workers=1", "--min_subject=8"])  # is there


def test_data_beside_a_config_is_not_the_configs(tmp_path, monkeypatch):
  """The config may be of the data set that comes out; its layout is not that of --data."""
  from data_pipeline.prepare import run

  monkeypatch.chdir(tmp_path)
  layouts.wildrgbd(tmp_path / "in")
  (tmp_path / "in" / "toy_car/scenes/scenes_000/masks/00000.png").unlink()
  given = []
  monkeypatch.setattr(run, "prepare", lambda *args, **options: given.append(args) or 1 / 0)
  for data in ("source='tfds', name='things'", "source='captures', name='else', layout='co3d'"):
    (tmp_path / "mine.py").write_text(
      "from types import SimpleNamespace as S\n"
      f"def get_config(): return S(data=S({data}, max_bad_share=0.25))\n")
    with pytest.raises(ZeroDivisionError):
      command.main(["--config=mine.py", "--data=in", "--out=o"])
    manifest, settings, _ = given.pop()
    assert manifest.layout == "wildrgbd" and manifest.frames.num_rows == 5
    assert settings.max_bad_share == 0.25
  monkeypatch.setattr(Settings, "check", lambda self: None)
  with pytest.raises(ZeroDivisionError):  # masks that are missing are made
    command.main(["--data=in", "--out=o", "--segmenter=u2netp.onnx"])
  assert given.pop()[0].frames["mask_kind"].to_pylist().count("none") == 1


def test_what_a_worker_finds_wrong_is_one_line(prepare, tmp_path, monkeypatch):
  def make_part(folder, fingerprint, number):
    raise DataError("the network gives values that are no numbers; use another")

  monkeypatch.setattr(parts, "make_part", make_part)
  with pytest.raises(DataError, match="^the network gives .* use another$"):
    prepare(write_subjects(tmp_path / "in", subjects=2), tmp_path / "out")


# ---- restarts


def test_a_restart_goes_on_and_ends_with_the_same_bytes(prepare, red, tmp_path, monkeypatch):
  """Stopped twice within a group of subjects, and once while the metadata are written."""
  from data_pipeline.prepare import frames, run, shards

  root = write_subjects(tmp_path / "in", subjects=4)
  wanted = contents(prepare(root, tmp_path / "whole", segmenter=red))
  calls, budget = [], [0]
  original = frames.FramePreparer._load

  def load(self, read, frame):
    if not budget[0]:
      raise RuntimeError("stopped")
    budget[0] -= 1
    calls.append(frame.picture)
    return original(self, read, frame)

  monkeypatch.setattr(frames.FramePreparer, "_load", load)
  for budget[0] in (5, 6):
    with pytest.raises(RuntimeError, match="stopped"):
      prepare(root, tmp_path / "out", segmenter=red)
    assert not (tmp_path / "out" / "things" / "1.0.0").exists()
  budget[0] = 99
  with monkeypatch.context() as patch:
    patch.setattr(shards, "write_metadata", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      prepare(root, tmp_path / "out", segmenter=red)
  made = len(calls)
  folder = prepare(root, tmp_path / "out", segmenter=red)
  assert contents(folder) == wanted
  assert len(calls) == made and 12 < made < 12 + 2 * 6  # groups that were complete stay
  assert not list(run.epath.Path(folder).parent.glob("incomplete*"))
  # Work of other settings is not mixed in.
  budget[0] = 5
  with pytest.raises(RuntimeError, match="stopped"):
    prepare(root, tmp_path / "other", segmenter=red, max_side=20)
  budget[0] = 99
  assert contents(prepare(root, tmp_path / "other", segmenter=red)) == wanted


@pytest.mark.slow  # three processes that are killed, and nine that end
def test_killed_three_times_and_on_four_workers_the_bytes_are_the_same(red, tmp_path):
  pytest.importorskip("apache_beam", reason="the preparation runs on apache_beam")
  root = write_subjects(tmp_path / "in", subjects=24, frames=6)
  environment = os.environ | {"PYTHONPATH": str(ROOT)}

  def start(out, workers, **more):
    flags = dict(data=root, out=tmp_path / out, name="things", segmenter=red, min_subject=4,
                 max_side=40, frames_per_shard=6, workers=workers) | more
    log = (tmp_path / f"{out}.log").open("ab")
    return subprocess.Popen(
      [sys.executable, "-m", "data_pipeline.prepare", *(f"--{k}={v}" for k, v in flags.items())],
      env=environment, cwd=tmp_path, stdout=log, stderr=log)

  def parts_of(out):
    return len(list((tmp_path / out / "things" / "incomplete.1.0.0" / "parts").glob("*.report.*")))

  def shards_of(out):
    return len(list((tmp_path / out / "things" / "incomplete.1.0.0" / "shards").glob("things*")))

  assert start("one", 1).wait() == 0, (tmp_path / "one.log").read_text()
  assert start("four", 4).wait() == 0, (tmp_path / "four.log").read_text()
  for count, limit in ((parts_of, 3), (parts_of, 12), (shards_of, 4)):
    process = start("killed", 2)
    while count("killed") < limit and process.poll() is None:
      time.sleep(0.01)
    assert process.poll() is None, "it was done before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "things" / "1.0.0").exists()
  assert start("killed", 2).wait() == 0, (tmp_path / "killed.log").read_text()
  wanted = contents(tmp_path / "one" / "things" / "1.0.0")
  assert len(wanted) == 24 + 5
  for other in ("four", "killed"):
    assert contents(tmp_path / other / "things" / "1.0.0") == wanted
  (tmp_path / "silent.py").write_text(
    "from data_pipeline.errors import DataError\n"
    "def describe(picture, noun): raise DataError('the server is silent; start it')\n")
  assert start("failed", 2, captioner="silent:describe").wait() == 1
  assert (tmp_path / "failed.log").read_text() == "error: the server is silent; start it\n"


def test_what_readers_say_of_any_frame_is_no_caption(prepare, tmp_path):
  save(np.dstack([picture(0), mask()]), tmp_path / "0.png")
  save(np.dstack([picture(1), mask()]), tmp_path / "1.png")
  frames = [FrameRow(f"{n}.png", [text], mask_kind="alpha")
            for n, text in enumerate(["a photo of a cup", "a cup on a table"])]
  manifest = Manifest.from_subjects(
    [SubjectRow("a", "cup", frames)], where="here", layout="test", root=str(tmp_path))
  made = prepare(manifest, tmp_path / "out", caption_template="the {noun} by itself")
  counts = json.loads((made / "manifest.json").read_text())["counts"]
  assert counts["captions"] == {"given": 1, "template": 1}
