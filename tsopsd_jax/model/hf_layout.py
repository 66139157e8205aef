"""The tensors of a Hugging Face checkpoint against our parameter tree: names, axes, dtypes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from einops import rearrange

from tsopsd_jax.model.qwen3 import Qwen3

STORED_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


class WeightLayout(NamedTuple):
    """One tensor on disk: axes as `stored`, "NH D" being N heads of H merged, against `ours`, "DNH"."""

    name: str
    stored: str
    ours: str

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.ours, shape, strict=True))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = self.sizes(shape)
        return tuple(math.prod(sizes[a] for a in group) for group in self.stored.split())

    def read(self, tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """Our `index` of a stored tensor, touching only the rows and columns that it needs.

        Raises:
            ValueError: if one of its numbers is not finite.
        """
        sizes, at = self.sizes(shape), dict(zip(self.ours, index, strict=True))
        cut = []
        for first, *inner in self.stored.split():
            width = math.prod(sizes[a] for a in inner)
            cut.append(slice(at[first].start * width, at[first].stop * width))
            # Whole heads are read; of their components those outside `index` are dropped afterwards.
            sizes[first], at[first] = at[first].stop - at[first].start, slice(None)
        values = tensor[tuple(cut)]
        check_finite(values, self.name)
        return rearrange(values, f"{self._merged()} -> {' '.join(self.ours)}", **sizes)[tuple(at[a] for a in self.ours)]

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rearrange(value, f"{' '.join(self.ours)} -> {self._merged()}"))

    def _merged(self) -> str:
        """The stored axes as einops writes them: "NH D" is "(N H) (D)"."""
        return " ".join(f"({' '.join(group)})" for group in self.stored.split())


EMBED = WeightLayout("model.embed_tokens.weight", "V D", "VD")
HEAD = WeightLayout("lm_head.weight", "V D", "DV")
NORM = WeightLayout("model.norm.weight", "D", "D")
LAYER = {
    "attention_norm": WeightLayout("input_layernorm.weight", "D", "D"),
    "q": WeightLayout("self_attn.q_proj.weight", "NH D", "DNH"),
    "k": WeightLayout("self_attn.k_proj.weight", "KH D", "DKH"),
    "v": WeightLayout("self_attn.v_proj.weight", "KH D", "DKH"),
    "q_bias": WeightLayout("self_attn.q_proj.bias", "NH", "NH"),
    "k_bias": WeightLayout("self_attn.k_proj.bias", "KH", "KH"),
    "v_bias": WeightLayout("self_attn.v_proj.bias", "KH", "KH"),
    "q_norm": WeightLayout("self_attn.q_norm.weight", "H", "H"),
    "k_norm": WeightLayout("self_attn.k_norm.weight", "H", "H"),
    "o": WeightLayout("self_attn.o_proj.weight", "D NH", "NHD"),
    "mlp_norm": WeightLayout("post_attention_layernorm.weight", "D", "D"),
    "gate": WeightLayout("mlp.gate_proj.weight", "F D", "DF"),
    "up": WeightLayout("mlp.up_proj.weight", "F D", "DF"),
    "down": WeightLayout("mlp.down_proj.weight", "D F", "FD"),
}
"""The tensors of one layer; an architecture has those that its parameters have."""


class Stored(NamedTuple):
    """One tensor on disk: which parameter, which layer of it, and that layer's shape in our axes."""

    layout: WeightLayout
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def stored_tensors(model: Qwen3) -> Iterator[Stored]:
    """Every stored tensor of a model, in the order of its forward pass."""
    shapes = model.param_shapes()
    yield Stored(EMBED, ("embed",), None, shapes["embed"].shape)
    for i in range(model.config.num_hidden_layers):
        for key, layout in LAYER.items():
            if key not in shapes["layers"]:
                continue
            full = layout._replace(name=f"model.layers.{i}.{layout.name}")
            yield Stored(full, ("layers", key), i, shapes["layers"][key].shape[1:])
    yield Stored(NORM, ("final_norm",), None, shapes["final_norm"].shape)
    if not model.config.tie_word_embeddings:
        yield Stored(HEAD, ("head",), None, shapes["head"].shape)


def cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Cast a tensor's numbers.

    Raises:
        ValueError: if one is too large for float16, the only dtype that can overflow.
    """
    with np.errstate(over="ignore"):
        out = value.astype(dtype, copy=False)
    if dtype == np.float16 and value.dtype != dtype and np.isinf(out).any():
        raise ValueError(f"{name}: a value exceeds float16's largest, 65504; use bfloat16 or float32")
    return out


def check_finite(values: np.ndarray, name: str) -> None:
    """Raise ValueError if one of the numbers, of one of DTYPES, is not finite.

    Their bits tell: an exponent of ones. Integers compare some ten times as fast as bfloat16,
    which numpy has no loops for.
    """
    kind = next(kind for kind, dtype in STORED_DTYPES.items() if dtype == values.dtype)
    bits = values.reshape(-1).view(np.uint32 if kind == "F32" else np.uint16)
    infinity = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[kind]
    without_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    for start in range(0, bits.size, 2**18):  # what a cache holds
        if (bits[start : start + 2**18] & without_sign).max() >= infinity:
            raise ValueError(
                f"{name}: expected finite numbers, got nan or inf: the checkpoint is damaged, or its training was"
            )
