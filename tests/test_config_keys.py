"""Every key of every config is read: recorded where a run is quick, else found in the code."""

import ast
import functools
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import data_pipeline
import data_pipeline.sources
import data_pipeline.subjects3d
from cc_jax import evaluate
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.errors import UserError
from cc_jax.lab import trial_scores
from cc_jax.training import config_checks, loop, setup, step
from data_pipeline.errors import DataError
from data_pipeline.feature_cache import Networks

ROOT = Path(__file__).parent.parent
# Methods that copy or compare a config read all of its keys for nothing.
COPYING = ("items", "values", "to_dict", "copy_and_resolve_references", "update", "__eq__")


class Reads:
  """Notes the dotted paths of keys that are read: not those that are only copied or checked."""

  def __init__(self, monkeypatch):
    self.paths, self._copying = set(), 0
    original = ConfigDict.__getitem__

    def getitem(section, key):
      value = original(section, key)
      path = (section.__dict__.get("path_of_section", "") + f".{key}").lstrip(".")
      if isinstance(value, ConfigDict):
        object.__setattr__(value, "path_of_section", path)
      elif not self._copying and not self._checking():
        self.paths.add(path)
      return value

    def copying(method):
      @functools.wraps(method)
      def wrapped(*args, **kwargs):
        self._copying += 1
        try:
          return method(*args, **kwargs)
        finally:
          self._copying -= 1

      return wrapped

    monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
    for name in COPYING:
      monkeypatch.setattr(ConfigDict, name, copying(getattr(ConfigDict, name)))
    frozen = ml_collections.FrozenConfigDict
    monkeypatch.setattr(frozen, "__init__", copying(frozen.__init__))
    # These two sections are read whole, into dataclasses: their attributes count.
    for name, cls in (("encoder", MFIEncoderConfig), ("injection", InjectionConfig)):
      monkeypatch.setattr(cls, "__getattribute__", self._attribute_of(name, cls))

  def _attribute_of(self, section, cls):
    def getattribute(instance, key):
      caller = sys._getframe(1)
      generic = caller.f_globals["__name__"] == "dataclasses" or caller.f_code.co_name in (
        "from_config", "__eq__", "__hash__", "__repr__")
      if key in cls.__dataclass_fields__ and not generic:
        self.paths.add(f"{section}.{key}")
      return object.__getattribute__(instance, key)

    return getattribute

  def _checking(self):
    """Whether a check reads the key, as an attribute or an item."""
    frame = sys._getframe(2)
    return config_checks.__name__ in (
      frame.f_globals["__name__"], frame.f_back.f_globals["__name__"])


def keys_of(config, prefix=""):
  """Dotted paths of all values."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from keys_of(value, f"{prefix}{key}.")
    else:
      yield prefix + key


def unread_by_training(config, workdir, monkeypatch):
  """Keys that nothing reads in a run of two steps with all its pictures and scores.

  Nothing large is compiled: the step is traced and not run, its metrics say that it was skipped.
  Pictures are not drawn either. What stays is every place at which a key is read.
  """
  keys = set(keys_of(config))

  def compile_step(run, batch, seed, profile):
    step_fn = step.make_train_step(run.context, run.mesh, run.state, run.frozen)
    _, metrics = jax.eval_shape(step_fn, run.state, run.frozen, batch, seed)
    metrics = {key: jnp.zeros(x.shape, x.dtype) for key, x in metrics.items()}
    metrics["bad_steps"] = jnp.ones((), jnp.int32)
    return lambda state, frozen, batch, seed: (state, metrics)

  class Sampler:
    is_subject_model = True

    def __init__(self, *_, **__):
      pass

    def noise(self, seeds):
      return np.zeros(len(seeds))

    def __call__(self, *_, noise, **__):
      return np.zeros((len(noise), tiny.IMAGE, tiny.IMAGE, 3), np.uint8), None

  real_loader = data_pipeline.make_loader

  def make_loader(data_config, tokenizer, *, batch_size, start_step=0, **options):
    """The real one, which reads the config; but batches whose captions the tiny tokenizer knows."""
    real_loader(data_config, tokenizer, batch_size=batch_size, start_step=start_step, **options)
    return tiny.batches(tokenizer, batch_size, start=start_step)

  monkeypatch.setattr(data_pipeline, "make_loader", make_loader)
  monkeypatch.setattr(trial_scores, "encode_with_negative", lambda *_, **__: (None, None))
  monkeypatch.setattr(loop, "compile_step", compile_step)
  monkeypatch.setattr(setup, "make_prompt_sensitivity", lambda *_: lambda *_: {"gap/class": 0.0})
  monkeypatch.setattr(evaluate, "ImageSampler", Sampler)
  monkeypatch.setattr(trial_scores, "score_images", lambda *_: {})
  monkeypatch.setattr(trial_scores.judging, "load_judge", lambda *_: (None, None))
  reads = Reads(monkeypatch)
  callbacks = loop.Callbacks(evaluate.draw_validation_grid, evaluate.score_test_subjects)
  loop.train(config, workdir, callbacks)
  # The other source's keys, without tensorflow, and those of stored features.
  subjects = SimpleNamespace(
    where="", names=["a", "b"], table=SimpleNamespace(family_id=np.arange(2)), pictures=4,
    features_folder=workdir / "features", fingerprint=lambda: "")
  modules = (data_pipeline.subjects3d, "builder"), (data_pipeline.sources, "tfds_source")
  for package, name in modules:
    stub = SimpleNamespace(
      build=lambda *_: None, SubjectRecords=lambda *_: subjects, check_holdout=lambda *_: 0)
    monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", stub)
    monkeypatch.setattr(package, name, stub, raising=False)
  config.data.update(source="tfds", cached=True, placements=1)
  tokenizer = load_tokenizer(Path(config.base) / "tokenizer")
  with pytest.raises(DataError, match="no features yet"):
    real_loader(config.data, tokenizer, batch_size=4, seed=0, networks=Networks({}, {}, ""))
  config.data.update(source="captures", name=str(workdir / "nowhere"), cached=False)
  with pytest.raises(DataError, match="is not a folder"):
    real_loader(config.data, tokenizer, batch_size=4, seed=0)
  return sorted(keys - reads.paths)


SECTIONS = ("", "data", "objective", "train", "mesh", "sample")
INVENTED = [f"{section}.shape".lstrip(".") for section in SECTIONS]


def main_config(folder, sections):
  """The tiny config with a key `shape` in some sections: nothing reads it."""
  changes = dict(steps=2, save_every=1, sample_every=1, prompt_sensitivity_every=1, max_bad_steps=2)
  config = tiny.tiny_config(folder, **{f"train__{k}": v for k, v in changes.items()})
  config.data.source = "render"
  config.sample.subjects = 2
  for section in sections:
    (config[section] if section else config).shape = 3
  return config


@pytest.fixture(scope="module")
def unread(tiny_folder, tmp_path_factory, quick_compile):
  config = main_config(tiny_folder, SECTIONS)
  with pytest.MonkeyPatch.context() as monkeypatch:
    for key in INVENTED:  # or the run would refuse them
      monkeypatch.setitem(config_checks.RULES, key, config_checks.whole())
    return unread_by_training(config, tmp_path_factory.mktemp("run"), monkeypatch)


def test_every_config_key_is_read(unread):
  assert [key for key in unread if key not in INVENTED] == []


@pytest.mark.parametrize("key", INVENTED)
def test_a_key_that_nothing_reads_is_reported(unread, key):
  assert key in unread


@pytest.mark.parametrize("section", ["encoder", "injection"])
def test_an_unknown_key_of_the_adapter_is_refused(tiny_folder, section):
  with pytest.raises(UserError, match="shape"):
    setup.adapter_configs(main_config(tiny_folder, [section]))


# The laboratory and pretraining train networks for minutes, too long for a recording. Their keys
# must be attributes, or strings in brackets, of something that has the name of a section.
OWNERS = {
  "lab": ("config", "own", "c", "score", "run"),
  "pretrain": ("config", "c", "world", "tokenizer", "train", "settings", "clip", "unet", "judge"),
}


def reads_in_code(package):
  """Names that the code of cc_jax/<package> reads as attributes or items of a config's section."""
  names = set()
  files = [*(ROOT / "cc_jax" / package).glob("*.py"), *(ROOT / "cc_jax").glob("evaluate.py")]
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, (ast.Attribute, ast.Subscript)):
        owner = getattr(node.value, "attr", getattr(node.value, "id", None))
        key = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
        if owner in OWNERS[package]:
          names.add(key)
  return names


def unread_in_code(config, package):
  names = reads_in_code(package)
  # config.json of a network or a scheduler, which their own classes check.
  whole = ("model", "scheduler", "text", "vision")
  return [
    key for key in keys_of(config)
    if not key.startswith("run.") and not set(key.split(".")[:-1]) & set(whole)
    and key.split(".")[0] != "mesh" and key.split(".")[-1] not in names
  ]


@pytest.mark.parametrize(
  ("name", "package"),
  [("lab", "lab"), ("subjects3d_base", "pretrain"), ("subjects3d_judge", "pretrain")],
)
def test_every_key_of_the_other_configs_is_in_the_code(name, package):
  config = importlib.import_module(f"configs.{name}").get_config()
  assert unread_in_code(config, package) == []
  section = config.score if name == "lab" else config.world
  section.shape = 3
  config.shape = 4
  prefix = "score" if name == "lab" else "world"
  assert sorted(unread_in_code(config, package)) == sorted(["shape", f"{prefix}.shape"])
