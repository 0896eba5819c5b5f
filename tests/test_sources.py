"""Every source gives a pure function of (seed, step), whole triples, and readable errors."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from fake_bucket import FakePath
from PIL import Image
from test_triples import make_tokenizer

import data_pipeline
from data_pipeline.errors import DataError
from data_pipeline.subjects3d import factors as factors_lib
from data_pipeline.subjects3d import multi_view

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=160)


def config(**changes):
  fields = dict(
      source="folder", name="", data_dir="", image_size=32, reference_ratio=0.8,
      reference_jitter=0.0, positive_ratio=(0.4, 0.9), group="class", group_ratio=0.5,
      reference_layout="centred", frames="multi_view", caption_drop_detail_prob=0.0,
      holdout_subjects=0, max_bad_share=0.0, placements=0, cached=False, cache_dir="",
  )  # fmt: skip
  return types.SimpleNamespace(**fields | changes)


def take(data_config, tokenizer, count, batch_size=4, **options):
  loader = data_pipeline.make_loader(
      data_config, tokenizer, batch_size=batch_size, seed=7, **options
  )
  batches = [next(loader) for _ in range(count)]
  loader.close()
  return batches


def assert_equal(first, second):
  assert first.keys() == second.keys()
  for key in first:
    assert first[key].dtype == second[key].dtype
    np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def check_purity(data_config, tokenizer, first_step=0):
  """Restart and shards; returns the batches of two steps."""
  batches = take(data_config, tokenizer, 2, start_step=first_step)
  assert_equal(take(data_config, tokenizer, 1, start_step=first_step + 1)[0], batches[1])
  for hosts in (2, 4):
    shards = [
        take(data_config, tokenizer, 1, start_step=first_step, process_index=n, process_count=hosts)
        for n in range(hosts)
    ]
    union = {key: np.concatenate([shard[0][key] for shard in shards]) for key in batches[0]}
    assert_equal(union, batches[0])
  assert not np.array_equal(batches[0]["positive"], batches[1]["positive"])
  return batches


def check_batch(batch, tokenizer, nouns, rows=4, size=32):
  """Types, shapes, white ground, and a slot behind the noun that `nouns[subject_id]` names."""
  picture = (rows, size, size, 3)
  shapes = dict(positive=picture, reference=picture, target=picture, target_mask=picture[:3],
                input_ids=(rows, 160), slot=(rows,), noun_span=(rows, 2),
                subject_id=(rows,), family_id=(rows,), class_id=(rows,))  # fmt: skip
  assert {key: value.shape for key, value in batch.items()} == shapes
  for key, value in batch.items():
    pictures = key in ("positive", "reference", "target", "target_mask")
    assert value.dtype == (np.uint8 if pictures else np.int32), key
  for row in range(rows):
    # The reference leaves a tenth of the canvas free on each side, less its soft edge.
    free = size // 16
    assert np.all(batch["reference"][row, :free] > 250)
    assert np.all(batch["reference"][row, :, -free:] > 250)
    start, end = batch["noun_span"][row]
    assert batch["slot"][row] == end
    noun = tokenizer.decode(batch["input_ids"][row, start:end]).strip()
    assert noun == nouns[batch["subject_id"][row]]


# A folder of subjects.

GROUND = np.array([0, 0, 200], np.uint8)


def draw(color, box, size=(40, 52)):
  """A coloured box on blue, and its mask."""
  image, mask = np.zeros((*size, 3), np.uint8) + GROUND, np.zeros(size, np.uint8)
  x0, y0, x1, y1 = box
  image[y0:y1, x0:x1], mask[y0:y1, x0:x1] = color, 255
  return image, mask


def write_folder(folder, subjects=6):
  """Subject n is a box of red 40 * n; its frame f is f + 4 times as high as wide / 8."""
  for n in range(subjects):
    place = folder / f"subject_{n}"
    place.mkdir(parents=True)
    noun = ("teapot", "teddy bear")[n % 2]
    captions = {}
    for f in range(3):
      image, mask = draw((40 * n, 0, 0), (8, 4, 24, 4 + 4 * (f + 4)))
      if f == 0:
        name = "0.png"
        Image.fromarray(np.dstack([image, mask])).save(place / name)
      else:
        name = f"{f}.jpg" if f == 1 else f"{f}.png"
        Image.fromarray(image).save(place / name, quality=100, subsampling=0)
        Image.fromarray(mask).save(place / f"{f}_mask.png")
      captions[name] = f"a {noun} in picture {f}"
    listing = {"class_noun": noun, "captions": captions, "family": f"family {n // 4}"}
    (place / "captions.json").write_text(json.dumps(listing))
  return {n: ("teapot", "teddy bear")[n % 2] for n in range(subjects)}


def frame_of(picture):
  """Which frame of `write_folder` a box on white is: by its height over its width."""
  ink = picture[..., 1] < 128
  height, width = ink.any(1).sum(), ink.any(0).sum()
  return round(4 * height / width) - 4


def test_folder(tmp_path, tokenizer):
  nouns = write_folder(tmp_path)
  data = config(name=str(tmp_path))
  batches = check_purity(data, tokenizer)
  for batch in batches + take(data, tokenizer, 6, start_step=2):
    check_batch(batch, tokenizer, nouns)
    assert len(set(batch["subject_id"])) == 4
    assert batch["class_id"].tolist() == [n % 2 for n in batch["subject_id"]]
    assert batch["family_id"].tolist() == [n // 4 for n in batch["subject_id"]]
    for row, subject in enumerate(batch["subject_id"]):
      text = tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True)
      target = int(text.strip()[-1])
      frames = [frame_of(batch["positive"][row]), frame_of(batch["reference"][row]), target]
      assert sorted(frames) == [0, 1, 2]
      # All three show the subject, and the target shows its ground.
      for key in ("positive", "reference"):
        red = batch[key][row][batch[key][row][..., 1] < 8]
        assert abs(np.median(red[:, 0]) - 40 * subject) <= 2
      assert np.abs(batch["target"][row, -1].astype(int) - GROUND).max() <= 4
      inside = batch["target"][row][batch["target_mask"][row] == 255]
      assert abs(np.median(inside[:, 0]) - 40 * subject) <= 2


def test_folder_whose_json_names_the_references(tmp_path, tokenizer):
  write_folder(tmp_path)
  for file in tmp_path.glob("*/captions.json"):
    listing = json.loads(file.read_text())
    file.write_text(json.dumps(listing | {"references": ["0.png"]}))
  for batch in take(config(name=str(tmp_path)), tokenizer, 4):
    for row in range(4):
      target = int(tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True).strip()[-1])
      assert target == 0 or frame_of(batch["reference"][row]) == 0


def _edit(change):
  def edit(folder):
    file = folder / "subject_1/captions.json"
    listing = json.loads(file.read_text())
    change(listing)
    file.write_text(json.dumps(listing))

  return edit


def _half(name):
  def cut(folder):
    file = folder / "subject_1" / name
    file.write_bytes(file.read_bytes()[:60])

  return cut


def _picture(name, array):
  return lambda folder: Image.fromarray(array).save(folder / "subject_1" / name)


def _remove(*names):
  return lambda folder: [(folder / "subject_1" / name).unlink() for name in names]


_BLACK = np.zeros((40, 52), np.uint8)


@pytest.mark.parametrize("spoil, message", [
    (_remove("captions.json"), "subject_1/captions.json is missing; write .*class_noun"),
    (_remove("1_mask.png"), "1.jpg has no mask.*1_mask.png"),
    (_remove("0.png"), "captions.json names '0.png', which is not in its folder"),
    (_picture("new.png", np.dstack([_BLACK] * 4)), "new.png has no caption; add one to .*json"),
    (_picture("0.png", np.dstack([*[_BLACK] * 3, ~_BLACK])), "0.png has no mask"),
    (_picture("1_mask.png", _BLACK), "1.jpg: the mask .* is empty"),
    (_picture("1_mask.png", ~_BLACK[1:]), r"1.jpg: the mask has shape \[39, 52\]"),
    (_half("0.png"), "0.png cannot be read"),
    (_half("2_mask.png"), "2_mask.png cannot be read"),
    (lambda f: (f / "subject_1/0.png").write_text("?"), "0.png is not a picture"),
    (lambda f: (f / "subject_1/captions.json").write_text("{"), "captions.json is not JSON"),
    (_edit(lambda c: c.pop("class_noun")), 'captions.json needs "class_noun"'),
    (_edit(lambda c: c.update(nouns=1)), "unknown key 'nouns'; it may have"),
    (_edit(lambda c: c.update(class_noun="kettle")), "json: the prompt .* not contain .*'kettle'"),
    (_edit(lambda c: c["captions"].update({"1.jpg": "a teddy bear" + " x" * 160})),
     "captions.json: the prompt .* the limit is 158"),
])  # fmt: skip
def test_folder_with_a_bad_file(tmp_path, tokenizer, spoil, message):
  write_folder(tmp_path, subjects=2)
  spoil(tmp_path)
  with pytest.raises(DataError, match=message) as caught:
    take(config(name=str(tmp_path), group_ratio=0.0), tokenizer, 6, batch_size=2)
  assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_used(tmp_path, tokenizer):
  with pytest.raises(DataError, match="nowhere is not a folder; set data.name"):
    take(config(name=str(tmp_path / "nowhere")), tokenizer, 1)
  with pytest.raises(DataError, match="has no folders in it"):
    take(config(name=str(tmp_path)), tokenizer, 1)
  write_folder(tmp_path, subjects=1)
  place = tmp_path / "subject_0"
  for name in ("1.jpg", "1_mask.png", "2.png", "2_mask.png"):
    (place / name).unlink()
  listing = {"class_noun": "teapot", "captions": {"0.png": "a teapot"}}
  (place / "captions.json").write_text(json.dumps(listing))
  with pytest.raises(DataError, match=r"subject_0 has 1 picture\(s\); a triple needs 2 or more"):
    take(config(name=str(tmp_path)), tokenizer, 1)


def test_arguments_that_make_no_sense(tokenizer):
  with pytest.raises(DataError, match="data.source='web' is unknown; .*tfds, render, folder"):
    take(config(source="web"), tokenizer, 1)
  with pytest.raises(DataError, match="batch size 6 cannot be split over 4 hosts"):
    take(config(), tokenizer, 1, batch_size=6, process_count=4)
  with pytest.raises(DataError, match="no split 'test'"):
    take(config(), tokenizer, 1, split="test")


def test_context_phrases_are_the_scenes_of_subjects3d():
  for data in (config(source="render"), config(source="tfds", name="subjects3d/small")):
    assert data_pipeline.is_subjects3d(data)
    assert data_pipeline.context_phrases(data) == factors_lib.SCENES
  for data in (config(name="my_subjects"), config(source="tfds", name="blobs")):
    assert not data_pipeline.is_subjects3d(data) and data_pipeline.context_phrases(data) == ()


# Rendered on the fly.


@pytest.fixture
def mushrooms(monkeypatch):
  """A world of one class: one program to compile."""
  table = factors_lib.subjects("train")
  only = table.take(table.class_id == factors_lib.CLASSES.index("mushroom"))
  monkeypatch.setattr(factors_lib, "subjects", lambda split: only)
  return only


def test_render(mushrooms, tokenizer):
  data = config(source="render", group="family", image_size=64)
  batches = check_purity(data, tokenizer)
  rows_of = {subject: n for n, subject in enumerate(mushrooms.subject_id)}
  for batch in batches:
    check_batch(batch, tokenizer, dict.fromkeys(rows_of, "mushroom"), size=64)
    assert len(set(batch["subject_id"])) == 4
    assert np.bincount(batch["family_id"]).max() >= 2
    rows = [rows_of[subject] for subject in batch["subject_id"]]
    np.testing.assert_array_equal(batch["family_id"], mushrooms.family_id[rows])
    # Three different views, each with its own ground or place.
    assert not np.any(np.all(batch["positive"] == batch["reference"], axis=(1, 2, 3)))


def test_self_reconstruction_differs_in_the_reference_alone(tmp_path, tokenizer):
  """The reference is cut out of the target's frame; all else is as with several views."""
  write_folder(tmp_path)
  for source, more in (("folder", dict(name=str(tmp_path))), ("render", dict(image_size=16))):
    data = config(source=source, group_ratio=0.0, **more)
    several, one = (
      take(types.SimpleNamespace(**vars(data) | dict(frames=frames, reference_layout="frame")),
           tokenizer, 1, batch_size=2)[0]
      for frames in ("multi_view", "self")
    )
    for key in several:
      if key != "reference":
        np.testing.assert_array_equal(several[key], one[key], err_msg=f"{source} {key}")
    np.testing.assert_array_equal(one["reference"], one["target"])
    assert not np.array_equal(several["reference"], one["reference"])
  with pytest.raises(data_pipeline.DataError, match="data.frames='twice' is unknown"):
    take(config(name=str(tmp_path), frames="twice"), tokenizer, 1)


def test_terse_captions_name_the_class_alone(tmp_path, tokenizer):
  nouns, share = write_folder(tmp_path), 0.4
  whole, terse, none = (
    take(config(name=str(tmp_path), group_ratio=0.0, caption_drop_detail_prob=share), tokenizer, 60)
    for share in (0.0, share, 1.0)
  )
  cut = []
  for full, some, bare in zip(whole, terse, none):
    for row, subject in enumerate(full["subject_id"]):
      texts = [tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True).strip()
               for batch in (full, some, bare)]
      assert texts[2] == f"a {nouns[subject]}" != texts[0]
      assert texts[1] in (texts[0], texts[2])
      cut.append(texts[1] == texts[2])
    for key in set(full) - {"input_ids", "slot", "noun_span"}:  # nothing else changes
      np.testing.assert_array_equal(full[key], some[key], err_msg=key)
    check_batch(some, tokenizer, nouns)
  assert abs(np.mean(cut) - share) < 0.12
  with pytest.raises(data_pipeline.DataError, match="caption_drop_detail_prob=1.5 must lie"):
    take(config(name=str(tmp_path), caption_drop_detail_prob=1.5), tokenizer, 1)


def test_rendered_references_are_photos_without_hat():
  from data_pipeline.sources import render

  subjects = factors_lib.subjects("train")
  rng = np.random.default_rng(0)
  views = [render.three_views(rng, subjects.take([n] * 3)) for n in range(200)]
  style, hat = np.array([v.style for v in views]), np.array([v.hat for v in views])
  assert np.all(style[:, :2] == 0) and np.all(hat[:, :2] == 0)
  assert set(style[:, 2]) == {0, 1, 2} and 0.1 < np.mean(hat[:, 2] > 0) < 0.5
  azimuth = np.array([v.azimuth for v in views])
  assert np.all(np.abs(np.diff(azimuth)) > 0)


def test_render_needs_no_tensorflow(tmp_path):
  data = vars(config(source="render", image_size=16, group_ratio=0.0))
  script = f"""
import sys, types
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import data_pipeline
from data_pipeline.subjects3d import factors, multi_view
from test_triples import make_tokenizer
table = factors.subjects("train")
factors.subjects = lambda split: table.take(table.class_id == 2)
data = types.SimpleNamespace(**{data!r})
tokenizer = make_tokenizer(Path({str(tmp_path)!r}) / "tokenizer", max_length=160)
loader = data_pipeline.make_loader(data, tokenizer, batch_size=2, seed=0)
assert next(loader)["target"].shape == (2, 16, 16, 3)
loader.close()
for source in ("tfds", "folder"):
  data.source, data.name, data.data_dir = source, {str(tmp_path)!r}, ""
  try:
    data_pipeline.make_loader(data, tokenizer, batch_size=2, seed=0)
  except data_pipeline.DataError as error:
    print(source, error)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "tfds tensorflow is not installed; use data.source='render'" in done.stdout


# Any TFDS data set.


def write_blobs(data_dir, *, file_format, frames=3, subject_ids=None, leave_out=(), masks=None,
                splits=("train",), features=(), values=()):
  """A data set of boxes as in `write_folder`, with what the pipeline calls optional left out."""
  from data_pipeline.sources.tf_data import import_tfds

  tfds = import_tfds()
  subject_ids = subject_ids or [f"number {n}" for n in range(5)]
  examples = []
  for n, subject in enumerate(subject_ids):
    pictures = [draw((40 * n, 0, 0), (8, 4, 24, 4 + 4 * (f + 4))) for f in range(frames)]
    example = {
        "frames": [image for image, _ in pictures],
        "masks": [mask[..., None] for _, mask in pictures][:masks],
        "captions": [f"a teapot in picture {f}" for f in range(frames)],
        "class_noun": "teapot",
        "subject_id": subject,
    }
    example |= values() if callable(values) else dict(values)
    examples.append({key: value for key, value in example.items() if key not in leave_out})
  f = tfds.features
  known = {
      "frames": f.Sequence(f.Image(shape=(None, None, 3))),
      "masks": f.Sequence(f.Image(shape=(None, None, 1))),
      "captions": f.Sequence(f.Text()),
      "class_noun": f.Text(),
      "subject_id": f.Text() if isinstance(subject_ids[0], str) else f.Scalar(np.int64),
  }
  features = known | dict(features)
  (data_dir / "blobs/1.0.0").mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(
      name="blobs", version=tfds.core.Version("1.0.0"), module_name="",
      data_dir=str(data_dir / "blobs/1.0.0"),
  )  # fmt: skip
  info = tfds.core.DatasetInfo(
      builder=identity,
      features=f.FeaturesDict({k: v for k, v in features.items() if k not in leave_out}),
  )
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format=file_format)
  writer.initialize_splits(splits)
  writer.add_examples(dict.fromkeys(splits, examples))
  writer.close_all()


def blobs(data_dir):
  return config(source="tfds", name="blobs", data_dir=str(data_dir))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_any_tfds_data_set(tmp_path, tokenizer, file_format):
  write_blobs(tmp_path, file_format=file_format)
  batches = check_purity(blobs(tmp_path), tokenizer)
  for batch in batches:
    check_batch(batch, tokenizer, dict.fromkeys(range(5), "teapot"))
    assert len(set(batch["subject_id"])) == 4
    # Texts are numbered in their order, subjects with one noun are a class, families are unknown.
    assert np.all(batch["class_id"] == 0) and np.all(batch["family_id"] == -1)
    for row, subject in enumerate(batch["subject_id"]):
      text = tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True)
      frames = [frame_of(batch["positive"][row]), frame_of(batch["reference"][row])]
      assert sorted([*frames, int(text.strip()[-1])]) == [0, 1, 2]
      inside = batch["target"][row][batch["target_mask"][row] == 255]
      assert abs(np.median(inside[:, 0]) - 40 * subject) <= 2
  # A second loader took the subjects' numbers from the file that the first one wrote.
  assert len(list(tmp_path.rglob("subjects_train_*.npz"))) == 1


def test_long_captions_of_a_tfds_data_set_lose_their_end(tmp_path, tokenizer, caplog):
  """A preparation does not know the tokenizer, and a run must not end at the first such caption."""
  long = [f"a teapot in picture {f} and " + "then again " * 30 for f in range(3)]
  write_blobs(tmp_path, file_format="tfrecord", values={"captions": long})
  (batch,) = take(blobs(tmp_path), tokenizer, 1)
  for ids in batch["input_ids"]:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("a teapot in picture") and text.strip().endswith(("then", "again"))
  write_blobs(tmp_path / "without", file_format="tfrecord", values={"captions": ["a cup"] * 3})
  with pytest.raises(DataError, match="does not contain the class noun"):
    take(blobs(tmp_path / "without"), tokenizer, 1)


def test_tfds_with_two_frames_and_large_numbers(tmp_path, tokenizer):
  write_blobs(tmp_path, file_format="tfrecord", frames=2, subject_ids=[7, 2**40, 3])
  [batch] = take(blobs(tmp_path), tokenizer, 1, batch_size=3)
  assert sorted(batch["subject_id"]) == [0, 1, 2]
  positives = [frame_of(picture) for picture in batch["positive"]]
  references = [frame_of(picture) for picture in batch["reference"]]
  assert [p + r for p, r in zip(positives, references)] == [1, 1, 1]


@pytest.mark.parametrize("options, message", [
    (dict(frames=1), r"has 1 encoded frame\(s\); a triple needs 2 or more"),
    (dict(masks=2), "has 3 frames, but 2 masks"),
    (dict(leave_out=["masks"]), "blobs.*has no feature 'masks'; needed are frames, masks"),
])  # fmt: skip
def test_tfds_data_sets_that_cannot_be_used(tmp_path, tokenizer, options, message):
  write_blobs(tmp_path, file_format="tfrecord", **options)
  with pytest.raises(DataError, match=message):
    take(blobs(tmp_path), tokenizer, 1)


def test_tfds_data_set_that_is_not_there(tmp_path, tokenizer):
  with pytest.raises(DataError, match="no data set 'blobs', nor is it in .*; check data.name"):
    take(blobs(tmp_path), tokenizer, 1)
  with pytest.raises(DataError, match="no data set 'subjects3d/huge'; choose one of .*/small"):
    take(config(source="tfds", name="subjects3d/huge", data_dir=str(tmp_path)), tokenizer, 1)
  write_blobs(tmp_path, file_format="tfrecord")
  with pytest.raises(DataError, match="has no split 'test'; it has train"):
    take(blobs(tmp_path), tokenizer, 1, split="test")
  [file] = tmp_path.rglob("*.tfrecord-00001")
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(DataError, match="tfrecord-00001 breaks off; delete"):
    take(blobs(tmp_path), tokenizer, 1)


# subjects3d in TFDS.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Written by the program behind `tfds build`, from the registered builder."""
  from data_pipeline.sources.tf_data import import_tfds

  import_tfds()
  import simple_parsing
  from tensorflow_datasets.scripts.cli import build

  folder = tmp_path_factory.mktemp("tfds")
  words = ["subjects3d/tiny", "--imports", "data_pipeline.subjects3d.builder"]
  simple_parsing.parse(build.Args, args=[*words, "--data_dir", str(folder)]).execute()
  return folder


def tiny(data_dir):
  return config(
      source="tfds", name="subjects3d/tiny", data_dir=str(data_dir), group="family", image_size=64
  )


def test_subjects3d(data_dir, tokenizer):
  factors = multi_view.plan("tiny", "train")
  nouns = {s: factors_lib.CLASSES[c] for s, c in zip(factors.subject_id[:, 0],
                                                     factors.class_id[:, 0])}  # fmt: skip
  families = dict(zip(factors.subject_id[:, 0], factors.family_id[:, 0]))
  for batch in check_purity(tiny(data_dir), tokenizer):
    check_batch(batch, tokenizer, nouns, size=64)
    assert [families[s] for s in batch["subject_id"]] == batch["family_id"].tolist()
    assert np.bincount(batch["family_id"]).max() >= 2
  [batch] = take(tiny(data_dir), tokenizer, 1, split="test", batch_size=3)
  assert set(batch["subject_id"]) == set(multi_view.plan("tiny", "test").subject_id[:, 0])


def test_subjects3d_in_a_bucket(data_dir, tokenizer, tmp_path, monkeypatch):
  """C15: what lies there is read, and nothing is written into a folder called 'fake:'."""
  shutil.copytree(data_dir, tmp_path / "cloud/mine")
  monkeypatch.setattr(FakePath, "root", tmp_path / "cloud")
  monkeypatch.chdir(tmp_path)
  [local], [remote] = (take(tiny(place), tokenizer, 1) for place in (data_dir, "fake://mine"))
  assert_equal(local, remote)
  assert [path.name for path in tmp_path.iterdir()] == ["cloud"]


def test_subjects_for_evaluation(data_dir):
  read = data_pipeline.load_subjects("subjects3d/tiny", "test", str(data_dir))
  anew = data_pipeline.load_subjects("subjects3d/tiny", "test", source="render")
  for name, a, b in zip(read._fields, read, anew):
    if name == "factors":
      for column, x, y in zip(a._fields, a, b):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=column)
    else:
      np.testing.assert_array_equal(a, b, err_msg=name)
  assert read.frames.shape == (3, 4, 64, 64, 3) and read.masks.shape == (3, 4, 64, 64)
  assert np.all(read.is_reference[:, : multi_view.REFERENCES])
  first = data_pipeline.load_subjects("subjects3d/tiny", "test", str(data_dir), count=2)
  np.testing.assert_array_equal(first.frames, read.frames[:2])


def test_first_use_writes_and_an_interrupted_one_leaves_nothing(tmp_path, tokenizer, monkeypatch):
  from data_pipeline.subjects3d import builder

  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(builder, "_examples", interrupted)
  with pytest.raises(KeyboardInterrupt):
    take(tiny(tmp_path), tokenizer, 1)
  monkeypatch.undo()
  assert not list(tmp_path.rglob("*.tfrecord*"))
  [batch] = take(tiny(tmp_path), tokenizer, 1)
  check_batch(batch, tokenizer, {s: factors_lib.CLASSES[c] for s, c in zip(
      batch["subject_id"], batch["class_id"])}, size=64)  # fmt: skip


def test_data_dir_that_cannot_be_written(tmp_path, tokenizer):
  (tmp_path / "file").write_text("")
  with pytest.raises(DataError, match="cannot write subjects3d into .*file.*; set data.data_dir"):
    take(tiny(tmp_path / "file/below"), tokenizer, 1)


def test_checksum_of_factors_that_were_changed(data_dir, tmp_path):
  from data_pipeline.subjects3d import builder

  shutil.copytree(data_dir, tmp_path / "copy")
  builder.verify(builder.build("subjects3d/tiny", str(tmp_path / "copy")))
  [file] = (tmp_path / "copy/subjects3d/tiny").rglob("metadata.json")
  metadata = json.loads(file.read_text())
  wrong = metadata["factors_sha256"]["test"].replace("a", "b")
  metadata["factors_sha256"]["test"] = wrong
  file.write_text(json.dumps(metadata))
  with pytest.raises(DataError, match="(test).*do not have the checksum"):
    data_pipeline.load_subjects("subjects3d/tiny", "test", str(tmp_path / "copy"))


def test_checksum_sees_every_column_and_not_the_order():
  factors = multi_view.plan("tiny", "test")
  whole = multi_view.checksum(factors)
  assert multi_view.checksum(factors.take(np.array([2, 0, 1]))) == whole
  for name in factors._fields:
    column = getattr(factors, name).copy()
    column[1, 2] += 1
    assert multi_view.checksum(factors._replace(**{name: column})) != whole, name


def test_factors_of_the_first_version():
  """Other factors under the same version would give one name to two data sets: raise VERSION."""
  sums = [multi_view.checksum(multi_view.plan("small", split))[:8] for split in factors_lib.SPLITS]
  assert sums == ["d6698110", "5b8af8b8", "a04ade58"]


def test_plan_of_the_data_sets():
  for name, splits in multi_view.CONFIGS.items():
    seen = set()
    for split, (count, frames) in splits.items():
      factors = multi_view.plan(name, split)
      assert factors.azimuth.shape == (count, frames)
      ids = factors.subject_id[:, 0]
      assert len(set(ids)) == count and not seen & set(ids)
      seen |= set(ids)
      references = multi_view.is_reference(factors)
      assert np.all(references.sum(1) >= 3)
      by_class = np.bincount(factors.class_id[:, 0], minlength=10)
      if name != "tiny":
        assert by_class.max() - by_class.min() <= 4
      if (name, split) == ("small", "train"):
        assert set(np.bincount(factors.family_id[:, 0])) == {0, 4}
      if (name, split) == ("small", "test"):
        assert len(set(factors.family_id[:, 0])) == 130  # all that there are
