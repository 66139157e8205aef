"""Attention of whole rows: one function, and the implementation for each backend.

| name | where | what it is |
|---|---|---|
| `xla` | everywhere | the formula, long rows in blocks of queries that see only what is before them |
| `cudnn` | GPU, bfloat16 or float16; packed rows on Hopper and newer | cuDNN's fused attention |
| `splash` | TPU, T a multiple of 128 | JAX's Pallas kernel for TPUs |

All can be differentiated; none keeps scores [T, T] for the backward pass where T > BLOCK_POSITIONS.
"""

import functools
from collections.abc import Callable
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
MOST_SEGMENTS = 32
"""Sequences in a packed row, at most: cuDNN's sums of a row, float32 [N, T], exist once for each that there may be."""


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
        segment_BT: positions attend within their segment only; None: a row is one. For `cudnn` they are numbered from 1
            in order, at most MOST_SEGMENTS in a row, and 0 follows the last: what attends there is no sequence and
            gives 0.
        implementation: one of IMPLEMENTATIONS, or `auto`: the best for the mesh's devices.
        mesh: over which a Pallas kernel is run, rows over data x fsdp and heads over tensor; None: one device.
        interpret: run a Pallas kernel without its device (tests).

    Raises:
        ValueError: a name that is unknown, or inputs that the implementation does not take.
    """
    if implementation == "auto":
        implementation = "xla"
        if mesh is not None:
            device, shape = mesh.devices.flat[0], q_BTNH.shape
            refused = None if segment_BT is None else cudnn_refuses_segments(device)
            implementation = best_causal(
                device.platform, positions=shape[1], dtype=q_BTNH.dtype, packed=refused is not None
            )
    if implementation == "xla":
        return _in_blocks(q_BTNH, k_BTKH, v_BTKH, segment_BT)
    if implementation == "cudnn":
        if segment_BT is None:
            return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
        refused = cudnn_refuses_segments(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
        if refused is not None:
            raise ValueError(f"attention: cudnn takes rows of one sequence here, got segments ({refused}); use xla")
        return _by_device(_cudnn_packed, mesh)(q_BTNH, k_BTKH, v_BTKH, segment_BT)
    if implementation != "splash":
        raise ValueError(f"attention: expected auto or one of {', '.join(CAUSAL_ATTENTION)}, got {implementation!r}")
    if q_BTNH.shape[1] % SPLASH_MULTIPLE:
        raise ValueError(f"attention: splash takes a multiple of {SPLASH_MULTIPLE} positions, got {q_BTNH.shape[1]}")
    kernel = functools.partial(_splash, interpret=interpret)
    return _by_device(kernel, mesh)(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _by_device(kernel: Callable[..., Array], mesh: Mesh | None) -> Callable[..., Array]:
    """Run a kernel on each device's own rows and heads."""
    if mesh is None:
        return kernel
    split = P(ROW_AXES, None, "tensor")
    specs = (split,) * 3 + (P(ROW_AXES),)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)


def best_causal(platform: str, *, positions: int, dtype, packed: bool = False) -> str:
    """Name the best implementation for a backend, where its conditions hold; else `xla`. `packed`: rows hold segments
    that cuDNN does not take."""
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and not packed:
        return "cudnn"
    if platform == "tpu" and positions % SPLASH_MULTIPLE == 0:
        return "splash"
    return "xla"


def cudnn_refuses_segments(device: Any) -> str | None:
    """Say why cuDNN cannot attend to packed rows on a device; None: it can."""
    if device.platform != "gpu":
        return f"a {device.platform} has no cuDNN"
    if float(device.compute_capability) < 9:
        return f"it needs Hopper or newer, compute capability 9, got {device.compute_capability}"
    try:
        _cudnn()
    except (ImportError, AttributeError) as error:
        return f"this version of JAX has no such interface: {error}"
    return None


def _cudnn() -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """Find JAX's private functions of cuDNN's attention: (forward, backward, options of both). Its public function
    knows neither segments nor devices that are not there.

    Raises:
        ImportError, AttributeError: this version of JAX has them no longer.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    options = {
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias
        "mask_type": cudnn.MaskType.PADDING_CAUSAL,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return cudnn._dot_product_attention_fwd_impl, cudnn._dot_product_attention_bwd_impl, options


def segment_ranges(segment_BT: Array) -> tuple[Array, Array]:
    """Find lengths [B, M] and starts [B, M + 1] of a row's segments as cuDNN reads them: -1 where there is none."""
    number_M = jnp.arange(1, MOST_SEGMENTS + 1, dtype=segment_BT.dtype)
    length_BM = jnp.sum(segment_BT[:, None, :] == number_M[None, :, None], axis=2, dtype=jnp.int32)
    start_BM = jnp.cumsum(length_BM, axis=1, dtype=jnp.int32) - length_BM
    length_BM, start_BM = (jnp.where(length_BM > 0, x, -1) for x in (length_BM, start_BM))
    return length_BM, jnp.pad(start_BM, ((0, 0), (0, 1)), constant_values=-1)


def _cudnn_packed(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array) -> Array:
    # What cuDNN leaves at places of no sequence is anything, in the output and in the gradients: both are cut off here.
    held = (segment_BT > 0)[..., None, None]
    q, k, v = (jnp.where(held, x, jnp.zeros((), x.dtype)) for x in (q_BTNH, k_BTKH, v_BTKH))
    return jnp.where(held, _within_ranges(q, k, v, *segment_ranges(segment_BT)), jnp.zeros((), q.dtype))


@jax.custom_vjp
def _within_ranges(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, length_BM: Array, start_BM: Array) -> Array:
    return _within_ranges_forward(q_BTNH, k_BTKH, v_BTKH, length_BM, start_BM)[0]


def _within_ranges_forward(q_BTNH, k_BTKH, v_BTKH, length_BM, start_BM):
    forward, _, options = _cudnn()
    none = jnp.zeros(0, q_BTNH.dtype)
    taken = (q_BTNH, k_BTKH, v_BTKH, none, length_BM, length_BM, start_BM, start_BM, none, none)
    out, sums = forward(*taken, scale=q_BTNH.shape[-1] ** -0.5, is_training=True, **options)
    return out, (taken, sums, out)


def _within_ranges_backward(kept, d_out_BTNH):
    taken, sums, out = kept
    _, backward, options = _cudnn()
    dq, dk, dv = backward(*taken, sums, out, d_out_BTNH, scale=out.shape[-1] ** -0.5, **options)
    return dq, dk, dv, None, None


_within_ranges.defvjp(_within_ranges_forward, _within_ranges_backward)


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
