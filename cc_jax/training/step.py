"""One training step of CustomContrast as a pure function, and the state that it turns over.

The adapter and the frozen base come as flat dictionaries (`cc_jax.customcontrast.build`); a module exists only
inside `loss`, where its methods are called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast.build import Params, join
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.remat import check_policies, set_policies
from cc_jax.objectives.contrast import NAIVE_BACKEND, ContrastiveBackend
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.diffusion import diffusion_loss, min_snr_weights
from cc_jax.objectives.macl import macl
from cc_jax.objectives.pairs import PairLoss
from cc_jax.parallel import rules as sharding
from cc_jax.sampling.sample import encode
from cc_jax.training import optimizer

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]
CSCL_FRAMES = ("same_frame", "cross_frame")


class TrainState(NamedTuple):
  """What a checkpoint holds. Trained weights, optimizer and average are cut alike."""

  trainable: Params
  opt_state: Any
  ema: Params
  step: Int[Array, ""]  # finished steps = position in the data
  bad_steps: Int[Array, ""]  # skipped updates in a row, up to now


@dataclasses.dataclass(frozen=True)
class Method:
  """What a step knows besides arrays."""

  definition: nnx.GraphDef
  schedule: NoiseSchedule
  config: ml_collections.ConfigDict
  empty_prompt: tuple[int, ...]  # [T] token ids of ""
  mesh: Mesh | None = None  # over which the batch is cut, for losses that must know

  def __post_init__(self):
    objective, train = self.config.objective, self.config.train
    parts = train.accumulate * self.contrast.devices  # the latter checks its own settings
    if train.batch_size % parts:
      raise UserError(
        f"train.batch_size={train.batch_size} does not divide into train.accumulate="
        f"{train.accumulate} parts on {self.contrast.devices} devices; use a multiple of {parts}"
      )
    check_policies("train.remat_unet", train.remat_unet)
    check_policies("train.remat_text", [train.remat_text])
    if objective.cscl_frame not in CSCL_FRAMES:
      raise UserError(
        f"unknown cscl_frame {objective.cscl_frame!r}; we have {', '.join(CSCL_FRAMES)}"
      )
    drops = [objective.drop_text, objective.drop_image, objective.drop_both]
    if min(drops) < 0 or sum(drops) > 1:
      raise UserError(f"drop_text, drop_image, drop_both are {drops}: shares that sum to at most 1")
    if objective.timestep_shift <= 0 or objective.subject_weight < 0:
      raise UserError(
        f"objective.timestep_shift={objective.timestep_shift} must be positive (1 = uniform), "
        f"objective.subject_weight={objective.subject_weight} not negative (0 = plain loss)"
      )

  @property
  def contrast(self) -> ContrastiveBackend:
    """How the contrastive losses are computed."""
    objective, axes = self.config.objective, ()
    if self.mesh is not None:
      axes = sharding.over_data(self.mesh).spec[0]
      axes = axes if isinstance(axes, tuple) else (axes,)
    return ContrastiveBackend(objective.contrast, objective.tile, self.mesh, axes)

  def describe_contrast(self, mesh: Mesh, *parts: Params) -> list[str]:
    """Log lines: the backend of each contrastive loss; `parts` are weights or their shapes."""
    objective, backend = self.config.objective, dataclasses.replace(self, mesh=mesh).contrast
    model, lines = self.model(*parts), []
    encoder, vision = model.mfi_encoder.config, model.image_encoder.config
    n, width = self.config.train.batch_size, encoder.width
    if objective.lambda_cscl:
      lines.append("cscl: " + backend.explain(PairLoss(1.0, symmetric=True), 1, n, width, 0))
    if objective.lambda_macl:
      groups = max(model.group_of_layer) + 1
      groups *= encoder.textual_queries if objective.macl_pooling == "per_token" else 1
      embed_width = vision.projection_dim if vision.with_projection else vision.hidden_size
      pair_loss = PairLoss(1.0, objective.macl_scaling, symmetric=objective.macl_symmetric)
      lines.append("macl: " + backend.explain(pair_loss, groups, n, width, embed_width))
    return lines

  def model(self, *parts: Params) -> CustomContrast:
    """The CustomContrast module with these weights (adapter's and base's)."""
    return join(self.definition, *parts)

  def learning_model(self, *parts: Params) -> CustomContrast:
    """The same for a gradient: gathered over fsdp, with train.remat_unet and train.remat_text."""
    model, train = self.model(*parts), self.config.train
    if self.mesh is not None and sharding.cuts(self.mesh):
      sharding.gather_in_use(model, self.mesh)
    unet = model.unet
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    check_policies("train.remat_unet", train.remat_unet, len(blocks))
    set_policies(blocks, train.remat_unet)
    set_policies([t.text_model.encoder for t in model.text_encoders], [train.remat_text])
    return model

  def gathered_again(self, function: Callable) -> Callable:
    """A loss whose gradient keeps no gathered weights.

    With train.remat_* the blocks that compute again see to their own; the rest, such as the
    MFI-Encoder's, are then kept.
    """
    train = self.config.train
    if any(word != "none" for word in (*train.remat_unet, train.remat_text)):
      return function
    return sharding.gathered_again(function, self.mesh)


def init_state(trainable: Params, config: ml_collections.ConfigDict) -> TrainState:
  """The state before the first step; the average starts as a copy of the weights."""
  return TrainState(
    trainable=trainable,
    opt_state=optimizer.make_optimizer(config.train).init(trainable),
    ema=jax.tree.map(jnp.copy, trainable),
    step=jnp.zeros((), jnp.int32),
    bad_steps=jnp.zeros((), jnp.int32),
  )


class Draws(NamedTuple):
  """The randomness of a step, sample by sample, so that it does not depend on how the batch is cut.
  """

  t: Int[Array, " b"]
  keep_text: Bool[Array, " b"]
  keep_image: Bool[Array, " b"]
  noise: Array  # [B] keys


def draw(method: Method, key: Array, size: int) -> Draws:
  """Everything random about `size` samples."""
  objective, steps = method.config.objective, method.schedule.num_train_timesteps
  of_t, of_dropout, of_noise = jax.random.split(key, 3)
  t = sample_timesteps(of_t, size, steps, objective.timestep_shift)
  keep = keep_conditions(of_dropout, size, objective)
  return Draws(t, *keep, jax.random.split(of_noise, size))


def to_latents(vae: nnx.Module, images: Array, keys: Array) -> Float[Array, "b h w c"]:
  """uint8 images [B, H, W, 3] -> a sample of the VAE's posterior in the UNet's units, float32.

  `keys` [B]: one for each sample.
  """
  return encode(vae, images, functools.partial(_normal, keys))


def keep_conditions(
  key: Array, size: int, objective: ml_collections.ConfigDict
) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
  """(keep text, keep image) per sample: disjoint shares lose the text, the image, or both.

  IP-Adapter's published values are 5 % each.
  """
  u = jax.random.uniform(key, (size,))
  text, image, both = objective.drop_text, objective.drop_image, objective.drop_both
  drops_text, drops_image = u < text, (u >= text) & (u < text + image)
  drops_both = (u >= text + image) & (u < text + image + both)
  return ~(drops_text | drops_both), ~(drops_image | drops_both)


def sample_timesteps(key: Array, size: int, steps: int, shift: float) -> Int[Array, " b"]:
  """Uniform timesteps in [0, steps), moved towards noise: u -> shift u / (1 + (shift - 1) u).

  shift 1 is the plain draw. More than 1 dwells where an image's colours and layout are decided; the
  map is that of SD3 (arXiv 2403.03206, section 5.3.2), here for training alone. [R]
  """
  u = jax.random.uniform(key, (size,))
  u = shift * u / (1 + (shift - 1) * u)
  return jnp.minimum((u * steps).astype(jnp.int32), steps - 1)


def subject_weights(
  masks: Array, size: tuple[int, int], weight: float
) -> Float[Array, "b h w"] | None:
  """1 + weight * mask at the latents' size, for uint8 masks [B, H, W]; None for weight 0. [R]"""
  if not weight:
    return None
  share = masks.astype(jnp.float32) / 255
  return 1 + weight * jax.image.resize(share, (share.shape[0], *size), "linear", antialias=True)


def denoise(
  method: Method,
  model: CustomContrast,
  batch: Batch,
  features: Float[Array, "b p c"],
  draws: Draws,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
  """(prediction, what it should be) for the target frame noised to t."""
  t, keep_text, keep_image, keys = draws
  of_posterior, of_noise = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  latents = to_latents(model.vae, batch["target"], of_posterior)
  noise = _normal(of_noise, latents.shape[1:])
  empty = jnp.asarray(method.empty_prompt, jnp.int32)
  conditioning = model.condition(
    features,
    jnp.where(keep_text[:, None], batch["input_ids"], empty),
    batch["slot"],
    batch["noun_span"],
    t,
    use_image=keep_image,
    # An empty prompt has no noun for S+ to stand after. [R]
    use_s_plus=keep_image & keep_text,
    time_ids=_whole_picture(model.unet, batch["target"]),
  )
  schedule = method.schedule
  prediction = model.predict(schedule.add_noise(latents, noise, t), t, conditioning)
  return prediction, schedule.target(latents, noise, t)


def loss(
  method: Method, trainable: Params, frozen: Params, batch: Batch, key: Array
) -> tuple[Float[Array, ""], Metrics]:
  """L = L_diffusion + λ_cscl L_CSCL + λ_macl L_MACL [P: the form; R: λ] over the global batch.

  `batch` is the loader's (data_pipeline.make_loader), arrays of the whole global batch. Contrast
  sees every image: condition dropout concerns the diffusion loss alone, since the tokens of dropped
  images would all be the same.
  """
  model = method.learning_model(trainable, frozen)
  draws = draw(method, key, batch["target"].shape[0])
  features, embed = model.image_features(unit(batch["reference"]))
  total, metrics = diffusion(method, model, batch, features, draws)
  contrast, parts = contrastive(
    model, method.config.objective, batch, features, embed, draws.t, method.contrast
  )
  total = total + contrast
  return total, {"loss": total, **metrics, **parts}


def accumulated(
  method: Method, trainable: Params, frozen: Params, batch: Batch, key: Array
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
  """`loss` and its gradient with the memory of a train.accumulate-th part of the batch.

  The contrastive losses see the whole batch all the same: their N does not shrink. First the
  embeddings of all parts, without what a gradient would have to keep; then the losses' gradient
  with respect to them; then each part again, whose own gradient takes these as given
  (GradCache, arXiv 2101.06983).
  """
  objective, count = method.config.objective, method.config.train.accumulate
  size = batch["target"].shape[0]
  chunks = cut((dict(batch), draw(method, key, size)), count)

  def look(trainable, chunk):
    """(model, features, embeddings) of a part."""
    batch, draws = chunk
    model = method.learning_model(trainable, frozen)
    features, embed = model.image_features(unit(batch["reference"]))
    return model, features, embeddings(model, objective, batch, features, embed, draws.t)

  def compare(seen):
    return contrast_embeddings(objective, paste(seen), batch["subject_id"], method.contrast)

  def part(trainable, chunk, d_seen):
    model, features, seen = look(trainable, chunk)
    total, metrics = diffusion(method, model, chunk[0], features, chunk[1])
    # Its gradient is that of the contrastive losses, through this part's embeddings.
    inner = jax.tree.map(lambda d, s: jnp.sum(d.astype(jnp.float32) * s), d_seen, seen)
    return total / count + sum(jax.tree.leaves(inner)), metrics

  def add(gradients, inputs):
    gradient = jax.grad(method.gathered_again(part), has_aux=True)
    more, metrics = gradient(trainable, *inputs)
    return jax.tree.map(jnp.add, gradients, more), metrics

  _, seen = jax.lax.scan(lambda _, chunk: (None, look(trainable, chunk)[2]), None, chunks)
  (contrast, parts), d_seen = jax.value_and_grad(compare, has_aux=True)(seen)
  gradients, metrics = jax.lax.scan(
    add, jax.tree.map(jnp.zeros_like, trainable), (chunks, d_seen)
  )
  metrics = {name: values.mean() for name, values in metrics.items()}
  total = metrics["loss/diffusion"] + contrast
  return (total, {"loss": total, **metrics, **parts}), gradients


def cut(tree: Any, count: int) -> Any:
  """Arrays [N, ...] -> [count, N / count, ...]; part m holds the samples m, m + count, ...

  So every device's share of the batch is cut by itself, and nothing moves between them.
  """
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree
  )


def paste(parts: Embeddings) -> Embeddings:
  """Stacked embeddings of the parts that `cut` made -> those of the whole batch."""

  def whole(x, axis):  # [count, ..., N / count, ...]
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  return Embeddings(
    *(x if x is None else whole(x, int(name in LAYERED)) for name, x in parts._asdict().items())
  )


def diffusion(
  method: Method, model: CustomContrast, batch: Batch, features: Float[Array, "b p c"], draws: Draws
) -> tuple[Float[Array, ""], Metrics]:
  """L_diffusion; `features` are the references'."""
  objective, schedule = method.config.objective, method.schedule
  prediction, target = denoise(method, model, batch, features, draws)
  snr = schedule.snr(draws.t)
  weights = min_snr_weights(snr, objective.min_snr_gamma, schedule.prediction_type)
  mask = subject_weights(batch["target_mask"], prediction.shape[1:3], objective.subject_weight)
  total, parts = diffusion_loss(prediction, target, weights, mask)
  return total, {"loss/diffusion": total, **_named("diffusion", parts)}


def contrastive(
  model: CustomContrast,
  objective: ml_collections.ConfigDict,
  batch: Batch,
  features: Float[Array, "b p c"],
  embed: Float[Array, "b e"],
  t: Int[Array, " b"],
  backend: ContrastiveBackend = NAIVE_BACKEND,
) -> tuple[Float[Array, ""], Metrics]:
  """λ_cscl L_CSCL + λ_macl L_MACL; `features` and `embed` are the references'."""
  seen = embeddings(model, objective, batch, features, embed, t)
  return contrast_embeddings(objective, seen, batch["subject_id"], backend)


class Embeddings(NamedTuple):
  """What the contrastive losses compare; None where neither asks for it."""

  visual_cls: Float[Array, "b d"] | None = None
  textual_cls: Float[Array, "b d"] | None = None
  anchors: Float[Array, "l b q d"] | None = None  # textual tokens of the references
  positives: Float[Array, "l b q d"] | None = None
  embed: Float[Array, "b e"] | None = None


LAYERED = ("anchors", "positives")  # the batch is their second axis


def embeddings(
  model: CustomContrast,
  objective: ml_collections.ConfigDict,
  batch: Batch,
  features: Float[Array, "b p c"],
  embed: Float[Array, "b e"],
  t: Int[Array, " b"],
) -> Embeddings:
  """Runs the encoder on what the contrastive losses need.

  Reference and positive of a sample get the same t. CSCL: `same_frame` is the figure's reading;
  `cross_frame` [R] holds V of the reference against T of the positive, which no pose they share can
  solve. S of MACL comes from the references, which are re-centred, so that S speaks of the
  subjects and not of where they stand.
  """
  seen = Embeddings()
  if not (objective.lambda_cscl or objective.lambda_macl):
    return seen
  reference = model.encode(features, t)
  positive = None
  if objective.lambda_macl or objective.cscl_frame == "cross_frame":
    positive = model.encode(model.image_features(unit(batch["positive"]))[0], t)
  if objective.lambda_cscl:
    textual = reference if objective.cscl_frame == "same_frame" else positive
    seen = seen._replace(visual_cls=reference.visual_cls, textual_cls=textual.textual_cls)
  if objective.lambda_macl:
    seen = seen._replace(
      anchors=reference.textual_tokens, positives=positive.textual_tokens, embed=embed
    )
  return seen


def contrast_embeddings(
  objective: ml_collections.ConfigDict,
  seen: Embeddings,
  subject_ids: Int[Array, " b"],
  backend: ContrastiveBackend,
) -> tuple[Float[Array, ""], Metrics]:
  """λ_cscl L_CSCL + λ_macl L_MACL over the global batch's embeddings."""
  total, metrics = jnp.zeros(()), {}
  if objective.lambda_cscl:
    value, parts = cscl(
      seen.visual_cls,
      seen.textual_cls,
      temperature=objective.cscl_temperature,
      subject_ids=subject_ids,
      backend=backend,
    )
    total = total + objective.lambda_cscl * value
    metrics |= {"loss/cscl": value, **_named("cscl", parts)}
  if objective.lambda_macl:
    value, parts = macl(
      seen.anchors,
      seen.positives,
      seen.embed,
      temperature=objective.macl_temperature,
      scaling=objective.macl_scaling,
      soft_temperature=objective.macl_soft_temperature,
      symmetric=objective.macl_symmetric,
      pooling=objective.macl_pooling,
      subject_ids=subject_ids,
      backend=backend,
    )
    total = total + objective.lambda_macl * value
    metrics |= {"loss/macl": value, **_named("macl", parts)}
  return total, metrics


def train_step(
  method: Method, state: TrainState, frozen: Params, batch: Batch, seed: Int[Array, ""]
) -> tuple[TrainState, Metrics]:
  """One update. All randomness is fold_in(seed, step): a step is a function of its arguments."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  if method.config.train.accumulate > 1:
    (_, metrics), gradients = accumulated(method, state.trainable, frozen, batch, key)
  else:
    whole = method.gathered_again(functools.partial(loss, method))
    (_, metrics), gradients = jax.value_and_grad(whole, has_aux=True)(
      state.trainable, frozen, batch, key
    )
  if method.mesh is not None and sharding.cuts(method.mesh):
    # Each device needs the sum of its own part only, and holds no more than that.
    gradients = jax.lax.with_sharding_constraint(
      gradients, sharding.placements(gradients, method.mesh)
    )
  return update(method.config.train, state, gradients, metrics)


def update(
  train: ml_collections.ConfigDict, state: TrainState, gradients: Params, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """The state after these gradients, and the metrics with norms, rate and bad steps added.

  A loss or gradient that is not finite changes nothing but the counters; the decision is made on
  the device, so that the loop need not wait for it.
  """
  rate = optimizer.learning_rate(train, state.step)
  gradient_norm = optax.global_norm(gradients)
  directions, opt_state = optimizer.make_optimizer(train).update(
    gradients, state.opt_state, state.trainable
  )
  trainable, change = optimizer.apply(state.trainable, directions, rate, train.gate_rate)
  ema = optimizer.ema(state.ema, trainable, train.ema, state.step)

  good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)
  kept = jax.tree.map(
    lambda new, old: jnp.where(good, new, old),
    (trainable, opt_state, ema),
    (state.trainable, state.opt_state, state.ema),
  )
  bad_steps = jnp.where(good, 0, state.bad_steps + 1)
  added = {
    "norm/gradient": gradient_norm,
    "norm/update": jnp.where(good, optax.global_norm(change), 0.0),
    "learning_rate": rate,
    "bad_steps": bad_steps,
  }
  for package, names in packages(gradients).items():
    added[f"norm/gradient/{package}"] = optax.global_norm([gradients[name] for name in names])
    moved = optax.global_norm([change[name] for name in names])
    added[f"norm/update/{package}"] = jnp.where(good, moved, 0.0)
  return TrainState(*kept, state.step + 1, bad_steps), {**metrics, **added}


def packages(names: Iterable[str]) -> dict[str, list[str]]:
  """Parameters by the part of the adapter: 'unet', 'mfi_encoder.visual', 'mfi_encoder.fusion'..."""
  found: dict[str, list[str]] = {}
  for name in names:
    parts = name.split(".")
    found.setdefault(".".join(parts[: 2 if parts[0] == "mfi_encoder" else 1]), []).append(name)
  return found


def make_train_step(
  method: Method, mesh: Mesh, state: TrainState, frozen: Params
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_step` jitted: step(state, frozen, batch, seed), the state donated, the batch cut.

  `state` and `frozen` tell shapes; they may be abstract, and lie where sharding.RULES say. Runs
  that differ in their seed alone compile the same program, which JAX's compilation cache then has.
  """
  method = dataclasses.replace(method, mesh=mesh)
  kept, base = sharding.placements(state, mesh), sharding.placements(frozen, mesh)
  return jax.jit(
    lambda state, frozen, batch, seed: train_step(method, state, frozen, batch, seed),
    in_shardings=(kept, base, sharding.over_data(mesh), sharding.replicated(mesh)),
    out_shardings=(kept, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def unit(images: Array) -> Float[Array, "b h w 3"]:
  """uint8 -> [0, 1], what image encoders take."""
  return images.astype(jnp.float32) / 255


def _whole_picture(unet: nnx.Module, images: Array) -> Float[Array, "b 6"] | None:
  """SDXL's time_ids of an uncropped picture: original size, crop corner, target size."""
  if unet.config.addition_embed_type != "text_time":
    return None
  size, height, width = images.shape[:3]
  return jnp.tile(jnp.asarray([height, width, 0, 0, height, width], jnp.float32), (size, 1))


def _normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
  """Standard normal samples [B, *shape], each from a key of its own."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _named(prefix: str, values: Mapping[str, Array]) -> Metrics:
  return {f"{prefix}/{key}": value for key, value in values.items()}
