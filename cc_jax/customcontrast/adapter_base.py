"""Which bases an adapter runs on: the one it was trained on, and others of its family.

A family is what has the same shapes and predicts the same thing: a model, its copies in other
precisions, and its fine-tunes.
"""

import warnings
from typing import Any

from cc_jax.bases.base import Base
from cc_jax.customcontrast.adapter_file import Adapter
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.unet import cross_attention_layers

# The published families by the widths of their text encoders, to name them in errors.
_FAMILIES = {(768,): "Stable Diffusion 1.x", (1024,): "Stable Diffusion 2.x", (768, 1280): "SDXL"}
_SHAPES = {
  "text_widths": "text encoders of width {}",
  "cross_attention_layers": "{} cross-attention layers",
  "image_width": "an image encoder of width {}",
}


def describe_base(base: Base) -> dict[str, Any]:
  """What an adapter file says of its base: keywords of `adapter_file.save_adapter`."""
  return dict(
    base_name=base.name, base_hash=base.plain_hash, prediction_type=_prediction_type(base),
    base_hashes=dict(base.hashes), base_shapes=_shapes(base),
  )


def check_base(
  adapter: Adapter, base: Base, *, source: str = "the adapter", strict: bool = False
) -> None:
  """Warns if the base has other weights than the adapter's own.

  What an older file does not say is not compared here; `apply_adapter` compares every tensor.

  Args:
    source: names the adapter in the message.
    strict: other weights are an error too.

  Raises:
    UserError: a base of another family, or an image encoder of another width.
  """
  origin = f"{source} was trained on the base {adapter.base_name!r}"
  shapes = _shapes(base)
  for key, what in _SHAPES.items():
    then, now = adapter.base_shapes.get(key), shapes.get(key)
    if key in adapter.base_shapes and then != now:
      remedy = "give a base of its family by --base, or train an adapter for this one"
      if key == "image_width":
        remedy = "give the one that it was trained with by --image_encoder"
      then, now = (what.format(_named(value)) for value in (then, now))
      raise UserError(f"{origin} with {then}, and {base.name!r} has {now}; {remedy}")
  predicts = _prediction_type(base)
  if adapter.prediction_type and adapter.prediction_type != predicts:
    raise UserError(
      f"{origin}, whose UNet predicts {adapter.prediction_type}, and that of {base.name!r} "
      f"predicts {predicts}; give a base of its family by --base, or mend prediction_type in the "
      "base's scheduler/scheduler_config.json if that is wrong")
  if not base.plain_hash or adapter.base_hash == base.plain_hash:
    return
  message = f"{origin} ({adapter.base_hash[:12]}), and {base.name!r} ({base.plain_hash[:12]}) has "
  message += f"other weights{_where(adapter, base)}"
  if strict:
    raise UserError(f"{message}; load that base, or leave strict_base out")
  if not adapter.prediction_type:
    message += f". That its UNet predicted {predicts} too, this older file does not say"
  warnings.warn(
    f"{message}. The same model in another precision, or a fine-tune of it, is fine; of anything "
    "else expect poor likeness", stacklevel=4)


def _where(adapter: Adapter, base: Base) -> str:
  """' in unet, vae', as far as the file says it."""
  if not adapter.base_hashes:
    return ""
  names = sorted(adapter.base_hashes.keys() | base.hashes.keys())
  return " in " + ", ".join(n for n in names if adapter.base_hashes.get(n) != base.hashes.get(n))


def _shapes(base: Base) -> dict[str, Any]:
  shapes = dict(
    text_widths=[tower.config.hidden_size for tower in base.text_encoders],
    cross_attention_layers=len(cross_attention_layers(base.unet)),
  )
  if base.image_encoder is not None:
    shapes["image_width"] = base.image_encoder.width
  return shapes


def _prediction_type(base: Base) -> str:
  return NoiseSchedule.from_config(base.scheduler_config).prediction_type


def _named(value: Any) -> str:
  """'[768] (Stable Diffusion 1.x)' for text widths that are known, else the value alone."""
  family = _FAMILIES.get(tuple(value)) if isinstance(value, list) else None
  return f"{value} ({family})" if family else str(value)
