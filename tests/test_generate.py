"""Generation: equal to a plain loop over diffusers' scheduler, and every mistake is one line."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

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
from cc_jax.models.attention_kinds import XLA_ONLY
from cc_jax.models.rngs import abstract
from cc_jax.sampling import images as pictures
from cc_jax.sampling import pipeline
from cc_jax.sampling.images import METADATA
from cc_jax.sampling.pipeline import BASE, load
from cc_jax.sampling.prompts import encode_prompts
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler
from configs import subjects3d
from data_pipeline.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_compile")

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
import textwrap
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_same_programs_serve_prompts_scales_samplers_steps_and_a_bar(
  pipe, rows, monkeypatch
):
  def compiled():
    draws = pipe.sampler
    programs = draws._begin, draws._take_call, draws._decode, draws._location_maps
    return [program._cache_size() for program in programs]

  pipe.sampler(**rows(2))
  before = compiled()
  longer, _ = pipe.sampler(**rows(2, steps=7, scale=0.5, guidance=4.0))
  other, _ = pipe.sampler(**rows(2, steps=7, scale=0.5, guidance=4.0, sampler="dpmsolver++"))
  pipe.sampler(**rows(2, steps=12, sampler="heun", noise=pipe.sampler.noise([8, 9])))
  ticks, lowered, program = [], [], pipe.sampler._take_call
  monkeypatch.setattr(pipe.sampler, "_take_call", lambda *args, config: (
    lowered or lowered.append(program.lower(*args, config=config).as_text()),
    program(*args, config=config))[1])  # fmt: skip
  ticking, _ = pipe.sampler(**rows(2, steps=26, sampler="heun", tick=lambda: ticks.append(0)))
  monkeypatch.undo()
  assert "callback" not in lowered[0]  # P29: it would keep the program out of JAX's cache
  silent, _ = pipe.sampler(**rows(2, steps=26, sampler="heun"))
  assert compiled() == before
  assert far(longer, other) > 1
  assert len(ticks) == 2 * 26 - 1  # calls of the UNet
  np.testing.assert_array_equal(ticking, silent)


@pytest.mark.slow
def test_the_bars_programs_are_found_in_the_compilation_cache(folder, tmp_path):
  """P29: a program with a host callback is compiled again in every process."""
  command = textwrap.dedent("""
    import sys
    import jax
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    missed = []
    note = lambda event, **_: missed.append(event) if event.endswith("cache_misses") else None
    jax.monitoring.register_event_listener(note)
    from cc_jax import generate
    pipe = generate.load(sys.argv[1])
    picture = pipe("a duck", "duck", [sys.argv[2]], steps=2, progress=True)[0]
    print(len(missed), picture.tobytes().hex())
  """)
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
  arguments = [sys.executable, "-c", command, str(folder / "run"), str(folder / "cut.png")]
  (missed, picture), (missed_again, same) = (
    subprocess.run(
      arguments, env=environment, capture_output=True, text=True, check=True).stdout.split()
    for _ in range(2))
  assert int(missed) >= 3 and int(missed_again) == 0
  assert picture == same


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
  cached = lambda *a, lora=(), **k: LOAD(*a, lora=tuple(lora), **k)  # noqa: E731
  monkeypatch.setattr("cc_jax.sampling.pipeline.load", cached)


LOAD = functools.cache(load)


def call(folder, **changes):
  """Runs the command in this process, with flags that work unless changed."""
  values = flags.FlagValues()
  generate.define_flags(values)
  given = dict(
    checkpoint=folder / "run", reference=f"{folder}/cut.png,{folder}/other.png", class_noun=NOUN,
    prompt=PROMPT, steps=STEPS, out=folder / "out.png",
  ) | changes  # fmt: skip
  given = {k: v if isinstance(v, list) else [v] for k, v in given.items() if v is not None}
  values(["generate", *(f"--{k}={v}" for k, several in given.items() for v in several)])
  generate.main([], values)


MISTAKES = {
  "checkpoint missing": (dict(checkpoint="{}/none.safetensors"), "leave --checkpoint out"),
  "training without a save": (dict(checkpoint="{}/empty_run"), "has saved yet"),
  "checkpoint truncated": (dict(checkpoint="{}/truncated.safetensors"), "truncated"),
  "checkpoint of another base": (
    dict(checkpoint="{}/foreign.safetensors", strict_base="true"),
    r"trained on the base '.*/base' \(000000000000\), and .* has other weights; load that base"),
  "base missing": (dict(base="{}/none"), "is no folder"),
  "base without adapter": (dict(base="{}/base", checkpoint=None), "give --checkpoint"),
  "reference missing": (dict(reference="{}/none.png"), "none.png is missing"),
  "reference no picture": (dict(reference="{}/words.png"), "not a picture"),
  "reference cut off": (dict(reference="{}/half.png"), "half.png cannot be read"),
  "reference empty": (dict(reference="{}/nothing.png"), "empty file"),
  "reference transparent": (dict(reference="{}/transparent.png"), "transparent.png: .*empty"),
  "mask of another size": (
    dict(reference="{}/whole.png", mask="{}/small_mask.png"), r"\[23, 20\].*\[24, 20\]"
  ),
  "masks too few": (dict(mask="{}/mask.png"), "1 masks for 2 references; .*,b.png"),
  "masks too many": (dict(mask=["{}/mask.png"] * 3), "3 masks for 2 references"),
  "mask missing": (dict(mask=",{}/none.png"), "none.png is missing"),
  "mask no picture": (dict(mask=",{}/words.png"), "words.png"),
  "an open quote in a list": (dict(reference='"a.png'), "is no list of files; write a.png,b.png"),
  "a home that is not there": (dict(reference="~nobody-here/a.png"), "~nobody-here/a.png is missi"),
  "noun not in prompt": (dict(class_noun="rocket"), "does not contain the class noun 'rocket'"),
  "noun not given": (dict(class_noun=None), "--class_noun"),
  "no prompt": (dict(prompt=None), "--prompt"),
  "prompt too long": (
    dict(prompt=PROMPT + " in the snow" * 9, long_prompts="error"), "shorten"
  ),
  "prompt too long without reference": (
    dict(reference=None, class_noun=None, prompt="at night " * 20, long_prompts="error"), "shorten"
  ),
  "noun cut off": (dict(prompt="at night " * 9 + PROMPT), "cut after 14 tokens, before its class"),
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
  "image encoder missing": (dict(image_encoder="{}/none"), "none/config.json is missing"),
  "image no picture": (dict(image="{}/words.png"), "no picture|not a picture"),
  "original size no numbers": (dict(original_size="64,wide"), "original_size=64,wide is no pair"),
  "too many pictures for their seeds": (dict(seed=2**31 - 1, num_images=2), "is out of range"),
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
  put = lambda v: v.format(folder) if isinstance(v, str) else v  # noqa: E731
  changes = {k: [put(one) for one in v] if isinstance(v, list) else put(v)
             for k, v in changes.items()}  # fmt: skip
  out = folder / "out.png"
  out.write_text("an earlier picture")
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  with pytest.raises((UserError, DataError), match=message) as caught:
    call(folder, **changes)
  assert "\n" not in str(caught.value)
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# Arguments of the Python interface that are wrong: P18.
WRONG = {
  "no prompts": (dict(prompt=[]), "no prompt"),
  "a prompt of bytes": (dict(prompt=b"a duck"), "prompt is b'a duck' .bytes.; give"),
  "an empty one among prompts": (dict(prompt=[PROMPT, " "]), "no prompt"),
  "None among prompts": (dict(prompt=[PROMPT, None]), "no prompt"),
  "prompts in a dict": (dict(prompt={PROMPT: 1}), "prompt is .* .dict."),
  "two prompts, three pictures": (dict(prompt=[PROMPT] * 2, num_images=3), "2 prompts for 3 pict"),
  "two prompts, three seeds": (dict(prompt=[PROMPT] * 2, seed=[1, 2, 3]), "one for each prompt"),
  "a noun among prompts missing": (dict(prompt=[PROMPT, "a car"]), "'a car' does not contain"),
  "a noun that is a number": (dict(class_noun=3), "class_noun is 3 .int."),
  "None among nouns": (dict(class_noun=["teddy bear", None]), "class_noun is None"),
  "negative prompts": (dict(negative_prompt=["a", "b"]), "negative_prompt is .*; give one text"),
  "references in a dict": (dict(references={"a.png": 1}), "reference is .* .dict."),
  "None among references": (dict(references=[None]), "a reference is None .* give a path, a PIL"),
  "a reference of bytes": (dict(references=b"png"), "reference is b'png' .bytes."),
  "a list in a list": (dict(references=[["a.png"], ["b.png"]]), "a reference is .'a.png'. .list."),
  "a mask that is a number": (dict(masks=[None, 3]), "a mask is 3 .int."),
  "a mask too many": (dict(masks=[None] * 3), "3 masks for 2 references"),
  "an image list": (dict(image=["a.png"]), "image is .'a.png'. .list."),
  "width as text": (dict(width="16"), "width is '16' .str.; give a whole number"),
  "height of half a pixel": (dict(height=16.5), "height is 16.5 .float."),
  "no width": (dict(width=0), "width 0 is no multiple of 2; use 2"),
  "no seed": (dict(seed=None), "seed is None .NoneType."),
  "seed as text": (dict(seed="7"), "seed is '7' .str."),
  "half a seed": (dict(seed=0.5), "seed is 0.5 .float."),
  "a negative seed of numpy": (dict(seed=np.int64(-1)), "seed -1 is out of range"),
  "a negative one among seeds": (dict(seed=[0, -1]), "is out of range"),
  "half a picture": (dict(num_images=1.5), "num_images is 1.5"),
  "steps as text": (dict(steps="20"), "steps is '20'"),
  "guidance as text": (dict(guidance="5"), "guidance is '5' .str.; give a number"),
  "guidance nan": (dict(guidance=float("nan")), "guidance nan"),
  "a guidance for each": (dict(guidance=[5.0, 6.0]), "guidance is .5.0, 6.0. .list."),
  "strength as text": (dict(image=np.zeros((4, 4, 3), np.uint8), strength="1"), "strength is '1'"),
  "eta None": (dict(eta=None), "eta is None"),
  "a scheduler for a sampler": (dict(sampler=DDIMScheduler), "sampler is .* give one text"),
  "scale of another shape": (dict(scale=np.ones((5, 77))), "nor 4 numbers .one per layer."),
  "scale a dict": (dict(scale={"up": 1}), "scale .* is no number"),
  "scale None": (dict(scale=None), "scale nan makes no sense"),
  "crop of three": (dict(crop=(1, 2, 3)), "crop is .1, 2, 3. .tuple.; give a pair"),
  "a size of half pixels": (dict(original_size=(1.5, 2)), "original_size is 1.5"),
  "a size below nothing": (dict(target_size=(64, -64)), r"target_size is \(64, -64\); give"),
  "a crop below nothing": (dict(crop=(0, -1)), r"crop is \(0, -1\); give"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_arguments_are_one_line(pipe, references, mistake):
  """P18."""
  changes, message = WRONG[mistake]
  given = dict(prompt=PROMPT, class_noun=NOUN, references=references, steps=STEPS) | changes
  with pytest.raises((UserError, DataError), match=message) as caught:
    pipe(**given)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_wrong_arguments_of_load_are_one_line(folder):
  for given, message in (
    (dict(checkpoint=5), "checkpoint is 5 .int.; give a path"),
    (dict(base=["a"]), "base is .'a'. .list."),
    (dict(checkpoint=folder / "run", dtype="float99"), "dtype is 'float99' .*; use float32 or bfl"),
    (dict(checkpoint=folder / "run", dtype=np.int32), "dtype is .*int32"),
    (dict(checkpoint=folder / "run", lora=[("a", "b", "c")]), "lora is .* give a pair"),
    (dict(checkpoint=folder / "run", lora=[("a", "strong")]), "the scale of a lora is 'strong'"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      load(**given)


def sent(pipe, monkeypatch, *args, **given):
  """What the sampler would be asked to draw, as keywords, and the prompts' texts."""
  asked = {}

  def sampler(prompts, negative, *, noise, **rest):
    asked.update(rest, prompts=prompts, negative=negative, noise=noise)
    return np.zeros((len(noise), 16, 16, 3), np.uint8), ()

  for name in ("factor", "latent_size", "noise", "table", "layers"):
    setattr(sampler, name, getattr(pipe.sampler, name))
  with monkeypatch.context() as patch:
    patch.setattr(pipe, "sampler", sampler)
    asked["images"] = pipe(*args, **given)
  return asked


def test_arguments_in_the_types_that_people_have(pipe, folder, monkeypatch):
  """P18: numbers of numpy and JAX, one picture or several in any container, several prompts."""
  ask = functools.partial(sent, pipe, monkeypatch)
  plain = ask(PROMPT, width=16, height=12, seed=3, num_images=2, steps=3, guidance=2.0)
  typed = ask(
    PROMPT, width=np.int64(16), height=jnp.int32(12), seed=np.uint8(3), num_images=np.int16(2),
    steps=np.int32(3), guidance=np.float32(2.0), clip_skip=None)
  np.testing.assert_array_equal(plain["noise"], typed["noise"])
  assert (typed["steps"], typed["guidance"]) == (3, 2.0) and len(typed["images"]) == 2
  given = ask(PROMPT, seed=jnp.asarray([3, 4]), height=12)
  np.testing.assert_array_equal(plain["noise"], given["noise"])

  # A list of prompts draws one picture of each, seeds counting up, as with diffusers.
  other = "the teddy bear at night"
  several = ask([PROMPT, other], NOUN, folder / "cut.png", seed=3, height=12)
  np.testing.assert_array_equal(several["noise"], plain["noise"])
  each = [ask(text, NOUN, folder / "cut.png") for text in (PROMPT, other)]
  for row, single in enumerate(each):
    for ids, own in zip(several["prompts"].ids, single["prompts"].ids):
      np.testing.assert_array_equal(ids[row : row + 1], own)
  assert several["references"].shape == (2, 1, 16, 16, 3)

  cut = Image.open(folder / "cut.png")
  pixels = np.asarray(cut)
  expected = pipe.read_references([folder / "cut.png"])
  for one in (str(folder / "cut.png"), cut, pixels, jnp.asarray(pixels), torch.tensor(pixels),
              pixels[None], (cut,), iter([pixels]), [folder / "cut.png"]):  # fmt: skip
    np.testing.assert_array_equal(pipe.read_references(one), expected)
  both = ask(PROMPT, [NOUN], [[cut, cut]], [[None, None]])["references"]
  np.testing.assert_array_equal(both[0], np.concatenate([expected] * 2))


class Recorder:
  """Stands for a loaded pipeline: notes what the command hands over, and draws a red square."""

  source, base = "a file", dataclasses.make_dataclass("Base", ["name", "hash"])("a base", "1234")
  sampler = SimpleNamespace(kernels=XLA_ONLY)

  def load(self, checkpoint, base, *, image_encoder, lora, **rest):
    self.loaded = dict(checkpoint=checkpoint, base=base, image_encoder=image_encoder, lora=lora)
    return self

  def __call__(self, **given):
    self.given = given
    return [Image.new("RGB", (4, 4), "red")]


@pytest.fixture
def recorder(monkeypatch):
  recorder = Recorder()
  monkeypatch.setattr("cc_jax.sampling.pipeline.load", recorder.load)
  return recorder


def test_the_home_folder_is_found(pipe, recorder, folder, monkeypatch, tmp_path):
  """P21: '~' in every path, which a shell leaves as it is behind an equals sign."""
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  (tmp_path / "home").symlink_to(folder)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  call(folder, out="~/home.png", reference="~/cut.png,~/whole.png", mask=",~/mask.png",
       image="~/whole.png", base="~/base", lora="~/a.safetensors:0.5")
  assert Image.open(folder / "home.png").getpixel((0, 0)) == (255, 0, 0)
  assert not list((tmp_path / "here").iterdir())

  shown = pipe.read_references(recorder.given["references"], recorder.given["masks"])
  cut = pipe.read_references(folder / "cut.png")
  np.testing.assert_array_equal(shown, np.concatenate([cut, cut]))
  asked = sent(pipe, monkeypatch, PROMPT, image=recorder.given["image"])
  assert asked["image"].shape == (1, 16, 16, 3)
  found = {}

  def look(name, **parts):
    found.update(parts, name=name)
    raise UserError("enough")

  monkeypatch.setattr(pipeline, "load_base", look)
  with pytest.raises(UserError, match="enough"):
    load("~/run", "~/base", image_encoder="~/clip", lora=recorder.loaded["lora"])
  home = str(tmp_path / "home")
  assert (found["name"], found["image_encoder"]) == (f"{home}/base", f"{home}/clip")
  assert found["lora"] == [(f"{home}/a.safetensors", 0.5)]
  with pytest.raises(UserError, match="enough"):
    load("~/run", "~/base", lora=folder / "b.safetensors")
  assert found["lora"] == [(f"{folder}/b.safetensors", 1.0)]


# ---- the command


def test_files_with_commas_and_plus_signs_in_their_names(tmp_path, monkeypatch):
  """P20: what is a file is taken whole; a flag may be repeated; an empty name is no mask."""
  monkeypatch.chdir(tmp_path)
  for name in ("a.png", "b.png", "a,b.png", "a+b.png", "c:0.5"):
    (tmp_path / name).write_text("")
  split = generate.split_files
  assert split(["a.png,b.png"]) == split(["a.png", "b.png"]) == ["a.png", "b.png"]
  assert split(["a.png, b.png"]) == ["a.png", "b.png"]
  assert split(["a,b.png"]) == ["a,b.png"]
  assert split(["a,b.png", "a.png,b.png"]) == ["a,b.png", "a.png", "b.png"]
  assert split(['"a,b.png",a.png']) == ["a,b.png", "a.png"]  # as before: a line of CSV
  assert split([",b.png"]) == split(["", "b.png"]) == ["", "b.png"]
  assert split(["a.png,"]) == ["a.png", ""]
  assert split([]) == split([""]) == []


def test_the_command_reads_references_and_masks_as_python_does(folder, pipe, recorder):
  """P20: a mask for one of two references, and names with a comma or a plus sign."""
  (folder / "a,b.png").write_bytes((folder / "whole.png").read_bytes())
  (folder / "a+b.png").write_bytes((folder / "other.png").read_bytes())

  def references(**flags):
    call(folder, out=folder / "seen.png", **flags)
    shown, cut, nouns = (recorder.given[k] for k in ("references", "masks", "class_noun"))
    subjects = [(shown, cut)] if isinstance(nouns, str) else zip(shown, cut)
    return [pipe.read_references(*pair) for pair in subjects]

  cut, other = (pipe.read_references(folder / f"{name}.png") for name in ("cut", "other"))
  both = np.concatenate([other, cut])
  (found,) = references(reference=f"{folder}/other.png,{folder}/whole.png",
                        mask=f",{folder}/mask.png")
  np.testing.assert_array_equal(found, both)
  (found,) = references(reference=[f"{folder}/other.png", f"{folder}/a,b.png"],
                        mask=["", f"{folder}/mask.png"])
  np.testing.assert_array_equal(found, both)
  two = dict(class_noun="bear,snow", prompt="a bear in the snow")
  files = f"{folder}/other.png+{folder}/whole.png,{folder}/a+b.png"
  first, second = references(reference=files, mask=f"+{folder}/mask.png,", **two)
  np.testing.assert_array_equal(first, both)
  np.testing.assert_array_equal(second, other)


def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(folder, monkeypatch, tmp_path):
  """A full disk in the middle of the file."""
  pictures.save(Image.new("RGB", (9, 9), "red"), tmp_path / "out.png")
  whole = (tmp_path / "out.png").read_bytes()

  def full(self, file, **_):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Image.Image, "save", full)
  with pytest.raises(UserError, match="No space left on device; choose another path"):
    pictures.save(Image.new("RGB", (9, 9)), tmp_path / "out.png")
  assert (tmp_path / "out.png").read_bytes() == whole
  assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_base_of_the_family_is_told_on_stderr(folder, monkeypatch, capsys):
  """C5, as the command says it: one line, and it goes on."""

  class Quiet(Recorder):
    def load(self, *args, **kwargs):
      load(*args, **kwargs)
      return self

  monkeypatch.setattr("cc_jax.sampling.pipeline.load", Quiet().load)
  call(folder, checkpoint=folder / "foreign.safetensors", out=folder / "family.png")
  errors = capsys.readouterr().err
  assert errors.startswith("warning: ") and errors.count("\n") == 1
  assert "was trained on the base" in errors and "other weights" in errors
  assert (folder / "family.png").is_file()


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
