"""The loop over micro-batches at a 4B model's true widths, compiled for devices that are not there: what it does with
weights and gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from compile_targets import PLACES, WIDTHS, devices_of

from tsopsd_jax.commands.plan import no_compilation_cache
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import MICRO_BATCHES, abstract_state, make_optimizer, make_update
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.objectives import make_objective
from tsopsd_jax.plan.collectives import Program
from tsopsd_jax.plan.traffic import FREE, loop_of, products, size
from tsopsd_jax.types import Batch

# No activation and no matrix of the head has as many numbers as a layer's matrix, or as its two.
LAYERS, VOCABULARY = 2, 7680


class Updating:
    """An update's program for a few layers: its text, its loop, and the layers' matrices on a device."""

    def __init__(self, place: str):
        devices = devices_of(place)
        mesh = make_mesh(data=1, fsdp=1, tensor=len(devices), devices=devices)
        shape = Qwen3Config(
            vocab_size=VOCABULARY, num_hidden_layers=LAYERS, head_dim=128, tie_word_embeddings=True, **WIDTHS
        )
        model, optimizer = Qwen3(shape, compute_dtype=jnp.bfloat16, mesh=mesh), make_optimizer(learning_rate=1e-6)
        state = abstract_state(model, optimizer, mesh)

        def rows(dtype):
            return jax.ShapeDtypeStruct((6, 256), dtype, sharding=jax.NamedSharding(mesh, jax.P()))

        batch = Batch(rows(jnp.int32), rows(jnp.bool), rows(jnp.float32), rows(jnp.float32))
        update = make_update(model, make_objective("dapo", {}), optimizer, micro_batches=2)
        with no_compilation_cache():
            self.text = jax.jit(update, donate_argnums=0).lower(state, batch).compile().as_text()
        self.sizes = {"data": 1, "fsdp": 1, "tensor": len(devices)}
        self.loop = loop_of(self.text, MICRO_BATCHES)
        layers = jax.tree.leaves(state.params["layers"])
        self.matrices = [x.size // LAYERS // len(devices) for x in layers if x.ndim > 2]


@functools.cache
def updating(place: str) -> Updating:
    return Updating(place)


@pytest.mark.parametrize("place", PLACES)
def test_products_of_the_update_are_of_bfloat16(place):
    """Also those of the backward pass: a gradient is cast to the dtype of what it is multiplied with, and the sums of
    the head's gradients are float32 all the same."""
    found = products(updating(place).loop.computations)
    # Of a layer four, which some compilers take apart, forward and twice backward; of the head three.
    assert len(found) >= LAYERS * 3 * 4 + 3
    assert [product for product in found if product.factors != ("bf16", "bf16")] == []


@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_is_written_once_and_added_once(place):
    """Of a layer's matrices, for each micro-batch: nothing is copied, turned or cast on the way to the sum."""
    update = updating(place)
    gradients_or_sums = {n * stacked for n in update.matrices for stacked in (1, LAYERS)}
    written = 0
    for i in update.loop.body:
        if i.op in FREE or i.op.endswith("-done"):
            continue
        results = re.findall(r"\w+\[[\d,]+\](?:\{[^}]*\})?", i.shape)
        for result in results[:1] if i.op == "copy-start" else results:  # a copy's result is both of its ends
            dims = result.split("[")[1].split("]")[0]
            written += size(result) if math.prod(map(int, dims.split(","))) in gradients_or_sums else 0
    once = LAYERS * sum(update.matrices)
    assert 2 + 4 <= written / once <= 4 + 4, written / once  # a gradient in bfloat16 or float32; a sum in float32


@pytest.mark.parametrize("place", PLACES)
def test_the_loop_moves_activations_alone(place):
    update = updating(place)
    moved = Program(update.text, update.sizes, {MICRO_BATCHES: 2}).moved
    assert all(m.largest <= 3 * 256 * WIDTHS["hidden_size"] for m in moved), moved
