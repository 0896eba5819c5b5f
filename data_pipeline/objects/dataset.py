"""The pictures as a TFDS data set, written shard by shard, so that a killed run goes on.

    OUT/objects/1.0.0/objects-train.tfrecord-00000-of-00036, -validation, -test
                      features.json, dataset_info.json     what tfds.builder('objects') reads
                      CREDITS.csv                          each subject's name, creator and licence
                      left_out.csv                         what is not in the data, and why
                      recipe.json                          the arguments

An example is a subject: `frames`, `masks`, `captions`, `class_noun`, `subject_id` as
sources/tfds_source.py wants them (subjects with one noun form a class: data.group='class'), and
`name`, `licence`, `creator`, `scene` and the cameras of its views, see `scene.Camera`.

The layout is TFDS' own for records that others write: "Load external tfrecord with TFDS",
tensorflow.org/datasets/external_tfrecord.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.objects import worker
from data_pipeline.objects.catalogue import LeftOut, Model, find_models
from data_pipeline.sources.tf_data import import_tensorflow, import_tfds

VERSION = "1.0.0"  # of the pictures: the same arguments give the same bytes within a version
NAME = "objects"
SHARD = 16  # subjects; a killed run loses what it has of one
_OF_TEN = ("validation", "test")  # splits with one tenth of the individuals each


def split_of(key: str) -> str:
  """'train', 'validation' or 'test': by the model's key alone, whatever other models there are."""
  tenth = sampling.name_hash(key) % 10
  return _OF_TEN[tenth] if tenth < len(_OF_TEN) else "train"


def build(
  place: str, out: str, *, views: int = 24, size: int = 128, seed: int = 0, licences: str = "any",
  workers: int = 1, max_bad_share: float = 0.1, progress: bool = True,
) -> Path:
  """Renders all models of `place` into OUT/objects/VERSION, and returns that folder.

  A run that was killed goes on where it stopped; with equal arguments the result has equal bytes.

  Args:
    views: pictures of each model, at least 2; `size` is their side in pixels.
    licences: 'any' | 'cc0' | 'cc-by', see `find_models`.
    workers: rendering processes.
    max_bad_share: share of models that may be broken or empty before it is an error.

  Raises:
    DataError: arguments or models that cannot be used, another data set in `out`.
  """
  worker.check_drawing(size, seed, views, workers)
  max_bad_share = sampling.check_bad_share(max_bad_share)
  models, left_out = find_models(place, licences)
  if not models:
    raise DataError(f"--licences={licences} leaves none of the {len(left_out)} models of {place}")
  recipe = dict(version=VERSION, views=views, size=size, seed=seed, licences=licences,
                models=len(models), digest=_digest(models))
  final = Path(out).expanduser() / NAME / VERSION
  if final.exists():
    _check_recipe(final, recipe)
    return final
  work = final.parent / f"incomplete.{VERSION}"
  try:
    work.mkdir(parents=True, exist_ok=True)
    with _lock(work):
      if (work / "recipe.json").exists():
        _check_recipe(work, recipe)
      else:
        _write(work / "recipe.json", json.dumps(recipe, indent=1))
      _render_missing(work, models, recipe, workers, max_bad_share, progress)
      _finish(work, final, models, left_out, recipe)
  except OSError as error:
    raise DataError(f"cannot write into {out} ({error.strerror or error}); set --out") from None
  return final


def _digest(models: Sequence[Model]) -> str:
  """Of what the pictures depend on, but for the content of the files: their sizes stand for it."""
  lines = []
  for model in models:
    row = (model.key, model.noun, model.licence, model.creator, model.rotation, model.extent)
    lines.append(f"{row} {os.path.getsize(model.path)}\n")
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_recipe(folder: Path, recipe: dict) -> None:
  try:
    stored = json.loads((folder / "recipe.json").read_text())
  except (OSError, ValueError):
    raise DataError(f"{folder} has no recipe.json; choose another --out, or delete it") from None
  changed = [key for key in recipe if stored.get(key) != recipe[key]]
  if changed:
    words = ", ".join(f"{key} {stored.get(key)} instead of {recipe[key]}" for key in changed[:3])
    raise DataError(f"{folder} was made with other arguments ({words}); choose another --out, or "
                    "delete it")


def _shards(models: Sequence[Model]) -> list[tuple[str, list[Model]]]:
  """(name, models) of each: of a split, in the order of hashes, so that classes are mixed."""
  shards = []
  for split in ("train", *_OF_TEN):
    members = [model for model in models if split_of(model.key) == split]
    members.sort(key=lambda model: (sampling.name_hash(model.key), model.key))
    for k in range(0, len(members), SHARD):
      shards.append((f"{split}-{k // SHARD:05d}", members[k : k + SHARD]))
  return shards


def _render_missing(work: Path, models, recipe, workers, max_bad_share, progress) -> None:
  shards = _shards(models)
  missing = [(name, members) for name, members in shards if not (work / f"{name}.json").exists()]
  bad = [entry for name, _ in shards if (work / f"{name}.json").exists()
         for entry in json.loads((work / f"{name}.json").read_text())["left_out"]]
  todo = sum(len(members) for _, members in missing)
  views = recipe["views"]
  rendered = worker.render_models(
    (model for _, members in missing for model in members), workers, views=views,
    size=recipe["size"], seed=recipe["seed"],
  )
  features = _features(views, recipe["size"])
  bar = tqdm(total=len(models) * views, initial=(len(models) - todo) * views, desc="rendering",
             unit=" views", disable=not progress)
  with contextlib.closing(rendered), bar:
    for name, members in missing:
      results = []
      for _ in members:
        results.append(next(rendered))
        bar.update(views)
        if results[-1].reason:
          bad.append([results[-1].model.key, results[-1].reason])
          bar.write(f"left out: {': '.join(bad[-1])}")
          _check_bad(bad, max_bad_share, len(models))
      _write_shard(work, name, results, features)


def _check_bad(bad: list, max_bad_share: float, count: int) -> None:
  if len(bad) > max_bad_share * count:
    listed = "; ".join(f"{key} {reason}" for key, reason in bad[:10])
    raise DataError(f"{len(bad)} of {count} models cannot be used, more than --max_bad_share="
                    f"{max_bad_share}: {listed}")


def _write_shard(work: Path, name: str, results: list[worker.Rendered], features) -> None:
  """The records, and then what is in them: where that file exists, the shard is complete."""
  tf = import_tensorflow()
  good = [result for result in results if not result.reason]
  temporary = work / f"{name}.tmp"
  with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
    for result in good:
      writer.write(_serialized(result, features))
  temporary.replace(work / f"{name}.tfrecord")
  _write(work / f"{name}.json", json.dumps(dict(
    subjects=[result.model.key for result in good],
    left_out=[[result.model.key, result.reason] for result in results if result.reason],
  )))  # fmt: skip


def _features(views: int, size: int):
  tfds = import_tfds()
  import numpy as np

  f = tfds.features
  return f.FeaturesDict({
    "frames": f.Sequence(f.Image(shape=(size, size, 3), encoding_format="png")),
    "masks": f.Sequence(f.Image(shape=(size, size, 1), encoding_format="png")),
    "captions": f.Sequence(f.Text()),
    **{key: f.Text() for key in ("class_noun", "subject_id", "name", "licence", "creator")},
    "scene": f.Sequence(f.Text()),
    "world_to_camera": f.Tensor(shape=(views, 3, 4), dtype=np.float32),
    "intrinsics": f.Tensor(shape=(views, 3, 3), dtype=np.float32),
    "azimuth": f.Tensor(shape=(views,), dtype=np.float32),
    "elevation": f.Tensor(shape=(views,), dtype=np.float32),
  })  # fmt: skip


def _serialized(result: worker.Rendered, features) -> bytes:
  from tensorflow_datasets.core.example_serializer import ExampleSerializer

  model = result.model
  example = features.encode_example({
    "frames": [io.BytesIO(data) for data in result.frames],
    "masks": [io.BytesIO(data) for data in result.masks],
    "captions": list(result.captions), "scene": list(result.scenes),
    "class_noun": model.noun, "subject_id": model.key, "name": model.name,
    "licence": model.licence, "creator": model.creator, **result.pose,
  })  # fmt: skip
  proto = ExampleSerializer(features.get_serialized_info()).get_tf_example(example)
  # The features are a map, whose order in the bytes is otherwise another in each process.
  return proto.SerializeToString(deterministic=True)


def _finish(work: Path, final: Path, models, left_out: list[LeftOut], recipe: dict) -> None:
  """Puts the shards under TFDS' names, with metadata and credits; the last rename is atomic."""
  tfds = import_tfds()
  done = work / "data"
  shutil.rmtree(done, ignore_errors=True)
  done.mkdir()
  left_out, subjects, infos = list(left_out), [], []
  for split in ("train", *_OF_TEN):
    files, lengths = [], []
    for name, _ in _shards(models):
      if name.startswith(f"{split}-"):
        what = json.loads((work / f"{name}.json").read_text())
        left_out += [LeftOut(*entry) for entry in what["left_out"]]
        subjects += [(key, split) for key in what["subjects"]]
        if what["subjects"]:
          files.append(work / f"{name}.tfrecord")
          lengths.append(len(what["subjects"]))
    for n, file in enumerate(files):  # links: a run that is killed here has its shards still
      os.link(file, done / f"{NAME}-{split}.tfrecord-{n:05d}-of-{len(files):05d}")
    if files:
      template = tfds.core.ShardedFileTemplate(
        data_dir=done, dataset_name=NAME, split=split, filetype_suffix="tfrecord"
      )
      infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=sum(file.stat().st_size for file in files),
        filename_template=template,
      ))  # fmt: skip
  if not subjects:
    raise DataError("no model could be rendered: " + "; ".join(
      f"{entry.key} {entry.reason}" for entry in left_out[:10]))
  _write_tables(done, models, subjects, left_out)
  _write(done / "recipe.json", json.dumps(recipe, indent=1))
  tfds.folder_dataset.write_metadata(
    data_dir=done, features=_features(recipe["views"], recipe["size"]), split_infos=infos,
    version=VERSION, check_data=False,
    description="3D models in several views; creators and licences: CREDITS.csv.",
  )
  done.replace(final)
  shutil.rmtree(work, ignore_errors=True)


def _write_tables(folder: Path, models, subjects, left_out) -> None:
  by_key = {model.key: model for model in models}
  rows = [("subject", "split", "noun", "name", "creator", "licence")]
  for key, split in sorted(subjects):
    model = by_key[key]
    rows.append((key, split, model.noun, model.name, model.creator, model.licence))
  for name, table in (
    ("CREDITS.csv", rows),
    ("left_out.csv", [("model", "reason"), *sorted((e.key, e.reason) for e in left_out)]),
  ):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
      csv.writer(file, lineterminator="\n").writerows(table)


def summary(folder: Path) -> str:
  """What is in a data set, in a few lines."""
  with (folder / "CREDITS.csv").open(newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  with (folder / "left_out.csv").open(newline="", encoding="utf-8") as file:
    reasons = Counter(row["reason"].split(":")[0] for row in csv.DictReader(file))
  splits, nouns = (Counter(row[key] for row in rows) for key in ("split", "noun"))
  licences = Counter(row["licence"] or "not stated" for row in rows)
  shared = {noun: count for noun, count in nouns.most_common() if count > 1}
  show = lambda counts: ", ".join(f"{k} {v}" for k, v in counts.most_common(12))  # noqa: E731
  return "\n".join((
    f"{len(rows)} subjects ({show(splits)}); licences: {show(licences)}",
    f"{len(nouns)} class nouns; {sum(shared.values())} subjects share theirs with others: "
    f"{show(Counter(shared))}",
    f"left out: {sum(reasons.values())}" + (f" ({show(reasons)})" if reasons else ""),
  ))  # fmt: skip


def _write(file: Path, text: str) -> None:
  temporary = file.with_name(f".{file.name}.tmp")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(file)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
  """One run at a time; a killed one holds no lock."""
  try:
    import fcntl
  except ImportError:  # Windows: there the user must not start two at the same time
    yield
    return
  with (folder / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise DataError(f"another run writes into {folder}; wait for it, or choose another --out"
                      ) from None
    yield
