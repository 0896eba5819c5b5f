"""Data as people have it: held-out subjects, names, captions.json, folders, TFDS types, buckets."""

import json
import unicodedata

import numpy as np
import pytest
from test_sources import blobs, config, draw, take, tokenizer, write_blobs, write_folder  # noqa: F401

import data_pipeline
from data_pipeline import sampling
from data_pipeline.errors import DataError


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


def held_out_of(data, tokenizer, total):  # noqa: F811
  """Checks that training sees all subjects but the held-out ones; returns those."""
  heldout = data_pipeline.heldout_subjects(data, total)
  batches = take(data, tokenizer, 4, batch_size=total)
  seen = {int(n) for batch in batches for n in batch["subject_id"]}
  numbers = {int(s.name.split("_")[-1].split()[-1]) for s in heldout}
  assert not seen & numbers and seen | numbers == set(range(total))
  return heldout


def test_held_out_subjects_of_a_folder(tmp_path, tokenizer):  # noqa: F811
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


def test_too_few_subjects_to_hold_some_out(tmp_path, tokenizer):  # noqa: F811
  write_folder(tmp_path, subjects=4)  # one family
  data = config(name=str(tmp_path), holdout_subjects=1)
  for use in (lambda: take(data, tokenizer, 1), lambda: data_pipeline.heldout_subjects(data, 1)):
    with pytest.raises(DataError, match=r"data.holdout_subjects=1 .* 4 subject\(s\) in 1 family"):
      use()


def test_held_out_subjects_of_a_tfds_set(tmp_path, tokenizer, caplog):  # noqa: F811
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
def test_values_that_make_no_sense(key, value, tokenizer):  # noqa: F811
  with pytest.raises(DataError, match=f"data.{key}={value!r} must be"):
    take(config(**{key: value}), tokenizer, 1)
