"""Pretraining: the loop that goes on where it stopped, whitening, captions."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from cc_jax.bases.base import load_module
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.parallel.mesh import make_mesh
from cc_jax.pretrain import vae as vae_stage
from cc_jax.pretrain.batches import cut_outs, to_unit, train_tokenizer
from cc_jax.pretrain.clip import code_positions, make_clip, similarity_correlation, train_clip
from cc_jax.pretrain.loop import fit
from cc_jax.pretrain.unet import dilate
from cc_jax.pretrain.vae import make_vae, train_vae, whiten
from configs import subjects3d_base
from data_pipeline.subjects3d import captions, prerender
from data_pipeline.subjects3d import factors as world


def settings(steps: int) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
    steps=steps, batch=4, learning_rate=0.2, ema=0.9, warmup=2, beta2=0.99, weight_decay=0.0,
    clip_norm=1.0, save_every=3))


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(ml_collections.ConfigDict(dict(data=1)), 4)


def loss_fn(params, frozen, batch, key):
  """A line through points, with noise that depends on the key."""
  noise = 0.01 * jax.random.normal(key, batch["y"].shape)
  error = batch["x"] @ params["w"] + frozen["bias"] + noise - batch["y"]
  return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}


def batch_fn(rng, step):
  del step
  x = rng.normal(size=(4, 3)).astype(np.float32)
  return dict(x=x, y=x @ np.array([1.0, -2.0, 3.0], np.float32) + 0.5)


def run(folder, mesh, config, batches=batch_fn):
  start, frozen = {"w": jnp.zeros(3)}, {"bias": jnp.array(0.5)}
  return fit("line", loss_fn, start, frozen, batches, config, folder, 0, mesh)


class Killed(Exception):
  pass


def test_fit_learns_and_goes_on_bit_for_bit_where_it_was_killed(tmp_path, mesh):
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  whole.mkdir(), halves.mkdir()
  expected = run(whole, mesh, settings(60))

  def killing(rng, step):
    if step == 35:
      raise Killed
    return batch_fn(rng, step)

  with pytest.raises(Killed):
    run(halves, mesh, settings(60), killing)
  found = run(halves, mesh, settings(60))
  np.testing.assert_array_equal(found["w"], expected["w"])
  np.testing.assert_allclose(expected["w"], [1, -2, 3], atol=0.2)
  last = json.loads((halves / "line.jsonl").read_text().splitlines()[-1])
  assert last["step"] == 60 and last["loss"] < 0.1


def test_fit_refuses_a_save_of_other_shapes_and_stops_on_nan(tmp_path, mesh):
  run(tmp_path, mesh, settings(3))
  with pytest.raises(UserError, match=r"another model: params/w should be \(2,\)"):
    fit("line", loss_fn, {"w": jnp.zeros(2)}, {"bias": jnp.array(0.5)}, batch_fn, settings(6),
        tmp_path, 0, mesh)
  (tmp_path / "line.state.safetensors").unlink()

  def broken(rng, step):
    return {k: v * np.nan for k, v in batch_fn(rng, step).items()}

  with pytest.raises(UserError, match="the loss is nan"):
    run(tmp_path, mesh, settings(3), broken)
  assert not (tmp_path / "line.state.safetensors").exists()


def test_whitening_gives_unit_latents_and_the_same_pictures():
  config = AutoencoderKLConfig.from_dict(dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[8, 16],
    layers_per_block=1, norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2, mid_block_add_attention=False, scaling_factor=1.0))
  vae = AutoencoderKL(config, rngs=nnx.Rngs(0))
  images = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3)).astype(np.uint8)
  x = to_unit(jnp.asarray(images))
  before = vae.decode(vae.encode(x)[0])
  whiten(vae, images)
  z, logvar = vae.encode(x)
  after = vae.decode(z)
  flat = np.asarray(z, np.float64).reshape(-1, 4)
  np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
  np.testing.assert_allclose(np.cov(flat.T), np.eye(4), atol=1e-2)
  np.testing.assert_allclose(after, before, atol=2e-4)
  assert np.ptp(np.asarray(logvar), axis=(0, 1, 2)).max() == 0  # a constant per channel


def test_captions_name_what_they_are_told_to_name():
  rng = np.random.default_rng(0)
  table = world.subjects("train")
  factors = world.sample_factors(rng, table.take(np.arange(40)), hat=0, style=0)
  always = captions.write_captions(rng, factors, dict(scene=1.0, color1=1.0))
  never = captions.write_captions(rng, factors, dict(scene=1.0, color1=0.0))
  for i, (one, other) in enumerate(zip(always, never)):
    colour = world.COLORS[factors.color1[i]]
    assert colour in one.split() and colour not in other.split(), (one, other)
    assert world.CLASSES[factors.class_id[i]] in one


def test_on_white_shows_the_subject_alone_at_any_size_and_place():
  images = np.full((40, 16, 16, 3), 100, np.uint8)
  masks = np.zeros((40, 16, 16), np.uint8)
  masks[:, 5:8, 7:11] = 255
  cut = cut_outs(images, masks, np.random.default_rng(0))
  there = cut[..., 0] < 178
  assert abs(np.median(cut[there]) - 100) <= 2 and np.median(cut[~there]) == 255
  sides = there.any(1).sum(1)  # 0.4 to 0.9 of 16 pixels, to the nearest pixel
  assert 6 <= sides.min() <= 8 and 13 <= sides.max() <= 15
  lefts = there.any(1).argmax(1)
  assert lefts.min() <= 1 and lefts.max() >= 6


def test_mirrored_pictures_show_the_mirrored_pose():
  images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
  factors = dict(azimuth=np.array([0.5, 0.5]), x=np.array([0.1, 0.1]), y=np.array([0.2, 0.2]))
  flipped, found = prerender.mirror_images(images, factors, np.array([False, True]))
  np.testing.assert_array_equal(flipped[0], images[0])
  np.testing.assert_array_equal(flipped[1, :, 0], images[1, :, 3])
  np.testing.assert_allclose(found["azimuth"], [0.5, -0.5])
  np.testing.assert_allclose(found["x"], [0.1, -0.1])
  np.testing.assert_allclose(found["y"], [0.2, 0.2])


def test_coded_positions_are_content_free_on_white_and_tell_rows_and_columns():
  vision = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(
    architectures=["CLIPVisionModelWithProjection"], hidden_size=16, intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8, projection_dim=8)),
    rngs=nnx.Rngs(0))
  embeddings = vision.vision_model.embeddings
  before = np.array(embeddings.position_embedding.embedding[...])
  code_positions(vision, CLIP_PROCESSOR, 2.0)
  white = clip_pixels(jnp.ones((1, 24, 24, 3)), dict(CLIP_PROCESSOR, size=24))
  code = (np.asarray(embeddings(white))[0] - before)[1:] / 2
  np.testing.assert_allclose(code.mean(0), 0, atol=1e-5)
  grid = code.reshape(3, 3, 4, 4)  # [y, x, (sin y, cos y, sin x, cos x), rate]
  np.testing.assert_allclose(np.ptp(grid[:, :, :2], axis=1), 0, atol=1e-5)  # rows alike in y's half
  np.testing.assert_allclose(np.ptp(grid[:, :, 2:], axis=0), 0, atol=1e-5)
  sines = grid[1, 0, 0] - grid[0, 0, 0]  # of pi/2 times 3^(-k/4), the centring taken off
  np.testing.assert_allclose(sines, np.sin(np.pi / 2 * 3 ** (-np.arange(4) / 4)), atol=1e-5)


def test_likeness_is_the_correlation_over_all_pairs_of_two():
  rng = np.random.default_rng(0)
  embed, real = rng.normal(size=(9, 4)), rng.random((9, 9))
  real = real + real.T
  unit = embed / np.linalg.norm(embed, axis=1, keepdims=True)
  pairs = np.triu_indices(9, 1)
  true = np.corrcoef((unit @ unit.T)[pairs], real[pairs])[0, 1]
  given = jnp.asarray(embed, jnp.float32), jnp.asarray(real, jnp.float32)
  assert float(similarity_correlation(*given)) == pytest.approx(true, abs=1e-5)


@pytest.mark.slow
def test_the_image_encoder_learns_factors_while_the_text_encoder_stays(tmp_path):
  config = subjects3d_base.get_config()
  config.clip.update(freeze_text=True)
  config.clip.vision.update(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2, patch_size=16, projection_dim=16)
  config.clip.text.update(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2)
  config.clip.train.update(steps=60, batch=16, warmup=0, learning_rate=1e-2, save_every=30, ema=0.9)
  rng = np.random.default_rng(0)
  table = world.subjects("train")
  # Two classes, told by brightness alone.
  rows = table.take(np.flatnonzero(np.isin(table.class_id, [0, 7]))[::8])
  factors = world.sample_factors(rng, rows, style=0)
  shade = np.where(factors.class_id == 0, 40, 200).astype(np.uint8)
  images = np.broadcast_to(shade[:, None, None, None], (len(shade), 64, 64, 3)).copy()
  masks = np.zeros((len(shade), 64, 64), np.uint8)
  masks[:, 16:48, 16:48] = 255
  pictures = SimpleNamespace(images=images, masks=masks, factors=factors,
                             coverage=np.full((len(shade), 4), 0.1))
  train_tokenizer(config, tmp_path, pictures, None)
  train_clip(config, tmp_path, pictures, make_mesh(config.mesh, 16))
  tokenizer = load_tokenizer(tmp_path / "base" / "tokenizer")
  start = make_clip(config, tokenizer)
  text = load_module(tmp_path / "base" / "text_encoder", type(start.text))
  for old, new in zip(jax.tree.leaves(nnx.state(start.text)), jax.tree.leaves(nnx.state(text))):
    np.testing.assert_array_equal(old, new)
  logs = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
  assert logs[-1]["class_id"] > 0.95
  # Of what makes subjects alike the encoder can see the class alone.
  pairs = np.triu_indices(len(shade), 1)
  alike = (factors.class_id[:, None] == factors.class_id)[pairs]
  best = np.corrcoef(alike, world.real_similarity(factors)[pairs])[0, 1]
  assert logs[-1]["likeness"] == pytest.approx(best, abs=0.05)


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(tmp_path, mesh, monkeypatch):
  config = subjects3d_base.get_config()
  config.vae.freeze_encoder, config.init_from = True, "somewhere"
  config.vae.model.update(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2,
                          down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2)
  config.vae.train.update(steps=2, batch=2, warmup=0)
  before = make_vae(config)
  monkeypatch.setattr(vae_stage, "load_base", lambda _: SimpleNamespace(vae=before))
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
  pictures = SimpleNamespace(images=images)
  x = to_unit(jnp.asarray(images))
  latents = before.encode(x)[0]
  decoded = before.decode(latents)  # now: the training gives up the arrays
  train_vae(config, tmp_path, pictures, mesh)
  after = load_module(tmp_path / "base" / "vae", AutoencoderKL)
  np.testing.assert_allclose(after.encode(x)[0], latents, rtol=1e-5, atol=1e-6)
  assert np.abs(after.decode(latents) - decoded).max() > 1e-3


def test_a_mask_grows_by_one_place_to_all_sides():
  mask = np.zeros((1, 5, 5))
  mask[0, 0, 1] = 0.5
  expected = np.zeros((5, 5))
  expected[:2, :3] = 0.5
  np.testing.assert_array_equal(dilate(mask)[0], expected)


def test_a_share_of_the_pictures_loses_its_pattern():
  plain = [np.mean(prerender.sample(np.random.default_rng(0), 4000, "train", 1000, share).pattern
                   == world.PATTERNS.index("plain")) for share in (0.0, 0.5, 1.0)]
  np.testing.assert_allclose(plain, [0.2, 0.6, 1.0], atol=0.03)


def test_recombined_subjects_are_new_ones_of_the_same_families():
  rng = np.random.default_rng(0)
  old = prerender.sample(rng, 4000, "train", 0, 0.0)
  new = prerender.recombined(rng, old)
  for name in old._fields:  # families, poses and scenes stay
    if name not in ("pattern", "pattern_color", "wide", "tall", "ratio"):
      np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
  for name in ("wide", "tall", "ratio"):  # dealt anew, each by itself
    np.testing.assert_array_equal(np.sort(getattr(old, name)), np.sort(getattr(new, name)))
  assert abs(np.corrcoef(old.wide, new.wide)[0, 1]) < 0.1
  assert np.mean(old.pattern == new.pattern) < 0.6  # by chance, or kept for its colour
  assert not np.any((new.pattern_color == new.color1) | (new.pattern_color == new.color2))
  individuals = lambda f: len({*zip(f.class_id, f.color1, f.color2, f.pattern, f.wide)})  # noqa: E731
  assert individuals(new) > 1.5 * individuals(old)
