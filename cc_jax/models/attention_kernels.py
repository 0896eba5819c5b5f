"""softmax(q kᵀ / √d) v by XLA, by cuDNN, or by a Pallas kernel on a TPU."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from cc_jax.models.attention_kinds import XLA_ONLY, AttentionKernels

_Model = TypeVar("_Model", bound=nnx.Module)
_LANES = 128  # the kernel's blocks are multiples
_BLOCKS = (1024, 896, 768, 640, 512)  # tokens that a block may have; all are multiples of _LANES


def dot_product_attention(
  query: Float[Array, "b s n h"], key: Float[Array, "b t n h"], value: Float[Array, "b t n h"],
  kernels: AttentionKernels = XLA_ONLY, *, causal: bool = False,
) -> Float[Array, "b s n h"]:
  """Attention of n heads, by whichever kernel `kernels` has for these shapes.

  Scores accumulate in float32 whatever the inputs are, which is what `upcast_attention` asks of
  PyTorch, and the softmax is in float32. `causal`: a token sees none after it.
  """
  batch, queries, heads, width = query.shape
  kind = kernels.choose(
    width=width, queries=queries, keys=key.shape[1], dtype=query.dtype, masked=causal, batch=batch
  )
  if kind == "xla":
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)
  attend = pallas_attention if kind == "pallas" else functools.partial(
    jax.nn.dot_product_attention, implementation="cudnn")  # fmt: skip
  if kernels.mesh is not None:
    axis = kernels.head_axis
    split_heads = axis is not None and heads % kernels.mesh.shape[axis] == 0
    spec = PartitionSpec(kernels.batch_axes, None, axis if split_heads else None)
    attend = jax.shard_map(
      attend, mesh=kernels.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
  return attend(query, key, value)


class WithAttention(nnx.Module):
  """A module that hands `kernels` to `dot_product_attention`."""

  kernels = XLA_ONLY


def with_kernels(model: _Model, kernels: AttentionKernels) -> _Model:
  """The same model, whose attentions now use these kernels: those of the program being traced."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, WithAttention) and module.kernels != kernels:
      module.kernels = kernels
  return model


def pallas_attention(
  query: Float[Array, "b s n h"], key: Float[Array, "b t n h"], value: Float[Array, "b t n h"], *,
  interpret: bool = False,
) -> Float[Array, "b s n h"]:
  """JAX's splash attention with no mask, for a TPU; any lengths, by padding.

  `interpret`: on any device, very slowly; for tests.
  """
  (queries, heads, width), keys = query.shape[1:], key.shape[1]
  block_q, block_k = (block_size(tokens, width) for tokens in (queries, keys))
  query = query * jnp.asarray(width**-0.5, query.dtype)
  q, k, v = (
    _pad_tokens(x.transpose(0, 2, 1, 3), block)
    for x, block in ((query, block_q), (key, block_k), (value, block_k))
  )
  kernel = _splash_kernel(heads, q.shape[2], k.shape[2], block_q, block_k, interpret)
  segments = None
  if k.shape[2] > keys:  # no query sees the keys that were added
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    added = (np.arange(k.shape[2]) >= keys).astype(np.int32)
    segments = splash.SegmentIds(jnp.zeros(q.shape[2], jnp.int32), jnp.asarray(added))
  out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
  return out[:, :, :queries].transpose(0, 2, 1, 3)


def block_size(tokens: int, width: int) -> int:
  """Tokens of a block: those that pad least, among them the largest."""
  if tokens <= _BLOCKS[-1]:
    return -(-tokens // _LANES) * _LANES
  if width > 256:  # larger blocks do not fit the chip's own memory
    return _BLOCKS[-1]
  return min(_BLOCKS, key=lambda block: (-(-tokens // block) * block, -block))


def _pad_tokens(x: Float[Array, "b n s h"], block: int) -> Float[Array, "b n s2 h"]:
  missing = -x.shape[2] % block
  return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x


@functools.lru_cache(maxsize=64)
def _splash_kernel(
  heads: int, queries: int, keys: int, block_q: int, block_k: int, interpret: bool
):
  """The kernel for one example, [n, s, h] each."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  compute = 512 if block_k == 1024 else block_k
  sizes = splash.BlockSizes(
    block_q=block_q, block_kv=block_k, block_kv_compute=compute, block_q_dkv=block_q,
    block_kv_dkv=block_k, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
  )
  mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
  with jax.ensure_compile_time_eval():
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
  return jax.device_get(kernel)  # constants that belong to no device
