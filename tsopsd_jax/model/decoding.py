"""The model for sampling: a rollout view of the weights, prefill, and one decoding step over a cache.

The rollout view holds the same weights in the compute dtype, laid out for decoding: a product with few rows is bound by
reading the weight, so matrices stand as [out, in] to be read in order, and those that share an input are one matrix.
Activations are feature-major, [D, M], with M = rows x positions.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int

from tsopsd_jax.model.attention import causal_attention
from tsopsd_jax.model.qwen3 import Qwen3, rms_norm, rotation
from tsopsd_jax.types import PyTree

LayerCache = tuple[Array, Array]
"""Keys [B, K, H, C] and values [B, K, C, H] of a layer."""

AttendCache = Callable[[Array, Array, Array, PyTree], tuple[Array, LayerCache]]
"""(q_BTNH, k_BTKH, v_BTKH, what it has of the layer's cache) -> (out_BTNH, the layer's new cache)"""

Causal = Callable[[Array, Array, Array], Array]
"""(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH"""


def rollout_view(model: Qwen3, params: PyTree) -> PyTree:
    """Lay the weights out as the sampler reads them; to be jitted, with `out_shardings` from `view_axes` on a mesh.

    Returns:
        embed [V, D]; unembed [V, D] (none when tied: embed is both); final_norm [D]; layers, a tuple of dicts of
        qkv [K, G + 2, H, D] (G query heads, the key and the value of each key-value head) and, where there is one, its
        bias qkv_bias [K, G + 2, H], o [D, K, G H], gate_up [2, F, D], down [D, F] and the norms. Norms stay in the
        master dtype, as training uses them.
    """
    c, dtype = model.config, model.compute_dtype
    k = c.num_key_value_heads

    def one(i: int) -> PyTree:
        norms = {name: params["layers"][name][i] for name in _norms(model)}
        w = {name: x[i].astype(dtype) for name, x in params["layers"].items() if name not in norms}
        q_DKGH = rearrange(w["q"], "D (K G) H -> D K G H", K=k)
        qkv_DKEH = jnp.concatenate([q_DKGH, w["k"][:, :, None], w["v"][:, :, None]], axis=2)
        layer = {
            "qkv": rearrange(qkv_DKEH, "D K E H -> K E H D"),
            "o": rearrange(w["o"], "(K G) H D -> D K (G H)", K=k),
            "gate_up": jnp.stack([w["gate"].T, w["up"].T]),
            "down": w["down"].T,
        }
        if c.family.qkv_bias:
            parts = [rearrange(w["q_bias"], "(K G) H -> K G H", K=k), w["k_bias"][:, None], w["v_bias"][:, None]]
            layer["qkv_bias"] = jnp.concatenate(parts, axis=1)
        return layer | norms

    view = {
        "embed": params["embed"].astype(dtype),
        "final_norm": params["final_norm"],
        "layers": tuple(one(i) for i in range(c.num_hidden_layers)),
    }
    # Two results of a jitted function are two buffers, even of one array: a tied matrix would lie there twice.
    return view if c.tie_word_embeddings else view | {"unembed": params["head"].astype(dtype).T}


def _norms(model: Qwen3) -> tuple[str, ...]:
    return tuple(name for name in model.param_shapes()["layers"] if name.endswith("_norm"))


def view_axes(model: Qwen3) -> PyTree:
    """The logical axis names of every array of the view, for `sharding.tree_shardings` with `DECODE_RULES`."""
    layer = {
        "qkv": ("kv_heads", "parts", "head_dim", "embed"),
        "o": ("embed", "kv_heads", "parts"),
        "gate_up": ("parts", "mlp", "embed"),
        "down": ("embed", "mlp"),
    } | dict.fromkeys(_norms(model), ("norm",))
    if model.config.family.qkv_bias:
        layer["qkv_bias"] = ("kv_heads", "parts", "head_dim")
    axes = {
        "embed": ("vocab", "embed"),
        "final_norm": ("norm",),
        "layers": (layer,) * model.config.num_hidden_layers,
    }
    return axes if model.config.tie_word_embeddings else axes | {"unembed": ("vocab", "embed")}


def prefill(
    model: Qwen3, view: PyTree, tokens: Int[Array, "B T"], *, attention: Causal = causal_attention
) -> tuple[LayerCache, ...]:
    """Make the cache of whole prompts, [B, K, H, T] and [B, K, T, H] per layer.

    What stands beyond a prompt's end is junk that no position of the prompt sees. `attention` is `causal_attention`
    with an implementation chosen.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)

    def attend(q_BTNH, k_BTKH, v_BTKH, _):
        new = rearrange(k_BTKH, "B T K H -> B K H T"), rearrange(v_BTKH, "B T K H -> B K T H")
        return attention(q_BTNH, k_BTKH, v_BTKH), new

    nothing = (None,) * model.config.num_hidden_layers
    _, cache = _trunk(model, view, tokens, positions_BT, attend, nothing)
    return cache


def decode(
    model: Qwen3,
    view: PyTree,
    tokens: Int[Array, " B"],
    position: Int[Array, " B"],
    attend: AttendCache,
    caches: Sequence[PyTree],
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Decode one token per row, each at its own position.

    Returns:
        Float32 logits [B, V] of the next token, and what `attend` made of each layer's cache.
    """
    x_DB, caches = _trunk(model, view, tokens[:, None], position[:, None], attend, caches)
    x_DB = _norm(x_DB, view["final_norm"], model.config.rms_norm_eps)
    logits_VB = jnp.einsum("VD,DB->VB", view.get("unembed", view["embed"]), x_DB, preferred_element_type=jnp.float32)
    return _apart(logits_VB).T, caches


def _trunk(
    model: Qwen3, view: PyTree, tokens_BT: Array, positions_BT: Array, attend: AttendCache, caches: Sequence[PyTree]
) -> tuple[Array, tuple[LayerCache, ...]]:
    c, new = model.config, []
    turn = rotation(positions_BT.reshape(-1), c.head_dim, c.rope_theta, c.yarn)  # once for all layers
    turn = _apart(turn[0]), _apart(turn[1])
    # Jitted to be traced and lowered once, not once a layer; XLA inlines it.
    layer = jax.jit(functools.partial(_layer, model, attend, len(tokens_BT)))
    x_DM = jnp.take(view["embed"], tokens_BT.reshape(-1), axis=0).T
    for w, cache in zip(view["layers"], caches, strict=True):
        x_DM, cache = layer(w, x_DM, turn, cache)
        new.append(cache)
    return x_DM, tuple(new)


def _layer(
    model: Qwen3, attend: AttendCache, b: int, w: PyTree, x_DM: Array, turn: tuple[Array, Array], cache
) -> tuple[Array, LayerCache]:
    c = model.config
    cos_MH, sin_MH = turn

    def rows(x_MKEH: Array) -> Array:
        return rearrange(x_MKEH, "(B T) K E H -> B T (K E) H", B=b)

    def position(x_MKEH: Array, scale_H: Array | None) -> Array:
        normed = x_MKEH if scale_H is None else rms_norm(x_MKEH, scale_H, c.rms_norm_eps)
        return _rotate(normed, cos_MH, sin_MH)

    y_DM = _norm(x_DM, w["attention_norm"], c.rms_norm_eps)
    qkv_KEHM = _apart(jnp.einsum("KEHD,DM->KEHM", w["qkv"], y_DM))
    if c.family.qkv_bias:
        qkv_KEHM = qkv_KEHM + w["qkv_bias"][..., None]
    qkv_MKEH = _apart(rearrange(qkv_KEHM, "K E H M -> M K E H"))
    q_BTNH = rows(position(qkv_MKEH[:, :, :-2], w.get("q_norm")))
    k_BTKH = rows(position(qkv_MKEH[:, :, -2:-1], w.get("k_norm")))
    out_BTNH, cache = attend(q_BTNH, k_BTKH, rows(qkv_MKEH[:, :, -1:]), cache)
    out_KEM = _apart(rearrange(out_BTNH, "B T (K G) H -> K (G H) (B T)", K=c.num_key_value_heads))
    x_DM = x_DM + jax.lax.dot_general(w["o"], out_KEM, (((1, 2), (0, 1)), ((), ())))
    y_DM = _norm(x_DM, w["mlp_norm"], c.rms_norm_eps)
    gate_up_CFM = jnp.einsum("CFD,DM->CFM", w["gate_up"], y_DM)
    x_DM = x_DM + jnp.einsum("DF,FM->DM", w["down"], jax.nn.silu(gate_up_CFM[0]) * gate_up_CFM[1])
    return x_DM, cache


def _norm(x_DM: Array, scale_D: Array, eps: float) -> Array:
    """`rms_norm` over the leading axis."""
    x32 = x_DM.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=0, keepdims=True) + eps)
    return (x32 * inverse * scale_D.astype(jnp.float32)[:, None]).astype(x_DM.dtype)


def _rotate(x_MKEH: Array, cos_MH: Array, sin_MH: Array) -> Array:
    a, b = jnp.split(x_MKEH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_MH[:, None, None], sin_MH[:, None, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_MKEH.dtype)


def _apart(x: Array) -> Array:
    """Keeps a transpose out of the product or loop beside it: folded in, XLA's CPU code runs at a third of its rate."""
    return jax.lax.optimization_barrier(x)
