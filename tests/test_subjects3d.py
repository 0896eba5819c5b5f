"""The rendered world: its table of subjects, its renderer and its sentences."""

import re

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.subjects3d import bulk, captions, factors, renderer, shapes
from data_pipeline.subjects3d.factors import CLASSES, CLASSES_WITH_FRONT, COLORS, SCENES

RED, BLUE = COLORS.index("red"), COLORS.index("blue")
GRASS, BEACH = SCENES.index("grass"), SCENES.index("beach")

SUBJECT_IDS = [36, 37, 38, 39, 40, 41]
PATTERN_COLORS = [6, 5, 9, 4, 10, 9]
WIDE = [-0.9048995, -0.2162113, -0.4691994]
GOLDEN_MEAN = (
  (126.6, 164.6, 106.8),
  (127.6, 160.5, 105.8),
  (131.0, 157.7, 105.5),
  (127.9, 161.0, 109.2),
  (123.9, 169.9, 112.2),
  (130.0, 158.9, 102.7),
  (125.7, 159.8, 102.2),
  (128.9, 169.1, 115.8),
  (126.3, 170.2, 113.5),
  (129.6, 170.1, 115.6),
)
GOLDEN_COVERAGE = (
  0.15129999816417694,
  0.17900000512599945,
  0.20229999721050262,
  0.211899995803833,
  0.15449999272823334,
  0.16459999978542328,
  0.16740000247955322,
  0.20829999446868896,
  0.1776999980211258,
  0.18700000643730164,
)


def draw(n, seed=0, **overrides):
  rng = np.random.default_rng(seed)
  table = factors.subjects("train")
  rows = table.take(rng.integers(len(table.class_id), size=n))
  return factors.sample_factors(rng, rows, **overrides)


def one_of_each(seed=1, **overrides):
  """Ten pictures that differ in class: plain, centred, upright, from a little above."""
  fixed = dict(
    pattern=0, color1=RED, color2=COLORS.index("white"), azimuth=0.6, elevation=0.35, roll=0.0,
    x=0.0, y=0.0, size=1.0, scene=GRASS, hat=0, style=0, light_azimuth=0.0, light_elevation=0.9,
    background_seed=7, wide=0.0, tall=0.0, ratio=0.0, class_id=np.arange(10),
  )  # fmt: skip
  return draw(10, seed, **(fixed | overrides))


def center(mask):
  """Centroid (x, y) of each mask in pixels."""
  weight = mask / mask.sum((1, 2), keepdims=True)
  axis = np.arange(mask.shape[1])
  return (weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)


@pytest.fixture(scope="module", autouse=True)
def small_batches():
  """Most tests draw one picture of each class: batches of a class would be filled up in vain."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(renderer, "CPU_BATCH", 2)
    yield


@pytest.fixture(scope="module")
def world(small_batches):
  f = draw(500)
  return f, renderer.render(f)


@pytest.fixture(scope="module")
def base(small_batches):
  return renderer.render(one_of_each())


def test_splits_share_no_class_and_colours():
  tables = {s: factors.subjects(s) for s in factors.SPLITS}
  keys = {s: set(zip(t.class_id, t.color1, t.color2, strict=True)) for s, t in tables.items()}
  assert [len(t.class_id) for t in tables.values()] == [3520, 360, 520]
  assert not keys["train"] & keys["test"]
  assert not keys["train"] & keys["validation"]
  assert not keys["validation"] & keys["test"]
  for table in tables.values():
    assert set(table.class_id) == set(range(10))
    assert (table.color1 != table.color2).all()
    assert ((table.pattern_color != table.color1) & (table.pattern_color != table.color2)).all()
    assert np.mean(table.pattern > 0) > 0.5
    sizes = np.unique(table.family_id, return_counts=True)[1]
    assert set(sizes) == {4}
  assert len(np.unique(np.concatenate([t.subject_id for t in tables.values()]))) == 4400
  test = tables["test"]
  assert len(set(zip(test.class_id, test.color1, strict=True))) == 110


def test_members_of_a_family_differ_in_pattern():
  table = factors.subjects("train")
  for family in np.unique(table.family_id)[:50]:
    members = table.take(table.family_id == family)
    assert len(set(zip(members.class_id, members.color1, members.color2, strict=True))) == 1
    assert len(set(members.pattern)) == 4


def test_table_never_changes():
  # A change here changes which subjects trained models have seen.
  table = factors.subjects("test")
  assert table.subject_id[:6].tolist() == SUBJECT_IDS
  assert table.pattern_color[:6].tolist() == PATTERN_COLORS
  np.testing.assert_allclose(table.wide[:3], WIDE, atol=1e-6)


def test_factors_cover_their_ranges():
  f = draw(20000)
  assert f.size.max() / f.size.min() == pytest.approx(2.5, rel=0.01)
  assert np.ptp(f.azimuth) > 2 * np.pi - 0.01
  assert np.histogram(f.azimuth, 8)[0].min() > 0.9 * len(f.azimuth) / 8
  for place in (f.x, f.y):
    assert place.min() < -0.099 and place.max() > 0.099
    assert np.abs(place).max() <= 0.1
  assert np.ptp(f.roll) > 0.59
  assert np.mean(f.hat > 0) == pytest.approx(0.25, abs=0.01)
  assert np.mean(f.style == 0) == pytest.approx(0.85, abs=0.01)
  assert not (f.hat == 1 + f.color1).any()
  # None of the irrelevant factors tells another.
  assert np.abs(np.corrcoef([f.azimuth, f.x, f.y, f.size, f.roll]) - np.eye(5)).max() < 0.03


def test_calm_ranges_overrides_and_determinism():
  calm = draw(2000, ranges="calm", scene=BEACH)
  assert np.abs(calm.azimuth).max() <= 1.6 and np.abs(calm.roll).max() <= 0.15
  assert calm.size.min() >= 0.8 and calm.size.max() <= 1.2
  assert (calm.style == 0).all() and (calm.scene == BEACH).all()
  for column, again in zip(draw(50, 3), draw(50, 3), strict=True):
    np.testing.assert_array_equal(column, again)
  assert (draw(50, 3).azimuth != draw(50, 4).azimuth).all()


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: factors.subjects("dev"), "'dev'"),
    (lambda: draw(2, ranges="wild"), "'wild'"),
    (lambda: draw(2, colour=1), "'colour'"),
    (lambda: renderer.render(draw(2).take(slice(0, 0))), "empty"),
    (lambda: captions.caption(None, draw(1).take(0), mention=("light",)), "'light'"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(DataError, match=message):
    call()


def test_subjects_fill_a_good_part_of_the_picture(world):
  f, r = world
  assert 0.25 < r.coverage[:, 0].mean() < 0.35
  assert r.coverage[:, 0].min() > 0.05 and r.coverage[:, 0].max() < 0.62
  per_class = [r.coverage[f.class_id == c].mean(0) for c in range(10)]
  for subject, main, second, pattern in per_class:
    assert subject > 0.2
    assert main + pattern > second > 0.12 * subject
  visible = r.mask > 128
  border = visible[:, [0, -1]].any((1, 2)) | visible[:, :, [0, -1]].any((1, 2))
  assert border.mean() < 0.08


def test_coverage_agrees_with_the_mask(world):
  f, r = world
  np.testing.assert_allclose(r.coverage[:, 0], r.mask.mean((1, 2)) / 255, atol=2e-3)
  assert (r.coverage[:, 1:].sum(1) <= r.coverage[:, 0] + 1e-5).all()
  assert (r.coverage[f.pattern == 0, 3] == 0).all()
  assert (r.coverage[f.pattern > 0, 3] > 0).mean() > 0.99


def test_place_moves_the_mask(base):
  moved = renderer.render(one_of_each(x=0.08, y=-0.05))
  for axis, shift in enumerate((0.08 * 64, -0.05 * 64)):
    step = center(moved.mask)[axis] - center(base.mask)[axis]
    np.testing.assert_allclose(step, shift, atol=0.1)


def test_area_follows_the_square_of_the_size(base):
  larger = renderer.render(one_of_each(size=1.4))
  # The soft edge, which adds half a pixel all around, does not grow.
  np.testing.assert_allclose(larger.coverage[:, 0] / base.coverage[:, 0], 1.4**2, rtol=0.05)


def test_roll_turns_the_mask_clockwise(base):
  rolled = renderer.render(one_of_each(roll=0.3)).mask > 128
  rows, columns = np.mgrid[:64, :64] - 31.5
  for c in range(10):
    middle = (
      -64 * shapes.placing(one_of_each())[c, 3]
    )  # the pivot's height under the picture's centre
    down = rows - middle
    # Where a pixel of the rolled picture was before: turned back, counter-clockwise on the screen.
    x = columns * np.cos(0.3) + down * np.sin(0.3)
    y = down * np.cos(0.3) - columns * np.sin(0.3) + middle
    before = (
      base.mask[c][
        np.clip(np.rint(y + 31.5), 0, 63).astype(int), np.clip(np.rint(x + 31.5), 0, 63).astype(int)
      ]
      > 128
    )
    assert (before & rolled[c]).sum() / (before | rolled[c]).sum() > 0.93, CLASSES[c]


def test_azimuth_turns_the_front_to_the_right():
  angles = np.linspace(-np.pi, np.pi, 9)[1:]
  views = [renderer.render(one_of_each(azimuth=a)).image / 255.0 for a in angles]
  difference = np.array(
    [[np.abs(p - q).mean((1, 2, 3)) for p in views] for q in views]
  )  # [8, 8, 10]
  for c, name in enumerate(CLASSES):
    between = difference[:, :, c][~np.eye(8, dtype=bool)]
    if name in CLASSES_WITH_FRONT:
      assert between.min() > 0.003, name  # every view is told from every other
    else:
      assert between.max() < 0.003, name
  duck = CLASSES.index("duck")
  beak = (views[5][duck] * (1.0, 1.0, -1.0)).sum(-1) > 1.2  # orange, at azimuth +pi/2
  assert angles[5] == pytest.approx(np.pi / 2)
  right = renderer.render(one_of_each(azimuth=np.pi / 2)).mask[duck]
  left = renderer.render(one_of_each(azimuth=-np.pi / 2)).mask[duck]
  # The beak and the head above it lean to that side: the upper third's centroid moves.
  upper = slice(16, 32)
  columns = np.arange(64)
  assert beak.any()
  assert (right[upper] * columns).sum() / right[upper].sum() > 32
  assert (left[upper] * columns).sum() / left[upper].sum() < 31


def test_main_colour_changes_the_main_part_only(base):
  blue = renderer.render(one_of_each(color1=BLUE))
  np.testing.assert_array_equal(blue.coverage, base.coverage)
  for c in range(10):
    before, after = base.image[c].astype(int), blue.image[c].astype(int)
    changed = np.abs(before - after).max(-1) > 40
    assert changed.mean() == pytest.approx(base.coverage[c, 1], abs=0.02), CLASSES[c]
    assert np.median(before[changed, 0] - before[changed, 2]) > 60
    assert np.median(after[changed, 2] - after[changed, 0]) > 60


def test_second_colour_and_pattern_change_their_share(base):
  second = renderer.render(one_of_each(color2=BLUE))
  dotted = renderer.render(one_of_each(pattern=2, pattern_color=BLUE))
  for c in range(10):
    changed = np.abs(base.image[c].astype(int) - second.image[c]).max(-1) > 40
    assert changed.mean() == pytest.approx(base.coverage[c, 2], abs=0.02), CLASSES[c]
    changed = np.abs(base.image[c].astype(int) - dotted.image[c]).max(-1) > 40
    assert changed.mean() == pytest.approx(dotted.coverage[c, 3], abs=0.03), CLASSES[c]
  assert (dotted.coverage[:, 3] > 0.2 * base.coverage[:, 1]).all()


def test_patterns_and_proportions_can_be_told_apart(base):
  kinds = [renderer.render(one_of_each(pattern=k, pattern_color=BLUE)).image for k in range(5)]
  for c in range(10):
    for a in range(5):
      for b in range(a):
        apart = np.abs(kinds[a][c].astype(int) - kinds[b][c]).max(-1) > 60
        assert apart.mean() > 0.02, (CLASSES[c], a, b)
  for name in ("wide", "tall", "ratio"):
    low, high = (renderer.render(one_of_each(**{name: v})).image.astype(int) for v in (-1, 1))
    apart = (np.abs(low - high).max(-1) > 60).mean((1, 2))
    assert (apart > 0.01).all(), name


def test_scene_is_behind_and_hat_is_on_top(base):
  beach = renderer.render(one_of_each(scene=BEACH))
  inside = base.mask == 255
  assert np.abs(beach.image.astype(int) - base.image)[inside].max() <= 1
  assert np.abs(beach.image.astype(int) - base.image)[base.mask == 0].mean() > 10
  hat = renderer.render(one_of_each(hat=1 + BLUE))
  bluish = (hat.image[..., 2].astype(int) - hat.image[..., 0] > 60) & (hat.mask > 128)
  for c in range(10):
    rows = np.flatnonzero(bluish[c].any(1))
    assert bluish[c].mean() > 0.006, CLASSES[c]
    assert rows.min() <= np.flatnonzero((hat.mask[c] > 128).any(1)).min() + 3, CLASSES[c]
  # It hides little of the subject.
  assert (hat.coverage[:, 1:3].sum(1) > 0.75 * base.coverage[:, 1:3].sum(1)).all()


def test_light_comes_from_its_side(base):
  images = [renderer.render(one_of_each(light_azimuth=a)).image.astype(int) for a in (-1.2, 1.2)]
  for c in range(10):
    columns = np.arange(64)[None] - center(base.mask)[0][c]
    side = np.where(base.mask[c] == 255, np.sign(columns), 0)
    gain = (images[1][c] - images[0][c]).mean(-1)  # what light from the right adds
    assert gain[side > 0].mean() > gain[side < 0].mean() + 5, CLASSES[c]


def test_styles_are_told_from_photos_and_keep_the_mask(base):
  photo = base.image.astype(int)
  for style in (1, 2):
    drawn = renderer.render(one_of_each(style=style))
    np.testing.assert_array_equal(drawn.mask, base.mask)
    assert (np.abs(drawn.image - photo).mean((1, 2, 3)) > 8).all()
  sketch = renderer.render(one_of_each(style=1)).image.astype(int)
  assert np.ptp(sketch, axis=-1).mean() < 0.5 * np.ptp(photo, axis=-1).mean()


@pytest.mark.slow
def test_one_program_for_all_classes_draws_the_same(world):
  f, r = world
  few = slice(0, 32)
  mixed = renderer.render(f.take(few), per_class=False, batch=32)
  apart = np.abs(mixed.image.astype(int) - r.image[few]).max(-1)
  # Rounding differs between the programs, so a ray may end on the other side of an edge.
  assert (apart > 3).mean() < 1e-3
  np.testing.assert_allclose(mixed.coverage, r.coverage[few], atol=1e-3)


def test_background_does_not_depend_on_how_the_batch_is_mapped(base):
  f = draw(10, 5, scene=np.arange(10))
  layers = tuple(np.zeros((10, 64 * 64), np.float32) for _ in range(5))
  one_by_one, together = (np.asarray(renderer._compose_program(64, s)(f, layers)) for s in (1, 0))
  np.testing.assert_allclose(one_by_one, together, atol=2e-3)
  for a in range(10):
    for b in range(a):
      assert np.abs(together[a] - together[b]).mean() > 0.03, (SCENES[a], SCENES[b])


def test_a_picture_does_not_depend_on_its_batch(world):
  f, r = world
  rows = np.array([400, 3, 41])
  alone = renderer.render(f.take(rows))
  for column, whole in zip(alone, r, strict=True):
    np.testing.assert_array_equal(column, whole[rows])


def test_march_has_converged(world):
  f, r = world
  long = renderer.render(f.take(slice(0, 100)), steps=64).image.astype(int)
  assert (np.abs(long - r.image[:100]).max(-1) > 25.5).mean() < 0.01
  short = renderer.render(f.take(slice(0, 100)), steps=6).image.astype(int)
  assert (np.abs(long - short).max(-1) > 25.5).mean() > 0.01  # steps are counted


@pytest.mark.slow
def test_processes_draw_the_same_pictures():
  f = draw(12, class_id=CLASSES.index("mushroom"))
  np.testing.assert_array_equal(
    bulk.render_many(f, processes=2, progress=False).image, renderer.render(f).image
  )


def test_pictures_never_change(world, base):
  # Trained models have seen these pictures: a change here asks for new ones.
  mean = base.image.reshape(10, -1, 3).mean(1)
  np.testing.assert_allclose(mean, GOLDEN_MEAN, atol=1.0)
  np.testing.assert_allclose(base.coverage[:, 0], GOLDEN_COVERAGE, atol=2e-3)


def test_captions_name_what_is_mentioned_and_where_the_noun_is():
  f = draw(600, 6)
  rng = np.random.default_rng(0)
  for i in range(600):
    row = f.take(i)
    c = captions.caption(rng, row)
    noun = CLASSES[row.class_id]
    assert c.noun == noun and c.text[c.noun_start :].startswith(noun)
    assert not c.text[: c.noun_start].strip().endswith(noun)
    # Neither the colours nor the pattern of the individual, unless the hat has the colour.
    words = set(c.text.replace(",", "").split())
    hat = {COLORS[row.hat - 1]} if row.hat else set()
    scene = {"green"} if row.scene == GRASS else set()
    assert words & set(COLORS) <= hat | scene
    assert not words & {"striped", "stripes", "dots", "checked", "plain", "parts", "details"}
    assert hat <= words
    assert any(p in c.text for p in captions._SCENES[row.scene]) or "," in c.text
    if row.style:
      assert factors.STYLES[row.style] in words
    everything = captions.caption(rng, row, mention=captions.MENTIONS)
    assert everything.text[everything.noun_start :].startswith(noun)
    assert COLORS[row.color1] in everything.text and COLORS[row.color2] in everything.text
    assert len(everything.text.split()) <= captions.MAX_WORDS
    assert captions.caption(rng, row, mention=()).text in (f"a {noun}", f"an {noun}")


def test_captions_with_a_wrong_word_differ_in_that_word_alone():
  f, shifts = draw(40, 6), np.arange(40)
  texts = captions.wrong_word_captions(f, shifts, 0)
  assert set(texts) == {"none", "class", "colour", "scene"}
  classes, colors, scenes = (
    (column + shifts % (count - 1) + 1) % count
    for column, count in ((f.class_id, 10), (f.color1, 11), (f.scene, 10))
  )
  for i, right in enumerate(texts["none"]):
    color, noun = COLORS[f.color1[i]], CLASSES[f.class_id[i]]
    subject = f"{color} {noun}"
    for word, wrong in (
      ("class", f"{color} {CLASSES[classes[i]]}"), ("colour", f"{COLORS[colors[i]]} {noun}")
    ):
      expected = right.replace(subject, wrong).replace("an ", "a ")
      assert wrong != subject and texts[word][i].replace("an ", "a ") == expected
    # A phrase before the subject lacks its "standing" or "floating".
    phrases = [re.sub("^(stand|float)ing ", "", phrase) for phrase in captions._SCENES[scenes[i]]]
    assert scenes[i] != f.scene[i] and any(phrase in texts["scene"][i] for phrase in phrases)


def test_corpus_uses_the_whole_vocabulary():
  texts = captions.corpus(3000, np.random.default_rng(0))
  words = {w.strip(",") for t in texts for w in t.split()}
  assert words == set(captions.all_words())
  assert len(set(texts)) > 2500


def test_extents_bound_the_solids():
  f = one_of_each()
  e = shapes.extents(f)
  assert (e[:, 2] < 0.15).all() and (e[:, 2] > -0.15).all()  # they stand on the ground
  assert e[CLASSES.index("tree"), 0] == pytest.approx(1.12 + 0.05)  # r + rnd


def test_main_colour_is_told_from_the_patterns():
  """A pattern covers a third: half and half, nobody could say which colour is the main one."""
  table = factors.subjects("train")
  teapots = np.flatnonzero(table.class_id == 0)  # one class: each compiles for seconds
  for kind, name in enumerate(factors.PATTERNS):
    if name == "plain":
      continue
    subjects = table.take(teapots[table.pattern[teapots] == kind][:16])
    f = factors.sample_factors(np.random.default_rng(0), subjects, hat=0, style=0)
    main, pattern = renderer.render(f).coverage.mean(0)[[1, 3]]
    assert 1.5 < main / pattern < 3.5, (name, main / pattern)
