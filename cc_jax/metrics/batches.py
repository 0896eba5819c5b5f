"""A network run over many rows: one compiled batch shape, spread over the devices of a mesh."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cc_jax.errors import UserError

_BATCH_AXES = ("data", "fsdp")  # of cc_jax/parallel/mesh.py; other axes have copies
_IN_FLIGHT = 2  # batches on the device while the host prepares the next


class Batched:
  """`function(module, *rows)` for any number of rows, in batches of `batch_size`, in float32.

  The last batch is filled up with its last row. Products are float32 in full: TPUs and GPUs would
  take fewer bits by themselves. Of several processes all call it, with the same rows.
  """

  def __init__(self, module: nnx.Module, batch_size: int, mesh: Mesh | None = None):
    """`mesh`: its axes `data` and `fsdp` share the rows; None is the default device."""
    if mesh is None:
      mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    axes = tuple(axis for axis in mesh.axis_names if axis in _BATCH_AXES)
    shards = int(np.prod([mesh.shape[axis] for axis in axes])) if axes else 1
    if batch_size < 1 or batch_size % shards:
      raise UserError(
        f"batch_size {batch_size} does not divide over the mesh's {shards} devices; use a multiple "
        f"of {shards}"
      )
    self.batch_size = batch_size
    self._all = NamedSharding(mesh, PartitionSpec())
    self._rows = NamedSharding(mesh, PartitionSpec(axes or None))
    self._graph, params = nnx.split(module)
    self._params = jax.tree.map(functools.partial(self._put, self._all), params)
    self._programs: dict[Callable, Callable] = {}

  def __call__(
    self, function: Callable[..., jax.Array], batches: Iterable[tuple[np.ndarray, ...]]
  ) -> np.ndarray:
    """The rows of `function(module, *batch)` for each batch, put together.

    Args:
      function: pure, of the module and arrays [batch_size, ...]; gives [batch_size, ...]. One
        program is kept for each, so hand over the same object every time.
      batches: of at most `batch_size` rows each; taken one by one, as the devices get free.
    """
    done: list[np.ndarray] = []
    waiting: list[tuple[jax.Array, int]] = []
    for batch in batches:
      count = len(batch[0])
      rows = [self._put(self._rows, _filled_up(array, self.batch_size)) for array in batch]
      waiting.append((self._program(function)(self._params, *rows), count))
      if len(waiting) > _IN_FLIGHT:
        done.append(_take(waiting.pop(0)))
    done += [_take(pair) for pair in waiting]
    return np.concatenate(done)

  def chunks(self, *columns: Sequence[Any]) -> Iterable[tuple[Sequence[Any], ...]]:
    """Columns of equal length, cut into pieces of at most `batch_size`; never none at all."""
    for start in range(0, len(columns[0]), self.batch_size):
      yield tuple(column[start : start + self.batch_size] for column in columns)

  def _program(self, function: Callable) -> Callable:
    if function not in self._programs:

      def run(params, *rows):
        with jax.default_matmul_precision("highest"):
          return function(nnx.merge(self._graph, params), *rows)

      self._programs[function] = jax.jit(run, out_shardings=self._all)
    return self._programs[function]

  @staticmethod
  def _put(sharding: NamedSharding, array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _filled_up(array: np.ndarray, size: int) -> np.ndarray:
  missing = size - len(array)
  return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def _take(pair: tuple[jax.Array, int]) -> np.ndarray:
  output, count = pair
  return np.asarray(output)[:count]
