"""Continuous batching: the same rows whatever the slots, pages, order and devices; and the schedule by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.rollout import Engine, Sampling, sample
from tsopsd_jax.sharding import make_mesh
from tsopsd_jax.types import Prompts

WIDTH, LIMIT = 8, 13
STOPS = (3, 17)


@pytest.fixture(scope="module")
def prompts():
    """Six groups of two rows; prompts of 1 to 8 tokens."""
    rng = np.random.default_rng(5)
    length = np.repeat(np.array([8, 1, 3, 6, 5, 4], np.int32), 2)
    tokens = np.repeat(rng.integers(0, 37, size=(6, WIDTH)), 2, axis=0).astype(np.int32)
    return Prompts(tokens=tokens, length=length, row_id=np.arange(12, dtype=np.uint32) + 5)


@pytest.fixture(scope="module")
def whole(tiny, prompts):
    """The same rows from the sampler inside jit: every row at once, no pages."""
    model, params = tiny
    run = functools.partial(sample, model, sampling=Sampling(), max_response_tokens=LIMIT, stop_ids=STOPS)
    rollout = jax.jit(run)(params, jax.tree.map(jnp.asarray, prompts), jax.random.key(11))
    return jax.tree.map(np.asarray, rollout)


def engine_of(model, *, slots, segment, devices=1, **mesh):
    return Engine(
        model,
        make_mesh(**(mesh or {"fsdp": 1}), devices=jax.devices()[:devices]),
        sampling=Sampling(),
        max_prompt_tokens=WIDTH,
        max_response_tokens=LIMIT,
        stop_ids=STOPS,
        slots=slots,
        segment=segment,
    )


def same(a, b):
    for name in ("tokens", "prompt_length", "length", "stopped"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "segment", "group"),
    [(12, LIMIT, 1), (12, LIMIT, 2), (3, LIMIT, 2), (3, 2, 2), (5, 4, 1), (1, 3, 2), (64, 4, 2)],
)
def test_slots_pages_and_groups_change_nothing(tiny, prompts, whole, slots, segment, group):
    model, params = tiny
    assert 2 <= whole.stopped.sum() <= 10, "the case must show both ends"
    engine = engine_of(model, slots=slots, segment=segment)
    rollout = engine.run(engine.view(params), prompts, jax.random.key(11), group=group)
    same(rollout, whole)
    assert engine.progress.finished == 12
    assert engine.progress.tokens == whole.response_length.sum()
