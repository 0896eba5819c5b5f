"""Which implementation of the contrastive loss goes through the pairs of the global batch.

| kind  | memory per device for N samples on P devices, G groups of D-wide features              |
|-------|----------------------------------------------------------------------------------------|
| naive | G N/P x N logits, several times                                                         |
| tiled | N/P x tile, and one group's keys of all devices, N x D, with their gradients            |
| ring  | N/P x tile, and blocks of N/P x D; P messages a group instead of one                    |
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError
from cc_jax.objectives.infonce import naive
from cc_jax.objectives.key_exchange import Gathered, Ring
from cc_jax.objectives.pairs import PairLoss
from cc_jax.objectives.tiled import tiled

CONTRASTS = ("auto", "naive", "tiled", "ring")
# Where `auto` turns, bytes per device: from the first on, logits cost more than computing their
# tiles twice; from the second on, other devices' keys cost more than passing them around.
NAIVE_LOGITS = 256 * 2**20
GATHERED_KEYS = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Contrast:
  """config.objective.contrast and .tile, and the devices that share the batch."""

  kind: str = "auto"  # one of CONTRASTS
  tile: int = 1024  # columns in a tile of 'tiled' and 'ring'
  mesh: Mesh | None = None  # None: one device, or whatever XLA makes of the naive loss
  axes: tuple[str, ...] = ()  # the mesh's axes over which the batch is cut

  def __post_init__(self):
    if self.kind not in CONTRASTS:
      raise UserError(
        f"unknown objective.contrast {self.kind!r}; we have {', '.join(CONTRASTS)}"
      )
    if self.tile < 1:
      raise UserError(f"objective.tile is {self.tile}; it must be at least 1")

  @property
  def devices(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1

  def choose(self, rule: PairLoss, groups: int, n: int, width: int, embed_width: int) -> str:
    """The kind, 'auto' decided for G groups of N features of this width."""
    if self.kind != "auto":
      return self.kind
    if self._logits(rule, groups, n) < NAIVE_LOGITS:
      return "naive"
    return "tiled" if self._keys(rule, n, width, embed_width) < GATHERED_KEYS else "ring"

  def explain(self, rule: PairLoss, groups: int, n: int, width: int, embed_width: int) -> str:
    """One line for the log."""
    logits = self._logits(rule, groups, n) / 2**20
    keys = self._keys(rule, n, width, embed_width) / 2**20
    chosen = self.choose(rule, groups, n, width, embed_width)
    tile = f", {min(self.tile, n)} columns at a time" if chosen != "naive" else ""
    return (
      f"contrast over {n} samples on {self.devices} devices: {chosen}{tile} ({self.kind}; logits "
      f"of the naive loss {logits:,.1f} MiB a device, a group's gathered keys {keys:,.1f} MiB)"
    )

  def _logits(self, rule: PairLoss, groups: int, n: int) -> float:
    return 4 * (2 if rule.both_ways else 1) * groups * n * n / self.devices

  def _keys(self, rule: PairLoss, n: int, width: int, embed_width: int) -> int:
    return 4 * n * (width + (embed_width if rule.needs_similarity else 0))


NAIVE = Contrast("naive")


def contrast(
  how: Contrast,
  rule: PairLoss,
  x: Float[Array, "g n d"],
  y: Float[Array, "g n d"],
  embed: Float[Array, "n e"] | None,
  subject_ids: Int[Array, " n"] | None,
  *,
  name: str,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """InfoNCE of x's rows against y's, the mean of G groups, over the **global** batch.

  Args:
    how: the implementation; value and gradient do not depend on it.
    rule: what one pair contributes.
    x, y: features, not normalised; x[:, j] and y[:, j] are each other's positives.
    embed: its cosines are S; None where `rule` does not need it.
    subject_ids: see `infonce.allowed_pairs`.
    name: of the loss, for the log.

  Returns:
    (loss, metrics of `infonce.retrieval_metrics`).

  Raises:
    UserError: N does not divide over the devices.
  """
  groups, n, width = x.shape
  sizes = groups, n, width, 0 if embed is None else embed.shape[1]
  kind = how.choose(rule, *sizes)
  if how is not NAIVE:
    _say(f"{name}: {how.explain(rule, *sizes)}")
  if kind == "naive":
    return naive(rule, x, y, embed, subject_ids)
  if n % how.devices:
    raise UserError(
      f"{n} samples do not divide over {how.devices} devices; change train.batch_size, or set "
      "objective.contrast to naive"
    )
  axes = how.axes if how.devices > 1 else ()  # alone, there is nobody to talk to
  tour = {"tiled": Gathered, "ring": Ring}[kind](how.tile, how.mesh if axes else None, axes)
  embed = embed if rule.needs_similarity else None
  return tiled(rule, tour, x, y, embed, subject_ids)


@functools.cache
def _say(line: str) -> None:
  """Prints a line once, though the step may be traced again."""
  if jax.process_index() == 0:
    print(line)
