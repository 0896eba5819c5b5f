"""subjects3d as a TFDS data set, rendered on first use.

    python -m data_pipeline.subjects3d --config=small
    tfds build data_pipeline/subjects3d/builder.py --config small   # where the tfds command works

or neither: `data.source='tfds'` with `data.name='subjects3d/small'` writes it on first use. The
metadata of the data set has a checksum of the factors of every split, which `verify` compares.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.sources.listing import data_path, is_local
from data_pipeline.sources.tf_data import import_tfds
from data_pipeline.sources.tfds_source import SubjectRecord, SubjectRecords
from data_pipeline.subjects3d import factors as factors_lib
from data_pipeline.subjects3d import multi_view
from data_pipeline.subjects3d.bulk import render_many
from data_pipeline.subjects3d.factors import CLASSES, SPLITS, Factors, concatenate

tfds = import_tfds()

_OF_SUBJECT = factors_lib.Subjects._fields  # one number per subject; the others, one per frame
# tf.Example has int64 and float32 only; uint32 is stored as int64.
_TYPES = {"background_seed": np.int64}


class Subjects3d(tfds.core.GeneratorBasedBuilder):
  """Subjects of a rendered world in several views, with masks, captions and all factors."""

  name = "subjects3d"
  # TFDS 4.9.10 would find it with importlib_resources, which is not among its dependencies.
  code_path = epath.Path(__file__)
  VERSION = tfds.core.Version(factors_lib.VERSION)
  RELEASE_NOTES = {"1.1.0": "Patterns cover a third of the main part.", "1.0.0": "First version."}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name, description=f"(subjects, frames of each): {sizes}")
    for name, sizes in multi_view.CONFIGS.items()
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    f, size = tfds.features, multi_view.RESOLUTION
    columns = {}
    for key, column in _example_factors().items():
      scalar = f.Scalar(_TYPES.get(key, column.dtype))
      columns[key] = scalar if key in _OF_SUBJECT else f.Sequence(scalar)
    return self.dataset_info_from_configs(
      features=f.FeaturesDict(
        {
          "frames": f.Sequence(f.Image(shape=(size, size, 3), encoding_format="png")),
          "masks": f.Sequence(f.Image(shape=(size, size, 1), encoding_format="png")),
          "captions": f.Sequence(f.Text()),
          "class_noun": f.Text(),
          "subject_id": f.Scalar(np.int32),
          "family_id": f.Scalar(np.int32),
          "class_id": f.Scalar(np.int32),
          "is_reference": f.Sequence(f.Scalar(np.bool_)),
          "factors": f.FeaturesDict(columns),
        }
      ),
      metadata=tfds.core.MetadataDict(factors_sha256={}),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    plans = {split: multi_view.plan(self.builder_config.name, split) for split in SPLITS}
    checksums = {split: multi_view.checksum(factors) for split, factors in plans.items()}
    self.info.metadata["factors_sha256"] = checksums
    # All splits at once: each process compiles a program for every class that it renders.
    rendered = render_many(
      concatenate([multi_view.flat(factors) for factors in plans.values()]),
      resolution=multi_view.RESOLUTION,
    )
    splits, start = {}, 0
    for split, factors in plans.items():
      rows = slice(start, start + factors.class_id.size)
      start = rows.stop
      splits[split] = _examples(split, factors, rendered.image[rows], rendered.mask[rows])
    return splits

  def _generate_examples(self):
    raise NotImplementedError("the examples come from _split_generators")


def _examples(
  split: str, factors: Factors, images: np.ndarray, masks: np.ndarray
) -> Iterator[tuple[int, dict]]:
  """Examples of the n subjects of a split; `images`, `masks` [n * f, ...] are its frames."""
  captions = multi_view.write_captions(factors, split)
  references = multi_view.is_reference(factors)
  count, frames = factors.class_id.shape
  with ThreadPoolExecutor() as pool:  # Pillow encodes without the interpreter's lock
    images, masks = list(pool.map(_png, images)), list(pool.map(_png, masks))
  for n in range(count):
    of_subject = slice(n * frames, (n + 1) * frames)
    subject = factors.take(n)
    columns = {
      key: (column[0] if key in _OF_SUBJECT else column).astype(_TYPES.get(key, column.dtype))
      for key, column in subject._asdict().items()
    }
    yield (
      int(columns["subject_id"]),
      {
        # TFDS stores file objects unchanged; arrays it would encode one by one.
        "frames": [io.BytesIO(data) for data in images[of_subject]],
        "masks": [io.BytesIO(data) for data in masks[of_subject]],
        "captions": captions[n],
        "class_noun": CLASSES[columns["class_id"]],
        "is_reference": references[n],
        **{key: columns[key] for key in ("subject_id", "family_id", "class_id")},
        "factors": columns,
      },
    )


def build(name: str, data_dir: str = "") -> Subjects3d:
  """The builder of 'subjects3d/<config>', written first if it is not on disk.

  TFDS writes into a temporary folder and renames it at the end, so that a killed build leaves no
  partial data set; with a lock, only one of several processes writes. Raises DataError for an
  unknown configuration or a folder that cannot be written.
  """
  config = name.split("/")[1].split(":")[0] if "/" in name else "small"
  if config not in multi_view.CONFIGS:
    known = ", ".join(f"subjects3d/{c}" for c in multi_view.CONFIGS)
    raise DataError(f"TFDS knows no data set {name!r}; choose one of {known}")
  root = data_path(data_dir or tfds.core.constants.DATA_DIR, "data.data_dir")
  try:
    root.mkdir(parents=True, exist_ok=True)
    with _quiet_tfds():
      builder = Subjects3d(config=config, data_dir=str(root))
      if not builder.is_prepared():
        with _lock(root / ".subjects3d.lock"):
          builder = Subjects3d(config=config, data_dir=str(root))
          _write(builder)
  except OSError as error:
    raise DataError(
      f"cannot write subjects3d into {root} ({error.strerror or error}); set data.data_dir"
    ) from None
  return builder


def _write(builder: Subjects3d) -> None:
  """Renders and writes, unless another process has done so while this one waited for the lock."""
  if builder.is_prepared():
    return
  print(f"writing {builder.info.full_name} to {builder.data_path} (once)", file=sys.stderr)
  tfds.disable_progress_bar()  # the renderer has one, with the remaining time
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  verify(builder)


@contextlib.contextmanager
def _quiet_tfds():
  """Silences TFDS's warnings that the folder, which it is about to create, does not exist."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def verify(builder: Subjects3d) -> None:
  """Raises DataError unless the factors on disk have the checksums in the metadata."""
  for split in SPLITS:
    stored = builder.info.metadata["factors_sha256"].get(split)
    records = SubjectRecords(builder, split)
    factors = _stack_factors([_read_factors(records[n]) for n in range(len(records))])
    if multi_view.checksum(factors) != stored:
      raise DataError(
        f"the factors of {builder.info.full_name} ({split}) do not have the checksum that was "
        f"written with them; delete {builder.data_path} to build it again"
      )


def read_subjects(
  name: str, split: str, data_dir: str = "", count: int | None = None
) -> multi_view.MultiView:
  """The first `count` subjects of a split, in the order of `multi_view.plan`."""
  builder = build(name, data_dir)
  verify(builder)
  records = SubjectRecords(builder, split)
  row_of = {subject: n for n, subject in enumerate(records.table.subject_id)}  # TFDS shuffles
  subject_ids = multi_view.plan(builder.builder_config.name, split).subject_id[:count, 0]
  chosen = [records[row_of[subject]] for subject in subject_ids]
  frames = [[record.frame(f) for f in range(record.frames)] for record in chosen]
  return multi_view.MultiView(
    frames=np.array([[image for image, _ in row] for row in frames]),
    masks=np.array([[mask for _, mask in row] for row in frames]),
    captions=tuple(tuple(record.texts("captions")) for record in chosen),
    class_noun=tuple(record.texts("class_noun")[0] for record in chosen),
    is_reference=np.array([record.is_reference() for record in chosen]),
    factors=_stack_factors([_read_factors(record) for record in chosen]),
  )


def _example_factors() -> dict[str, np.ndarray]:
  """The factors of a single picture, for the types of the columns."""
  subject = factors_lib.subjects("test").take(slice(1))
  return factors_lib.sample_factors(np.random.default_rng(0), subject)._asdict()


def _read_factors(record: SubjectRecord) -> Factors:
  """Columns [f] of one subject, in the types of `sample_factors`."""
  columns = {}
  for key, column in _example_factors().items():
    values = np.array(record.values(f"factors/{key}")).astype(column.dtype)
    columns[key] = np.repeat(values, record.frames) if key in _OF_SUBJECT else values
  return Factors(**columns)


def _stack_factors(rows: list[Factors]) -> Factors:
  return Factors(*(np.stack(columns) for columns in zip(*rows, strict=True)))


def _png(image: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(image).save(out, "png", compress_level=3)
  return out.getvalue()


@contextlib.contextmanager
def _lock(file: epath.Path):
  """Waits until no other process of this machine builds; a bucket knows no locks."""
  if not is_local(file):
    yield
    return
  try:
    import fcntl
  except ImportError:  # Windows: there the user must not start two builds at the same time
    yield
    return
  descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)
