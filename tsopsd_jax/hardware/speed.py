"""What a step had to do, from the lengths of its own rows, to be held against the devices' peaks."""

import numpy as np

from tsopsd_jax.hardware.chips import Chip
from tsopsd_jax.hardware.work import Split, attention_flops, cache_bytes_per_token, layer_weights
from tsopsd_jax.model.qwen3 import Qwen3Config
from tsopsd_jax.types import AnyArray


def update_model_flops(c: Qwen3Config, prompt_tokens: AnyArray, response_tokens: AnyArray) -> float:
    """Count the operations that an update's rows need: forward, and backward twice as much. Padding, forward passes
    that are repeated to save memory, and a fourth product of the head are not counted.

    Args:
        prompt_tokens, response_tokens: [N] of each row.
    """
    length = np.asarray(prompt_tokens, np.float64) + np.asarray(response_tokens, np.float64)
    layers = 2 * np.sum(length) * c.num_hidden_layers * layer_weights(c)
    attention = np.sum([attention_flops(c, each) for each in length])
    head = 2 * np.sum(np.asarray(response_tokens, np.float64)) * c.hidden_size * c.vocab_size
    return float(3 * (layers + attention + head))


def decode_floor_s(
    c: Qwen3Config,
    split: Split,
    chip: Chip,
    prompt_tokens: AnyArray,
    response_tokens: AnyArray,
    *,
    slots: int,
    itemsize: int,
) -> float:
    """Time that decoding takes at least: in every step all weights are read, and for every token the cache before it.

    Args:
        prompt_tokens, response_tokens: [N] of each row.
        slots: rows decoded side by side; there are at least as many steps as the longest response has tokens.
        itemsize: bytes of a number in the rollout view and the cache.
    """
    prompt, response = np.asarray(prompt_tokens, np.float64), np.asarray(response_tokens, np.float64)
    steps = max(response.max(), response.sum() / slots)
    weights = (c.num_hidden_layers * layer_weights(c) + c.hidden_size * c.vocab_size) * itemsize / split.tensor
    context = np.sum(response * (prompt + response / 2))
    cache = context * cache_bytes_per_token(c, itemsize) / split.devices
    return float((steps * weights + cache) / chip.hbm_rate)
