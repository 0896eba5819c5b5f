"""Stored features: the numbers of a run with them are those of a run without."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath
from flax import nnx
from PIL import Image

import data_pipeline
from cc_jax.bases.base import load_base
from cc_jax.cache import writer
from cc_jax.customcontrast.build import build_customcontrast
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.errors import UserError
from cc_jax.models.vae import latents_to_images
from cc_jax.parallel.mesh import make_mesh, shard_batch
from cc_jax.plan import lower
from cc_jax.training import cached_features, inputs, loop, losses, setup, step
from data_pipeline import feature_cache, sampling, triples
from data_pipeline.errors import DataError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compile")


def write_subjects(folder, subjects=4, frames=4):
  """Boxes on noise, of other sizes than the model's; the first three frames are references."""
  rng = np.random.default_rng(0)
  for n in range(subjects):
    place = folder / f"subject_{n}"
    place.mkdir(parents=True)
    noun = tiny.NOUNS[n % len(tiny.NOUNS)]
    for f in range(frames):
      image = rng.integers(0, 256, (20, 26, 4), np.uint8)
      image[..., 3] = 0
      image[4 : 10 + f, 6 : 14 + n] = (60 * n, 40 * f, 99, 255)
      Image.fromarray(image).save(place / f"{f}.png")
    listing = {
      "class_noun": noun, "references": ["0.png", "1.png", "2.png"],
      "captions": {f"{f}.png": tiny.CAPTIONS[f % 3].format(noun) for f in range(frames)},
    }  # fmt: skip
    (place / "captions.json").write_text(json.dumps(listing))
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_subjects(tmp_path_factory.mktemp("cache") / "subjects")


def config_of(base, data, **changes):
  settings = dict(data__source="folder", data__name=str(data), data__placements=3,
                  data__reference_layout="random", data__holdout_subjects=1)  # fmt: skip
  return tiny.tiny_config(base, **settings | changes)


def first_batches(config, base, steps=(0, 1, 2, 3)):
  """This process's batches of a few steps."""
  mesh = make_mesh(config.mesh, config.train.batch_size, devices=jax.devices()[:1])
  maker = setup.make_batches(config, base, 0, steps[0], mesh)
  found = [next(maker) for _ in steps]
  maker.close()
  return found


class Cached:
  """Features of `data` for the tiny base, really encoded."""

  def __init__(self, base, data, root):
    self.config = config_of(base, data, data__cache_dir=str(root))
    self.folder = writer.write_features(self.config, batch_per_chip=4)
    self.base = load_base(base)
    self.reading = config_of(base, data, data__cache_dir=str(root), data__cached=True)


@pytest.fixture(scope="module")
def cached(tiny_folder, data, tmp_path_factory):
  return Cached(tiny_folder, data, tmp_path_factory.mktemp("features"))


# The pictures' side: which frame and placement a row shows. The encoders copy, so that what is
# stored can be compared with the pictures to the bit.


def copy(role, pictures):
  if role == "target":
    return {"target_moments": pictures.astype(np.float32)}
  features = {f"{role}_features": pictures.astype(np.float32)}
  return features | ({"reference_embed": pictures[:, 3, 3]} if role == "reference" else {})


def store_copies(config, networks, per_shard=3):
  from data_pipeline.sources.stored import StoredFrames, open_subjects

  frames = StoredFrames(config.data, networks, *open_subjects(config.data))
  layout = frames.layout(per_shard)
  writer.write_missing_shards(frames, layout, copy)
  dtypes = dict.fromkeys(feature_cache.ROLES, "float32")
  dtypes |= {"target_mask": "uint8", "reference_embed": "uint8"}
  feature_cache.write_manifest(frames.folder, frames.key, layout, dtypes)
  return frames, layout


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"frames": "self", "reference_layout": "centred", "reference_jitter": 0.5, "placements": 2},
    {"reference_layout": "centred", "max_bad_share": 0.3},
  ],
)
def test_a_cache_shows_the_same_frames_and_placements(cached, data, tmp_path, changes, monkeypatch):
  changes = {f"data__{key}": value for key, value in changes.items()}
  folder = shutil.copytree(data, tmp_path / "subjects")
  if "data__max_bad_share" in changes:
    (folder / "subject_0" / "1.png").write_bytes(b"no picture")
  config = config_of(cached.config.base, folder, **changes)
  reading = config_of(cached.config.base, folder, **changes, data__cached=True)
  frames, layout = store_copies(config, cached_features.needed_features(config, cached.base))
  assert frames.root == tmp_path / "subjects_features"
  assert layout.shards > 2
  if not changes:  # the fourth frame is no reference: it is a target alone
    assert not layout.is_shown("positive", (layout.subjects[0][0], 3))
  plain, stored = first_batches(config, cached.base), first_batches(reading, cached.base)
  positives = set()
  for a, b in zip(plain, stored, strict=True):
    assert a.keys() - b.keys() == {"positive", "reference", "target"}
    np.testing.assert_array_equal(b["target_moments"], a["target"])
    np.testing.assert_array_equal(b["positive_features"], a["positive"])
    np.testing.assert_array_equal(b["reference_features"], a["reference"])
    np.testing.assert_array_equal(b["reference_embed"], a["reference"][:, 3, 3])
    for key in a.keys() & b.keys():
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    positives |= {picture.tobytes() for picture in a["positive"]}
  assert len(positives) <= 3 * 4 * config.data.placements


def test_placements_are_fixed_and_fresh_ones_are_not():
  image, mask = np.zeros((20, 26, 3), np.uint8), np.zeros((20, 26), np.uint8)
  mask[4:12, 6:16] = 255
  config = triples.TripleConfig(16, placements=2, reference_layout="random")

  def shown(name, config, ids=((5, 0), (5, 1), (5, 2))):
    made = [triples.make_triple(sampling.row_rng(0, step, 0), [image] * 3, [mask] * 3, config, ids)
            for step in range(40)]  # fmt: skip
    return {triple[name].tobytes() for triple in made}

  for name in ("positive", "reference"):
    assert len(shown(name, config)) == 2
    assert shown(name, config) != shown(name, config, ((6, 0), (6, 1), (6, 2)))
    assert len(shown(name, triples.TripleConfig(16, reference_layout="random"))) > 35
  # A placement is uniform, whatever the seed of the run.
  u = np.stack([triples.placement(n, f, k) for n in range(9) for f in range(9) for k in range(9)])
  np.testing.assert_allclose(u.mean(0), 0.5, atol=0.04)
  np.testing.assert_allclose(u.std(0), 12**-0.5, atol=0.02)


@pytest.mark.slow
def test_a_tfds_data_set(tmp_path):
  """The index of TFDS, and a cache in the data set's folder; without any network."""
  import test_sources
  from test_triples import make_tokenizer

  tokenizer = make_tokenizer(tmp_path / "tokenizer", max_length=160)
  data_dir = tmp_path / "tfds"
  test_sources.write_blobs(data_dir, file_format="array_record", frames=4)
  networks = feature_cache.Networks({"vae": "1"}, {}, "the command")
  settings = dict(source="tfds", name="blobs", data_dir=str(data_dir), placements=2,
                  group_ratio=0.0)  # fmt: skip
  plain, reading = (test_sources.config(**settings, cached=c) for c in (False, True))
  frames, _ = store_copies(SimpleNamespace(data=plain), networks)
  assert frames.root.name == "features"
  assert data_dir in frames.root.parents
  found, wanted = (
    next(data_pipeline.make_loader(c, tokenizer, batch_size=4, seed=3, networks=networks))
    for c in (reading, plain)
  )
  np.testing.assert_array_equal(found["target_moments"], wanted["target"])
  np.testing.assert_array_equal(found["positive_features"], wanted["positive"])
  np.testing.assert_array_equal(found["reference_features"], wanted["reference"])
  np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])


# The numbers' side.


def parts(config, base):
  """(context, trainable, frozen) of a run."""
  definition, trainable, frozen = build_customcontrast(base, *setup.adapter_configs(config))
  return setup.make_step_context(config, definition, base), trainable, frozen


def gradients(config, base, batch):
  """((loss, metrics), gradient) of a step, without VAE and image encoder if they are stored."""
  context, trainable, frozen = parts(config, base)
  if config.data.cached:
    context, frozen, _ = cached_features.without_encoders(context, frozen)
    assert not any(name.startswith(("vae", "image_encoder")) for name in frozen)
  trainable = {name: x + 0.05 for name, x in trainable.items()}  # gates start at 0
  gradient = jax.value_and_grad(losses.total_loss, 1, has_aux=True)
  gradient = jax.jit(functools.partial(gradient, context))
  return gradient(trainable, frozen, batch, jax.random.key(3))


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_a_run_without(cached):
  mesh = make_mesh(cached.config.mesh, 4, devices=jax.devices()[:1])
  found = {}
  for config in (cached.config, cached.reading):
    batch = shard_batch(first_batches(config, cached.base, [5])[0], mesh)
    found[config.data.cached] = gradients(config, cached.base, batch)
  ((plain, metrics), plain_gradient), ((stored, more), gradient) = found[False], found[True]
  np.testing.assert_allclose(stored, plain, rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(more[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
  norms = {name: float(np.linalg.norm(x)) for name, x in plain_gradient.items()}
  errors = {name: float(np.linalg.norm(gradient[name] - x)) for name, x in plain_gradient.items()}
  whole, of_error = (np.linalg.norm([*values.values()]) for values in (norms, errors))
  assert of_error < 5e-6 * whole  # 5e-7 was seen
  # Where a weight's gradient nearly cancels out, what is left has the rounding of its summands.
  for name, norm in norms.items():
    assert errors[name] < max(1e-5 * norm, 1e-6 * whole), name


def test_stored_inputs_are_those_of_the_step(cached):
  """Latents with the same noise, features and embeddings: all that a step asks the encoders for."""
  plain, stored = (first_batches(c, cached.base, [5])[0] for c in (cached.config, cached.reading))
  keys = jax.random.split(jax.random.key(2), 4)
  encoders = SimpleNamespace(vae=cached.base.vae, image_features=jax.jit(
    functools.partial(CustomContrast.image_features, seeing(cached.config, cached.base))))
  none = SimpleNamespace(vae=SimpleNamespace(config=cached.base.vae.config))
  latents = jax.jit(lambda batch: inputs.target_latents(encoders, batch, keys))
  roles = ("reference", "positive")
  features, embed = inputs.image_features(encoders, plain, roles)
  wanted = latents(plain), features, embed[:, :1]
  found = inputs.target_latents(none, stored, keys), *inputs.image_features(none, stored, roles)
  for a, b in zip(found, wanted, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
  assert float(np.std(wanted[0])) > 0.1


def seeing(config, base):
  """What `CustomContrast.image_features` reads of a model."""
  return SimpleNamespace(
    image_encoder=base.image_encoder, image_processor=base.image_processor,
    image_layers=config.encoder.image_layers, dtype=np.float32)


@pytest.fixture(scope="module")
def run(cached, tmp_path_factory):
  """A run with stored features before its first step."""
  with contextlib.ExitStack() as lock:
    run = loop.set_up(cached.reading, epath.Path(tmp_path_factory.mktemp("run")), lock)
    run.log.close()
    run.checkpoints.close()
  return run


def test_losses_go_without_the_encoders(cached, run):
  """Traced, not compiled. What logs the wrong-word gap runs in `test_a_run_trains_...`."""
  batch = first_batches(cached.reading, cached.base, [0])[0]
  context, trainable, frozen = run.context, run.state.trainable, run.frozen
  loss = functools.partial(losses.total_loss, context)
  _, metrics = jax.eval_shape(loss, trainable, frozen, batch, jax.random.key(0))
  assert {"loss/diffusion", "loss/cscl", "loss/macl"} <= metrics.keys()


@pytest.mark.slow
def test_microbatches_of_stored_features(cached):
  batch = first_batches(cached.reading, cached.base, [0])[0]
  config = cached.reading.copy_and_resolve_references()
  config.train.grad_accum_steps = 2
  context, trainable, frozen = parts(config, cached.base)
  context, frozen, _ = cached_features.without_encoders(context, frozen)
  state = jax.eval_shape(lambda t: step.init_state(t, config), trainable)
  _, metrics = jax.eval_shape(
    functools.partial(step.train_step, context), state, frozen, batch, np.uint32(0))
  assert {"loss/diffusion", "loss/cscl", "loss/macl"} <= metrics.keys()


def test_a_run_keeps_the_encoders_off_the_devices(cached, run, tmp_path):
  assert not any(name.startswith(("vae", "image_encoder")) for name in run.frozen)
  for module in (run.base.vae, run.base.image_encoder):
    leaves = jax.tree.leaves(nnx.state(module))
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  # Pictures are drawn by a model that has them all, as they were.
  models = []
  loop.run_callback(run, lambda config, base, model, path: models.append(model), tmp_path)
  for name in cached_features.ENCODERS:
    found = nnx.to_flat_state(nnx.state(getattr(models[0], name)))
    wanted = dict(nnx.to_flat_state(nnx.state(getattr(cached.base, name))))
    assert len(found) == len(wanted)
    for path, leaf in found:
      assert isinstance(leaf.get_value(), np.ndarray)
      np.testing.assert_array_equal(leaf.get_value(), wanted[path].get_value())


def test_the_plan_has_the_batch_of_a_run(cached):
  config = cached.reading.copy_and_resolve_references()
  mesh = make_mesh(config.mesh, 4, devices=jax.devices()[:1])
  program = lower.train_program(config, mesh)
  batch = first_batches(config, cached.base, [0])[0]
  planned = {name: (x.shape, x.dtype) for name, x in program.parts["batch"].items()}
  assert planned == {name: (x.shape, x.dtype) for name, x in batch.items()}
  names = program.parts["frozen base"].keys()
  assert any(name.startswith("unet") for name in names)
  assert not any(name.startswith(("vae", "image_encoder")) for name in names)


# What is refused, and what a kill leaves.


def refusal(config, base):
  with pytest.raises((DataError, UserError)) as caught:
    first_batches(config, base, [0])
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_features_of_something_else_are_refused(cached, data, tmp_path, monkeypatch):
  """Another base and encoder, other placements and other data, each named; and the command."""
  monkeypatch.setattr("sys.argv", ["train", "--workdir=x", "--config=a b.py", "--config.seed=3"])
  command = "make them: python -m cc_jax.cache '--config=a b.py' --config.seed=3"
  other = dataclasses.replace(
    cached.base, name="/bases/other", hashes={**cached.base.hashes, "vae": "f00d" * 16})
  message = refusal(cached.reading, other)
  for text in ("vae /bases/other (f00df00df00d)", f"not {cached.config.base} (", command):
    assert text in message
  message = refusal(config_of(cached.config.base, data, **{
    "data__cached": True, "data__cache_dir": cached.config.data.cache_dir, "data__placements": 4,
  }), cached.base)  # fmt: skip
  assert "placements 4, not 3" in message
  assert "vae" not in message
  folder = shutil.copytree(data, tmp_path / "subjects")
  Image.new("RGBA", (30, 30), (9, 9, 9, 255)).save(folder / "subject_0" / "0.png")
  config = cached.reading.copy_and_resolve_references()
  config.data.name = str(folder)
  assert f"data {folder} (" in refusal(config, cached.base)
  config.data.cache_dir = str(tmp_path / "none")
  assert "none has no features yet; make them" in refusal(config, cached.base)
  for key, value, text in (
    ("placements", 0, "data.placements=0 places"), ("source", "render", "data.source='render'")
  ):
    config = cached.reading.copy_and_resolve_references()
    config.data[key] = value
    with pytest.raises(DataError, match=text):
      data_pipeline.check_cached(config.data)
    with pytest.raises(DataError, match=text):
      writer.write_features(config, batch_per_chip=4)


def test_a_broken_shard_is_named(cached, tmp_path):
  folder = shutil.copytree(cached.folder, tmp_path / "root" / cached.folder.name)
  config = cached.reading.copy_and_resolve_references()
  config.data.cache_dir = str(folder.parent)
  shard = folder / "00001.safetensors"
  content = shard.read_bytes()
  for spoilt, text in (
    (content[:-7], "is truncated"), (b"x" * len(content), "is broken"), (None, "is missing")
  ):
    shard.unlink() if spoilt is None else shard.write_bytes(spoilt)
    message = refusal_of_some_row(config, cached.base)
    assert f"{shard} {text}" in message
    assert "make it again: python -m cc_jax.cache" in message
  (folder / "manifest.json").write_text("{")
  assert "manifest.json cannot be used" in refusal(config, cached.base)
  (folder / "manifest.json").unlink()
  assert f"{folder} is not complete; finish it: python" in refusal(config, cached.base)


def refusal_of_some_row(config, base):
  with pytest.raises(DataError) as caught:
    first_batches(config, base, range(8))
  return str(caught.value)


def test_a_stopped_run_goes_on_and_writes_the_same_bytes(cached, tmp_path, monkeypatch):
  config = cached.config.copy_and_resolve_references()
  config.data.cache_dir = str(tmp_path)
  write, written = writer.write_shard, []

  def stop(folder, shard, *args):
    if len(written) == 2:
      # As a kill in the middle of a shard leaves it.
      (folder / f".{shard:05d}.safetensors.1.tmp").write_bytes(b"half")
      raise KeyboardInterrupt
    written.append(shard)
    write(folder, shard, *args)

  monkeypatch.setattr(writer, "write_shard", stop)
  with pytest.raises(KeyboardInterrupt):
    writer.write_features(config, batch_per_chip=4)
  folder = tmp_path / cached.folder.name
  assert not (folder / "manifest.json").exists()
  # A shard that is half there all the same, as after a power failure, is made again.
  (folder / "00000.safetensors").write_bytes((folder / "00000.safetensors").read_bytes()[:-9])
  again = []

  def note(folder, shard, *args):
    again.append(shard)
    write(folder, shard, *args)

  monkeypatch.setattr(writer, "write_shard", note)
  assert writer.write_features(config, batch_per_chip=4) == folder
  assert again == [0, 2, 3, 4, 5]
  for file in cached.folder.iterdir():
    assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_a_run_trains_on_stored_features(cached, tmp_path):
  """Two steps of both; the pictures at the end have the encoders."""
  logs, seen = {}, []
  for config in (cached.config, cached.reading):
    config = config.copy_and_resolve_references()
    config.train.steps, config.train.prompt_sensitivity_every = 2, 1
    workdir = tmp_path / str(config.data.cached)
    decoded = loop.Callbacks(on_finish=lambda config, base, model, path: seen.append(
      latents_to_images(model.vae, jax.numpy.ones((1, 8, 8, 4)))))
    loop.train(config, workdir, decoded)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    logs[config.data.cached] = [line for line in lines if "loss" in line or "gap/class" in line]
  assert len(logs[True]) == len(logs[False]) >= 2
  for stored, plain in zip(logs[True], logs[False]):
    assert stored.keys() == plain.keys()
    for key in plain:
      if key.startswith(("loss", "norm", "gap", "diffusion", "cscl", "macl")):
        np.testing.assert_allclose(stored[key], plain[key], rtol=1e-4, atol=1e-7, err_msg=key)
  np.testing.assert_array_equal(*seen)


@pytest.mark.slow
def test_the_command_killed_and_on_two_processes(cached, tiny_folder, data, tmp_path):
  """SIGKILL while shards are written; then two processes of four devices each go on."""
  flags = ["--batch_per_chip=2", "--config.data.placements=3", "--config.data.source=folder"]
  flags += [f"--config.data.name={data}", f"--config.data.cache_dir={tmp_path}"]
  flags += ["--config.data.reference_layout=random", "--config.data.holdout_subjects=1"]
  flags += [f"--config.base={tiny_folder}", "--config.data.image_size=16"]
  flags += ["--config.encoder.image_layers=(1, 2)", "--config.mesh.cpu_devices=4"]
  main = [sys.executable, "-m", "cc_jax.cache", "--config=configs/subjects3d.py", *flags]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  first = subprocess.Popen(main, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
  folder = tmp_path / cached.folder.name
  deadline = time.time() + 200
  while not list(folder.glob("*.safetensors")) and time.time() < deadline:
    time.sleep(0.01)
  first.kill()
  first.wait()
  assert not (folder / "manifest.json").exists()
  kept = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
  assert kept
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = []
  for n in range(2):
    more = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(n)}  # fmt: skip
    processes.append(subprocess.Popen([*main, "--config.mesh.processes=2"], cwd=ROOT,
                                      env=environment | more, stdout=subprocess.PIPE, text=True))
  assert [process.wait(400) for process in processes] == [0, 0]
  assert "is complete" in processes[0].stdout.read()
  assert "complete" not in processes[1].stdout.read()
  assert kept == {file: file.stat().st_mtime_ns for file in kept}
  for file in cached.folder.glob("*.safetensors"):
    found, wanted = (safetensors.numpy.load_file(f / file.name) for f in (folder, cached.folder))
    assert found.keys() == wanted.keys()
    for name in wanted:
      np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
