"""The plan of a batch, its pictures, its captions as tokens: values known by construction."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline import images, sampling, tokens, triples
from data_pipeline.errors import DataError
from data_pipeline.sampling import SubjectTable


def make_tokenizer(folder, max_length=64):
  """A CLIPTokenizer whose pieces are letters, but for "tea", "pot" and "bear"."""
  from tokenizers.pre_tokenizers import ByteLevel
  from transformers import CLIPTokenizer

  merges = ["t e", "te a", "p o", "po t</w>", "b e", "be a", "bea r</w>"]
  letters = sorted(ByteLevel.alphabet())
  pieces = [*letters, *(x + "</w>" for x in letters), *(m.replace(" ", "") for m in merges)]
  pieces += ["<|startoftext|>", "<|endoftext|>"]
  folder.mkdir(exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
  config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# Which subjects.

# 6 classes of 5 families of 4 members, as in subjects3d but for the numbers.
_IDS = np.arange(120)
TABLE = SubjectTable(subject_id=1000 + _IDS, family_id=_IDS // 4, class_id=_IDS // 20)


def choose(step, batch_size=24, table=TABLE, seed=3, group="family", group_ratio=0.0):
  return sampling.choose_subjects(
      seed, step, table, batch_size, group=group, group_ratio=group_ratio
  )


def test_subjects_are_distinct_and_all_come():
  batches = [choose(step) for step in range(60)]
  assert all(len(set(batch)) == 24 for batch in batches)
  assert set(np.concatenate(batches)) == set(range(120))
  assert all(np.array_equal(choose(step), batch) for step, batch in enumerate(batches))
  assert len({tuple(b) for b in batches}) == 60
  assert not np.array_equal(choose(0), choose(0, seed=4))


def test_small_data_set_repeats_as_late_as_it_can():
  table = SubjectTable(*(column[:5] for column in TABLE))
  counts = np.bincount(choose(0, batch_size=13, table=table), minlength=5)
  assert sorted(counts) == [2, 2, 3, 3, 3]


def test_share_of_one_class():
  for step in range(20):
    batch = choose(step, group="class", group_ratio=0.75)
    assert len(set(batch)) == 24
    # 18 of the class's 20 members, and of the other 6 at most 2 can be of that class again.
    assert 18 <= np.bincount(TABLE.class_id[batch]).max() <= 20
  # A share that the class cannot fill: all of its members, none of them twice.
  batch = choose(0, group="class", group_ratio=1.0)
  assert np.bincount(TABLE.class_id[batch]).max() == 20 and len(set(batch)) == 24


def test_share_of_one_family_goes_on_with_whole_families_of_its_class():
  groups = set()
  for step in range(40):
    batch = choose(step, group="family", group_ratio=0.5)  # 12 = three families of 4
    assert len(set(batch)) == 24
    families = np.bincount(TABLE.family_id[batch], minlength=30)
    by_class = (families == 4).reshape(6, 5).sum(1)
    assert by_class.max() >= 3
    groups.add(by_class.argmax())
  assert groups == set(range(6))
  # 4 rows are one family, not four subjects of one class.
  batch = choose(1, group="family", group_ratio=1 / 6)
  assert np.bincount(TABLE.family_id[batch]).max() == 4


def test_group_is_spread_over_the_hosts():
  firsts = [np.bincount(TABLE.class_id[choose(s, group="class", group_ratio=0.5)[:12]]).max()
            for s in range(10)]  # fmt: skip
  assert max(firsts) < 12


def test_group_that_cannot_be_drawn():
  unknown = TABLE._replace(family_id=np.full(120, -1))
  sampling.check_group(unknown, "class", 0.5)
  sampling.check_group(unknown, "family", 0.0)
  with pytest.raises(DataError, match="family.*data.group_ratio=0"):
    sampling.check_group(unknown, "family", 0.5)
  with pytest.raises(DataError, match="'color'.*class, family"):
    sampling.check_group(TABLE, "color", 0.5)
  with pytest.raises(DataError, match="group_ratio=1.5"):
    sampling.check_group(TABLE, "class", 1.5)


# Which frames.


def test_frames_differ_and_references_are_references():
  flags = np.array([True, False, True, False, True, False])
  drawn = [sampling.choose_frames(sampling.row_rng(0, 0, row), flags) for row in range(300)]
  assert all(len({i, j, k}) == 3 for i, j, k in drawn)
  assert all(flags[i] and flags[j] for i, j, _ in drawn)
  assert {k for _, _, k in drawn} == set(range(6))
  assert {i for i, _, _ in drawn} == {j for _, j, _ in drawn} == {0, 2, 4}


def test_the_only_reference_beside_the_target_is_the_reference():
  flags = np.array([False, True, False, False])
  for row in range(50):
    i, j, k = sampling.choose_frames(sampling.row_rng(0, 0, row), flags)
    assert len({i, j, k}) == 3
    assert j == 1 or k == 1


def test_two_frames_give_the_target_as_the_positive_and_one_frame_nothing():
  drawn = {sampling.choose_frames(sampling.row_rng(0, 0, r), np.ones(2, bool)) for r in range(20)}
  assert drawn == {(0, 1, 0), (1, 0, 1)}
  with pytest.raises(DataError, match="at least 2 frames"):
    sampling.choose_frames(sampling.row_rng(0, 0, 0), np.ones(1, bool))


# Pictures.


def box_picture(height=90, width=120, box=(20, 30, 60, 50)):
  """A red box (x0, y0, x1, y1) on a blue ground, and its mask."""
  image = np.zeros((height, width, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
  mask = np.zeros((height, width), np.uint8)
  x0, y0, x1, y1 = box
  image[y0:y1, x0:x1] = (200, 0, 0)
  mask[y0:y1, x0:x1] = 255
  return image, mask


def extent(image):
  """Bounding box (x0, y0, x1, y1) of what is more subject than white, to a fraction of a pixel."""
  ink = (255 - image[..., 1].astype(float)) / 255
  xs, ys = ink.max(0), ink.max(1)
  spans = []
  for profile in (xs, ys):
    found = np.flatnonzero(profile > 0.02)
    first, last = found[0], found[-1]
    spans.append((first + 1 - profile[first], last + profile[last]))
  return np.array([spans[0][0], spans[1][0], spans[0][1], spans[1][1]])


def test_reference_is_centred_at_its_share():
  image, mask = box_picture()
  out = triples.segment_reference(image, mask, ratio=0.8, size=64)
  # Longer side 0.8 * 64 = 51.2, the other half of it, the middle in the middle.
  np.testing.assert_allclose(extent(out), [6.4, 19.2, 57.6, 44.8], atol=0.35)
  np.testing.assert_array_equal(out[24:40, 12:52], np.broadcast_to((200, 0, 0), (16, 40, 3)))
  # White, and nothing of the blue ground.
  assert np.all(out[:18] == 255) and np.all(out[46:] == 255) and np.all(out[:, :5] == 255)


def test_reference_of_a_subject_that_the_picture_cuts():
  image, mask = box_picture(box=(0, 0, 10, 40))
  out = triples.segment_reference(image, mask, ratio=0.5, size=64)
  np.testing.assert_allclose(extent(out), [28, 16, 36, 48], atol=0.35)


def test_soft_alpha_is_composed_on_white():
  image, mask = box_picture(32, 32, (0, 0, 32, 32))
  mask[8:16] = 51  # a fifth
  out = triples.place_on_white(image, mask, size=32, ratio=1.0)
  np.testing.assert_array_equal(out[0], image[0])
  np.testing.assert_array_equal(out[12], np.broadcast_to((244, 204, 204), (32, 3)))


def test_shrinking_is_antialiased():
  image, mask = box_picture(256, 256, (0, 0, 256, 256))
  image[:, ::2] = 0  # stripes of one pixel: red and black
  out = triples.place_on_white(image, mask, size=32, ratio=1.0)
  assert np.all(np.abs(out[4:-4, 4:-4, 0].astype(int) - 100) <= 2)


def test_positive_has_random_size_and_place_inside_the_canvas():
  image, mask = box_picture()
  config = triples.TripleConfig(64, 0.8, 0.0, (0.4, 0.9))
  boxes, references = [], []
  for row in range(200):
    rng = sampling.row_rng(0, 0, row)
    out = triples.make_triple(rng, [image] * 3, [mask] * 3, config)
    boxes.append(extent(out["positive"]))
    references.append(out["reference"])
  boxes = np.array(boxes)
  longer = (boxes[:, 2] - boxes[:, 0]) / 64
  assert 0.39 < longer.min() < 0.43 and 0.87 < longer.max() < 0.91
  np.testing.assert_allclose(longer, 2 * (boxes[:, 3] - boxes[:, 1]) / 64, atol=0.03)
  assert boxes.min() >= 0 and boxes.max() <= 64
  # The free room left of the subject is used from none to all.
  x = boxes[:, 0] / (64 - (boxes[:, 2] - boxes[:, 0]))
  y = boxes[:, 1] / (64 - (boxes[:, 3] - boxes[:, 1]))
  for place in (x, y):
    assert place.min() < 0.05 and place.max() > 0.95 and abs(place.mean() - 0.5) < 0.06
  assert abs(np.corrcoef(x, y)[0, 1]) < 0.2 and abs(np.corrcoef(x, longer)[0, 1]) < 0.2
  assert all(np.array_equal(r, references[0]) for r in references)


def test_reference_jitter_moves_the_reference_alone():
  image, mask = box_picture()
  steady, shaken = [], []
  for jitter, found in ((0.0, steady), (0.5, shaken)):
    config = triples.TripleConfig(64, 0.6, jitter, (0.4, 0.9))
    for row in range(100):
      rng = sampling.row_rng(0, 0, row)
      found.append(triples.make_triple(rng, [image] * 3, [mask] * 3, config))
  for a, b in zip(steady, shaken):
    np.testing.assert_array_equal(a["positive"], b["positive"])
  boxes = np.array([extent(row["reference"]) for row in shaken])
  longer = (boxes[:, 2] - boxes[:, 0]) / 64
  assert 0.29 < longer.min() < 0.36 and 0.84 < longer.max() < 0.91
  place = boxes[:, 0] / (64 - (boxes[:, 2] - boxes[:, 0]))  # half of the room, in its middle
  assert 0.23 < place.min() < 0.33 and 0.67 < place.max() < 0.77


def test_places_of_the_reference():
  """The lab's ways of showing a reference; positive, target and every other row stay the same."""
  image, mask = box_picture(100, 100, (50, 20, 80, 40))
  rows = {
    place: triples.make_triple(
      sampling.row_rng(0, 0, 0), [image] * 3, [mask] * 3,
      triples.TripleConfig(50, 0.8, 0.0, (0.4, 0.6), place))
    for place in triples.LAYOUTS
  }
  for row in rows.values():
    np.testing.assert_array_equal(row["positive"], rows["centred"]["positive"])
    np.testing.assert_array_equal(row["target"], rows["centred"]["target"])
  np.testing.assert_allclose(extent(rows["centred"]["reference"]), [5, 11.6, 45, 38.4], atol=0.5)
  kept = rows["in_place"]["reference"]  # half the size, where it was, on white
  np.testing.assert_allclose(extent(kept), [25, 10, 40, 20], atol=0.5)
  assert np.all(kept[:8] == 255)
  np.testing.assert_array_equal(rows["frame"]["reference"], rows["frame"]["target"])
  boxes = []
  for row in range(60):
    config = triples.TripleConfig(50, 0.8, 0.0, (0.4, 0.6), "random")
    out = triples.make_triple(sampling.row_rng(0, 0, row), [image] * 3, [mask] * 3, config)
    boxes.append(extent(out["reference"]))
  longer = (np.array(boxes)[:, 2] - np.array(boxes)[:, 0]) / 50
  assert 0.38 < longer.min() < 0.44 and 0.56 < longer.max() < 0.62
  assert np.ptp(np.array(boxes)[:, 0]) > 20


def test_target_keeps_its_ground_and_is_cropped_around_the_subject():
  image, mask = box_picture()
  config = triples.TripleConfig(image_size=90)
  out = triples.make_triple(sampling.row_rng(0, 0, 0), [image] * 3, [mask] * 3, config)
  # The square of 90 pixels has to stop at the left edge: the subject's middle is at x = 40.
  np.testing.assert_array_equal(out["target"], image[:, :90])
  np.testing.assert_array_equal(out["target_mask"], mask[:, :90])
  image, mask = box_picture(box=(50, 30, 80, 50))  # the middle at 65: the square from 20 to 110
  target, target_mask = triples.square(image, mask, 90)
  np.testing.assert_array_equal(target, image[:, 20:110])
  np.testing.assert_array_equal(target_mask, mask[:, 20:110])


def test_reference_by_alpha_mask_or_whole():
  image, mask = box_picture()
  by_mask = triples.segment_reference(image, mask)
  rgba = np.dstack([image, mask])
  np.testing.assert_array_equal(triples.segment_reference(rgba), by_mask)
  np.testing.assert_array_equal(triples.segment_reference(image, mask > 0), by_mask)
  np.testing.assert_array_equal(triples.segment_reference(image, mask // 255), by_mask)
  # A mask goes before the alpha channel; an alpha of 255 everywhere tells nothing.
  other = np.dstack([image, np.roll(mask, 9)])
  np.testing.assert_array_equal(triples.segment_reference(other, mask), by_mask)
  whole = triples.segment_reference(image, size=120)
  np.testing.assert_array_equal(whole[15:105], image)
  assert np.all(whole[:14] == 255)
  opaque = np.dstack([image, np.full_like(mask, 255)])
  np.testing.assert_array_equal(triples.segment_reference(opaque, size=120), whole)


def test_references_are_segmented_as_training_showed_them():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (48, 64, 3), np.uint8)
  mask = np.zeros((48, 64), np.uint8)
  mask[10:30, 12:25] = 255
  for place in ("in_place", "frame"):
    config = triples.TripleConfig(32, reference_layout=place)
    wanted = triples.show_reference(image, mask, config, np.full(3, 0.5))
    np.testing.assert_array_equal(
      triples.segment_reference(image, mask, size=32, layout=place), wanted)
    if place == "in_place":  # what training placed anywhere stays where it is
      np.testing.assert_array_equal(
        triples.segment_reference(image, mask, size=32, layout="random"), wanted)
      assert (wanted[-4:] == 255).all() and not np.array_equal(
        wanted, triples.segment_reference(image, mask, size=32))
  # Nothing is known of what lies under an alpha channel.
  rgba = np.dstack([image, mask])
  np.testing.assert_array_equal(triples.segment_reference(rgba, size=32, layout="frame"),
                                triples.segment_reference(rgba, size=32, layout="in_place"))


def test_pictures_that_cannot_be_used():
  image, mask = box_picture()
  with pytest.raises(DataError, match="empty: no pixel of the subject is opaque"):
    triples.segment_reference(image, np.zeros_like(mask))
  with pytest.raises(DataError, match="empty"):
    triples.segment_reference(np.dstack([image, np.zeros_like(mask)]))
  with pytest.raises(DataError, match=r"shape \[90, 119\], its image \[90, 120\]"):
    triples.segment_reference(image, mask[:, 1:])
  with pytest.raises(DataError, match=r"uint8 \[height, width, 3 or 4\], got float32"):
    triples.segment_reference(image.astype(np.float32), mask)
  with pytest.raises(DataError, match=r"got uint8 \[90, 120\]"):
    triples.segment_reference(image[..., 0], mask)
  with pytest.raises(DataError, match="mask must be uint8 or bool, got float"):
    triples.segment_reference(image, mask / 255)


@pytest.mark.parametrize("field, value", [
    ("image_size", 4), ("reference_ratio", 0.0), ("reference_ratio", 1.2),
    ("reference_jitter", 1.0), ("positive_ratio", (0.9, 0.4)), ("positive_ratio", (0.0, 0.5)),
    ("reference_layout", "somewhere"),
])  # fmt: skip
def test_config_values_that_make_no_sense(field, value):
  import dataclasses
  import types

  fields = dataclasses.asdict(triples.TripleConfig()) | {field: value}
  with pytest.raises(DataError, match=f"data.{field}="):
    triples.TripleConfig.from_config(types.SimpleNamespace(**fields))


def test_reading_pictures(tmp_path):
  image, mask = box_picture()
  Image.fromarray(image).save(tmp_path / "a.png")
  np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), image)
  Image.fromarray(np.dstack([image, mask])).save(tmp_path / "alpha.png")
  np.testing.assert_array_equal(images.read_image(tmp_path / "alpha.png")[..., 3], mask)
  np.testing.assert_array_equal(images.read_mask(tmp_path / "alpha.png"), mask)
  Image.fromarray(mask).save(tmp_path / "grey.png")
  np.testing.assert_array_equal(images.read_mask(tmp_path / "grey.png"), mask)
  exif = Image.Exif()
  exif[0x0112] = 6  # a telephone held upright: turn by 90 degrees to look at it
  Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
  np.testing.assert_array_equal(images.read_image(tmp_path / "turned.png"), np.rot90(image, -1))
  with pytest.raises(DataError, match="nothing.png does not exist"):
    images.read_image(tmp_path / "nothing.png")
  (tmp_path / "text.png").write_text("not a picture")
  with pytest.raises(DataError, match="text.png is not a picture"):
    images.read_image(tmp_path / "text.png")
  whole = (tmp_path / "a.png").read_bytes()
  (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(DataError, match="half.png cannot be read"):
    images.read_image(tmp_path / "half.png")


# Captions.


@pytest.mark.parametrize("prompt, noun, pieces", [
    ("a teapot on grass", "teapot", ["tea", "pot</w>"]),
    ("A Teapot.", "teapot", ["tea", "pot</w>"]),
    ("teapot", "teapot", ["tea", "pot</w>"]),
    ("a teddy bear's hat", "teddy bear", ["te", *"dd", "y</w>", "bear</w>"]),
    ("a  Teddy   bear", "teddy bear", ["te", *"dd", "y</w>", "bear</w>"]),
    ("a carpet, a car (red)", "car", ["c", "a", "r</w>"]),
    ("a bearded bear", "bear", ["bear</w>"]),
])  # fmt: skip
def test_noun_span_and_slot(tokenizer, prompt, noun, pieces):
  ids, slot, span = tokens.encode_prompt(tokenizer, prompt, noun, s_words=2)
  assert tokenizer.convert_ids_to_tokens(ids[slice(*span)]) == pieces
  assert slot == span[1]
  assert ids.dtype == span.dtype == np.int32 and ids.shape == (64,)
  text = tokenizer(prompt)["input_ids"]
  assert ids[: len(text)].tolist() == text and text[0] == tokenizer.bos_token_id
  assert np.all(ids[len(text) :] == tokenizer.pad_token_id) and text[-1] == tokenizer.eos_token_id


def test_noun_span_of_a_vocabulary_that_joins_neighbours():
  class Joining:
    """Where text precedes, the space is glued to a word: a prefix has other tokens than a whole."""

    model_max_length, pad_token_id = 16, 0
    pieces = ["<s>", "</s>", "a", " teapot", "teapot", " ", " on", " grass"]

    def __call__(self, text, **_):
      parts = {"a teapot on grass": ["a", " teapot", " on", " grass"], "a ": ["a", " "]}
      found = parts.get(text, ["a", " ", "teapot"])
      return {"input_ids": [0, *(self.pieces.index(p) for p in found), 1]}

    def decode(self, ids):
      return "".join(self.pieces[n] for n in ids)

  _, slot, span = tokens.encode_prompt(Joining(), "a teapot on grass", "teapot", s_words=1)
  assert (slot, span.tolist()) == (3, [2, 3])


def test_prompts_that_cannot_be_used(tokenizer):
  for prompt in ("a kettle", "two teapots", "a greenteapot"):
    with pytest.raises(DataError, match="does not contain the class noun 'teapot'"):
      tokens.encode_prompt(tokenizer, prompt, "teapot", s_words=2)
  with pytest.raises(DataError, match="class noun ' '"):
    tokens.encode_prompt(tokenizer, "a teapot", " ", s_words=2)
  # BOS, "a", "teapot" in two pieces and EOS leave 64 - 2 - 5 = 57 letters.
  fits = "a teapot " + "x" * 57
  ids, _, _ = tokens.encode_prompt(tokenizer, fits, "teapot", s_words=2)
  assert ids[61] == tokenizer.eos_token_id
  with pytest.raises(DataError, match="has 63 tokens; the limit is 62 .64 .* less 2 for S"):
    tokens.encode_prompt(tokenizer, fits + "x", "teapot", s_words=2)
  tokens.encode_prompt(tokenizer, fits + "x", "teapot", s_words=1)


def test_empty_prompt(tokenizer):
  ids = tokens.tokenize(tokenizer, "").ids[0]
  assert ids[0] == tokenizer.bos_token_id and ids[1] == tokenizer.eos_token_id
  assert ids.shape == (64,) and np.all(ids[2:] == tokenizer.pad_token_id)
