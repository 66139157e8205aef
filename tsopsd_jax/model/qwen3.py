"""Qwen3 and its neighbours in Flax NNX, behind plain functions of a parameter tree.

The NNX module declares the parameters (shapes, initialisation, logical axes) and one block's mathematics; the `Qwen3`
dataclass is what the rest of the package sees: `hidden` and `logits` on a nested dict of arrays. Layers are stacked on
a leading axis and run under `scan`. Llama and Qwen2 are the same model without the norms of queries and keys, Qwen2
with biases in their place. Sampling has the same model over again in `decoding`: other weights' layout, a cache, no
gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tsopsd_jax.model.attention import causal_attention
from tsopsd_jax.types import PyTree


class Family(NamedTuple):
    """What sets an architecture apart from the others."""

    model_type: str
    """The name in config.json."""
    qk_norm: bool
    """Each head's query and key are RMS-normed before the rotation."""
    qkv_bias: bool
    """Query, key and value projections have a bias."""


FAMILIES = {
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, qkv_bias=False),
    "Qwen2ForCausalLM": Family("qwen2", qk_norm=False, qkv_bias=True),
    "LlamaForCausalLM": Family("llama", qk_norm=False, qkv_bias=False),
}
"""The families by Hugging Face's name of the architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071): a rotation for contexts `factor` times as long as those of pretraining.

    Names follow the Hugging Face config.
    """

    factor: float
    original_max_position_embeddings: int
    """Positions of pretraining."""
    beta_fast: float = 32.0
    """Components that turn more often than this within the positions of pretraining keep their frequency."""
    beta_slow: float = 1.0
    """Components that turn less often than this have it divided by `factor`; those in between have a mixture."""
    truncate: bool = True
    """Whether the range in between is widened to whole components."""
    attention_factor: float | None = None
    """Factor of rotated queries and keys; None: 0.1 ln(`factor`) + 1 (equation 22)."""

    def __post_init__(self):
        if not self.factor >= 1 or self.original_max_position_embeddings < 1:
            raise ValueError(
                "YaRN: expected factor and original_max_position_embeddings of at least 1, "
                f"got {self.factor} and {self.original_max_position_embeddings}"
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"YaRN: expected beta_fast > beta_slow > 0, got {self.beta_fast} and {self.beta_slow}")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"YaRN: expected attention_factor above 0, got {self.attention_factor}")

    @property
    def scale(self) -> float:
        """The factor of rotated queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def kept(self, head_dim: int, theta: float) -> np.ndarray:
        """The share of each component's frequency that is not divided by `factor`, [head_dim / 2] from 1 to 0 (section
        3.2)."""

        def component(turns: float) -> float:
            """The component that turns so often within the positions of pretraining."""
            return head_dim / 2 * math.log(self.original_max_position_embeddings / (2 * math.pi * turns), theta)

        low, high = component(self.beta_fast), component(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return 1 - np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """The shape of a model of one of FAMILIES; names follow the Hugging Face config. `head_dim` is its own field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    yarn: Yarn | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    architecture: str = "Qwen3ForCausalLM"

    def __post_init__(self):
        if self.architecture not in FAMILIES:
            raise ValueError(f"architecture: expected one of {', '.join(FAMILIES)}, got {self.architecture!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]


def rms_norm(x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*N D"]:
    """Normalise the last axis by its root mean square: x / sqrt(mean(x^2) + eps) * scale, computed in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale32 = jnp.broadcast_to(scale.astype(jnp.float32), x32.shape)
    return (x32 * inverse * scale32).astype(x.dtype)


def rope_frequency(head_dim: int, theta: float, yarn: Yarn | None = None) -> Array:
    """The rotation's frequencies, [head_dim / 2] in radians per position."""
    half = head_dim // 2
    # A constant made in float64: the position multiplies the error of an accelerator's float32 power.
    frequency = np.power(float(theta), -np.arange(half) / half)
    if yarn is not None:
        kept = yarn.kept(head_dim, theta)
        frequency = frequency * kept + frequency / yarn.factor * (1 - kept)
    return jnp.asarray(frequency, jnp.float32)


def rotation(positions: Array, head_dim: int, theta: float, yarn: Yarn | None = None) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, [..., head_dim / 2] in float32, times what YaRN scales queries and keys
    by."""
    frequency_H = rope_frequency(head_dim, theta, yarn)
    angle = positions.astype(jnp.float32)[..., None] * frequency_H[(None,) * positions.ndim]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if yarn is None else (cos * yarn.scale, sin * yarn.scale)


def rope(x_BTNH: Array, positions_BT: Array, theta: float, yarn: Yarn | None = None) -> Array:
    """Rotary position embedding, half-split layout; angles in float32 whatever the compute dtype."""
    cos, sin = (x[:, :, None, :] for x in rotation(positions_BT, x_BTNH.shape[-1], theta, yarn))
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


Attend = Callable[[Array, Array, Array], Array]
"""(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH"""

REMAT = ("none", "dots", "full")
"""What a layer's backward pass finds: results of matrix products and of kernels, so that only elementwise functions are
computed again; results of products with weights, the rest computed again; its input, all computed again."""

_SHALLOW = 4
"""Layers up to which a model is unrolled: the loop's stacked residuals cost more there than it saves in compilation."""

_CHEAP = frozenset(
    "add add_any broadcast_in_dim concatenate convert_element_type div exp expand_dims integer_pow logistic max mul "  # noqa: SIM905
    "neg reduce_max reduce_sum reshape rsqrt select_n slice split square squeeze stop_gradient sub transpose".split()
)
"""Primitives that are computed again rather than kept: a kept one is a buffer of its own for each layer."""


def _costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether the result of a primitive is kept for the backward pass where `remat` is none."""
    return primitive.name not in _CHEAP


_KEPT = {
    "none": _costly,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """One decoder layer; parameters are kept in the master dtype and cast where they are used."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
        n, kv = config.num_attention_heads, config.num_key_value_heads
        self.config = config

        def weight(shape, axes):
            value = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
            return nnx.Param(value, axes=axes)

        def ones(size, axis):
            return nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))

        def bias(heads, axis):
            return nnx.Param(jnp.zeros((heads, h), jnp.float32), axes=(axis, "head_dim"))

        self.attention_norm = ones(d, "norm")
        self.q = weight((d, n, h), ("embed", "heads", "head_dim"))
        self.k = weight((d, kv, h), ("embed", "kv_heads", "head_dim"))
        self.v = weight((d, kv, h), ("embed", "kv_heads", "head_dim"))
        if config.family.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = bias(n, "heads"), bias(kv, "kv_heads"), bias(kv, "kv_heads")
        if config.family.qk_norm:
            self.q_norm, self.k_norm = ones(h, "norm"), ones(h, "norm")
        self.o = weight((n, h, d), ("heads", "head_dim", "embed"))
        self.mlp_norm = ones(d, "norm")
        self.gate = weight((d, f), ("embed", "mlp"))
        self.up = weight((d, f), ("embed", "mlp"))
        self.down = weight((f, d), ("mlp", "embed"))

    def __call__(self, x_BTD: Array, positions_BT: Array, attend: Attend) -> Array:
        """x -> x; the T positions attend among themselves."""
        c, dtype = self.config, x_BTD.dtype
        # M = B * T: on one axis, the gradients of the weights are plain matrix products. With B and T apart XLA writes
        # transposed copies of the activations for them (on a CPU that doubles the time of the whole update).
        x_MD, rows = rearrange(x_BTD, "B T D -> (B T) D"), x_BTD.shape[0]
        y_MD = rms_norm(x_MD, self.attention_norm[...], c.rms_norm_eps)

        def heads(weight_DNH: Array) -> Array:
            flat = y_MD @ rearrange(weight_DNH, "D N H -> D (N H)").astype(dtype)
            return rearrange(flat, "(B T) (N H) -> B T N H", B=rows, H=c.head_dim)

        q_BTNH, k_BTKH, v_BTKH = heads(self.q[...]), heads(self.k[...]), heads(self.v[...])
        if c.family.qkv_bias:
            q_BTNH = q_BTNH + self.q_bias[...].astype(dtype)[None, None]
            k_BTKH = k_BTKH + self.k_bias[...].astype(dtype)[None, None]
            v_BTKH = v_BTKH + self.v_bias[...].astype(dtype)[None, None]
        if c.family.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], c.rms_norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], c.rms_norm_eps)
        q_BTNH, k_BTKH = (rope(x, positions_BT, c.rope_theta, c.yarn) for x in (q_BTNH, k_BTKH))
        flat = rearrange(attend(q_BTNH, k_BTKH, v_BTKH), "B T N H -> (B T) (N H)")
        x_MD = x_MD + flat @ rearrange(self.o[...], "N H D -> (N H) D").astype(dtype)
        y_MD = rms_norm(x_MD, self.mlp_norm[...], c.rms_norm_eps)
        gate_MF = jax.nn.silu(y_MD @ self.gate[...].astype(dtype))
        up_MF = y_MD @ self.up[...].astype(dtype)
        x_MD = x_MD + (gate_MF * up_MF) @ self.down[...].astype(dtype)
        return rearrange(x_MD, "(B T) D -> B T D", B=rows)


class Qwen3Module(nnx.Module):
    """The whole parameter tree: embedding, stacked blocks, final norm, and a head unless it is tied."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        v, d = config.vocab_size, config.hidden_size

        def weight(shape, axes):
            value = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
            return nnx.Param(value, axes=axes)

        self.embed = weight((v, d), ("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @functools.partial(nnx.vmap, transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = nnx.Param(jnp.ones((d,), jnp.float32), axes=("norm",))
        if not config.tie_word_embeddings:
            self.head = weight((d, v), ("embed", "vocab"))


@functools.cache
def _abstract(config: Qwen3Config):
    """(graph of one block, abstract parameter tree, logical axes of every parameter)."""
    module = nnx.eval_shape(lambda: Qwen3Module(config, rngs=nnx.Rngs(0)))
    state = nnx.state(module)
    shapes = nnx.to_pure_dict(state)
    is_param = functools.partial(lambda x: isinstance(x, nnx.Variable))

    def axes_of(param: nnx.Variable, shape: jax.ShapeDtypeStruct) -> tuple[str, ...]:
        names = tuple(param.get_metadata("axes"))
        return names if len(names) == len(shape.shape) else ("layers", *names)

    flat, treedef = jax.tree.flatten(shapes)
    names = [axes_of(p, s) for p, s in zip(jax.tree.leaves(state, is_leaf=is_param), flat, strict=True)]
    block = nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    return block, shapes, jax.tree.unflatten(treedef, names)


def segment_starts(segment: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The position at which each position's segment starts: position minus start counts from 0 in every segment."""
    at = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    first = jnp.diff(segment, axis=1, prepend=segment[:, :1]) != 0
    return jax.lax.cummax(jnp.where(first, at, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Qwen3:
    """A model of one of FAMILIES as functions of its parameters (a nested dict of arrays).

    `compute_dtype` is the dtype of activations and matrix products (logits are float32 always); `remat` one of REMAT,
    for each layer. `mesh` is the one that rows and parameters lie on (None: one device): the best attention for it is
    taken, and kernels and the head's tiles are divided over it.
    """

    config: Qwen3Config
    compute_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat: expected one of {', '.join(REMAT)}, got {self.remat!r}")

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def param_shapes(self) -> PyTree:
        """The parameter tree as ShapeDtypeStructs (float32)."""
        return _abstract(self.config)[1]

    def param_axes(self) -> PyTree:
        """The logical axis names of every parameter, for `sharding.tree_shardings`."""
        return _abstract(self.config)[2]

    def init(self, key: Array, *, shardings: PyTree | None = None) -> PyTree:
        """Random float32 parameters; with `shardings` each device makes its own part."""

        def make(key):
            return nnx.to_pure_dict(nnx.state(Qwen3Module(self.config, rngs=nnx.Rngs(params=key))))

        return jax.jit(make, out_shardings=shardings)(key)

    def unembed(self, params: PyTree) -> Float[Array, "D V"]:
        """The output matrix; the transposed embedding when tied."""
        return params["embed"].T if self.config.tie_word_embeddings else params["head"]

    def _embed(self, params: PyTree, tokens_BT: Array) -> Array:
        return jnp.take(params["embed"], tokens_BT, axis=0).astype(self.compute_dtype)

    def hidden(
        self, params: PyTree, tokens: Int[Array, "B L"], segment: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Final hidden states (after the last norm) of whole rows, every position attending causally.

        Args:
            segment: [B, L], where rows hold several sequences: equal numbers side by side are one, whose positions
                count from 0 and attend among themselves.
        """
        x_BLD, _ = self._run(params, tokens, segment, every=False)
        return rms_norm(x_BLD, params["final_norm"], self.config.rms_norm_eps)

    def layer_states(self, params: PyTree, tokens: Int[Array, "B L"]) -> Float[Array, "layers B L D"]:
        """The output of every layer (the residual stream after it, before the last norm) of whole rows. For
        analyses."""
        _, states = self._run(params, tokens, None, every=True)
        assert states is not None
        return states

    def _run(self, params: PyTree, tokens_BT: Array, segment: Array | None, *, every: bool):
        """Go through the layers: (the last one's output, those of all, stacked, if `every` is asked for)."""
        positions_BL = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
        if segment is not None:
            positions_BL = positions_BL - segment_starts(segment)

        def body(x_BLD, layer):
            block = nnx.merge(_abstract(self.config)[0], layer)
            x_BLD = block(x_BLD, positions_BL, lambda q, k, v: causal_attention(q, k, v, segment, mesh=self.mesh))
            return x_BLD, x_BLD if every else None

        step, shallow = body, self.config.num_hidden_layers <= _SHALLOW
        if self.remat != "none" or not shallow:
            step = jax.checkpoint(body, prevent_cse=False, policy=_KEPT[self.remat])
        return jax.lax.scan(step, self._embed(params, tokens_BT), params["layers"], unroll=shallow)

    def project(self, params: PyTree, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Project hidden states to float32 logits."""
        unembed = self.unembed(params).astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, unembed, preferred_element_type=jnp.float32)

    def logits(self, params: PyTree, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Float32 logits of every position. Materialises [B, L, V]: for tests and small models."""
        return self.project(params, self.hidden(params, tokens))
