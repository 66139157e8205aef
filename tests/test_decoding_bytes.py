"""The loop over tokens at a 4B model's true widths, compiled for devices that are not there: the bytes of device memory
that a token moves, beside what it must read."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from compile_targets import PLACES, WIDTHS, devices_of

from tsopsd_jax.commands.plan import no_compilation_cache
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.plan.collectives import Program
from tsopsd_jax.plan.traffic import FREE, loop_of, products, size
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rollout.segment import STEPS

LAYERS, SLOTS = 36, 64
MOST = 1.25
"""Of weights and live cache, that a token may move."""


class Decoding:
    """A decoding segment's program for a few layers: its text, its loop, and what a token must read."""

    def __init__(self, place: str, layers: int):
        devices = devices_of(place)
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
        self.loop = loop_of(self.text, STEPS)

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


@functools.cache
def decoding(place: str, layers: int) -> Decoding:
    return Decoding(place, layers)


@pytest.mark.parametrize("place", PLACES)
def test_a_token_moves_little_beside_weights_and_cache(place):
    """Counted for one layer and for two, and so for 36."""
    one, two = decoding(place, 1), decoding(place, 2)

    def whole(one: int, two: int) -> int:
        return one + (LAYERS - 1) * (two - one)

    ratio = whole(one.loop.bytes_moved, two.loop.bytes_moved) / whole(one.needed, two.needed)
    assert 0.8 < ratio <= MOST, ratio  # what reads less than the weights was not counted


@pytest.mark.parametrize("place", PLACES)
def test_the_loop_neither_copies_nor_moves_a_weight(place):
    """No instruction of the body writes a matrix's bytes to device memory (a TPU fetches some into the chip's own ahead
    of their product), and between devices only activations move."""
    two = decoding(place, 2)
    weights = {x.size * x.dtype.itemsize // two.shards for x in jax.tree.leaves(two.view) if x.ndim > 1}
    written = [
        (i.name, i.shape)
        for i in two.loop.body
        if i.op not in FREE and not i.op.startswith("copy-") and size(i.shape) in weights
    ]
    assert written == []
    fetched = [i.shape for i in two.loop.body if i.op == "copy-start" and size(i.shape) >= 2 * min(weights)]
    assert [shape for shape in fetched if "S(1)" not in shape] == []
    crossing = Program(two.text, {"data": 1, "fsdp": 1, "tensor": two.shards}, {STEPS: 1}).moved
    assert all(m.largest <= SLOTS * WIDTHS["hidden_size"] for m in crossing), crossing


@pytest.mark.parametrize("place", PLACES)
def test_products_of_the_loop_are_of_bfloat16(place):
    found = products(decoding(place, 2).loop.computations)
    assert len(found) >= 2 * 4 + 1  # a layer's four with weights, and the head; a TPU's attention to the tail beside
    assert [product for product in found if product.factors != ("bf16", "bf16")] == []
