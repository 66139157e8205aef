"""The models, engines and peaks that the cases of device.py share."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rollout import LARGE, SHAPES, shape

from tsopsd_jax.distributed.sharding import make_mesh, tree_shardings
from tsopsd_jax.hardware.chips import GPU_MEMORY_SHARE, Chip, chip_of
from tsopsd_jax.hardware.work import layer_weights, model_weights
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.types import Prompts

TOY = shape(32, 2, 64, 4, 2, 16, 48)
ALL = SHAPES | LARGE | {"toy": TOY}
STATE_BYTES = 4 * 4
"""Of each parameter: float32 master, two moments, gradient."""


def config_of(name: str) -> Qwen3Config:
    names = Qwen3Config.__dataclass_fields__
    return Qwen3Config(**{key: value for key, value in ALL[name].items() if key in names})


def chip() -> Chip | None:
    return chip_of(jax.devices()[0].device_kind)


def model_of(config: Qwen3Config, **settings: Any) -> Qwen3:
    mesh = make_mesh(devices=jax.devices()[:1])
    return Qwen3(config, **({"compute_dtype": jnp.bfloat16, "mesh": mesh} | settings))


def layout_of(model: Qwen3) -> Any:
    assert model.mesh is not None
    return tree_shardings(model.param_axes(), model.param_shapes(), model.mesh)


def fitting(config: Qwen3Config, *, left_bytes: float) -> Qwen3Config:
    """The model with as many layers as let its state fit beside `left_bytes` for everything else: all, or fewer."""
    if (known := chip()) is None:
        return config
    room = GPU_MEMORY_SHARE * known.hbm_bytes - left_bytes
    tables = model_weights(config) - config.num_hidden_layers * layer_weights(config)
    most = int((room / STATE_BYTES - tables) // layer_weights(config))
    return dataclasses.replace(config, num_hidden_layers=max(1, min(config.num_hidden_layers, most)))


def prompts_of(config: Qwen3Config, rows: int, tokens: int) -> Prompts:
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens)).astype(np.int32)
    return Prompts(drawn, np.full(rows, tokens, np.int32), np.arange(rows, dtype=np.uint32))


def engine_of(model: Qwen3, *, slots: int, prompt: int, response: int, stop_ids: tuple[int, ...] = ()) -> Engine:
    """An engine; without `stop_ids` nothing ends early: there is no such token."""
    assert model.mesh is not None
    return Engine(
        model,
        model.mesh,
        sampling=Sampling(),
        max_prompt_tokens=prompt,
        max_response_tokens=response,
        stop_ids=stop_ids or (model.vocab_size,),
        slots=slots,
    )


def median_s(run: Callable[[], Any], times: int = 5) -> float:
    """Seconds of a call, the median; the first, which compiles, is not counted."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def shares(seconds: float, *, flops: float = 0.0, moved: float = 0.0) -> dict[str, float]:
    """Shares of the device's peaks; nothing where they are not known."""
    if (known := chip()) is None:
        return {}
    found = {"flops_share": flops / seconds / known.flops} if flops else {}
    return found | ({"hbm_share": moved / seconds / known.hbm_rate} if moved else {})
