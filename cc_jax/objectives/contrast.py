"""Backends of the contrastive loss: how it goes through the pairs of the global batch.

| kind  | memory per device for N samples on P devices, G groups of D-wide features              |
|-------|----------------------------------------------------------------------------------------|
| naive | G N/P x N logits, several times                                                         |
| tiled | N/P x tile, and one group's keys of all devices, N x D, with their gradients            |
| ring  | N/P x tile, and blocks of N/P x D; P messages a group instead of one                    |
"""

import dataclasses
import math

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError
from cc_jax.objectives.infonce import naive
from cc_jax.objectives.key_exchange import AllGather, Ring
from cc_jax.objectives.pair_scaling import PairLoss
from cc_jax.objectives.tiled import tiled

KINDS = ("auto", "naive", "tiled", "ring")
# Thresholds of 'auto', bytes per device: more logits cost more time than computing their tiles
# twice; more keys of other devices cost more than passing them around a ring.
MAX_NAIVE_LOGITS = 256 * 2**20
MAX_GATHERED_KEYS = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class ContrastiveBackend:
  """config.objective.contrast and .tile, and the devices over which the batch is sharded."""

  kind: str = "auto"  # one of KINDS
  tile: int = 1024  # columns in a tile of 'tiled' and 'ring'
  mesh: Mesh | None = None  # None: one device, or however XLA partitions the naive loss
  axes: tuple[str, ...] = ()  # the mesh's axes over which the batch is sharded

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"unknown objective.contrast {self.kind!r}; we have {', '.join(KINDS)}")
    if self.tile < 1:
      raise UserError(f"objective.tile is {self.tile}; it must be at least 1")

  @property
  def devices(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1

  def choose(self, pair_loss: PairLoss, groups: int, n: int, width: int, embed_width: int) -> str:
    """The kind, 'auto' resolved for G groups of N features of this width."""
    if self.kind != "auto":
      return self.kind
    logits, keys = self._bytes(pair_loss, groups, n, width, embed_width)
    if logits < MAX_NAIVE_LOGITS:
      return "naive"
    return "tiled" if keys < MAX_GATHERED_KEYS else "ring"

  def explain(self, pair_loss: PairLoss, groups: int, n: int, width: int, embed_width: int) -> str:
    """One line for the log: what `choose` says, and why."""
    sizes = pair_loss, groups, n, width, embed_width
    kind, (logits, keys) = self.choose(*sizes), self._bytes(*sizes)
    tile = f", {min(self.tile, n)} columns at a time" if kind != "naive" else ""
    return (
      f"contrast over {n} samples on {self.devices} devices: {kind}{tile} ({self.kind}; logits "
      f"of the naive loss {logits / 2**20:,.1f} MiB a device, a group's gathered keys "
      f"{keys / 2**20:,.1f} MiB)"
    )

  def _bytes(self, pair_loss, groups, n, width, embed_width) -> tuple[float, int]:
    """On a device: logits of the naive loss, and keys of a group where they are gathered."""
    logits = 4 * (2 if pair_loss.symmetric else 1) * groups * n * n / self.devices
    return logits, 4 * n * (width + (embed_width if pair_loss.needs_similarity else 0))


NAIVE_BACKEND = ContrastiveBackend("naive")


def contrast(
  backend: ContrastiveBackend, pair_loss: PairLoss, x: Float[Array, "g n d"],
  y: Float[Array, "g n d"], embed: Float[Array, "n e"] | None,
  subject_ids: Int[Array, " n"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """InfoNCE of x's rows against y's, the mean of G groups, over the **global** batch.

  Args:
    backend: value and gradient do not depend on it.
    pair_loss: what one pair contributes.
    x, y: features, not normalised; x[:, j] and y[:, j] are each other's positives.
    embed: its cosines are S; None where `pair_loss` does not need it.
    subject_ids: see `infonce.allowed_pairs`.

  Returns:
    (loss, metrics of `infonce.retrieval_metrics`).

  Raises:
    UserError: N does not divide over the devices.
  """
  groups, n, width = x.shape
  kind = backend.choose(pair_loss, groups, n, width, 0 if embed is None else embed.shape[1])
  if kind == "naive":
    return naive(pair_loss, x, y, embed, subject_ids)
  if n % backend.devices:
    raise UserError(
      f"{n} samples do not divide over {backend.devices} devices; change train.batch_size, or set "
      "objective.contrast to naive"
    )
  mesh, axes = (backend.mesh, backend.axes) if backend.devices > 1 else (None, ())
  key_exchange = {"tiled": AllGather, "ring": Ring}[kind](backend.tile, mesh, axes)
  embed = embed if pair_loss.needs_similarity else None
  return tiled(pair_loss, key_exchange, x, y, embed, subject_ids)
