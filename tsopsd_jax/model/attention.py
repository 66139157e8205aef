"""Attention of whole rows: one function, and the implementation for each backend.

| name | where | what it is |
|---|---|---|
| `xla` | everywhere | the formula, long rows in blocks of queries that see only what is before them |
| `cudnn` | GPU, bfloat16 or float16, one sequence a row | cuDNN's fused attention, through `jax.nn.dot_product_attention` |
| `splash` | TPU, T a multiple of 128 | JAX's Pallas kernel for TPUs |

All can be differentiated; none keeps scores [T, T] for the backward pass where T > BLOCK_POSITIONS.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from tsopsd_jax.distributed.sharding import ROW_AXES

CAUSAL_ATTENTION = ("xla", "cudnn", "splash")
SPLASH_MULTIPLE = 128
BLOCK_POSITIONS = 256
"""Rows up to this length are one block of `xla`."""
BLOCKS = 16
"""Blocks of a longer row, at most."""


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
    """Grouped-query attention of each query over the keys that it may see (1 or B masks); softmax in float32."""
    q_BTKGH = rearrange(q_BTNH, "B T (K G) H -> B T K G H", K=k_BSKH.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * q_BTNH.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return rearrange(out_BTKGH, "B T K G H -> B T (K G) H")


def _in_blocks(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array | None) -> Array:
    """Causal attention within segments. Blocks of a long row are computed again in the backward pass."""
    t = q_BTNH.shape[1]
    at = np.arange(t)
    size = t if t <= BLOCK_POSITIONS else SPLASH_MULTIPLE * -(-t // (SPLASH_MULTIPLE * BLOCKS))
    out = []
    for start in range(0, t, size):
        end = min(start + size, t)
        visible_BTS = jnp.asarray(at[None, start:end, None] >= at[None, None, :end])
        if segment_BT is not None:
            visible_BTS = visible_BTS & (segment_BT[:, start:end, None] == segment_BT[:, None, :end])
        one = attention if size == t else jax.checkpoint(attention)
        out.append(one(q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], visible_BTS))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_BT: Array | None = None,
    *,
    implementation: str = "auto",
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention of T positions, each over itself and those before it, by the named implementation.

    Args:
        segment_BT: positions attend within their segment only; None: a row is one.
        implementation: one of IMPLEMENTATIONS, or `auto`: the best for the mesh's devices.
        mesh: over which a Pallas kernel is run, rows over data x fsdp and heads over tensor; None: one device.
        interpret: run a Pallas kernel without its device (tests).

    Raises:
        ValueError: a name that is unknown, or inputs that the implementation does not take.
    """
    if implementation == "auto":
        implementation = "xla"
        if mesh is not None:
            platform, packed = mesh.devices.flat[0].platform, segment_BT is not None
            implementation = best_causal(platform, positions=q_BTNH.shape[1], dtype=q_BTNH.dtype, packed=packed)
    if implementation == "xla":
        return _in_blocks(q_BTNH, k_BTKH, v_BTKH, segment_BT)
    if implementation == "cudnn":
        if segment_BT is not None:
            raise ValueError("attention: cudnn takes rows of one sequence, got segments; use xla")
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
    if implementation != "splash":
        raise ValueError(f"attention: expected auto or one of {', '.join(CAUSAL_ATTENTION)}, got {implementation!r}")
    if q_BTNH.shape[1] % SPLASH_MULTIPLE:
        raise ValueError(f"attention: splash takes a multiple of {SPLASH_MULTIPLE} positions, got {q_BTNH.shape[1]}")
    kernel = functools.partial(_splash, interpret=interpret)
    if mesh is not None:
        split = P(ROW_AXES, None, "tensor")
        specs = (split,) * 3 + (P(ROW_AXES),)
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return kernel(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def best_causal(platform: str, *, positions: int, dtype, packed: bool = False) -> str:
    """Name the best implementation for a backend, where its conditions hold; else `xla`."""
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and not packed:
        return "cudnn"
    if platform == "tpu" and positions % SPLASH_MULTIPLE == 0:
        return "splash"
    return "xla"


def _splash(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array | None, *, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, n, h = q_BTNH.shape[1:]
    mask = masks.MultiHeadMask([masks.CausalMask((t, t))] * n)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)
    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2) * jnp.asarray(np.float32(h) ** -0.5, q_BTNH.dtype)
    segments = None if segment_BT is None else splash.SegmentIds(segment_BT, segment_BT)
    out_BNTH: Any = jax.vmap(kernel)(q_BNTH, jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2), segments)
    return jnp.swapaxes(out_BNTH, 1, 2).astype(q_BTNH.dtype)
