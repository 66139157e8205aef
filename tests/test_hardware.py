"""Tiles of the head by the devices' peaks, by hand."""

import dataclasses

import jax
import pytest

from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.hardware.chips import GPUS, TPUS
from tsopsd_jax.hardware.tiles import UNKNOWN_DEVICE, head_tile_on, head_tile_tokens
from tsopsd_jax.head_tiles import TILE_TOKENS


@pytest.mark.parametrize(
    ("chip", "vocab_size", "tile"),
    [
        # 4/3 x F / R / 0.08, the next power of two: H100 295 operations a byte, 4,920 tokens; logits and gradient
        # 8 x 8,192 x 151,936 bytes = 9.96 GB of at most 80 / 8 = 10.
        (GPUS["h100"], 151_936, 8192),
        (GPUS["h200"], 151_936, 4096),  # 206: 3,434
        (GPUS["a100-80g"], 151_936, 4096),  # 153: 2,550
        (TPUS["v5p"], 151_936, 4096),  # 166: 2,767
        (TPUS["v5e"], 151_936, 1024),  # 241: 4,009, but 15.75 GiB / 8 hold the logits of 1,739
        (TPUS["v5e"], 151_936 // 8, 4096),  # the vocabulary over eight devices
        (TPUS["v6e"], 151_936 // 8, 16_384),  # 560: 9,341
        (None, 151_936, 1024),
    ],
)
def test_the_least_tile_whose_gradient_traffic_is_small_and_whose_logits_fit(chip, vocab_size, tile):
    assert head_tile_tokens(chip, vocab_size=vocab_size) == tile


def test_the_share_is_met_and_half_the_tile_would_miss_it():
    chip = dataclasses.replace(GPUS["h100"], hbm_bytes=10**15)
    tile = head_tile_tokens(chip, vocab_size=151_936)
    shares = [8 / chip.hbm_rate / (6 * n / chip.flops) for n in (tile, tile // 2)]
    assert shares[0] <= 0.08 < shares[1]


def test_a_cpu_keeps_its_tile():
    assert UNKNOWN_DEVICE == TILE_TOKENS
    assert head_tile_on(make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]), vocab_size=151_936) == 1024
