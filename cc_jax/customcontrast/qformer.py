"""The two Q-Formers: learned queries that read image features by Perceiver attention."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from cc_jax.models.layers import Linear

TRAIN_TIMESTEPS = 1000  # t / TRAIN_TIMESTEPS is in [0, 1) for every base that we load
_T_BANDS = 6  # fastest wave over t: a period of 62 steps; S+ should move smoothly while denoising
_L_BANDS = 5


def fourier(x: Num[Array, "*n"], bands: int) -> Float[Array, "*n f"]:
  """x and sin/cos of x·π·2^k, k < bands: f = 1 + 2·bands features of a number in [0, 1]."""
  angles = jnp.asarray(x, jnp.float32)[..., None] * (jnp.pi * 2.0 ** jnp.arange(bands))
  x = jnp.asarray(x, jnp.float32)[..., None]
  return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)


def perceiver_attention(
  q: Float[Array, "b l q h e"], k_image: Float[Array, "b p h e"],
  v_image: Float[Array, "b p h e"], k_self: Float[Array, "b l k h e"],
  v_self: Float[Array, "b l k h e"],
) -> Float[Array, "b l q h e"]:
  """softmax(q·[k_image; k_self]ᵀ/√e)·[v_image; v_self], with the image's keys shared by all l.

  Concatenating logits instead of keys keeps one copy of the image's keys and values per sample:
  they do not depend on the layer. Logits, which bfloat16 would round, and softmax in float32. The
  queries are too few for a fused kernel on any chip (docs/attention.md, "By layer").
  """
  p = k_image.shape[1]
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits = jnp.concatenate(
    [product("blqhe,bphe->bhlqp", q, k_image), product("blqhe,blkhe->bhlqk", q, k_self)], axis=-1
  )
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
  weights = weights.astype(q.dtype)
  return jnp.einsum("bhlqp,bphe->blqhe", weights[..., :p], v_image) + jnp.einsum(
    "bhlqk,blkhe->blqhe", weights[..., p:], v_self
  )


class PerceiverBlock(nnx.Module):
  """Pre-norm Perceiver attention and a GELU MLP, both residual. No biases, as in IP-Adapter-plus.

  [R] The paper says only that image features enter every layer. Keys and values come from the image
  features and from the queries themselves, through one pair of projections. The image side has no
  norm of its own: its features arrive normalised (`CustomContrast.image_features`), and a norm
  would multiply the gradient of a dropped (all-zero) image by 1/√eps.
  """

  def __init__(self, width: int, heads: int, **kinds):
    self.heads = heads
    self.norm_attn = nnx.LayerNorm(width, epsilon=1e-5, **kinds)
    self.to_q = Linear(width, width, use_bias=False, **kinds)
    self.to_k = Linear(width, width, use_bias=False, **kinds)
    self.to_v = Linear(width, width, use_bias=False, **kinds)
    self.to_out = Linear(width, width, use_bias=False, **kinds)
    self.norm_ff = nnx.LayerNorm(width, epsilon=1e-5, **kinds)
    self.ff_in = Linear(width, 4 * width, use_bias=False, **kinds)
    self.ff_out = Linear(4 * width, width, use_bias=False, **kinds)

  def __call__(
    self, x: Float[Array, "b l q d"], image: Float[Array, "b p d"]
  ) -> Float[Array, "b l q d"]:
    def split(y):
      return y.reshape(*y.shape[:-1], self.heads, -1)

    h = self.norm_attn(x)
    attended = perceiver_attention(
      split(self.to_q(h)), split(self.to_k(image)), split(self.to_v(image)), split(self.to_k(h)),
      split(self.to_v(h)),
    )
    x = x + self.to_out(attended.reshape(x.shape))
    return x + self.ff_out(jax.nn.gelu(self.ff_in(self.norm_ff(x)), approximate=False))


class _Qformer(nnx.Module):
  """What both Q-Formers are: queries (CLS first), an input projection, blocks, a final norm."""

  def __init__(
    self, image_width: int, width: int, *, depth: int, heads: int, queries: int,
    dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs,
  ):
    kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.dtype = dtype
    # Query 0 is the CLS; the others are the tokens. N(0, 1/width) as IP-Adapter's latents.
    values = jax.random.normal(rngs.params(), (1 + queries, width), param_dtype) * width**-0.5
    self.queries = nnx.Param(values)
    self.proj_in = Linear(image_width, width, **kinds)
    self.blocks = nnx.List([PerceiverBlock(width, heads, **kinds) for _ in range(depth)])
    self.norm_out = nnx.LayerNorm(width, epsilon=1e-5, **kinds)

  def _read(
    self, x: Float[Array, "b l q d"], features: Float[Array, "b p c"]
  ) -> Float[Array, "b l q d"]:
    image = self.proj_in(features)
    for block in self.blocks:
      x = block(x, image)
    return self.norm_out(x)


class VisualQformer(_Qformer):
  """Reads what the subject looks like; knows neither the timestep nor the layer [P]."""

  def __call__(
    self, features: Float[Array, "b p c"]
  ) -> tuple[Float[Array, "b d"], Float[Array, "b v d"]]:
    """Returns (visual_cls [B, D], visual_tokens [B, V, D])."""
    queries = jnp.asarray(self.queries[...], self.dtype)
    x = jnp.broadcast_to(queries, (features.shape[0], 1, *queries.shape))
    x = self._read(x, features)[:, 0]
    return x[:, 0], x[:, 1:]


class TextualQformer(_Qformer):
  """Reads what words could say about the subject, at timestep t, for every layer l at once [P].

  [R] (t, l) enter as Fourier features through an MLP, added to the queries. `timestep_layer='none'`
  is the lab's control: one result, the same for every t and l.
  [R] textual_cls is the mean of the layers' CLS queries, or the last layer's (`cls_from='last'`).
  """

  def __init__(
    self, image_width: int, width: int, *, depth: int, heads: int, queries: int, layers: int,
    timestep_layer: str = "fourier_mlp", cls_from: str = "mean", **kinds,
  ):
    super().__init__(image_width, width, depth=depth, heads=heads, queries=queries, **kinds)
    self.layers = layers
    self.cls_from = cls_from
    self.conditioned = timestep_layer == "fourier_mlp"
    if self.conditioned:
      features = (1 + 2 * _T_BANDS) + (1 + 2 * _L_BANDS)
      self.mlp_in = Linear(features, width, **kinds)
      self.mlp_out = Linear(width, width, **kinds)

  def layer_time(self, t: Int[Array, " b"]) -> Float[Array, "b l d"]:
    """The vector that says (t, l), added to every query."""
    layer = jnp.arange(self.layers) / max(self.layers - 1, 1)
    t_BxLxF = jnp.broadcast_to(
      fourier(t / TRAIN_TIMESTEPS, _T_BANDS)[:, None], (len(t), self.layers, 1 + 2 * _T_BANDS)
    )
    l_BxLxF = jnp.broadcast_to(
      fourier(layer, _L_BANDS), (len(t), self.layers, 1 + 2 * _L_BANDS)
    )
    x = jnp.concatenate([t_BxLxF, l_BxLxF], axis=-1).astype(self.dtype)
    return self.mlp_out(jax.nn.silu(self.mlp_in(x)))

  def __call__(
    self, features: Float[Array, "b p c"], t: Int[Array, " b"]
  ) -> tuple[Float[Array, "b d"], Float[Array, "l b q d"]]:
    """Returns (textual_cls [B, D], textual_tokens [L, B, Q, D]). t in [0, 1000)."""
    queries = jnp.asarray(self.queries[...], self.dtype)
    batch = features.shape[0]
    if self.conditioned:
      x = self._read(queries + self.layer_time(t)[:, :, None], features)
    else:  # every layer would compute the same
      x = self._read(jnp.broadcast_to(queries, (batch, 1, *queries.shape)), features)
      x = jnp.broadcast_to(x, (batch, self.layers, *x.shape[2:]))
    cls = jnp.mean(x[:, :, 0], axis=1) if self.cls_from == "mean" else x[:, -1, 0]
    return cls, jnp.moveaxis(x[:, :, 1:], 1, 0)
