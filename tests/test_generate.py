"""Generation: equal to a plain loop over diffusers' scheduler, and every mistake is one line."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from absl import flags
from diffusers import DDIMScheduler
from flax import nnx
from PIL import Image

from cc_jax import generate
from cc_jax.bases.base import load_base, random_base
from cc_jax.bases.files import ASSETS
from cc_jax.customcontrast.adapter_file import adapter_tensors, load_adapter, save_adapter
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.rngs import abstract
from cc_jax.sampling import images as pictures
from cc_jax.sampling.images import METADATA
from cc_jax.sampling.pipeline import BASE, load
from cc_jax.sampling.prompts import encode_prompts
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler
from configs import subjects3d
from data_pipeline.errors import DataError

STEPS = 3
PROMPT, NOUN = "a teddy bear in the snow", "teddy bear"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A random base, an adapter that has something to say, and a few pictures."""
  folder = tmp_path_factory.mktemp("generate")
  tiny.tiny_base(folder / "base")
  base = load_base(folder / "base")
  config = tiny.tiny_config(folder / "base")
  encoder = MFIEncoderConfig.from_config(config.encoder)
  injection = InjectionConfig.from_config(config.injection)
  model = abstract(
    lambda rngs: CustomContrast(random_base(folder / "base"), encoder, injection, rngs=rngs)
  )
  rng = np.random.default_rng(2)
  tensors = {
    name: (rng.standard_normal(x.shape) / np.sqrt(x.shape[0] if x.ndim > 1 else 1)).astype("f4")
    for name, x in adapter_tensors(model).items()
  }
  said = dict(encoder=encoder, injection=injection, base_name=str(folder / "base"))
  save_adapter(folder / "run" / "adapter.safetensors", tensors, base_hash=base.hash, **said)
  save_adapter(folder / "foreign.safetensors", tensors, base_hash="0" * 64, **said)

  pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
  alpha = np.zeros((24, 20), np.uint8)
  alpha[4:18, 5:15] = 255
  alpha[4, 5:15] = 130
  Image.fromarray(pixels).save(folder / "whole.png")
  Image.fromarray(alpha).save(folder / "mask.png")
  Image.fromarray(np.dstack([pixels, alpha])).save(folder / "cut.png")
  Image.fromarray(np.dstack([pixels[::-1], alpha])).save(folder / "other.png")
  Image.fromarray(np.dstack([pixels, 0 * alpha])).save(folder / "transparent.png")
  Image.fromarray(alpha[1:]).save(folder / "small_mask.png")
  (folder / "words.png").write_text("no picture")
  (folder / "nothing.png").write_bytes(b"")
  (folder / "half.png").write_bytes((folder / "cut.png").read_bytes()[:900])
  whole = (folder / "run" / "adapter.safetensors").read_bytes()
  (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
  (folder / "empty_run").mkdir()
  return folder


@pytest.fixture(scope="module")
def pipe(folder):
  return load(folder / "run")


@pytest.fixture(scope="module")
def references(folder):
  return [folder / "cut.png", folder / "other.png"]


@pytest.fixture(scope="module")
def rows(pipe, references):
  """Arguments of the sampler for one prompt, `n` times; all use the same compiled function."""

  def make(n, **changes):
    pair = np.stack([pictures.read_reference(r, size=tiny.IMAGE) for r in references])
    return dict(
      prompts=encode_prompts(pipe.base.tokenizers, [PROMPT] * n, [NOUN] * n, s_words=2),
      negative=encode_prompts(pipe.base.tokenizers, [""]),
      noise=pipe.sampler.noise(range(n)),
      references=np.stack([pair] * n),
      steps=STEPS,
      batch_size=2,
    ) | changes

  return make


def far(a, b):
  """The largest difference of two pictures, in 255ths."""
  return int(np.max(np.abs(np.asarray(a, int) - np.asarray(b, int))))


# ---- what is drawn


def test_a_picture_is_a_function_of_its_own_seed(pipe, references):
  said = dict(class_noun=NOUN, references=references, steps=STEPS, num_images=2)
  first = pipe(PROMPT, seed=0, **said)
  again = pipe(PROMPT, seed=0, **said)
  second = pipe(PROMPT, seed=1, **said)
  assert far(first[0], again[0]) == 0 and far(first[1], again[1]) == 0
  assert far(first[1], second[0]) <= 1  # another row of the batch
  assert far(first[0], second[0]) > 20
  assert first[0].size == (tiny.IMAGE, tiny.IMAGE)


def test_a_single_reference_needs_no_list(pipe, folder):
  alone = pipe.read_references(folder / "whole.png", folder / "mask.png")
  np.testing.assert_array_equal(alone, pipe.read_references([folder / "cut.png"], None))


def test_order_of_references_does_not_matter_but_they_do(pipe, rows):
  noise = np.repeat(pipe.sampler.noise([5]), 2, axis=0)
  given = rows(2, noise=noise)
  pair = given["references"][0]
  images, _ = pipe.sampler(**given | dict(references=np.stack([pair, pair[::-1]])))
  assert far(*images) <= 1
  images, _ = pipe.sampler(**given | dict(references=np.stack([pair, pair[[0, 0]]])))
  assert far(*images) > 5


def test_padding_of_the_last_batch_changes_nothing(pipe, rows):
  three = rows(3)
  images, _ = pipe.sampler(**three)
  assert images.shape == (3, tiny.IMAGE, tiny.IMAGE, 3) and images.dtype == np.uint8
  last, _ = pipe.sampler(**rows(2, noise=three["noise"][1:]))
  assert far(images[1:], last) <= 1
  assert far(images[1], images[2]) > 20


def test_a_picture_without_image_is_the_bases_also_within_a_batch(pipe, rows):
  mixed, _ = pipe.sampler(**rows(2, use_image=np.array([False, True])))
  base, _ = pipe.sampler(**rows(2, references=None))
  zero, _ = pipe.sampler(**rows(2, scale=0.0))
  assert far(mixed[0], base[0]) <= 1
  assert far(mixed[1], base[1]) > 5
  assert far(zero, base) == 0


def test_scale_is_per_step_and_layer(pipe, rows):
  base, _ = pipe.sampler(**rows(2, references=None))
  full, _ = pipe.sampler(**rows(2))
  layers = pipe.sampler.layers
  ones, _ = pipe.sampler(**rows(2, scale=np.ones((STEPS, layers))))
  assert far(full, ones) == 0
  early, _ = pipe.sampler(**rows(2, scale=[[1.0]] + [[0.0]] * (STEPS - 1)))
  late, _ = pipe.sampler(**rows(2, scale=[[0.0]] * (STEPS - 1) + [[1.0]]))
  assert min(far(early, full), far(late, full), far(early, late), far(early, base)) > 1
  with pytest.raises(UserError, match="per layer"):
    pipe.sampler(**rows(2, scale=np.ones(layers + 1)))


SHARDED = """
import sys
import jax
from cc_jax import generate
jax.config.update("jax_disable_most_optimizations", True)
folder, out, references = sys.argv[1], sys.argv[2], sys.argv[3:]
pipe = generate.load(folder, mesh=generate.data_mesh(3))
assert pipe.sampler.mesh.size == 3
said = dict(class_noun="teddy bear", references=references, steps=3, seed=[5, 2, 9])
for k, image in enumerate(pipe("a teddy bear in the snow", **said)):
  image.save(f"{out}/{k}.png")
"""


def test_pictures_are_the_same_over_several_devices(folder, pipe, references, tmp_path):
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  command = [sys.executable, "-c", SHARDED, folder / "run", tmp_path, *references]
  subprocess.run([str(part) for part in command], env=environment, check=True, timeout=600)
  said = dict(class_noun=NOUN, references=references, steps=STEPS)
  expected = pipe(PROMPT, seed=[5, 2, 9], **said)
  for k, image in enumerate(expected):
    assert far(Image.open(tmp_path / f"{k}.png"), image) <= 1
  assert far(expected[0], expected[1]) > 20


@pytest.mark.parametrize("with_adapter", [False, True])
def test_without_references_it_is_a_naive_stable_diffusion(folder, pipe, with_adapter):
  base = load_base(folder / "base")
  tokenizer = base.tokenizers[0]
  noise = pipe.sampler.noise([3, 4])

  def ids(text):
    return jnp.asarray(tokenizer(text, padding="max_length")["input_ids"])[None]

  encode = nnx.jit(type(base.text_encoders[0]).__call__)
  prompts = jnp.concatenate([ids(t) for t in ("", "", PROMPT, PROMPT)])
  texts = encode(base.text_encoders[0], prompts).last_hidden_state
  scheduler = DDIMScheduler.from_config(base.scheduler_config)
  scheduler.set_timesteps(STEPS)
  unet = nnx.jit(type(base.unet).__call__)
  x = torch.from_numpy(np.array(noise))
  for t in scheduler.timesteps:
    both = jnp.asarray(torch.cat([x, x]).numpy())
    away, towards = np.split(np.asarray(unet(base.unet, both, jnp.full(4, int(t)), texts)), 2)
    guided = torch.from_numpy(away + 3.0 * (towards - away))
    x = scheduler.step(guided, t, x).prev_sample
  decode = nnx.jit(type(base.vae).decode)
  decoded = decode(base.vae, jnp.asarray(x.numpy()) / base.vae.config.scaling_factor)
  expected = np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1)

  sampler = pipe.sampler if with_adapter else ImageSampler(bundle(base), pipe.schedule)
  drawn = []
  draw = sampler._sample
  sampler._sample = lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1]
  sampler(
    encode_prompts([tokenizer], [PROMPT] * 2), encode_prompts([tokenizer], [""]), noise=noise,
    steps=STEPS, guidance=3.0,
  )  # fmt: skip
  sampler._sample = draw
  np.testing.assert_allclose(drawn[0].images, expected, atol=1e-4)
  assert np.std(expected) > 0.05  # not all clipped away


def psnr_against_pytorch(folder, prompts, steps=20, guidance=3.0):
  """PSNR in dB of each prompt's picture, ours against StableDiffusionPipeline's, float32."""
  from diffusers import StableDiffusionPipeline

  theirs = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
  theirs.set_progress_bar_config(disable=True)
  base = load_base(folder)
  sampler = ImageSampler(bundle(base), NoiseSchedule.from_config(base.scheduler_config))
  noise = sampler.noise(range(len(prompts)))
  expected = theirs(
    prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="np",
    latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
  ).images  # fmt: skip
  encoded, empty = (encode_prompts(base.tokenizers, texts) for texts in (prompts, [""]))
  found, _ = sampler(encoded, empty, noise=noise, steps=steps, guidance=guidance)
  assert expected.std() > 0.05
  error = np.square(found / 255.0 - expected).mean((1, 2, 3))
  return -10 * np.log10(np.maximum(error, 1e-12))


def test_shipped_base_draws_what_pytorch_draws():
  shipped = ASSETS / BASE
  prompts = [
    "a teapot on the beach",
    "a red snowman in the snow",
    "a photo of a blue mushroom on grass",
    "a robot at night",
    "a yellow rocket in the desert",
    "a tree in a flower meadow",
    "a green car on the road",
    "a teddy bear with a purple hat on a wooden floor",
  ]
  assert psnr_against_pytorch(shipped, prompts).min() >= 40


def test_equal_guidances_apart_are_the_joint_one(pipe, rows):
  joint, _ = pipe.sampler(**rows(2, guidance=2.5))
  apart, _ = pipe.sampler(**rows(2, guidance=2.5, image_guidance=2.5))
  less, _ = pipe.sampler(**rows(2, guidance=2.5, image_guidance=0.5))
  assert far(joint, apart) <= 1
  assert far(joint, less) > 3


def test_maps_are_the_models_at_the_states_passed_through(pipe, references):
  """Without S+ at a vanishing scale the picture is the base's; its maps are still made."""
  given = dict(steps=STEPS, seed=3, num_images=2)
  images, maps = pipe(
    PROMPT, NOUN, references, scale=1e-6, s_plus=False, return_maps=True, **given
  )
  assert far(images[0], pipe(PROMPT, **given)[0]) <= 1

  model = pipe.sampler.merge(pipe.sampler.params)
  assert tuple(maps) == model.layer_paths
  noise = pipe.sampler.noise([3, 4])
  prompts = encode_prompts(pipe.base.tokenizers, [PROMPT] * 2, [NOUN] * 2)
  cut = np.stack([pictures.read_reference(r, size=tiny.IMAGE) for r in references])

  @jax.jit
  def first(params):
    model = pipe.sampler.merge(params)
    features, _ = model.image_features(jnp.asarray(cut, jnp.float32) / 255)
    features = jnp.concatenate([features.reshape(1, -1, features.shape[-1])] * 2)
    t = jnp.full(2, DDIM_START)
    condition = model.condition(
      features, jnp.asarray(prompts.ids[0]), prompts.slot, prompts.noun_span, t,
      use_s_plus=False, scale=1e-6,
    )  # fmt: skip
    return model.predict(noise, t, condition, maps=True)[1]

  for found, expected in zip(maps.values(), first(pipe.sampler.params)):
    assert found.shape[:2] == (STEPS, 2) and found.shape[2] == found.shape[3]
    np.testing.assert_allclose(found[0].reshape(2, -1, 1), expected, atol=1e-5)
    assert np.abs(found[-1] - found[0]).max() > 1e-3  # depends on the step


def test_one_program_serves_prompts_scales_samplers_and_numbers_of_steps(pipe, rows):
  pipe.sampler(**rows(2))
  compiled = pipe.sampler._sample._cache_size()
  longer, _ = pipe.sampler(**rows(2, steps=7, scale=0.5, guidance=4.0))
  other, _ = pipe.sampler(**rows(2, steps=7, scale=0.5, guidance=4.0, sampler="dpmsolver++"))
  pipe.sampler(**rows(2, steps=12, sampler="heun", noise=pipe.sampler.noise([8, 9])))
  assert pipe.sampler._sample._cache_size() == compiled
  assert far(longer, other) > 1
  pipe.sampler(**rows(2, steps=26))
  assert pipe.sampler._sample._cache_size() == compiled + 1


def test_fresh_noise_is_a_pictures_own_and_maps_are_per_step(pipe, references):
  """A sampler that adds noise, and one that calls the UNet twice a step."""
  noisy = dict(steps=STEPS, sampler="euler_ancestral", num_images=2)
  two = pipe(PROMPT, seed=3, **noisy)
  again = pipe(PROMPT, seed=4, **noisy)
  assert far(two[1], again[0]) == 0
  assert far(two[1], pipe(PROMPT, seed=4, **noisy | dict(sampler="euler"))[0]) > 3
  _, maps = pipe(  # of a program that the test before has compiled
    PROMPT, NOUN, references, **noisy | dict(sampler="heun"), s_plus=False, return_maps=True
  )
  assert all(len(m) == STEPS and np.abs(m[-1] - m[0]).max() > 1e-3 for m in maps.values())


DDIM_START = 999  # trailing spacing starts at the last timestep


def test_mask_file_equals_alpha_channel_and_whole_pictures_warn(folder):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    cut = pictures.read_reference(folder / "cut.png", size=32)
    masked = pictures.read_reference(str(folder / "whole.png"), folder / "mask.png", size=32)
  np.testing.assert_array_equal(cut, masked)
  assert (cut[0] == 255).all() and (cut[16] < 250).any()  # white around, the subject inside
  with pytest.warns(UserWarning, match="transparent background"):
    whole = pictures.read_reference(Image.open(folder / "whole.png"), size=32)
  assert far(whole, cut) > 20


# ---- mistakes


@pytest.fixture(autouse=True)
def loads_once(monkeypatch):
  monkeypatch.setattr(generate, "load", lambda *a, lora=(), **k: LOAD(*a, lora=tuple(lora), **k))


LOAD = functools.cache(load)


def call(folder, **changes):
  """Runs the command in this process, with flags that work unless changed."""
  values = flags.FlagValues()
  generate.define_flags(values)
  given = dict(
    checkpoint=folder / "run", reference=f"{folder}/cut.png,{folder}/other.png", class_noun=NOUN,
    prompt=PROMPT, steps=STEPS, out=folder / "out.png",
  ) | changes  # fmt: skip
  values(["generate", *(f"--{k}={v}" for k, v in given.items() if v is not None)])
  generate.main([], values)


MISTAKES = {
  "checkpoint missing": (dict(checkpoint="{}/none.safetensors"), "leave --checkpoint out"),
  "training without a save": (dict(checkpoint="{}/empty_run"), "has saved yet"),
  "checkpoint truncated": (dict(checkpoint="{}/truncated.safetensors"), "truncated"),
  "checkpoint of another base": (dict(checkpoint="{}/foreign.safetensors"), "trained on the base"),
  "base missing": (dict(base="{}/none"), "is no folder"),
  "base without adapter": (dict(base="{}/base", checkpoint=None), "give --checkpoint"),
  "reference missing": (dict(reference="{}/none.png"), "none.png is missing"),
  "reference no picture": (dict(reference="{}/words.png"), "no picture"),
  "reference cut off": (dict(reference="{}/half.png"), "no picture"),
  "reference empty": (dict(reference="{}/nothing.png"), "empty file"),
  "reference transparent": (dict(reference="{}/transparent.png"), "transparent.png: .*empty"),
  "mask of another size": (
    dict(reference="{}/whole.png", mask="{}/small_mask.png"), r"\[23, 20\].*\[24, 20\]"
  ),
  "masks too few": (dict(mask="{}/mask.png"), "1 masks for 2 references"),
  "noun not in prompt": (dict(class_noun="rocket"), "does not contain the class noun 'rocket'"),
  "noun not given": (dict(class_noun=None), "--class_noun"),
  "no prompt": (dict(prompt=None), "--prompt"),
  "prompt too long": (dict(prompt=PROMPT + " in the snow" * 9), "shorten"),
  "prompt too long without reference": (
    dict(reference=None, class_noun=None, prompt="at night " * 20), "shorten"
  ),
  "no steps": (dict(steps=0), "at least 1 step"),
  "too many steps": (dict(steps=1001), "between 1 and 1000"),
  "guidance negative": (dict(guidance=-1), "guidance -1.0"),
  "image guidance no number": (dict(image_guidance="nan"), "image_guidance nan"),
  "scale negative": (dict(scale=-0.5), "scale -0.5"),
  "scale infinite": (dict(scale="inf"), "scale inf"),
  "seed negative": (dict(seed=-1), "seed -1"),
  "no pictures": (dict(num_images=0), "at least one"),
  "sampler unknown": (dict(sampler="euler_a"), "ddim, .*euler_ancestral"),
  "width no multiple": (dict(width=15), "width 15 is no multiple of 2; use 16"),
  "image missing": (dict(image="{}/none.png"), "none.png is missing"),
  "strength too small": (dict(image="{}/whole.png", strength=0.1), "leaves no step; use 0.33 to 1"),
  "eta of another sampler": (dict(eta=0.5, sampler="euler"), "an option of ddim"),
  "layers skipped that are not there": (dict(clip_skip=2), "clip_skip is 2 .* use 0 to 1"),
  "crop no pair": (dict(crop="5"), "--crop=5 is no pair"),
  "lora missing": (dict(lora="{}/none.safetensors:0.5"), "none.safetensors"),
  "dtype unknown": (dict(dtype="float8"), "float32 or bfloat16"),
  "out in no folder": (dict(out="{}/none/out.png"), "does not exist"),
  "out is a folder": (dict(out="{}/folder.png"), "cannot be written"),
  "out no PNG": (dict(out="{}/out.jpg"), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_with_a_remedy(folder, mistake):
  changes, message = MISTAKES[mistake]
  (folder / "folder.png").mkdir(exist_ok=True)
  changes = {k: v.format(folder) if isinstance(v, str) else v for k, v in changes.items()}
  with pytest.raises((UserError, DataError), match=message) as caught:
    call(folder, **changes)
  assert "\n" not in str(caught.value)
  assert not (folder / "out.png").exists()


# ---- the command


@pytest.mark.parametrize("given", ["--steps=0", "--step=3"])
def test_a_mistake_on_the_command_line_prints_one_line_and_no_traceback(folder, given):
  command = [sys.executable, "-m", "cc_jax.generate", "--prompt=a duck", given]
  done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_command_writes_pictures_that_carry_their_settings(folder, pipe, references, capsys):
  call(folder, num_images=2, seed=7, out=folder / "drawn.png")
  assert capsys.readouterr().out.split() == [f"{folder}/drawn-7.png", f"{folder}/drawn-8.png"]
  said = dict(class_noun=NOUN, references=references, steps=STEPS, num_images=2)
  expected = pipe(PROMPT, seed=7, **said)
  for seed, image in zip((7, 8), expected):
    found = Image.open(folder / f"drawn-{seed}.png")
    assert far(found, image) <= 1
    settings = json.loads(found.text[METADATA])
    assert settings["prompt"] == PROMPT and settings["seed"] == seed
    assert settings["base_hash"] == pipe.base.hash
    assert settings["checkpoint"] == str(folder / "run" / "adapter.safetensors")
    assert settings["steps"] == STEPS and settings["scale"] == 1.0


def test_adapter_tells_how_large_its_references_were(folder, pipe):
  adapter = load_adapter(folder / "run" / "adapter.safetensors")
  assert "reference_share" not in adapter.notes  # else this test says nothing
  small = dataclasses.replace(pipe.adapter, notes={"reference_share": "0.4"})
  whole = pipe.read_references([folder / "cut.png"], None)
  pipe.adapter, before = small, pipe.adapter
  half = pipe.read_references([folder / "cut.png"], None)
  pipe.adapter = before
  # Twice as small: a quarter of the canvas is not white.
  assert 2.5 < (whole < 250).any(-1).sum() / (half < 250).any(-1).sum() < 6


# ---- grids


def test_a_grid_puts_each_picture_where_it_belongs():
  colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
  images = [np.full((8, 8, 3), c, np.uint8) for c in colours]
  sheet = pictures.grid([*images, None], ["a", "b", "c c c c c c", ""], columns=2, scale=2)
  pixels = np.asarray(sheet)
  where = [np.argwhere((pixels == c).all(-1)) for c in colours]
  for found in where:
    assert len(found) == 16 * 16
  corners = [tuple(found.min(0)) for found in where]
  assert corners[0][0] == corners[1][0] < corners[2][0]  # rows
  assert corners[0][1] == corners[2][1] < corners[1][1]  # columns
  below = pixels[corners[2][0] + 16 :, :, 0]
  assert (below < 100).any()  # the caption
  assert (pixels[corners[0][0] : corners[0][0] + 16, : corners[0][1]] == 255).all()
  headed = pictures.grid(images, columns=3, row_headings=["row"], column_headings=["x", "y", "z"])
  assert headed.width > pictures.grid(images, columns=3).width
  with pytest.raises(ValueError, match="2 captions for 3"):
    pictures.grid(images, ["a", "b"])


def test_pictures_are_clipped_rounded_and_laid_on_white():
  assert pictures.to_uint8([-1.0, 0.5, 2.0, 0.1]).tolist() == [0, 128, 255, 26]
  clear = np.zeros((2, 2, 4), np.uint8)
  clear[0, 0] = (10, 20, 30, 255)
  image = np.asarray(pictures.to_image(clear))
  assert image[0, 0].tolist() == [10, 20, 30] and image[1, 1].tolist() == [255, 255, 255]


def test_references_are_displayed_as_in_training():
  data = subjects3d.get_config().data
  data.update(reference_ratio=0.5, reference_layout="in_place", image_size=32)
  assert pictures.reference_display(data) == dict(ratio=0.5, size=32, layout="in_place")
  notes = {"reference_share": "0.5", "reference_place": "frame"}  # as adapter files name them
  assert pictures.reference_display(notes, 64) == dict(ratio=0.5, size=64, layout="frame")
  assert pictures.reference_display({}, 64) == dict(ratio=0.8, size=64, layout="centred")
