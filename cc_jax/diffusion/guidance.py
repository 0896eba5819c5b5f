"""Classifier-free guidance: how the predictions of one step under several conditions combine."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def classifier_free(
  unconditional: Float[Array, "b h w c"], conditional: Float[Array, "b h w c"],
  guidance: float | Float[Array, ""], *, text_only: Float[Array, "b h w c"] | None = None,
  image_guidance: float | Float[Array, ""] | None = None,
) -> Float[Array, "b h w c"]:
  """One prediction, float32.

  Jointly: unconditional + guidance (conditional - unconditional) (arXiv 2207.12598).
  Separately, with `text_only` and `image_guidance`:
    unconditional + guidance (text_only - unconditional) + image_guidance (conditional - text_only),
  the order of InstructPix2Pix (arXiv 2211.09800) with text first. [R] Equal scales give the
  joint form.

  Args:
    unconditional: empty prompt, no image.
    conditional: the prompt with S+ and the image.
    guidance: the prompt's scale; 1 returns `conditional` (jointly), or the text's part unscaled.
    text_only: the prompt without S+ and without image.
    image_guidance: the image's scale.

  Raises:
    ValueError: only one of text_only and image_guidance is given.
  """
  if (text_only is None) != (image_guidance is None):
    raise ValueError("text_only and image_guidance are given together or not at all")
  base = unconditional.astype(jnp.float32)
  full = conditional.astype(jnp.float32)
  if text_only is None:
    return base + guidance * (full - base)
  text = text_only.astype(jnp.float32)
  return base + guidance * (text - base) + image_guidance * (full - text)
