"""What a LoRA adds to one weight."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Change:
  """The factors of one module's change, in PyTorch's layout."""

  up: np.ndarray | None = None  # [O, r], for a convolution [O, r, 1, 1]
  down: np.ndarray | None = None  # [r, I], [r, I, kh, kw]
  mid: np.ndarray | None = None  # [r, r, kh, kw]; up and down are 1x1 then
  alpha: float | None = None

  def delta(self) -> np.ndarray:
    """(alpha / rank) · up · down, [O, I] or [O, I, kh, kw], float32."""
    up = self.up.reshape(self.up.shape[:2]).astype(np.float32)
    down = self.down.astype(np.float32)
    rank = down.shape[0]
    if self.mid is not None:
      window = self.mid.astype(np.float32)
      product = np.einsum("oa,abkl,bi->oikl", up, window, down.reshape(down.shape[:2]))
    else:
      product = (up @ down.reshape(rank, -1)).reshape(up.shape[0], *down.shape[1:])
    return product * np.float32((rank if self.alpha is None else self.alpha) / rank)

  def shape(self) -> tuple[int, ...]:
    window = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
    return (self.up.shape[0], self.down.shape[1], *window)


def core_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A shape without a window of one pixel: 1x1 convolutions and linear layers are alike."""
  return tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape)
