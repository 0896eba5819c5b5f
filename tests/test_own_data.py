"""Data as people have it: held-out subjects, names, captions.json, folders, TFDS types, buckets."""

import json
import shutil
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from fake_bucket import FakePath
from PIL import Image
from test_sources import (
  assert_equal,
  blobs,
  check_purity,
  config,
  draw,
  take,
  write_blobs,
  write_folder,
)
from test_triples import make_tokenizer

import data_pipeline
from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.sources import records
from data_pipeline.sources.folder import FolderSubjects, read_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=160)


def edit(file, **changes):
  """captions.json with other values; None removes a key."""
  listing = json.loads(file.read_text()) | changes
  file.write_text(json.dumps({k: v for k, v in listing.items() if v is not None}))


def names_of(subjects):
  return [subject.name for subject in subjects]


# Held-out subjects (issue 18, part 3).


def test_held_out_subjects_depend_on_names_alone():
  names, families = [f"subject {n}" for n in range(12)], np.arange(12) // 3
  families[9:] = -1  # unknown: each by itself
  chosen = sampling.choose_heldout(names, families, 4, "it")
  order = np.random.default_rng(0).permutation(12)
  shuffled = sampling.choose_heldout([names[n] for n in order], families[order], 4, "it")
  np.testing.assert_array_equal(chosen[order], shuffled)
  other_numbers = sampling.choose_heldout(names, np.where(families < 0, -1, 7 - families), 4, "it")
  np.testing.assert_array_equal(chosen, other_numbers)
  for family in range(3):
    assert len(set(chosen[families == family])) == 1
  assert 4 <= chosen.sum() <= 6
  # By hand: the families in the order of the smallest SHA-256 of a member's name.
  import hashlib

  digest = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in names]
  assert chosen[int(np.argmin(digest))]
  assert not sampling.choose_heldout(names, families, 0, "it").any()
  # As macOS spells file names.
  nfc, nfd = (unicodedata.normalize(form, "blåbær") for form in ("NFC", "NFD"))
  assert sampling.name_hash(nfc) == sampling.name_hash(nfd)


def held_out_of(data, tokenizer, total):
  """Checks that training sees all subjects but the held-out ones; returns those."""
  heldout = data_pipeline.heldout_subjects(data, total)
  batches = take(data, tokenizer, 4, batch_size=total)
  seen = {int(n) for batch in batches for n in batch["subject_id"]}
  numbers = {int(s.name.split("_")[-1].split()[-1]) for s in heldout}
  assert not seen & numbers and seen | numbers == set(range(total))
  return heldout


def test_held_out_subjects_of_a_folder(tmp_path, tokenizer):
  nouns = write_folder(tmp_path)  # families {0..3}, {4, 5}
  for n in range(4):
    edit(tmp_path / f"subject_{n}/captions.json", family=f"pair {n // 2}")
  data = config(name=str(tmp_path), group_ratio=0.0, holdout_subjects=1)
  heldout = held_out_of(data, tokenizer, 6)
  assert len(heldout) == 2  # the whole family
  for subject in heldout:
    n = int(subject.name[-1])
    assert subject.held_out and subject.class_noun == nouns[n]
    assert subject.image.shape == (40, 52, 3) and subject.image.dtype == np.uint8
    red = subject.image[subject.mask == 255]
    assert abs(np.median(red[:, 0]) - 40 * n) <= 2
    frame = np.flatnonzero((subject.mask == 255).any(1)).size // 4 - 4
    assert subject.caption.startswith(f"a {nouns[n]} in picture ")
    assert int(subject.caption[-1]) in {0, 1, 2} - {frame}
  assert {*names_of(heldout)} in [{f"subject_{n}", f"subject_{n + 1}"} for n in (0, 2, 4)]
  again = data_pipeline.heldout_subjects(data, 6)
  assert names_of(again) == names_of(heldout)
  others = [data_pipeline.heldout_subjects(data, 1, seed)[0] for seed in range(6)]
  assert {*names_of(others)} == {*names_of(heldout)}
  data.holdout_subjects = 0
  training = data_pipeline.heldout_subjects(data, 9)
  assert sorted(names_of(training)) == [f"subject_{n}" for n in range(6)]
  assert not any(subject.held_out for subject in training)


def test_too_few_subjects_to_hold_some_out(tmp_path, tokenizer):
  write_folder(tmp_path, subjects=4)  # one family
  data = config(name=str(tmp_path), holdout_subjects=1)
  for use in (lambda: take(data, tokenizer, 1), lambda: data_pipeline.heldout_subjects(data, 1)):
    with pytest.raises(DataError, match=r"data.holdout_subjects=1 .* 4 subject\(s\) in 1 family"):
      use()


def test_held_out_subjects_of_a_tfds_set(tmp_path, tokenizer, caplog):
  write_blobs(tmp_path / "one", file_format="tfrecord")
  data = blobs(tmp_path / "one")
  data.holdout_subjects, data.group_ratio = 2, 0.0
  heldout = held_out_of(data, tokenizer, 5)
  assert len(heldout) == 2 and all(subject.held_out for subject in heldout)
  # With a split of its own nothing need be left out.
  write_blobs(tmp_path / "two", file_format="tfrecord", splits=("train", "test"))
  data.data_dir = str(tmp_path / "two")
  batches = take(data, tokenizer, 4, batch_size=5)
  assert {int(n) for batch in batches for n in batch["subject_id"]} == set(range(5))
  assert "data.holdout_subjects=2 has no effect" in caplog.text and "'test'" in caplog.text
  heldout = data_pipeline.heldout_subjects(data, 9)
  assert len(heldout) == 5 and all(subject.held_out for subject in heldout)


def test_held_out_subjects_need_stored_data():
  with pytest.raises(DataError, match="'render' has no stored subjects"):
    data_pipeline.heldout_subjects(config(source="render"), 1)


@pytest.mark.parametrize("key, value", [
    ("holdout_subjects", -1), ("holdout_subjects", 1.5), ("holdout_subjects", "two"),
    ("max_bad_share", 1.0), ("max_bad_share", -0.1), ("max_bad_share", float("nan")),
    ("max_bad_share", "some"),
])  # fmt: skip
def test_values_that_make_no_sense(key, value, tokenizer):
  with pytest.raises(DataError, match=f"data.{key}={value!r} must be"):
    take(config(**{key: value}), tokenizer, 1)


# Names (P10, P11).


def test_classes_and_families_by_spelling(tmp_path, tokenizer):
  """P10: Teapot and teapot are one class, blåbær with accents apart is that with accents."""
  nfd = unicodedata.normalize("NFD", "blåbær")
  write_folder(tmp_path)
  nouns = ("Teapot", "teapot", " tea  pot", "Tea pot", "blåbær", nfd)
  families = ("Set 1", "set 1", 3, "3", "blåbær", nfd)
  for n, (noun, family) in enumerate(zip(nouns, families)):
    edit(tmp_path / f"subject_{n}/captions.json", class_noun=noun, family=family,
         captions={name: f"My {noun} here" for name in ("0.png", "1.jpg", "2.png")})  # fmt: skip
  subjects = FolderSubjects(str(tmp_path))
  classes, family_ids = subjects.table.class_id, subjects.table.family_id
  assert classes[0] == classes[1] and classes[2] == classes[3] and classes[4] == classes[5]
  assert len(set(classes)) == len(set(family_ids)) == 3
  assert [a == b for a, b in zip(family_ids[::2], family_ids[1::2])] == [True] * 3
  assert subjects[0].captions(0) == ("My Teapot here",)  # the caption stays as it was written
  data_pipeline.make_loader(config(name=str(tmp_path)), tokenizer, batch_size=2, seed=0)


@pytest.mark.parametrize("source, name, answer", [
    ("render", "anything", True), ("tfds", "subjects3d", True), ("tfds", "subjects3d/small", True),
    ("tfds", "subjects3d/small:1.1.0", True), ("tfds", "subjects3d:1.1.0", True),
    ("tfds", "subjects3d_mine", False), ("tfds", "my/subjects3d", False),
    ("folder", "subjects3d_mine", False), ("folder", "subjects3d/small", False),
    ("folder", "subjects3d", False),
])  # fmt: skip
def test_what_is_subjects3d(source, name, answer):
  """P11: an own folder is not the rendered world, whatever its name."""
  assert data_pipeline.is_subjects3d(config(source=source, name=name)) == answer
  assert bool(data_pipeline.context_phrases(config(source=source, name=name))) == answer


# captions.json by hand (P16) and folders as systems leave them (P19).


def in_json(**changes):
  """A change of captions.json."""
  return lambda place: edit(place / "captions.json", **changes)


def captions(change, key="0.png"):
  def spoil(place):
    file = place / "captions.json"
    listing = json.loads(file.read_text())
    listing["captions"][key] = change
    file.write_text(json.dumps(listing))

  return spoil


def raw(data):
  return lambda place: (place / "captions.json").write_bytes(data)


def renamed(old, new, in_captions=None):
  """A picture of another name, which captions.json calls `in_captions`."""

  def change(place):
    (place / old).rename(place / new)
    file = place / "captions.json"
    listing = json.loads(file.read_text())
    listing["captions"][in_captions or new] = listing["captions"].pop(old)
    file.write_text(json.dumps(listing))

  return change


def all_below(place):
  """Every subject one folder deeper."""
  root = place.parent
  (root / "mine").mkdir()
  for folder in sorted(root.glob("subject_*")):
    folder.rename(root / "mine" / folder.name)


def only_pictures(place):
  for folder in sorted(place.parent.glob("subject_*")):
    (folder / "0.png").rename(place.parent / f"{folder.name}.png")
    shutil.rmtree(folder)


def only_one(place):
  for file in place.glob("[12]*"):
    file.unlink()
  edit(place / "captions.json", captions={"0.png": "a teddy bear"})


def zipped(place):
  root = place.parent
  shutil.rmtree(root)
  root.write_bytes(b"PK\3\4")


BAD = {
    "caption null": (captions(None), "captions.json: the caption of '0.png' is null; write a text"),
    "caption number": (captions(7), "captions.json: the caption of '0.png' is 7; write a text"),
    "caption empty": (captions(" "), "the caption of '0.png' is an empty text; write a text"),
    "captions empty": (captions([]), "the caption of '0.png' is a list of 0; write a text"),
    "list with null": (captions(["a teddy bear", None]), "caption of '0.png' is null; write"),
    "no noun in one": (captions(["a teddy bear", "a toy"]), "json: the prompt 'a toy' does not"),
    "noun missing": (captions("a toy"), "subject_1/captions.json: the prompt 'a toy' does not con"),
    "noun empty": (in_json(class_noun=" "), 'captions.json needs "class_noun" .a text.'),
    "noun a list": (in_json(class_noun=["a"]), 'captions.json needs "class_noun" .a text.'),
    "captions a list": (in_json(captions=["a"]), 'json needs .* and "captions" .picture -> text.'),
    "family a list": (in_json(family=["a"]), 'json: "family" is a list of 1; write a text'),
    "family true": (in_json(family=True), 'json: "family" is true; write a text'),
    "references text": (in_json(references="0.png"), '"references" has the text'),
    "references number": (in_json(references=[0]), '"references" has 0; write a list'),
    "references other": (in_json(references=["4.png"]), "names '4.png', which is not in its"),
    "unknown key": (in_json(captoins={}), "unknown key 'captoins'; .*did you mean 'captions'"),
    "top level list": (raw(b"[1, 2]"), "captions.json holds a list of 2; write"),
    "no JSON": (raw(b'{"class_noun": "teapot",}'), r"json is not JSON .*line 1 column .*; mend it"),
    "two keys": (raw(b'{"captions": {"a": "b", "a": "c"}}'), "json has 'a' twice; keep one"),
    "UTF-16": (raw('{"class_noun": "teapot"}'.encode("utf-16")), "is not UTF-8 .*; save it as"),
    "Latin-1": (raw('{"class_noun": "blåbær"}'.encode("latin-1")), "is not UTF-8 .*; save it as"),
    "nothing": (raw(b""), "captions.json is not JSON"),
    "hidden ending": (lambda place: (place / "captions.json").rename(place / "captions.json.txt"),
                      "captions.json is missing; write .*mean 'captions.json.txt'"),
    "near name": (renamed("2.png", "2.png", "2.jpg"), "names '2.jpg', .* mean '2.png'"),
    "two spellings": (captions("a teddy bear", "0.PNG"), "'0.png' in two spellings; keep"),
    "mask of that kind": (lambda place: (place / "2_mask.png").rename(place / "2_mask.jxl"),
                          "2_mask.jxl: pictures of the kind .jxl cannot be read here; save it as"),
    "raw picture": (renamed("2.png", "2.dng"), "2.dng: pictures of the kind .dng cannot .*; save"),
    "HEIC": (renamed("2.png", "2.HEIC"), "2.HEIC: .*kind .heic cannot .* pillow-heif"),
    "no caption": (lambda place: shutil.copy(place / "0.png", place / "3.bmp"),
                   "3.bmp has no caption; add one to .*captions.json"),
    "one picture": (only_one, r"subject_1 has 1 picture\(s\); a triple needs 2 .*: add some"),
    "too deep": (all_below, "a level too deep, as .*mine/subject_0; set data.name to .*/mine"),
    "too shallow": (lambda place: shutil.copy(place / "captions.json", place.parent),
                    "is the folder of one subject: .*; set data.name to the folder above it"),
    "only pictures": (only_pictures, "has pictures, but no folders in it; put the pictures"),
    "zip": (zipped, "data.zip is a file, not a folder; unpack it"),
    "not there": (lambda place: shutil.rmtree(place.parent),
                  "data.zip is not a folder; set data.name to the folder of your subjects"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", BAD.values(), ids=BAD.keys())
def test_bad_data_is_found_before_the_first_step(tmp_path, tokenizer, spoil, message):
  """P16, P19: one line with the file's name and what to do."""
  root = tmp_path / "data.zip"
  write_folder(root, subjects=2)
  spoil(root / "subject_1")
  with pytest.raises(DataError, match=message) as caught:
    data_pipeline.make_loader(config(name=str(root)), tokenizer, batch_size=2, seed=0)
  assert "\n" not in str(caught.value) and "data.zip" in str(caught.value)


def junk(place):
  for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
    (place / name).write_bytes(b"\0\5\26\7")
    (place.parent / name).write_bytes(b"\0\5\26\7")
  for name in ("__MACOSX", "@eaDir", "empty", ".ipynb_checkpoints", "emptied"):
    (place.parent / name).mkdir()
    (place / name).mkdir()
  (place.parent / "__MACOSX/._subject_1").write_bytes(b"\0\5\26\7")
  (place.parent / "@eaDir/0.png").write_bytes(b"\0")
  (place.parent / "emptied/.DS_Store").write_bytes(b"\0")


def byte_order_mark(place):
  file = place / "captions.json"
  file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def other_kind(ending):
  """2.png saved as another kind of file."""

  def change(place):
    with Image.open(place / "2.png") as image:
      image.save(place / f"2{ending}")
    renamed("2.png", "2.old", f"2{ending}")(place)
    (place / "2.old").unlink()

  return change


NORDIC = "blåbær kop.png"
GOOD = {
    "junk": junk,
    "byte order mark": byte_order_mark,
    "null family": in_json(family=None),
    "number as family": in_json(family=3),
    "no reference": in_json(references=[]),
    "capital ending": renamed("1.jpg", "1.JPG", "1.jpg"),
    "capital in json": renamed("1.jpg", "1.jpg", "1.JPG"),
    "capitals": lambda place: (place / "captions.json").rename(place / "Captions.JSON"),
    "NFD": renamed("0.png", unicodedata.normalize("NFD", NORDIC), NORDIC),
    "NFC": renamed("0.png", NORDIC, unicodedata.normalize("NFD", NORDIC)),
    "capital mask": lambda place: (place / "2_mask.png").rename(place / "2_MASK.PNG"),
    **{ending: other_kind(ending) for ending in (
        ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jfif", ".avif", ".jp2")},
}  # fmt: skip


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD.keys())
def test_folders_as_systems_leave_them(tmp_path, change):
  """P16, P19: what is plain enough is taken; pictures of all kinds keep their colours."""
  write_folder(tmp_path, subjects=2)
  change(tmp_path / "subject_1")
  subjects = read_folder(tmp_path)
  assert [subject.place.name for subject in subjects] == ["subject_0", "subject_1"]
  assert len(subjects[1].frames) == 3
  for frame in subjects[1].frames:
    picture, mask = frame.load()
    assert np.abs(np.median(picture[mask > 128], 0) - (40, 0, 0)).max() <= 8
    height = np.flatnonzero((mask > 128).any(1)).size  # as the caption says
    assert height == 4 * (int(frame.caption[-1]) + 4)


def test_heic_with_its_package(tmp_path, monkeypatch):
  """Where pillow-heif is installed, its opener is registered (here one that stands for it)."""
  write_folder(tmp_path, subjects=1)
  renamed("2.png", "2.heic")(tmp_path / "subject_0")
  asked = []
  package = SimpleNamespace(register_heif_opener=lambda: asked.append(1))
  monkeypatch.setitem(sys.modules, "pillow_heif", package)
  assert len(read_folder(tmp_path)[0].frames) == 3 and asked


def test_several_captions_of_a_picture(tmp_path, tokenizer):
  """P16: one is drawn for each row; nothing else of the batch changes, nor do other rows."""
  write_folder(tmp_path)
  data = config(name=str(tmp_path), group_ratio=0.0)
  plain = take(data, tokenizer, 4)
  noun = "teddy bear"
  texts = ["the teddy bear alone", "some teddy bear", "this teddy bear"]
  edit(tmp_path / "subject_1/captions.json",
       captions={"0.png": texts, "1.jpg": texts, "2.png": texts})
  several = check_purity(data, tokenizer) + take(data, tokenizer, 30, start_step=2)
  for before, after in zip(plain, several):
    for key in before.keys() - {"input_ids", "slot", "noun_span"}:
      np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    other = before["subject_id"] != 1
    assert_equal({k: v[other] for k, v in before.items()}, {k: v[other] for k, v in after.items()})
  seen = [
      tokenizer.decode(row, skip_special_tokens=True).strip()
      for batch in several for row in batch["input_ids"][batch["subject_id"] == 1]
  ]  # fmt: skip
  counts = [seen.count(text) for text in texts]
  assert sum(counts) == len(seen) and min(counts) >= len(seen) / 6 and noun in seen[0]


# Bad pictures (P13).


def cut(file):
  """As a download that broke off: the header is whole."""
  file.write_bytes(file.read_bytes()[: int(0.7 * file.stat().st_size)])


def test_bad_pictures_up_to_a_share(tmp_path, tokenizer, caplog):
  """P13: others take their place, which depends on (seed, step, row) and the bad files alone."""
  write_folder(tmp_path)
  data = config(name=str(tmp_path), group_ratio=0.0, max_bad_share=0.2)  # 3 of 18 pictures
  whole = take(data, tokenizer, 6)
  cut(tmp_path / "subject_1/1.jpg")
  (tmp_path / "subject_2/1.jpg").write_text("<html>not found</html>")
  cut(tmp_path / "subject_2/2_mask.png")
  mended = check_purity(data, tokenizer) + take(data, tokenizer, 4, start_step=2)
  changed = 0
  for before, after in zip(whole, mended):
    for row, subject in enumerate(before["subject_id"]):
      same = all(np.array_equal(before[key][row], after[key][row]) for key in before)
      changed += not same
      if subject == 1:
        assert after["subject_id"][row] == 1  # its other pictures are good
      elif subject == 2:
        assert after["subject_id"][row] != 2 and not same  # one picture makes no triple
      else:
        assert same
  assert changed
  heldout = data_pipeline.heldout_subjects(data, 6)
  assert len(heldout) == 6
  for name in ("subject_1/1.jpg", "subject_2/1.jpg", "subject_2/2_mask.png"):
    told = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("left out, others take its place: "), told


def test_more_bad_pictures_than_the_share(tmp_path, tokenizer):
  write_folder(tmp_path)
  cut(tmp_path / "subject_1/1.jpg")
  data = config(name=str(tmp_path), group_ratio=0.0)
  with pytest.raises(DataError, match="subject_1/1.jpg cannot be read .*; save it again") as caught:
    take(data, tokenizer, 12)
  assert "max_bad_share" not in str(caught.value)  # as it always was
  cut(tmp_path / "subject_3/1.jpg")
  data.max_bad_share = 0.1  # 1.8 of 18 pictures
  message = "subject_[13]/1.jpg cannot .*; with it 2 of 18 .*max_bad_share=0.1; the first: "
  with pytest.raises(DataError, match=message) as caught:
    take(data, tokenizer, 12)
  assert "\n" not in str(caught.value)


# TFDS sets of other types (P17).


def typed(folder, changes):
  """`write_blobs` of the boxes FRAMES; `changes`: key -> (feature, value in all examples)."""
  values = dict(frames=list(FRAMES), masks=list(MASKS[..., None]))
  write_blobs(
    folder, file_format="tfrecord", features={key: f for key, (f, _) in changes.items()},
    values=values | {key: value for key, (_, value) in changes.items()},
  )
  data = blobs(folder)
  data.group_ratio = 0.0
  return data


PICTURES = [draw((200, 0, 0), (8, 4, 24, 20 + 4 * f)) for f in range(3)]
FRAMES, MASKS = (np.stack(arrays) for arrays in zip(*PICTURES))


def tfds_features():
  from data_pipeline.sources.tf_data import import_tfds

  return import_tfds().features


TYPES = {
    "label": lambda f: dict(class_noun=(f.ClassLabel(names=["kettle", "teapot"]), "teapot")),
    "bool masks": lambda f: dict(masks=(f.Sequence(f.Tensor(shape=(40, 52), dtype=np.bool_)),
                                        list(MASKS > 0))),
    "masks of 1": lambda f: dict(masks=(f.Tensor(shape=(None, 40, 52, 1), dtype=np.uint8),
                                        MASKS[..., None] // 255)),
    "zipped frames": lambda f: dict(frames=(
        f.Tensor(shape=(None, None, None, 3), dtype=np.uint8, encoding="zlib"), FRAMES)),
    "frames": lambda f: dict(frames=(f.Sequence(f.Tensor(shape=(40, 52, 3), dtype=np.uint8)),
                                     list(FRAMES))),
    "video": lambda f: dict(frames=(f.Video(shape=(None, 40, 52, 3)), FRAMES)),
    "captions": lambda f: dict(captions=(f.Sequence(f.Sequence(f.Text())), [
        ["a teapot 0"], ["a teapot 1", "the teapot 1"], ["a teapot 2"]])),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_tfds_features_of_other_types(tmp_path, tokenizer, name):
  """P17: the same pictures, however they are stored."""
  data = typed(tmp_path, TYPES[name](tfds_features()))
  [batch] = take(data, tokenizer, 1)
  subjects = data_pipeline.heldout_subjects(data, 5)
  assert len(subjects) == 5
  for subject in subjects:
    assert subject.class_noun == "teapot"
    f = next(f for f in range(3) if np.array_equal(subject.image, FRAMES[f]))
    np.testing.assert_array_equal(subject.mask, MASKS[f])
  for row in range(4):
    text = tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True)
    assert "teapot" in text
    assert batch["target_mask"][row].max() == 255


BAD_TYPES = {
    "number": lambda f: dict(class_noun=(f.Scalar(np.int64), 3)),
    "label without names": lambda f: dict(class_noun=(f.ClassLabel(num_classes=4), 3)),
    "noun a list": lambda f: dict(class_noun=(f.Sequence(f.Text()), ["teapot"])),
    "number captions": lambda f: dict(captions=(f.Sequence(f.Scalar(np.int64)), [0, 1, 2])),
    "one caption": lambda f: dict(captions=(f.Text(), "a teapot")),
    "float masks": lambda f: dict(masks=(
        f.Tensor(shape=(3, 40, 52), dtype=np.float32), np.float32(MASKS))),
    "float images": lambda f: dict(masks=(
        f.Sequence(f.Image(shape=(None, None, 1), dtype=np.float32)),
        list(np.float32(MASKS[..., None] / 255)))),
    "float frames": lambda f: dict(frames=(
        f.Tensor(shape=(3, 40, 52, 3), dtype=np.float32), np.float32(FRAMES))),
    "one frame": lambda f: dict(frames=(f.Image(shape=(None, None, 3)), FRAMES[0])),
    "views": lambda f: dict(frames=(f.Sequence({"view": f.Image(shape=(None, None, 3))}),
                                    [{"view": frame} for frame in FRAMES])),
    "float id": lambda f: dict(subject_id=(f.Scalar(np.float32), 1.5)),
    "text flags": lambda f: dict(is_reference=(f.Sequence(f.Text()), ["yes"] * 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TYPES)
def test_tfds_features_that_cannot_be_used(tmp_path, tokenizer, name):
  """P17: one line, before the first step: which feature, what it is, what it must be."""
  changes = BAD_TYPES[name](tfds_features())
  data = typed(tmp_path, changes)
  [key] = changes
  with pytest.raises(DataError, match=f"blobs.*the feature '{key}' is .*; it must be ") as caught:
    data_pipeline.make_loader(data, tokenizer, batch_size=4, seed=0)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values, message", [
    (dict(class_noun=" "), "example 0 has no class noun; give it to all examples"),
    (dict(captions=["a teapot", "", "a teapot"]), "example 0, frame 1 has an empty caption; give"),
    (dict(class_noun="kettle"), "example .: the prompt 'a teapot in picture .' does not contain"),
])  # fmt: skip
def test_tfds_values_that_cannot_be_used(tmp_path, tokenizer, values, message):
  write_blobs(tmp_path, file_format="tfrecord", values=values)
  with pytest.raises(DataError, match=f"blobs.*{message}"):
    take(blobs(tmp_path), tokenizer, 1)


def test_tfds_classes_and_families_by_spelling(tmp_path, tokenizer):
  """P10 for texts in a TFDS set, whose ids keep their spelling."""
  f = tfds_features()
  spellings = iter([("Teapot", "Set"), ("teapot", "set"), ("TEA  pot", "other"), ("tea pot", "x")])

  def examples():
    noun, family = next(spellings)
    return dict(class_noun=noun, family_id=family, captions=[f"a {noun}"] * 3)

  write_blobs(tmp_path, file_format="tfrecord", subject_ids=["a", "A", "b", "c"],
              features=dict(family_id=f.Text()), values=examples)
  [batch] = take(blobs(tmp_path), tokenizer, 1)
  row = {int(subject): n for n, subject in enumerate(batch["subject_id"])}  # in ASCII's order
  a, b = [[batch[key][row[n]] for n in (1, 0, 2, 3)] for key in ("class_id", "family_id")]
  assert a[0] == a[1] != a[2] == a[3]
  assert b[0] == b[1] and len(set(b)) == 3


def test_one_subject_is_told(tmp_path, tokenizer, caplog):
  """It can be trained on, but without contrast."""
  write_folder(tmp_path, subjects=1)
  data_pipeline.make_loader(config(name=str(tmp_path)), tokenizer, batch_size=2, seed=0)
  assert f"{tmp_path} has one subject to train on: there is nothing to contrast" in caplog.text


def test_no_folder_is_named(tokenizer):
  with pytest.raises(DataError, match="data.name is empty; set it to the folder of your subjects"):
    take(config(), tokenizer, 1)


# Data in a bucket (C15).


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """Where fake:// is on this machine."""
  (tmp_path / "cloud").mkdir()
  monkeypatch.setattr(FakePath, "root", tmp_path / "cloud")
  monkeypatch.chdir(tmp_path)
  return tmp_path / "cloud"


def test_a_folder_in_a_bucket(bucket, tokenizer):
  """C15: the same batches as from the disk."""
  write_folder(bucket / "mine/data")
  local = take(config(name=str(bucket / "mine/data")), tokenizer, 2)
  remote = take(config(name="fake://mine/data"), tokenizer, 2)
  for a, b in zip(local, remote):
    assert_equal(a, b)
  heldout = data_pipeline.heldout_subjects(config(name="fake://mine/data"), 2)
  assert len(heldout) == 2
  cut(bucket / "mine/data/subject_1/1.jpg")
  with pytest.raises(DataError, match="^fake://mine/data/subject_1/1.jpg cannot be read"):
    take(config(name="fake://mine/data"), tokenizer, 8)
  with pytest.raises(DataError, match="^fake://mine/nothing is not a folder; set data.name"):
    take(config(name="fake://mine/nothing"), tokenizer, 1)
  with pytest.raises(DataError, match="data.name='other://x': no file system is known for other"):
    take(config(name="other://x"), tokenizer, 1)
  assert not (bucket.parent / "fake:").exists()


def test_a_tfds_set_in_a_bucket(bucket, tokenizer, monkeypatch):
  """C15: TFRecord files are read by seeking, the index lies beside them."""
  write_blobs(bucket / "mine", file_format="tfrecord")
  local = take(blobs(bucket / "mine"), tokenizer, 2)
  for file in bucket.rglob("subjects_*.npz"):
    file.unlink()
  searched = []
  search = records._tfrecord_offsets
  monkeypatch.setattr(records, "_tfrecord_offsets", lambda *a: searched.append(a) or search(*a))
  for first_use in (True, False):
    remote = take(blobs("fake://mine"), tokenizer, 2)
    for a, b in zip(local, remote):
      assert_equal(a, b)
    assert len(list(bucket.rglob("subjects_train_*.npz"))) == 1
    assert len(searched) == 3 * first_use  # files; later the index knows where records are
    searched.clear()
  assert not (bucket.parent / "fake:").exists()
  write_blobs(bucket / "array", file_format="array_record")
  with pytest.raises(DataError, match="^fake://array.*: ArrayRecord files are read from local"):
    take(blobs("fake://array"), tokenizer, 1)
