"""The data set that comes out: TFDS shards and their metadata."""

import csv
import io
import json
from collections.abc import Iterator

import numpy as np
from absl import logging
from etils import epath

from data_pipeline.manifest import Manifest
from data_pipeline.prepare.parts import Work, open_work, read_frames, temporary_name
from data_pipeline.prepare.selection import Selection
from data_pipeline.prepare.settings import Settings
from data_pipeline.prepare.sheet import contact_sheet
from data_pipeline.sources import tf_data

VERSION = "1.0.0"
SPLIT = "train"


def features(encoding: str):
  """What an example, a subject, has; `data_pipeline.sources.tfds_source` reads it."""
  f = tf_data.import_tfds().features
  pixels = lambda n: f.Sequence(f.Tensor(shape=(n,), dtype=np.int32))  # noqa: E731
  return f.FeaturesDict({
    "frames": f.Sequence(f.Image(shape=(None, None, 3), encoding_format=encoding)),
    "masks": f.Sequence(f.Image(shape=(None, None, 1), encoding_format="png")),
    "captions": f.Sequence(f.Sequence(f.Text())),
    "class_noun": f.Text(),
    "subject_id": f.Text(),
    "family_id": f.Scalar(np.int64),  # -1 = none is known
    "class_id": f.Scalar(np.int64),
    "is_reference": f.Sequence(f.Scalar(np.bool_)),
    "licence": f.Text(),
    "creator": f.Text(),
    "source": f.Sequence(f.Text()),  # the file that the frame was
    "original_size": pixels(2),  # height, width of the upright picture
    "crop": pixels(4),  # x0, y0, x1, y1 of it
    "bucket": pixels(2),  # height, width
  })  # fmt: skip


def shard_name(settings: Settings, number: int, count: int) -> str:
  """The name of a shard, as TFDS forms it."""
  return f"{settings.name}-{SPLIT}.{settings.file_format}-{number:05d}-of-{count:05d}"


def write_shard(folder: str, fingerprint: str, task: tuple[int, int, int]) -> None:
  """Writes shard `number` of `count` from what was kept of a part, unless it is there.

  `task`: (part, number, count).
  """
  part, number, count = task
  work = open_work(folder, fingerprint)
  path = work.shards() / shard_name(work.settings, number, count)
  if path.exists():
    return
  temporary = temporary_name(path)
  writer = _open_writer(temporary, work.settings.file_format)
  serialize = _serializer(work.settings.encoding)
  for example in _examples(work, part):
    writer.write(serialize(example))
  writer.close()
  temporary.replace(path)


def _open_writer(path: epath.Path, file_format: str):
  if file_format == "array_record":
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")  # one record is read, not its neighbours
  return tf_data.import_tensorflow().io.TFRecordWriter(str(path))


def _serializer(encoding: str):
  """TFDS' own serialization, with the features in one order.

  TFDS 4.9.10 leaves the order to protobuf's hash table, which is another in every process.
  """
  description = features(encoding)
  parse = tf_data.import_tensorflow().train.Example.FromString

  def serialize(example: dict) -> bytes:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # of lists of lists TFDS warns itself of itself
    try:
      data = description.serialize_example(description.encode_example(example))
    finally:
      logging.set_verbosity(verbosity)
    return parse(data).SerializeToString(deterministic=True)

  return serialize


def _examples(work: Work, part: int) -> Iterator[dict]:
  """The subjects of a part of which something was kept."""
  manifest, table = work.manifest, work.table
  keep = np.load(io.BytesIO((epath.Path(work.folder) / "keep.npy").read_bytes()))
  kept = (frame for frame in read_frames(work, part) if keep[frame["row"]])
  frame = next(kept, None)
  for subject in work.groups[part]:
    row = {key: manifest.subjects[key][subject].as_py() for key in manifest.subjects.column_names}
    own = []
    while frame is not None and frame["row"] < row["first"] + row["count"]:
      own.append(frame)
      frame = next(kept, None)
    if not own:
      continue
    of_frames = lambda key: [  # noqa: E731
      manifest.frames[key][frame["row"]].as_py() for frame in own]  # noqa: B023
    yield {
      "frames": [io.BytesIO(frame["picture"]) for frame in own],  # TFDS stores them unchanged
      "masks": [io.BytesIO(frame["mask"]) for frame in own],
      "captions": [frame["captions"] for frame in own],
      "class_noun": row["noun"],
      "subject_id": row["name"],
      "family_id": int(table.family_id[subject]),
      "class_id": int(table.class_id[subject]),
      "is_reference": of_frames("is_reference"),
      "licence": row["licence"],
      "creator": row["creator"],
      "source": of_frames("picture"),
      "original_size": np.array([frame["size"] for frame in own], np.int32),
      "crop": np.array([frame["crop"] for frame in own], np.int32),
      "bucket": np.array([frame["bucket"] for frame in own], np.int32),
    }


def write_metadata(work: Work, lengths: list[int], notes: dict, selection: Selection) -> None:
  """What stands beside the shards: TFDS' files, manifest.json, credits, a contact sheet.

  `lengths`: subjects of each shard.
  """
  tfds = tf_data.import_tfds()
  folder, settings = work.shards(), work.settings
  files = [folder / shard_name(settings, n, len(lengths)) for n in range(len(lengths))]
  split = tfds.core.SplitInfo(
    name=SPLIT, shard_lengths=lengths, num_bytes=sum(file.stat().length for file in files))
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder), features=features(settings.encoding), split_infos=[split],
    version=VERSION, check_data=False, description=f"Prepared by cc_jax from {notes['where']}.")
  (folder / "contact_sheet.jpg").write_bytes(contact_sheet(work, selection.keep))
  (folder / "credits.csv").write_text(_credits(work.manifest, selection.keep))
  (folder / "manifest.json").write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n")


def _credits(manifest: Manifest, keep: np.ndarray) -> str:
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(("subject", "licence", "creator"))
  for subject in manifest.subjects.to_pylist():
    if keep[subject["first"] : subject["first"] + subject["count"]].any():
      writer.writerow((subject["name"], subject["licence"], subject["creator"]))
  return out.getvalue()
