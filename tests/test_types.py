"""The data types: addable means, masks from lengths, batches without junk."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.types import Batch, Mean, Rollout


def test_mean_of_counts_the_mask_and_adds_totals_and_counts():
    a = Mean.of(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]))  # 3 over 2
    b = Mean.of(jnp.array([6.0]), jnp.array([True]))  # 6 over 1
    assert (float(a.total), float(a.count), float(a.value)) == (3.0, 2.0, 1.5)
    both = a + b  # 9 over 3: 3; the mean of the means would be (1.5 + 6) / 2 = 3.75
    assert (float(both.total), float(both.count), float(both.value)) == (9.0, 3.0, 3.0)


def test_mean_never_reads_outside_the_mask():
    values = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    mask = jnp.array([[True, False], [False, True]])
    assert float(Mean.of(values, mask).value) == 1.5
    # Nor does the gradient: 1 inside the mask, exactly 0 outside, although the values are not finite there.
    grad = jax.grad(lambda v: Mean.of(v, mask).total)(values)
    np.testing.assert_array_equal(grad, [[1.0, 0.0], [0.0, 1.0]])


def test_mean_of_nothing_is_zero():
    nothing = Mean.of(jnp.array([jnp.nan]), jnp.array([False]))
    assert (float(nothing.count), float(nothing.value)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "mask"), [((2,), (2, 3)), ((2, 3), (2,)), ((2, 1), (2, 3)), ((), (2, 3)), ((3, 2), (2, 3))]
)
def test_mean_of_wants_one_shape(values, mask):
    """Also of what numpy would stretch: rows under a mask of tokens would be counted once a token."""
    with pytest.raises(ValueError, match=re.escape(f"of one shape, got values {values} and mask {mask}")):
        Mean.of(jnp.zeros(values), jnp.ones(mask, bool))


def test_batch_zeroes_junk_and_keeps_prompt_tokens():
    mask = jnp.array([[False, False, True, True, False], [False, True, False, False, False]])
    junk = jnp.where(mask, 0.5, jnp.nan)
    batch = Batch.of(
        tokens=jnp.array([[5, 6, 7, 0, 10**9], [8, 9, 10**9, -3, 2]]),
        mask=mask,
        advantage=jnp.where(mask, 2.0, jnp.inf),
        old_logp=junk,
    )
    # Prompt tokens (before the first response token) stay; everything after the last response token is 0.
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(batch.advantage, [[0, 0, 2, 2, 0], [0, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.old_logp, [[0, 0, 0.5, 0.5, 0], [0, 0.5, 0, 0, 0]])
    assert batch.mask.dtype == jnp.bool_
    assert batch.tokens.dtype == jnp.int32


def test_batch_accepts_a_mask_of_numbers():
    ones = np.ones((1, 2), np.float32)
    batch = Batch.of(tokens=np.array([[3, 4]]), mask=np.array([[0.0, 1.0]]), advantage=ones, old_logp=ones)
    np.testing.assert_array_equal(batch.mask, [[False, True]])


@pytest.mark.parametrize("field", ["tokens", "mask", "advantage", "old_logp"])
def test_batch_shape_errors_show_the_shapes(field):
    fields = {
        "tokens": np.zeros((2, 3), np.int32),
        "mask": np.ones((2, 3), bool),
        "advantage": np.zeros((2, 3), np.float32),
        "old_logp": np.zeros((2, 3), np.float32),
    }
    fields[field] = fields[field][:, :2]
    with pytest.raises(ValueError, match=rf"'{field}': \(2, 2\)"):
        Batch.of(**fields)


def test_batch_wants_two_dimensions():
    flat = np.zeros((3,), np.float32)
    with pytest.raises(ValueError, match="one shape"):
        Batch.of(tokens=flat.astype(np.int32), mask=flat, advantage=flat, old_logp=flat)


@pytest.mark.parametrize("where", ["host", "device"])
def test_rollout_mask_comes_from_the_lengths_whatever_the_tokens(where):
    # Token 0 is pad and stop token at once: it ends row 0 and counts; row 1 is all zeros and counts too.
    rollout = Rollout(
        tokens=jnp.array([[4, 5, 6, 0, 0], [0, 0, 0, 0, 0]]),
        prompt_length=jnp.array([2, 1]),
        length=jnp.array([4, 5]),
        logp=jnp.zeros((2, 5)),
        stopped=jnp.array([True, False]),
    )
    if where == "host":
        rollout = jax.tree.map(np.asarray, rollout)
    np.testing.assert_array_equal(rollout.mask, [[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(rollout.response_length, [2, 4])
