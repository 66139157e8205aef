"""Devices that are not there and programs are compiled for, skipped where their compiler is not installed."""

import importlib.util

import pytest

from tsopsd_jax.plan.topologies import topology

WIDTHS = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
"""Qwen3-4B's."""
GPU = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="the GPU compiler is not installed (extra `cuda`)",
)
TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed (extra `tpu`)"
)
PLACES = [pytest.param("h100:1", marks=[GPU, pytest.mark.gpu_compiler]), pytest.param("v5p:2x2x1", marks=TPU)]


def devices_of(place: str):
    """The devices of a topology; the test is skipped where another process holds the compiler."""
    try:
        devices = topology(place).devices
    except ValueError as error:
        pytest.skip(f"the compiler cannot be used here: {error}")
    assert devices is not None
    return devices
