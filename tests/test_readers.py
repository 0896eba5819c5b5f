"""Layouts as data sets are published: a fixture of each goes in, known triples come out."""

import gzip
import json
import re
import shutil

import layouts
import numpy as np
import pytest
from fake_bucket import FakePath
from PIL import Image
from test_sources import config, take
from test_triples import make_tokenizer

import data_pipeline
from data_pipeline import inspect, readers
from data_pipeline.errors import DataError
from data_pipeline.readers import texts

NO_MASKS = ("uno", "subjects200k", "openimages_boxes")
ONE_VIEW = ("openimages", "openimages_boxes")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=160)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """written(layout): its folder, the subjects in it, how many are left out; each written once."""
  done = {}

  def write(layout):
    if layout not in done:
      root = tmp_path_factory.mktemp("captures") / layout
      done[layout] = root, *layouts.ALL[layout](root)
    return done[layout]

  return write


@pytest.fixture
def copied(written, tmp_path):
  """copied(layout): the folder of a copy, for tests that break something."""
  def copy(layout):
    return shutil.copytree(written(layout)[0], tmp_path / layout)

  return copy


def number(layout, name, nouns):
  """The n of `layouts.picture` that a subject shows."""
  if layout == "mvimgnet":
    return {"17/0a001b": 0, "17/0a001c": 1, "2/00002e": 2}[name]
  return list(nouns).index(name)


@pytest.mark.parametrize("layout", layouts.ALL)
def test_frames_are_those_of_the_fixture(written, layout):
  root, nouns, left_out = written(layout)
  captures = readers.read(str(root))
  assert captures.layout == layout.removesuffix("2").removesuffix("_boxes")
  assert len(captures.left_out) == left_out
  subjects = captures.subjects
  assert sorted(subjects.names) == sorted(nouns)
  for index, name in enumerate(subjects.names):
    subject, n = subjects[index], number(layout, name, nouns)
    assert subject.noun == nouns[name]
    for f in range(len(subject.is_reference())):
      for caption in subject.captions(f):
        assert re.search(rf"\b{re.escape(nouns[name])}(?!\w)", caption, re.IGNORECASE), caption
      pixels, mask = subject.frame(f)
      shown = 0 if layout in ONE_VIEW else f
      if layout == "subjects200k":
        assert pixels.shape == (512, 512, 3)  # not a pixel of the padding
        np.testing.assert_array_equal(pixels - [layouts.red(n), 0, 100 * f], 0)
      else:
        expected = layouts.picture(n, shown)
        if layout == "openimages_boxes":
          expected = expected[layouts.Y0 : layouts.Y0 + layouts.height(0), layouts.X0 : layouts.X1]
        expected = expected * (mask[..., None] > 0) if layout == "omniobject3d" else expected
        assert pixels.shape == expected.shape
        near = 3 if layout != "openimages_boxes" else 60  # JPEG's blocks end beside the box
        assert np.abs(pixels.astype(int) - expected).max() <= near
      expected = layouts.mask(shown) if layout not in NO_MASKS else np.full_like(mask, 255)
      # SynCD's masks are JPEGs of half the size: their edge is off by a pixel.
      off = (mask >= 128) != (expected >= 128)
      assert off.sum() <= (40 if layout == "syncd" else 0)


@pytest.mark.parametrize("layout", layouts.ALL)
def test_triples_come_out_of_the_loader(written, tokenizer, layout):
  root, nouns, _ = written(layout)
  data = config(source="captures", name=str(root), layout="auto", max_bad_share=0.0)
  (batch,) = take(data, tokenizer, 1)
  names = readers.read(str(root)).subjects.names
  for row in range(4):
    name = names[batch["subject_id"][row]]
    n = number(layout, name, nouns)
    start, end = batch["noun_span"][row]
    noun = tokenizer.decode(batch["input_ids"][row, start:end]).strip()
    assert noun.replace(" ", "") == nouns[name].replace(" ", "")
    assert abs(int(batch["reference"][row, 16, 16, 0]) - layouts.red(n)) <= 8
    is_subject = batch["target_mask"][row] > 128
    reds = batch["target"][row][is_subject][:, 0].astype(int)
    assert abs(np.median(reds) - (0 if layout == "uno" else layouts.red(n))) <= 4
    assert is_subject.all() == (layout in NO_MASKS)
    corners = batch["positive"][row, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 250).all(-1).any()  # the subject is on white, and smaller than the canvas


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.ALL)
def test_two_steps_of_training(written, tiny_folder, quick_compile, tmp_path, layout):
  import tiny

  from cc_jax.training import loop

  root, _, _ = written(layout)
  changes = dict(steps=2, batch_size=2, save_every=2, sample_every=0)
  run = tiny.tiny_config(
    tiny_folder, data__source="captures", data__name=str(root),
    **{f"train__{key}": value for key, value in changes.items()})
  loop.train(run, tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  losses = [line["loss"] for line in lines if "loss" in line]
  assert len(losses) == 2 and np.all(np.isfinite(losses))
  assert (tmp_path / "run" / "adapter.safetensors").exists()


# What is wrong with data sets: named, counted, left out up to the share that may be bad.


def truncate(file, share=0.5):
  content = file.read_bytes()
  file.write_bytes(content[: int(len(content) * share)])


def one_frame(root):
  for f in ("002", "003"):
    (root / "17/0a001b/images" / f"{f}.jpg").unlink()


def no_mask(root):
  (root / "17/0a001b/002.jpg.png").unlink()


def cut_tar(root):
  truncate(root / "data-000001.tar", 0.3)


def cut_in_a_header(root):
  file = root / "data-000001.tar"
  import tarfile

  with tarfile.open(file) as archive:
    last = archive.getmembers()[6]
  file.write_bytes(file.read_bytes()[: last.offset + 100])


def json_missing(root):
  """A shard whose writer was killed before the json of its last frame."""
  import tarfile

  with tarfile.open(root / "data-000009.tar", "w") as archive:
    layouts.add(archive, "v1.0/mug 0/0009.jpg", layouts.encoded(layouts.picture(0, 0), "jpg"))


def compressed_tar(root):
  file = root / "data-000001.tar"
  (root / "data-000001.tar.gz").write_bytes(gzip.compress(file.read_bytes()))
  file.unlink()


def missing_file(root):
  (root / "teddybear/110_1/images/frame000005.jpg").unlink()


def cut_parquet(root):
  file = root / "data" / "train-00000-of-00001.parquet"
  other = root / "data" / "train-00001-of-00001.parquet"
  other.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize(("layout", "damage", "name", "reason", "share"), [
  ("mvimgnet", one_frame, "17/0a001b", r"1 usable picture\(s\)", 0.2),
  ("mvimgnet", no_mask, "17/0a001b/images/002.jpg", "no mask", 0.2),
  ("co3d", missing_file, "teddybear/110_1/images/frame000005.jpg", "is missing", 0.3),
  ("webdataset", cut_tar, "data-000001.tar", "breaks off at byte", 0.3),
  ("webdataset", cut_in_a_header, "data-000001.tar", "breaks off at byte", 0.3),
  ("webdataset", json_missing, "data-000009.tar, v1.0/mug 0/0009", "cut at a shard's end", 0.3),
  ("webdataset", compressed_tar, "data-000001.tar.gz", "unpack it", 0.3),
  ("subjects200k", cut_parquet, "train-00001-of-00001.parquet", "cannot be read", 0.6),
])
def test_what_the_reader_finds_bad(copied, layout, damage, name, reason, share):
  root = copied(layout)
  before = len(readers.read(str(root)).left_out)
  damage(root)
  with pytest.raises(DataError, match=reason) as error:
    readers.read(str(root))
  assert name in str(error.value) and "data.max_bad_share=0.0" in str(error.value)
  captures = readers.read(str(root), max_bad_share=share)
  assert len(captures.left_out) > before
  assert any(item.name == name and re.search(reason, item.reason) for item in captures.left_out)
  for number in range(len(captures.subjects.names)):
    subject = captures.subjects[number]
    for f in range(len(subject.is_reference())):
      subject.frame(f)  # nothing half is left in


@pytest.mark.parametrize(("layout", "file"), [
  ("mvimgnet", "17/0a001b/002.jpg.png"), ("co3d", "teddybear/110_1/masks/frame000005.png"),
  ("wildrgbd", "toy_car/scenes/scenes_001/masks/00001.png"),
  ("syncd", "rigid/masks/0_1.jpg"), ("pictures", "blue_mug_01/view1_mask.png"),
])
def test_missing_masks_are_no_fault_where_they_are_made(copied, layout, file):
  """`prepare --segmenter` takes them for frames without masks."""
  from data_pipeline.prepare import inputs

  root = copied(layout)
  before = readers.read(str(root)).subjects.pictures
  (root / file).unlink()
  with pytest.raises(DataError, match="max_bad_share=0.0"):
    readers.read(str(root))
  with pytest.raises(DataError, match="max_bad_share=0.0"):
    inputs.read_manifest(str(root))
  kinds = inputs.read_manifest(str(root), needs_masks=False).frames["mask_kind"].to_pylist()
  # Of CO3D's frames the one that names no mask comes in addition.
  assert kinds.count("none") == 1 + (layout == "co3d")
  assert len(kinds) == before + (layout == "co3d")


def test_a_subject_without_pictures_is_no_fault(copied):
  root = copied("wildrgbd")
  for file in (root / "toy_car/scenes/scenes_001/rgb").iterdir():
    file.unlink()
  captures = readers.read(str(root))
  assert captures.subjects.names == ["toy_car/scenes/scenes_000"]
  for file in (root / "toy_car/scenes/scenes_000/masks").iterdir():
    file.unlink()  # three pictures are bad, and not a fourth for their subject
  with pytest.raises(DataError, match=": 3 of 3 pictures are bad"):
    readers.read(str(root))


def test_captions_json_means_folder_wherever_it_is(copied, tmp_path):
  """A folder that somebody began to caption must not train on its folders' names."""
  root = copied("pictures")
  for n in range(30):
    (root / f"aa_{n}").mkdir()
  assert readers.recognise(readers.epath.Path(root)) == "pictures"
  (root / "zz_last").mkdir()
  (root / "zz_last" / "Captions.json").write_text("{}")
  assert readers.recognise(readers.epath.Path(root)) == "folder"
  with pytest.raises(DataError, match="captions.json is missing"):
    readers.read(str(root))


def test_a_layout_that_is_named_is_not_recognised(copied, monkeypatch):
  root = copied("wildrgbd")
  (root / "readme_metadata.json").write_text('[{"filenames": [], "prompts": []}]')
  shutil.rmtree(root / "toy_car/scenes/scenes_000/rgb")
  for n in range(3):  # whatever is in front of the scene that has pictures
    (root / "toy_car/scenes" / f"scene_{n}").mkdir()
  assert readers.recognise(readers.epath.Path(root)) == "syncd"
  captures = readers.read(str(root), "wildrgbd")
  assert captures.layout == "wildrgbd" and captures.subjects.pictures == 3
  with pytest.raises(DataError, match="has no subjects of two usable pictures"):
    readers.read(str(root), "co3d")
  with pytest.raises(DataError, match="no split 'train'; it has none"):
    readers.read(str(root), "openimages")


def test_pngs_of_a_webdataset_without_alpha_are_all_subject(tmp_path):
  import tarfile

  said = json.dumps(dict(class_noun="mug")).encode()
  for name, channels in (("rgb", 3), ("rgba", 4)):
    (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / name / "0.tar", "w") as archive:
      for f, end in enumerate(("png", "webp", "png")):
        pixels = np.dstack([layouts.picture(0, f), layouts.mask(f)])[..., :channels]
        layouts.add(archive, f"mug/{f}.{end}", layouts.encoded(pixels, end))
        layouts.add(archive, f"mug/{f}.json", said)
    subject = readers.read(str(tmp_path / name)).subjects[0]
    for f in range(3):
      expected = layouts.mask(f) if channels == 4 else 255
      np.testing.assert_array_equal(subject.frame(f)[1], expected)
  # In a set that has masks a picture without one is bad.
  (tmp_path / "rgb" / "0.tar").rename(tmp_path / "rgba" / "1.tar")
  with pytest.raises(DataError, match=r"3 of 6 pictures are bad.*1.tar, byte \d+: it has no mask"):
    readers.read(str(tmp_path / "rgba"))


def cp1252_caption(root):
  (root / "blue_mug_01" / "view1.txt").write_bytes("a blue mug in a café".encode("cp1252"))
  return "view1.txt is not UTF-8"


def cp1252_table(root):
  (root / "mvimgnet_category.txt").write_bytes("17,café".encode("cp1252"))
  return "mvimgnet_category.txt is not UTF-8"


def broken_deflate(root):
  file = root / "teddybear" / "frame_annotations.jgz"
  content = bytearray(file.read_bytes())
  content[10:16] = b"\xff" * 6
  file.write_bytes(content)
  return "frame_annotations.jgz cannot be read"


def list_in_a_json(root):
  import tarfile

  with tarfile.open(root / "data-000009.tar", "w") as archive:
    layouts.add(archive, "a/0.jpg", layouts.encoded(layouts.picture(0, 0), "jpg"))
    layouts.add(archive, "a/0.json", b'["mug"]')
  return "a/0: its json is no"


def huge_picture(root):
  (root / "annotations" / "train-annotations-object-segmentation.csv").unlink(missing_ok=True)
  header = b"P6\n60000 60000\n255\n"
  (root / "train" / "0f3a0.jpg").write_bytes(header)
  return "0f3a0.jpg cannot be read"


@pytest.mark.parametrize(("layout", "damage"), [
  ("pictures", cp1252_caption), ("mvimgnet", cp1252_table), ("co3d", broken_deflate),
  ("webdataset", list_in_a_json), ("openimages", huge_picture),
])
def test_what_people_and_disks_do_is_one_line(copied, layout, damage):
  root = copied(layout)
  message = damage(root)
  with pytest.raises(DataError, match=message) as error:
    readers.read(str(root))
  assert "\n" not in str(error.value)


def test_metadata_of_others_and_a_group_of_one(copied, tmp_path):
  for number, content in enumerate(('{"a": 1}', "[]", "[1]", '[{"filenames": 1}]', "no json")):
    root = tmp_path / str(number)
    root.mkdir()
    (root / "metadata.json").write_text(content)
    with pytest.raises(DataError, match="has none of the layouts"):
      readers.read(str(root))
  root = copied("syncd")
  file = root / "rigid_metadata_with_scores.json"
  groups = json.loads(file.read_text())
  groups.append(dict(filenames=["rigid/0_0.jpg"], prompts=["a"], dino_scores=[[1.0]]))
  file.write_text(json.dumps(groups))
  captures = readers.read(str(root), max_bad_share=0.2)
  assert captures.left_out[-1].reason.startswith("1 usable picture(s)")


def test_the_error_lists_the_first_ten(tmp_path):
  found = readers.Findings("here", 0.5)
  for n in range(13):
    found.bad(f"picture {n}", "no mask")
  found.check(13, 5)
  with pytest.raises(DataError, match="13 of 25 pictures are bad") as error:
    found.check(12, 5)
  assert "picture 9: no mask" in str(error.value) and "picture 10" not in str(error.value)
  assert "and 3 more" in str(error.value)


def broken_jpeg(root):
  truncate(root / "17/0a001b/images/002.jpg")
  return "002.jpg"


def empty_mask(root):
  layouts.save(root / "17/0a001b/002.jpg.png", np.zeros(layouts.SIZE, np.uint8))
  return "002.jpg"


def other_mask(root):
  layouts.save(root / "17/0a001b/002.jpg.png", np.full((40, 40), 255, np.uint8))
  return "002.jpg"


@pytest.mark.parametrize(("damage", "reason"), [
  (broken_jpeg, "cannot be read"), (empty_mask, "is empty"), (other_mask, "of other proportions"),
])
def test_what_decoding_finds_bad(copied, tokenizer, damage, reason):
  root = copied("mvimgnet")
  name = damage(root)
  data = config(source="captures", name=str(root), layout="mvimgnet", batch_size=3)
  with pytest.raises(Exception, match=f"{name}.*{reason}"):
    take(data, tokenizer, 6, batch_size=3)
  data.max_bad_share = 0.2  # of 9 pictures one
  for batch in take(data, tokenizer, 6, batch_size=3):
    assert (batch["target_mask"] > 128).any((1, 2)).all()
  truncate(root / "17/0a001c/images/001.jpg")
  with pytest.raises(Exception, match="2 of 9 pictures are bad.*the first: .*002.jpg") as error:
    take(data, tokenizer, 6, batch_size=3)
  assert "0a001c/images/001.jpg" in str(error.value)


def test_wrong_splits_layouts_and_folders(written, tokenizer, tmp_path, monkeypatch):
  root = str(written("mvimgnet")[0])
  data = config(source="captures", name=root, layout="auto")
  with pytest.raises(DataError, match="no split 'test'; it has 'train'"):
    take(data, tokenizer, 1, split="test")
  with pytest.raises(DataError, match="no split 'test'; it has 'train'"):
    readers.read(str(written("openimages")[0]), split="test")
  with pytest.raises(DataError, match="layout='mvimagenet' is unknown; choose"):
    readers.read(root, "mvimagenet")
  (tmp_path / "empty").mkdir()
  with pytest.raises(DataError, match="none of the layouts mvimgnet, co3d"):
    readers.read(str(tmp_path / "empty"))
  with pytest.raises(DataError, match="nowhere is not a folder"):
    readers.read(str(tmp_path / "nowhere"))
  monkeypatch.setattr(FakePath, "root", tmp_path)
  with pytest.raises(DataError, match="fake://no_bucket is not a folder"):
    data_pipeline.check_folder(config(source="captures", name="fake://no_bucket", layout="auto"))
  with pytest.raises(DataError, match="no file system is known for s4://"):
    readers.read("s4://bucket/captures")
  shutil.copytree(root, tmp_path / "unnamed")
  (tmp_path / "unnamed" / "mvimgnet_category.txt").unlink()
  with pytest.raises(DataError, match="put mvimgnet_category.txt .* there"):
    readers.read(str(tmp_path / "unnamed"))


@pytest.mark.parametrize("layout", ["co3d", "webdataset", "subjects200k"])
def test_a_bucket_reads_as_a_folder(written, monkeypatch, layout):
  root, _, _ = written(layout)
  monkeypatch.setattr(FakePath, "root", root.parent)
  here, there = (readers.read(name).subjects for name in (str(root), f"fake://{layout}"))
  assert there.names == here.names
  for a, b in zip(here[1].frame(1), there[1].frame(1), strict=True):
    np.testing.assert_array_equal(a, b)


def test_held_out_subjects_and_features_beside_the_data(written):
  root, nouns, _ = written("mvimgnet")
  data = config(source="captures", name=str(root), layout="auto", holdout_subjects=1)
  (held_out,) = data_pipeline.heldout_subjects(data, 5)
  assert held_out.held_out and held_out.class_noun == nouns[held_out.name]
  del data.layout  # a config of before
  assert data_pipeline.heldout_subjects(data, 5)[0].name == held_out.name
  subjects = readers.read(str(root)).subjects
  assert str(subjects.features_folder) == f"{root}_features"
  assert subjects.fingerprint() == readers.read(str(root)).subjects.fingerprint()


@pytest.mark.parametrize("layout", ["co3d", "subjects200k"])
def test_features_can_be_stored(written, layout):
  """What cc_jax.cache encodes of a frame is what training shows of it."""
  from data_pipeline import triples
  from data_pipeline.feature_cache import Networks
  from data_pipeline.sources.stored import StoredFrames, open_subjects

  root, _, _ = written(layout)
  data = config(source="captures", name=str(root), layout=layout, placements=2)
  subjects, heldout = open_subjects(data)
  frames = StoredFrames(data, Networks({}, {}, ""), subjects, heldout)
  assert str(frames.folder).startswith(f"{root}_features/")
  shown, is_good = frames.pictures((1, 1), frames.layout(3))
  target, mask = triples.square(*subjects[1].frame(1), 32)
  np.testing.assert_array_equal(shown["target"][0], target)
  np.testing.assert_array_equal(shown["target_mask"][0], mask)
  assert is_good and len(shown["positive"]) == 2


def test_captions_get_their_noun_and_lose_their_end(tokenizer):
  assert texts.with_noun("This item is on a shelf.", "mug") == "This mug is on a shelf."
  assert texts.with_noun("A MUG here", "mug") == "A MUG here"
  assert texts.with_noun("red, on a smuggler", "mug") == "a mug: red, on a smuggler"
  assert texts.with_noun("", "apple") == "a photo of an apple"
  assert texts.clean_noun("a matchbox ") == "matchbox"
  assert texts.clean_noun("Secateurs (Pruning Shears)") == "secateurs"
  from data_pipeline import tokens

  encode = texts.shortened(
    lambda caption, noun: tokens.encode_prompt(tokenizer, caption, noun, 2))
  ids, slot, _ = encode("a teapot on " + "x" * 100 + " " + "y" * 100, "teapot")
  assert tokenizer.decode(ids[: slot + 3]).endswith("teapot on x") and slot == 4
  assert "x" in tokenizer.decode(ids) and "y" not in tokenizer.decode(ids)
  with pytest.raises(DataError, match="does not contain"):
    encode("a cup", "teapot")
  short = tokens.encode_prompt(tokenizer, "a teapot", "teapot", 2)[0]
  np.testing.assert_array_equal(encode("x" * 200 + " teapot", "teapot")[0], short)
  with pytest.raises(DataError, match="tokens"):
    encode("an " + "x" * 200, "x" * 200)


def test_notes_are_said_once(written, tokenizer, caplog):
  root = str(written("openimages")[0])
  data = config(source="captures", name=root, layout="auto")
  readers._read_once.cache_clear()
  data_pipeline.check_folder(data)
  take(data, tokenizer, 1, batch_size=2)
  said = [record.getMessage() for record in caplog.records]
  assert sum("one picture of each object" in line for line in said) == 1
  assert sum("2 left out" in line for line in said) == 1
  assert any("forbids commercial use" in note
             for note in readers.read(str(written("co3d")[0])).notes)
  assert any("data_pipeline.prepare" in note for note in readers.read(str(written("uno")[0])).notes)


def test_inspect_says_what_is_there(written, copied, tmp_path, capsys):
  root = copied("co3d")
  truncate(root / "teddybear/110_2/images/frame000007.jpg")
  missing_file(root)
  sheet = tmp_path / "sheet.png"
  inspect.main([str(root), f"--sheet={sheet}", "--check=2"])
  out = capsys.readouterr().out
  for line in ("layout 'co3d'", "subjects: 2 of 1 class nouns", "frames: 5, 2 to 3 a subject",
               "masks: 5 of their own", "captions: 5, 1 of them different, 6 to 6 words",
               "52 x 40 (5)", "licences: CC-BY-NC-4.0 (2)", "forbids commercial use",
               "left out: 4", "viewpoint quality 0.10", "frame000005.jpg is missing",
               "decoded: 2, of which 1 are bad", "frame000007.jpg"):  # fmt: skip
    assert line in out, (line, out)
  with Image.open(sheet) as image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
  # The reference of the first subject: its middle has the box's colour.
  near = np.abs(pixels[20 + 64, 190 + 128 + 64] - [[layouts.red(0), 0, 0], [layouts.red(1), 0, 0]])
  assert near.max(-1).min() <= 8
  inspect.main([str(root), f"--manifest={tmp_path / 'manifest'}", "--sheet=", "--check=0"])
  again = readers.read(str(tmp_path / "manifest"))
  assert again.layout == "manifest" and again.subjects.pictures == 5
  first = readers.read(str(root), max_bad_share=0.5).subjects[0]
  np.testing.assert_array_equal(again.subjects[0].frame(1)[0], first.frame(1)[0])
  with pytest.raises(SystemExit, match="error: .*none of the layouts"):
    inspect.main([str(tmp_path)])
  with pytest.raises(SystemExit, match="error: .* cannot be written"):
    inspect.main([str(root), "--sheet=/nowhere/sheet.png"])
  for wrong, message in (("--sheet=sheet", "--sheet=sheet names no kind of picture.* .png"),
                         ("--check=-1", "--check=-1 must be 0 or more")):
    with pytest.raises(SystemExit, match=f"error: {message}"):  # before the folder is looked at
      inspect.main([str(tmp_path / "nowhere"), wrong])
