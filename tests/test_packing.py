"""Packing: every token once, in its row's order; few rows; and how an update is cut to fit a device."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.learn.micro_batches import TOKENS_PER_DEVICE, choose_micro_batches, exhausted_bytes, needed_bytes
from tsopsd_jax.learn.packing import fill_rows, pack, pack_in_program, useful_fraction
from tsopsd_jax.model.qwen3 import segment_starts
from tsopsd_jax.types import Batch


def batch_of(length, width):
    """Row i's tokens are 100 i + position; the last two of each are its response."""
    at, i = np.arange(width)[None, :], np.arange(len(length))[:, None]
    live, mask = at < length[:, None], (at < length[:, None]) & (at >= length[:, None] - 2)
    return Batch(
        tokens=np.where(live, 100 * i + at, 0).astype(np.int32),
        mask=mask,
        advantage=np.where(mask, i + 1.0, 0).astype(np.float32),
        old_logp=np.where(mask, -i - at / 10, 0).astype(np.float32),
    )


def test_rows_are_filled_longest_first():
    # 6 | 5 | 4 3 | 2 ... : 6 (room 1), 5 (room 2), 4, then 3 joins 4; 2 joins 5; 1 joins 6.
    np.testing.assert_array_equal(fill_rows(np.array([1, 2, 3, 4, 5, 6]), 7), [0, 1, 2, 2, 1, 0])
    with pytest.raises(ValueError, match="a sequence of 8 tokens is longer than a row of 7"):
        fill_rows(np.array([8]), 7)


def test_a_row_holds_so_many_sequences_and_no_more():
    """33 sequences of one token fit a row of 40; the 33rd begins another row, since attention counts up to 32."""
    np.testing.assert_array_equal(fill_rows(np.ones(33, np.int64), 40), [0] * 32 + [1])


def test_every_token_once_in_order_with_its_segment():
    length, width = np.array([3, 7, 2, 4, 5, 3]), 8
    batch = batch_of(length, width)
    packed = pack(batch, length, micro_batches=3)
    # 7 | 5 3 | 4 3 | 2 -> 7 . | 5 3 | 4 3 | 2 cannot join (7 + 2 > 8, 4 + 3 + 2 > 8): four rows. Fill order 0..3 is
    # rows 0, 3 (micro-batch 0) and 1, 4 (micro-batch 1); micro-batch 2 is empty.
    want = {0: [1], 3: [0, 4], 1: [3, 5], 4: [2]}  # within a row by number
    for row in range(6):
        sequences = want.get(row, [])
        tokens = np.concatenate([batch.tokens[i, : length[i]] for i in sequences] + [np.zeros(0, np.int32)])
        number = np.concatenate([np.full(length[i], k + 1) for k, i in enumerate(sequences)] + [np.zeros(0)])
        np.testing.assert_array_equal(packed.tokens[row, : len(tokens)], tokens)
        np.testing.assert_array_equal(packed.segment[row, : len(tokens)], number)
        assert not packed.segment[row, len(tokens) :].any()
    for name in ("mask", "advantage", "old_logp"):
        before, after = vars(batch)[name], vars(packed)[name]
        np.testing.assert_array_equal(np.sort(before[batch.mask]), np.sort(after[packed.mask]))
    at = np.argwhere(packed.mask)
    for row, t in at:  # what belongs to a token is still at it
        i, position = divmod(int(packed.tokens[row, t]), 100)
        assert packed.advantage[row, t] == i + 1
        assert packed.old_logp[row, t] == np.float32(-i - position / 10)
    assert useful_fraction(packed, length, micro_batches=3) == 24 / 32  # two of three micro-batches of two rows of 8
    assert useful_fraction(batch, length, micro_batches=3) == 24 / 48
    assert useful_fraction(batch, length, micro_batches=1) == 24 / 48


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_packed_alike_inside_a_program(seed):
    """Long sequences and short ones, more than a row may hold; the batch keeps its knobs."""
    rng = np.random.default_rng(seed)
    length = np.clip(rng.lognormal(2, 1.2, 48).astype(np.int32), 2, 64)
    length[:4] = 2, 2, 64, 64
    batch = batch_of(length, 64 if seed else 200)
    want = pack(batch, length, micro_batches=6)
    given = dataclasses.replace(batch, knobs={"coefficient": np.float32(3)})
    got = jax.jit(functools.partial(pack_in_program, micro_batches=6))(given, length)
    assert got.knobs["coefficient"] == 3
    for name in ("tokens", "mask", "advantage", "old_logp", "segment"):
        np.testing.assert_array_equal(vars(got)[name], vars(want)[name], err_msg=name)
    assert want.segment.max() > 2


def test_positions_count_from_zero_in_every_segment():
    segment = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [3, 1, 1, 1, 1, 1, 2]], jnp.int32)
    at = jnp.arange(7, dtype=jnp.int32)[None, :]
    positions = at - segment_starts(segment)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]])


def test_a_batch_of_the_papers_lengths_is_nearly_full():
    # Log-normal responses, mean 1,000, cut at 8,192, prompts of 100 to 300 tokens; 512 rows in 64 pieces of 8.
    rng = np.random.default_rng(0)
    response = np.minimum(rng.lognormal(np.log(1000) - 0.5, 1.0, 512).astype(int) + 1, 8192)
    length = response + rng.integers(100, 300, 512)
    batch = batch_of(length, 10_240)
    packed = pack(batch, length, micro_batches=64)
    assert useful_fraction(packed, length, micro_batches=64) > 0.9
    assert useful_fraction(batch, length, micro_batches=64) < 0.15


@pytest.mark.parametrize(
    ("rows", "width", "shards", "want"),
    [
        (512, 26, 1, 1),  # 13,312 tokens
        (512, 64, 1, 2),
        (512, 10_240, 8, 64),  # a row on each device
        (512, 10_240, 512, 1),
        (6, 8192, 1, 3),  # two rows of 8,192
        (6, 20_000, 2, 3),  # a row is more than TOKENS_PER_DEVICE
    ],
)
def test_micro_batches_without_a_limit_of_memory(rows, width, shards, want):
    def never(_):
        raise AssertionError("nothing is compiled")

    assert choose_micro_batches(never, rows=rows, width=width, shards=shards, limit_bytes=None) == want
    assert TOKENS_PER_DEVICE == 16_384
    demo = choose_micro_batches(never, rows=512, width=26, shards=2, limit_bytes=None, tokens=2048)
    assert demo == 4  # 64 rows a device, 1,664 tokens


def program(temporaries):
    sizes = {"argument_size_in_bytes": 100, "output_size_in_bytes": 90, "alias_size_in_bytes": 80}
    memory = types.SimpleNamespace(**sizes, temp_size_in_bytes=temporaries)
    return types.SimpleNamespace(memory_analysis=lambda: memory)


def test_what_a_tpu_compiler_refuses_is_a_number_of_bytes():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G."
    assert exhausted_bytes(used) == int(24.5 * 2**30)
    rest = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (512.0M) exceeds available HBM (15.75G)."
    assert exhausted_bytes(rest) == 512 * 2**20
    assert (
        exhausted_bytes("RESOURCE_EXHAUSTED: Used 20.0M of 16.0M vmem.") is None
    )  # a kernel's bug, not the device's size
    assert exhausted_bytes("INVALID_ARGUMENT: Used 1.0G of 0.5G hbm") is None


def test_micro_batches_are_doubled_until_the_update_fits():
    asked = []

    def need_of(pieces):
        asked.append(pieces)
        return needed_bytes(program(4096 // pieces))

    sizes = {"rows": 64, "width": 4096, "shards": 1}
    assert needed_bytes(program(7)) == 117
    assert choose_micro_batches(need_of, **sizes, limit_bytes=110 + 70) == 64
    assert asked == [16, 32, 64]  # 16 pieces of 4 rows have 16,384 tokens
    assert choose_micro_batches(need_of, **sizes, limit_bytes=110 + 130) == 32
    with pytest.raises(ValueError, match="with one row of 4096 tokens at a time.*model.remat: full"):
        choose_micro_batches(need_of, **sizes, limit_bytes=120)
