"""What steps need and reach, and tiles of the head, by the devices' peaks: by hand; and traces of steps."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.hardware.chips import GPUS, TPUS
from tsopsd_jax.hardware.speed import decode_floor_s, update_model_flops
from tsopsd_jax.hardware.tiles import UNKNOWN_DEVICE, head_tile_on, head_tile_tokens
from tsopsd_jax.hardware.work import Split
from tsopsd_jax.head_tiles import TILE_TOKENS
from tsopsd_jax.model import Qwen3Config
from tsopsd_jax.train import perf
from tsopsd_jax.train.profiling import StepProfile


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


C = Qwen3Config(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)
"""A layer has 120 weights, the unembedding 40; a token's cache has 2 x 2 layers x 2 numbers."""


def test_operations_that_an_update_needs():
    # Rows of 1 + 2 and 1 + 3 tokens. Layers: 2 x 7 tokens x 240; attention 2 x 2 layers x 4 x (3 x 4 + 4 x 5) / 2 pairs
    # x 2 = 2 layers x 2 x 4 x 32 = 512; head 2 x 5 x 40; forward and twice backward.
    found = update_model_flops(C, np.array([1, 1]), np.array([2, 3]))
    assert found == 3 * (2 * 7 * 240 + 512 + 2 * 5 * 40)


def test_the_floor_of_decoding():
    # Responses of 2 and 6 after prompts of 1 and 3, two slots: 6 steps read 280 weights; contexts 2 (1 + 1) + 6 (3 + 3)
    # = 40 tokens of 8 numbers; two bytes each, at 10 bytes a second.
    chip = dataclasses.replace(GPUS["h100"], hbm_rate=10.0)
    args = (chip, np.array([1, 3]), np.array([2, 6]))
    assert decode_floor_s(C, Split(1, 1, 1), *args, slots=2, itemsize=2) == (6 * 280 * 2 + 40 * 8 * 2) / 10
    # One slot: 8 steps. Weights over `tensor`, the cache over all devices.
    found = decode_floor_s(C, Split(1, 2, 2), *args, slots=1, itemsize=2)
    assert found == (8 * 280 * 2 / 2 + 40 * 8 * 2 / 4) / 10


def test_a_steps_speed_against_its_device(monkeypatch):
    """Two devices of 1,000 operations and 10 bytes a second; an update of 2 s, a rollout of 100 s."""
    chip = dataclasses.replace(GPUS["h100"], flops=1000.0, hbm_rate=10.0)
    rollout = SimpleNamespace(prompt_length=np.array([1, 3]), response_length=np.array([2, 6]))
    model = SimpleNamespace(config=C, compute_dtype=np.float16)
    mesh = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[:2])
    drawn = SimpleNamespace(
        scored=[SimpleNamespace(rollout=rollout, rollout_s=100.0)], update_s=2.0, engine=SimpleNamespace(slots=2)
    )
    assert perf.step_perf(model, mesh, drawn, rollout) == {"perf/tokens_per_s_per_device": 8 / 100 / 2}  # a CPU
    monkeypatch.setattr(perf, "chip_of", lambda _: chip)
    found = perf.step_perf(model, mesh, drawn, rollout)
    flops = update_model_flops(C, rollout.prompt_length, rollout.response_length)
    assert found["perf/mfu"] == pytest.approx(flops / (2 * 2 * 1000))
    assert perf.step_perf(model, mesh, drawn, rollout, passes=3.0)["perf/mfu"] == pytest.approx(3 * found["perf/mfu"])
    assert found["perf/decode_of_floor"] == pytest.approx((6 * 280 * 2 + 40 * 8 * 2 / 2) / 10 / 100)
    whole = SimpleNamespace(scored=drawn.scored, update_s=2.0, engine=None)  # one program
    assert perf.step_perf(model, mesh, whole, rollout) == {"perf/tokens_per_s_per_device": 8 / 2 / 2}


def test_steps_are_traced_from_first_to_last(tmp_path):
    profile = StepProfile((2, 3), tmp_path / "profile")
    for number, tracing in ((1, False), (2, True), (3, False)):
        with profile.step(number):
            assert profile.tracing == (number > 1)
        assert profile.tracing == tracing
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    profile.close()  # nothing is left open
