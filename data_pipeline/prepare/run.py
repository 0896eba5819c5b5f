"""The way of a preparation: parts, selection, shards; and how it goes on after it was killed."""

import contextlib
import functools
import hashlib
import io
import json
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from absl import logging
from etils import epath
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import beam_jobs, parts, selection, shards
from data_pipeline.prepare.frames import BAD
from data_pipeline.prepare.settings import Settings
from data_pipeline.segment import Segmenter
from data_pipeline.sources import listing

_VERSION = 1  # of what a preparation makes of a manifest and settings


def prepare(
  manifest: Manifest, settings: Settings, out: str, *, workers: int = 0,
  options: Sequence[str] = (),
) -> epath.Path:
  """Writes the data set OUT/NAME/1.0.0 and returns its folder.

  It appears there complete or not at all. Until then the work lies in OUT/NAME/incomplete.1.0.0;
  the same call goes on from there, another one begins anew. With a runner on other machines OUT
  and the pictures must be where they see them, such as in a bucket.

  Args:
    manifest: the frames; `masks` and captions that it lacks are made.
    settings: see there.
    out: the TFDS data folder, `data.data_dir` of the training.
    workers: processes on this machine; 0 = one for every core.
    options: Beam's pipeline options, of which --runner=... leads to other machines.

  Raises DataError: see `selection.check_bad`, `Settings.check`; frames without mask and no
  segmenter; a data set of that name that was made otherwise; a folder that cannot be written.
  """
  settings.check()
  beam_jobs.check_options(options)
  if settings.file_format == "array_record" and not listing.is_local(listing.data_path(out, "")):
    raise DataError(f"--file_format=array_record: {out} is no local folder, and such files are "
                    "written and read on local disks only; use tfrecord")
  plan = _plan(manifest, settings)
  root = listing.data_path(out, "--out")  # absolute, for workers elsewhere
  home = (root.resolve() if listing.is_local(root) else root) / settings.name
  final = home / shards.VERSION
  work = parts.open_work(str(home / f"incomplete.{shards.VERSION}"), plan["fingerprint"])
  try:
    if final.exists():
      _check_same(final, plan)
    else:
      _begin(manifest, work, plan)
      _make_all(manifest, settings, work, plan, workers, options)
      work.shards().rename(final)
    folder = epath.Path(work.folder)
    if folder.exists():
      folder.rmtree()
  except OSError as error:
    raise DataError(f"cannot write to {home} ({error.strerror or error}); what is done is kept "
                    "there, and the same command goes on") from error
  return final


def _plan(manifest: Manifest, settings: Settings) -> dict:
  """What is to be done, as JSON; raises DataError where it cannot be."""
  names = manifest.subjects["name"].to_pylist()
  if not manifest.frames.num_rows:
    raise DataError(f"{manifest.where} has no frames; nothing to prepare")
  twice = len(names) - len(set(names))
  if twice:
    raise DataError(f"{manifest.where}: {twice} names of subjects occur twice; give each its own")
  if not all(noun.strip() for noun in manifest.subjects["noun"].to_pylist()):
    raise DataError(f"{manifest.where} has a subject without a class noun; give it to all")
  bare = manifest.frames["mask_kind"].to_pylist().count("none")
  if bare and not settings.segmenter:
    raise DataError(f"{bare} of {manifest.frames.num_rows} frames of {manifest.where} have no "
                    "mask; name a network that finds subjects with --segmenter=FILE.onnx, or give "
                    "them masks")
  network = Segmenter(settings.segmenter).fingerprint() if settings.segmenter else ""
  values = dict(vars(settings))
  # What a higher share would let pass need not be prepared again.
  decisive = {key: value for key, value in values.items() if key != "max_bad_share"}
  parts_of = [_VERSION, manifest.fingerprint(), manifest.root, network, sorted(decisive.items())]
  digest = hashlib.sha256(json.dumps(parts_of).encode()).hexdigest()
  return dict(fingerprint=digest, settings=values, segmenter=network)


def _check_same(final: epath.Path, plan: dict) -> None:
  try:
    made_by = json.loads((final / "manifest.json").read_text())["fingerprint"]
  except (OSError, ValueError, KeyError):
    made_by = ""
  if made_by != plan["fingerprint"]:
    raise DataError(f"{final} is there, made of other data or settings; choose another --name, or "
                    "delete it")
  logging.info("%s is complete", final)


def _begin(manifest: Manifest, work: parts.Work, plan: dict) -> None:
  """Makes the work's folder, unless an earlier run has left the same work there."""
  folder = epath.Path(work.folder)
  file = folder / "plan.json"
  if file.exists():
    if json.loads(file.read_text())["fingerprint"] == work.fingerprint:
      return
    logging.warning("%s is of other data or settings, and is begun anew", folder)
  if folder.exists():
    folder.rmtree()
  for inside in (folder / "parts", work.shards()):
    inside.mkdir(parents=True)
  manifest.write(folder / "manifest")
  parts.write_whole(file, json.dumps(plan).encode())


def _make_all(manifest, settings, work: parts.Work, plan: dict, workers, options) -> None:
  """Fills the work's folder of shards."""
  count = len(work.groups)
  frames = np.add.reduceat(manifest.subjects["count"].to_numpy(),
                           [group.start for group in work.groups])
  missing = sorted({*range(count)} - work.complete())
  with _progress(work, frames):
    _on_workers(parts.make_part, work, missing, workers, options)
  report = pa.concat_tables(parts.read_report(work, n) for n in range(count))
  chosen = selection.select(manifest, report, settings.copy_bits)
  try:
    selection.check_bad(chosen, settings.max_bad_share)
  except DataError:
    _forget_bad(work, count)
    raise
  keep = epath.Path(work.folder) / "keep.npy"
  parts.write_whole(keep, _npy(chosen.keep))
  kept = [_subjects_kept(work, group, chosen.keep) for group in work.groups]
  full = [n for n in range(count) if kept[n]]
  tasks = [(part, number, len(full)) for number, part in enumerate(full)]
  _on_workers(shards.write_shard, work, tasks, workers, options)
  notes = dict(
    name=settings.name, version=shards.VERSION, where=manifest.where, layout=manifest.layout,
    fingerprint=plan["fingerprint"], segmenter=plan["segmenter"],
    settings=vars(settings), counts=chosen.counts,
    left_out_by_the_reader=[vars(item) for item in manifest.left_out], left_out=chosen.left_out)
  shards.write_metadata(work, [kept[n] for n in full], notes, chosen)


def _on_workers(task, work: parts.Work, items: Sequence, workers: int, options) -> None:
  """task(work's folder, its fingerprint, item) for all items; DataError: what one of them said."""
  work.failure.unlink(missing_ok=True)
  beam_jobs.run(functools.partial(parts.guarded, task, work.folder, work.fingerprint), items,
                workers=workers, options=options)
  parts.raise_failure(work)


def _subjects_kept(work: parts.Work, group: range, keep: np.ndarray) -> int:
  subjects = work.manifest.subjects.slice(group.start, len(group))
  rows = zip(subjects["first"].to_pylist(), subjects["count"].to_pylist())
  return sum(bool(keep[first : first + count].any()) for first, count in rows)


def _forget_bad(work: parts.Work, count: int) -> None:
  """Deletes the parts with bad frames: when somebody has mended them they are read again."""
  for number in range(count):
    if set(parts.read_report(work, number)["kind"].to_pylist()) & set(BAD):
      for kind in ("report", "frames"):
        work.part(number, kind).unlink(missing_ok=True)


def _npy(array: np.ndarray) -> bytes:
  header_and_values = io.BytesIO()
  np.save(header_and_values, array)
  return header_and_values.getvalue()


@contextlib.contextmanager
def _progress(work: parts.Work, frames: np.ndarray) -> Iterator[None]:
  """A bar of frames, by the parts that are there: workers may be on other machines."""
  stop, total = threading.Event(), int(frames.sum())
  pause = 1 if listing.is_local(epath.Path(work.folder)) else 15

  def done() -> int:
    return int(frames[sorted(work.complete())].sum())

  def watch() -> None:
    while not stop.wait(pause):
      with contextlib.suppress(OSError):
        bar.update(done() - bar.n)

  with tqdm(total=total, initial=done(), desc="preparing", unit="frame", disable=None) as bar:
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
      yield
    finally:
      stop.set()
      thread.join()
    bar.update(done() - bar.n)
