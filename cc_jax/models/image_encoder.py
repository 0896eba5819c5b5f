"""What the adapter asks of an image encoder: CLIP's (clip_vision.py) and DINO's (dino.py) answer.

Another one is a file in this folder with a subclass of `ImageEncoder`, and its line in NETWORKS of
cc_jax/bases/files.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from flax import nnx
from jaxtyping import Array, Float


class ImageEncoderOutput(Protocol):
  """Patches row by row, behind the class token if there is one."""

  hidden_states: tuple[Float[Array, "b s d"], ...]  # the first layer's input, then each output
  embedding: Float[Array, "b e"]  # of the whole image, not normalised


class ImageEncoder(nnx.Module):
  """A vision transformer whose config has hidden_size, num_hidden_layers, image_size, patch_size.

  `__call__` takes pixels of `clip_pixels` [B, size, size, 3] and gives an ImageEncoderOutput.
  """

  config: Any
  normalisation: ClassVar[Mapping[str, Any]]  # mean and std of its training
  model_types: ClassVar[tuple[str, ...]]  # in config.json, where no architectures are named
  has_class_token: ClassVar[bool] = True  # it is token 0 of the hidden states
  any_size: ClassVar[bool] = False  # takes other sizes than config.image_size

  @classmethod
  def default_processor(cls, config: Any) -> dict[str, Any]:
    """How images are prepared if no preprocessor_config.json says it."""
    return {**cls.normalisation, "size": config.image_size, "shortest_edge": config.image_size}

  @property
  def width(self) -> int:
    """D of the hidden states."""
    return self.config.hidden_size

  @property
  def embedding_width(self) -> int:
    """E of the embedding."""
    return self.config.hidden_size

  @property
  def num_hidden_states(self) -> int:
    """One more than layers."""
    return self.config.num_hidden_layers + 1

  def num_tokens(self, size: int) -> int:
    """S of the hidden states for images of `size` pixels a side."""
    return (size // self.config.patch_size) ** 2 + self.has_class_token
