"""From a data set to its features, shard by shard."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

import data_pipeline
from cc_jax.bases.base import load_base
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.models.params import Params
from cc_jax.parallel.distributed import initialize_distributed, set_cpu_devices
from cc_jax.parallel.mesh import (
  batch_sharding,
  make_mesh,
  pad_batch,
  replicate,
  replicated_sharding,
)
from cc_jax.training import setup
from cc_jax.training.cached_features import (
  ENCODERS,
  feature_shapes,
  needed_features,
  shapes_of,
  without_encoders,
)
from cc_jax.training.inputs import encode_role
from cc_jax.training.step_context import StepContext
from data_pipeline.cores import available_cores
from data_pipeline.feature_cache import (
  MANIFEST,
  ROLES,
  Layout,
  bad_frames_of,
  write_manifest,
  write_shard,
)
from data_pipeline.sources.stored import StoredFrames, check_cacheable, open_subjects

SHARD_BYTES, MIN_SHARDS = 2**28, 8
Encode = Callable[[str, np.ndarray], dict[str, np.ndarray]]  # role, pictures -> features


def write_features(config: ml_collections.ConfigDict, *, batch_per_chip: int) -> Path:
  """Writes what `config.data.cached` needs, as far as it is not there; returns the folder.

  Raises UserError or DataError for a config, base or data that cannot be used, and for a folder
  that cannot be written.
  """
  setup.check_config(config)
  data_pipeline.check_folder(config.data)
  check_cacheable(config.data)
  set_cpu_devices(config.mesh, config.train.batch_size)
  if processes := initialize_distributed(config.mesh):
    _say(processes)
  # Every process encodes shards of its own on its own devices: nothing is exchanged.
  devices = jax.local_devices()
  axes = ml_collections.ConfigDict(dict(data=len(devices)))
  mesh = make_mesh(axes, len(devices) * batch_per_chip, devices=devices)
  context, encoders, frames = _prepare(config, mesh)
  shapes = feature_shapes(config, context, encoders)
  layout = plan_shards(frames, shapes)
  sizes = batch_sizes(layout, len(devices), batch_per_chip)
  encode = make_encode(context, encoders, mesh, sizes)
  _say(f"{frames.folder}: {len(layout.frames):,} pictures in {layout.shards} shards, "
       f"{layout_bytes(layout, shapes) / 1e9:.2f} GB")
  write_missing_shards(frames, layout, encode)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("all shards are written")
  if jax.process_index() == 0 and not (frames.folder / MANIFEST).is_file():
    dtypes = {name: x.dtype for name, x in shapes.items()}
    write_manifest(frames.folder, frames.key, layout, dtypes)
  _say(f"{frames.folder} is complete; train with --config.data.cached=True")
  return frames.folder


def _prepare(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[StepContext, Params, StoredFrames]:
  """(context in which all but the encoders is shapes, the encoders' weights, the data)."""
  base = load_base(
    config.base, sharding=lambda path, shape: replicated_sharding(mesh), only=ENCODERS,
    **setup.base_options(config),
  )
  definition, trainable, frozen = build_customcontrast(
    base, *setup.adapter_configs(config), dtype=config.train.dtype, transform=eval_shape_only
  )
  context = setup.make_step_context(config, definition, base)
  _, rest, encoders = without_encoders(context, frozen)
  networks = needed_features(config, base)
  frames = StoredFrames(config.data, networks, *open_subjects(config.data))
  unread = shapes_of({**trainable, **rest})
  return dataclasses.replace(context, unread=unread), encoders, frames


def make_encode(
  context: StepContext, encoders: Params, mesh: Mesh, sizes: Mapping[str, int]
) -> Encode:
  """`encode_role` for any number of pictures, `sizes[role]` at a time."""
  encoders = replicate(encoders, mesh)
  encode_batch = jax.jit(
    lambda role, params, pictures: encode_role(context.model(params), role, pictures),
    static_argnums=0,
  )

  def encode(role: str, pictures: np.ndarray) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(pictures), sizes[role]):
      rows = pictures[start : start + sizes[role]]
      batch = jax.device_put(pad_batch(rows, sizes[role]), batch_sharding(mesh))
      features = jax.device_get(encode_batch(role, encoders, batch))
      parts.append({name: x[: len(rows)] for name, x in features.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  return encode


def plan_shards(frames: StoredFrames, shapes: Mapping[str, Any]) -> Layout:
  """Shards of about SHARD_BYTES, and MIN_SHARDS of them, for that many processes to share."""
  layout = frames.layout(1)
  shards = max(MIN_SHARDS, round(layout_bytes(layout, shapes) / SHARD_BYTES))
  return Layout(layout.subjects, layout.placements, -(-len(layout.frames) // shards))


def layout_bytes(layout: Layout, shapes: Mapping[str, Any]) -> int:
  """Bytes of all features; `shapes`: name -> [1, ...] of one."""
  rows = {role: sum(layout.count(role)) for role in layout.placements}
  return sum(x.size * x.dtype.itemsize * rows[ROLES[name]] for name, x in shapes.items())


def batch_sizes(layout: Layout, devices: int, per_device: int) -> dict[str, int]:
  """How many pictures of each role are encoded at once: few rows of a shard's batches are padding.
  """
  sizes = {}
  for role in layout.placements:
    most = -(-max(layout.count(role)) // devices)  # of a shard, on a device
    batches = -(-most // per_device)
    sizes[role] = -(-most // batches) * devices
  return sizes


def write_missing_shards(frames: StoredFrames, layout: Layout, encode: Encode) -> None:
  """Writes those of this process's shards that are not there; pictures are read ahead."""
  mine = range(jax.process_index(), layout.shards, jax.process_count())
  todo = [shard for shard in mine if bad_frames_of(frames.folder, shard, layout) is None]
  total, left = (sum(len(layout.of_shard(s)) for s in shards) for shards in (mine, todo))
  with (
    ThreadPoolExecutor(available_cores(), thread_name_prefix="pictures") as pool,
    tqdm(total=total, initial=total - left, desc="features", unit=" pictures",
         disable=jax.process_index() != 0) as bar,
  ):  # fmt: skip

    def load(shards: Sequence[int]) -> list[Future]:
      shown = [frame for shard in shards for frame in layout.of_shard(shard)]
      return [pool.submit(frames.pictures, frame, layout) for frame in shown]

    ahead = load(todo[:1])
    try:
      for n, shard in enumerate(todo):
        loaded, ahead = ahead, load(todo[n + 1 : n + 2])
        tensors, bad = encode_shard(layout.of_shard(shard), loaded, encode)
        write_shard(frames.folder, shard, tensors, bad)
        bar.update(len(loaded))
    finally:
      for future in ahead:
        future.cancel()


def encode_shard(
  frames: Sequence[tuple[int, int]], loaded: Sequence[Future], encode: Encode
) -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
  """(the shard's tensors, its bad frames); `loaded` are the frames' `StoredFrames.pictures`."""
  results = [future.result() for future in loaded]
  bad = [frame for frame, (_, is_good) in zip(frames, results) if not is_good]
  shown = {name: np.concatenate([pictures[name] for pictures, _ in results])
           for name in results[0][0]}  # fmt: skip
  tensors = {"target_mask": shown.pop("target_mask")}
  for role, pictures in shown.items():
    if len(pictures):  # a shard whose frames are all targets only has no others
      tensors |= encode(role, pictures)
  return tensors, bad


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
