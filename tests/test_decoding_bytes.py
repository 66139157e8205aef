"""The loop over tokens at a 4B model's true widths, compiled for devices that are not there: the bytes of device memory
that a token moves, beside what it must read."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from program_bytes import FREE, moved, operands, size

from tsopsd_jax.commands.plan import no_compilation_cache
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.plan.collectives import Program, _computations
from tsopsd_jax.plan.topologies import topology
from tsopsd_jax.rollout import Engine, Sampling

LAYERS, SLOTS = 36, 64
WIDTHS = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
MOST = 1.25
"""Of weights and live cache, that a token may move."""

GPU = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="the GPU compiler is not installed (extra `cuda`)",
)
TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed (extra `tpu`)"
)
PLACES = [pytest.param("h100:1", marks=[GPU, pytest.mark.gpu_compiler]), pytest.param("v5p:2x2x1", marks=TPU)]


class Decoding:
    """A decoding segment's program for a few layers: its text, the loop's body, and what a token must read."""

    def __init__(self, place: str, layers: int):
        try:
            devices = topology(place).devices
        except ValueError as error:  # another process may hold the library
            pytest.skip(f"the compiler cannot be used here: {error}")
        assert devices is not None
        self.shards, self.layers = len(devices), layers
        mesh = make_mesh(data=1, fsdp=1, tensor=self.shards, devices=devices)
        config = Qwen3Config(
            vocab_size=151_936, num_hidden_layers=layers, head_dim=128, tie_word_embeddings=True, **WIDTHS
        )
        model = Qwen3(config, compute_dtype=jnp.bfloat16, mesh=mesh)
        self.params = abstract_state(model, optax.adamw(1e-6), mesh).params
        self.engine = Engine(
            model,
            mesh,
            sampling=Sampling(),
            max_prompt_tokens=512,
            max_response_tokens=1024,
            stop_ids=(0, 1),
            slots=SLOTS,
        )
        with no_compilation_cache():
            self.text = self.engine.on_device.lower_segment(self.params).compile().as_text()
        self.computations, _ = _computations(self.text)
        loops = [i for found in self.computations.values() for i in found if i.op == "while"]
        (loop,) = [i for i in loops if "decoding_steps/while" in i.rest]
        body = re.search(r"body=%?([\w.\-]+)", loop.rest)
        assert body is not None
        self.body = self.computations[body[1]]

    @property
    def view(self):
        return jax.eval_shape(self.engine.on_device.view, self.params)

    @property
    def needed(self) -> int:
        """Bytes on a device: all weights once, and the cache of all slots at full length, tails and pages."""
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.view))
        geometry, pages = self.engine.geometry, self.engine.on_device.pool_sizes()[-1]
        places = pages * geometry.segment_tokens + SLOTS * (geometry.home + geometry.segment_tokens)
        cache = self.layers * places * 2 * WIDTHS["num_key_value_heads"] * 128 * 2
        return (weights + cache) // self.shards

    @property
    def moved(self) -> int:
        return sum(moved(self.body, self.computations).values())


@functools.cache
def decoding(place: str, layers: int) -> Decoding:
    return Decoding(place, layers)


@pytest.mark.parametrize("place", PLACES)
def test_a_token_moves_little_beside_weights_and_cache(place):
    """Counted for one layer and for two, and so for 36."""
    one, two = decoding(place, 1), decoding(place, 2)

    def whole(one: int, two: int) -> int:
        return one + (LAYERS - 1) * (two - one)

    ratio = whole(one.moved, two.moved) / whole(one.needed, two.needed)
    assert 0.8 < ratio <= MOST, ratio  # what reads less than the weights was not counted


@pytest.mark.parametrize("place", PLACES)
def test_the_loop_neither_copies_nor_moves_a_weight(place):
    """No instruction of the body writes a matrix's bytes to device memory (a TPU fetches some into the chip's own ahead
    of their product), and between devices only activations move."""
    two = decoding(place, 2)
    weights = {x.size * x.dtype.itemsize // two.shards for x in jax.tree.leaves(two.view) if x.ndim > 1}
    written = [
        (i.name, i.shape)
        for i in two.body
        if i.op not in FREE and not i.op.startswith("copy-") and size(i.shape) in weights
    ]
    assert written == []
    fetched = [i.shape for i in two.body if i.op == "copy-start" and size(i.shape) >= 2 * min(weights)]
    assert [shape for shape in fetched if "S(1)" not in shape] == []
    crossing = Program(two.text, {"data": 1, "fsdp": 1, "tensor": two.shards}, {"decoding_steps": 1}).moved
    assert all(m.largest <= SLOTS * WIDTHS["hidden_size"] for m in crossing), crossing


@pytest.mark.parametrize("place", PLACES)
def test_products_of_the_loop_are_of_bfloat16(place):
    found = []
    for instructions in decoding(place, 2).computations.values():
        known = {i.name: i.shape for i in instructions}
        for i in instructions:
            if i.op in ("dot", "convolution") or (i.op == "custom-call" and "gemm" in i.rest):
                found.append((i.name, [known[name].split("[")[0] for name in operands(i)[:2]]))
    assert len(found) >= 2 * 4 + 1  # a layer's four with weights, and the head; a TPU's attention to the tail beside
    assert [product for product in found if product[1] != ["bf16", "bf16"]] == []
