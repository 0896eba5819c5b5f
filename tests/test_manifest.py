"""A manifest: what readers describe is what is read, from whole files and from parts of them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, LeftOut, Manifest, SubjectRow
from data_pipeline.manifest_frames import ManifestSubjects, load_frame
from data_pipeline.sources import listing


def picture(seed: int, sides=(6, 8)) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (*sides, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
  for n in range(3):
    Image.fromarray(picture(n)).save(tmp_path / f"{n}.png")
  soft = np.tile(np.array([0, 60, 120, 130, 200, 255, 40, 10], np.uint8), (6, 1))
  Image.fromarray(soft).save(tmp_path / "mask.png")
  Image.fromarray(np.kron(soft, np.ones((2, 2), np.uint8))).save(tmp_path / "twice.png")
  Image.fromarray(soft.T.copy()).save(tmp_path / "turned.png")
  alpha = Image.fromarray(picture(7))
  alpha.putalpha(Image.fromarray(soft))
  alpha.save(tmp_path / "alpha.png")
  parts = [(tmp_path / f"{n}.png").read_bytes() for n in range(3)]
  (tmp_path / "all.bin").write_bytes(b"".join(parts))
  return tmp_path, soft, [len(part) for part in parts]


def test_it_is_read_as_it_was_written(folder, tmp_path):
  root, _, _ = folder
  subjects = [
    SubjectRow("a", "Mug", [FrameRow("0.png", ["a mug"]), FrameRow("1.png", ["x", "y"])], "set"),
    SubjectRow("b", "mug", [FrameRow("2.png", ["b"], is_reference=False)], creator="someone")]
  left_out = [LeftOut("c", "one frame")]
  made = Manifest.from_subjects(subjects, where="here", layout="test", root=str(root),
                                left_out=left_out)
  made.write(tmp_path / "manifest")
  read = Manifest.read(tmp_path / "manifest")
  assert read == made and read.fingerprint() == made.fingerprint()
  assert read.left_out == tuple(left_out)
  shown = ManifestSubjects(read)
  assert shown.names == ["a", "b"] and shown.pictures == 3
  assert shown.table.class_id.tolist() == [0, 0] and shown.table.family_id.tolist() == [0, -1]
  assert shown[0].captions(1) == ["x", "y"] and shown[1].is_reference().tolist() == [False]
  np.testing.assert_array_equal(shown[1].frame(0)[0], picture(2))
  subjects[1] = SubjectRow("b", "mug", [FrameRow("1.png", ["b"], is_reference=False)])
  before = ManifestSubjects(read).fingerprint()
  Image.fromarray(picture(9, (12, 16))).save(root / "2.png")
  assert ManifestSubjects(read).fingerprint() != before  # a file has changed
  other = Manifest.from_subjects(subjects, where="here", layout="test", root=str(root))
  assert other.fingerprint() != made.fingerprint()


def test_features_are_of_one_set_and_of_its_files_as_they_are(folder, tmp_path):
  """What a cache of features is named after: other sizes or another root are other data."""
  root, _, _ = folder
  frames = [FrameRow("0.png", ["a"], "mask.png", "file"), FrameRow(str(root / "1.png"), ["a"])]

  def fingerprint(root):
    return ManifestSubjects(Manifest.from_subjects(
      [SubjectRow("a", "mug", frames)], where="here", layout="test", root=str(root))).fingerprint()

  first = fingerprint(root)
  assert fingerprint(root) == first
  other = shutil.copytree(root, tmp_path / "other")
  seen = {first, fingerprint(other)}
  for name in ("0.png", "mask.png", "1.png"):
    with (root / name).open("ab") as file:
      file.write(b"more")
    seen.add(fingerprint(root))
  (root / "0.png").unlink()  # a bad picture, which drawing it will find
  seen.add(fingerprint(root))
  assert len(seen) == 6


def test_heif_is_read_or_the_remedy_named(folder, monkeypatch):
  """Pillow knows HEIF only once it was taught; a frame may be the first that asks for it."""
  root, _, _ = folder
  (root / "0.png").rename(root / "photo.HEIC")  # Pillow goes by the content
  asked = []
  monkeypatch.setattr(listing, "_register_heif", lambda: asked.append(1) or len(asked) > 1)
  frame = FrameRow("photo.HEIC", ["a"])
  with pytest.raises(DataError, match="photo.HEIC: .*pip install pillow-heif"):
    load_frame(str(root), frame)
  np.testing.assert_array_equal(load_frame(str(root), frame)[0], picture(0))


def test_a_folder_that_holds_none(tmp_path):
  with pytest.raises(DataError, match="is no manifest"):
    Manifest.read(tmp_path)


def test_masks_and_parts(folder):
  root, soft, lengths = folder
  load = lambda **options: load_frame(  # noqa: E731
    str(root), FrameRow(**(dict(picture="0.png", captions=["a"]) | options)))
  np.testing.assert_array_equal(load()[1], 255)
  np.testing.assert_array_equal(load(mask="mask.png", mask_kind="file")[1], soft)
  cut = load(mask="mask.png", mask_kind="file", threshold=120)[1]
  np.testing.assert_array_equal(cut, np.where(soft >= 120, 255, 0))
  np.testing.assert_array_equal(load(mask="twice.png", mask_kind="file")[1], soft)
  np.testing.assert_array_equal(load(picture="alpha.png", mask_kind="alpha")[1], soft)
  np.testing.assert_array_equal(load(mask_kind="alpha")[1], 255)  # without a channel: opaque
  pixels, mask = load(mask="mask.png", mask_kind="file", box=(1, 2, 7, 5))
  np.testing.assert_array_equal(pixels, picture(0)[2:5, 1:7])
  np.testing.assert_array_equal(mask, soft[2:5, 1:7])
  pixels, mask = load(mask="mask.png", mask_kind="file", rotation=90)  # clockwise
  np.testing.assert_array_equal(pixels, picture(0).transpose(1, 0, 2)[:, ::-1])
  np.testing.assert_array_equal(mask, soft.T[:, ::-1])
  part = load(picture="all.bin", picture_offset=lengths[0], picture_length=lengths[1])[0]
  np.testing.assert_array_equal(part, picture(1))


@pytest.mark.parametrize(("options", "message"), [
  (dict(picture="9.png"), "cannot be read"),
  (dict(mask="turned.png", mask_kind="file"), "other proportions"),
  (dict(mask="mask.png", mask_kind="file", box=(0, 0, 1, 6)), "mask .* is empty"),
  (dict(picture_offset=5, picture_length=10_000), "breaks off"),
])
def test_mistakes_name_the_file(folder, options, message):
  with pytest.raises(DataError, match=message) as error:
    load_frame(str(folder[0]), FrameRow(**(dict(picture="0.png", captions=["a"]) | options)))
  assert options.get("picture", "0.png") in str(error.value)
