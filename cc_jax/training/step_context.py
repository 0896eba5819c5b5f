"""What a training step depends on besides arrays."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cc_jax.customcontrast.build import merge_params
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.attention_kernels import with_kernels
from cc_jax.models.attention_kinds import XLA_ONLY, AttentionKernels
from cc_jax.models.params import Params
from cc_jax.models.remat import check_policies, set_policies
from cc_jax.objectives.contrast import ContrastiveBackend
from cc_jax.objectives.pair_scaling import PairLoss
from cc_jax.parallel.attention import mesh_kernels
from cc_jax.parallel.fsdp import all_gather_on_use, remat_all_gathers
from cc_jax.parallel.mesh import batch_sharding
from cc_jax.parallel.rules import shards_params

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]
CSCL_FRAMES = ("same_frame", "cross_frame")


@dataclasses.dataclass(frozen=True)
class StepContext:
  """What a step depends on besides arrays. Creating it checks config.objective and config.train."""

  definition: nnx.GraphDef
  schedule: NoiseSchedule
  config: ml_collections.ConfigDict
  empty_prompt: tuple[tuple[int, ...], ...]  # per text encoder, [T] token ids of ""
  mesh: Mesh | None = None  # over which the batch is sharded; the contrastive losses use it
  # Shapes of weights that no step reads: with stored features, the VAE's and image encoder's.
  unread: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    objective, train = self.config.objective, self.config.train
    divisor = train.grad_accum_steps * self.contrast.devices  # the latter checks its own settings
    if train.batch_size % divisor:
      raise UserError(
        f"train.batch_size={train.batch_size} does not divide into train.grad_accum_steps="
        f"{train.grad_accum_steps} parts on {self.contrast.devices} devices; use a multiple of "
        f"{divisor}"
      )
    check_policies("train.remat_unet", train.remat_unet)
    check_policies("train.remat_text", [train.remat_text])
    if objective.cscl_frame not in CSCL_FRAMES:
      raise UserError(
        f"unknown cscl_frame {objective.cscl_frame!r}; we have {', '.join(CSCL_FRAMES)}"
      )
    drops = [objective.drop_text, objective.drop_image, objective.drop_both]
    if min(drops) < 0 or sum(drops) > 1:
      raise UserError(f"drop_text, drop_image, drop_both are {drops}; they must sum to at most 1")
    if objective.timestep_shift <= 0 or objective.subject_weight < 0:
      raise UserError(
        f"objective.timestep_shift={objective.timestep_shift} must be positive (1 = uniform), "
        f"objective.subject_weight={objective.subject_weight} not negative (0 = plain loss)"
      )

  @property
  def contrast(self) -> ContrastiveBackend:
    """How the contrastive losses are computed."""
    objective = self.config.objective
    axes = () if self.mesh is None else batch_sharding(self.mesh).spec[0]
    return ContrastiveBackend(objective.contrast, objective.tile, self.mesh, axes)

  def rows_per_device(self, size: int) -> int:
    """How many of `size` samples lie on one device."""
    return size // self.contrast.devices

  def describe_contrast(self, mesh: Mesh, *parts: Params) -> list[str]:
    """Log lines: the backend of each contrastive loss; `parts` are weights or their shapes."""
    objective, backend = self.config.objective, dataclasses.replace(self, mesh=mesh).contrast
    model, lines = self.model(*parts), []
    encoder = model.mfi_encoder.config
    n, width = self.config.train.batch_size, encoder.width
    if objective.lambda_cscl:
      lines.append("cscl: " + backend.explain(PairLoss(1.0, symmetric=True), 1, n, width, 0))
    if objective.lambda_macl:
      groups = max(model.group_of_layer) + 1
      groups *= encoder.textual_queries if objective.macl_pooling == "per_token" else 1
      pair_loss = PairLoss(1.0, objective.macl_scaling, symmetric=objective.macl_symmetric)
      embed_width = model.image_encoder.embedding_width
      lines.append("macl: " + backend.explain(pair_loss, groups, n, width, embed_width))
    return lines

  @property
  def kernels(self) -> AttentionKernels:
    """The attention kernels of a program on the mesh; XLA's while there is none."""
    if self.mesh is None:
      return XLA_ONLY
    train = self.config.train
    return mesh_kernels(train.attention, self.mesh, dtype=train.dtype, training=True)

  def model(self, *params: Params) -> CustomContrast:
    """The CustomContrast module with these weights (adapter's and base's)."""
    return with_kernels(merge_params(self.definition, self.unread, *params), self.kernels)

  def model_for_gradient(self, *params: Params) -> CustomContrast:
    """`model` with weights gathered over fsdp, train.remat_unet and train.remat_text."""
    model, train = self.model(*params), self.config.train
    if self.mesh is not None and shards_params(self.mesh):
      all_gather_on_use(model, self.mesh)
    unet = model.unet
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    check_policies("train.remat_unet", train.remat_unet, len(blocks))
    set_policies(blocks, train.remat_unet)
    set_policies([t.text_model.encoder for t in model.text_encoders], [train.remat_text])
    return model

  def remat_all_gathers(self, function: Callable) -> Callable:
    """A loss whose gradient keeps no gathered weights.

    With train.remat_* the rematerialised blocks gather theirs again by themselves, and other
    gathered weights, such as the MFI-Encoder's, are kept.
    """
    train = self.config.train
    if any(word != "none" for word in (*train.remat_unet, train.remat_text)):
      return function
    return remat_all_gathers(function, self.mesh)


def to_unit_range(images: Array) -> Float[Array, "b h w 3"]:
  """uint8 -> [0, 1], the input of image encoders."""
  return images.astype(jnp.float32) / 255


def prefix_keys(prefix: str, values: Mapping[str, Array]) -> Metrics:
  return {f"{prefix}/{key}": value for key, value in values.items()}
