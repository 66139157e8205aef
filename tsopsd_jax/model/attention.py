"""Attention of whole prompts: one function, and the implementation for each backend.

| name | where | what it is |
|---|---|---|
| `xla` | everywhere | the formula; scores [B, K, G, T, T] exist |
| `cudnn` | GPU, bfloat16 or float16 | cuDNN's fused attention, through `jax.nn.dot_product_attention` |
| `splash` | TPU, T a multiple of 128 | JAX's Pallas kernel for TPUs |
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
SPLASH_MULTIPLE = 128


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, positions_BT: Array) -> Array:
    """Grouped-query attention of queries at `positions` over slots 0..position; softmax in float32."""
    b, t, n, h = q_BTNH.shape
    s, kv = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible_BTS = jnp.arange(s, dtype=positions_BT.dtype)[None, None, :] <= positions_BT[:, :, None]
    scores = jnp.where(visible_BTS[:, None, None], scores * h**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(b, t, n, h)


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    *,
    implementation: str = "xla",
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Array:
    """`attention` of T positions among themselves, by the named implementation.

    Args:
        mesh: over which a Pallas kernel is run, rows over data x fsdp and heads over tensor; None: one device.
        interpret: run a Pallas kernel without its device (tests).

    Raises:
        ValueError: a name that is unknown, or inputs that the implementation does not take.
    """
    if implementation == "xla":
        t = q_BTNH.shape[1]
        return attention(q_BTNH, k_BTKH, v_BTKH, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), q_BTNH.shape[:2]))
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
    if implementation != "splash":
        raise ValueError(f"attention: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if q_BTNH.shape[1] % SPLASH_MULTIPLE:
        raise ValueError(f"attention: splash takes a multiple of {SPLASH_MULTIPLE} positions, got {q_BTNH.shape[1]}")
    kernel = functools.partial(_splash, interpret=interpret)
    if mesh is not None:
        split = P(("data", "fsdp"), None, "tensor")
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return kernel(q_BTNH, k_BTKH, v_BTKH)


def best_causal(platform: str, *, positions: int, dtype) -> str:
    """The implementation for a backend, where its conditions hold; else `xla`."""
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return "cudnn"
    if platform == "tpu" and positions % SPLASH_MULTIPLE == 0:
        return "splash"
    return "xla"


def _splash(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, *, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, n, h = q_BTNH.shape[1:]
    mask = masks.MultiHeadMask([masks.CausalMask((t, t))] * n)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)
    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2) * jnp.asarray(np.float32(h) ** -0.5, q_BTNH.dtype)
    out_BNTH: Any = jax.vmap(kernel)(q_BNTH, jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2))
    return jnp.swapaxes(out_BNTH, 1, 2).astype(q_BTNH.dtype)
