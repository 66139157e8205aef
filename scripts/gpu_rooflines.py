"""What one H100 could do at best with these programs: `python scripts/gpu_rooflines.py > docs/plans/h100_rooflines.md`.

The GPU compiler is needed (extra `cuda`), but no GPU. Decoding: the loop over tokens is compiled for one layer and for
two at the true widths of Qwen3-4B and 8B; bytes and kernels of all layers follow from the difference. Updates and whole
steps: operations and bytes counted from shapes, as `tsopsd plan` counts them. `benchmarks/device.py` measures the same
cases on a device.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

from tsopsd_jax.commands.plan import no_compilation_cache
from tsopsd_jax.config import load_config
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.hardware.chips import GPUS
from tsopsd_jax.hardware.work import Split, UpdateShape, update_work
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan.planner import Means, by_formula
from tsopsd_jax.plan.report import as_json
from tsopsd_jax.plan.topologies import topology
from tsopsd_jax.plan.traffic import loop_of
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rollout.segment import STEPS

ROOT = Path(__file__).resolve().parents[1]
CHIP = GPUS["h100"]
KERNEL_S = 1.5e-6
"""Assumed: what a kernel inside a CUDA graph costs beside its bytes."""
DECODING = [("Qwen3-4B-Base", slots, 1024) for slots in (1, 8, 64, 128, 256)]
DECODING += [("Qwen3-4B-Base", 64, 8192), *(("Qwen3-8B-Base", slots, 1024) for slots in (8, 64, 256))]
UPDATES = [
    (name, length, remat)
    for name in ("Qwen3-4B-Base", "Qwen3-8B-Base")
    for length in (2048, 8192, 16_384)
    for remat in ("full", "none")
]
UPDATE_POSITIONS = 32_768
NEMO = {"GPUs": 16, "rows": 2048, "mean": 1019, "limit": 4096, "tokens_per_s": 1581}
"""NeMo-RL v0.5's published row: Llama-3.1-8B, GRPO, synchronous, 16 H100."""

HEAD = f"""# What one H100 could do at best

Made by `python scripts/gpu_rooflines.py` on a machine without a GPU. **Nothing here was measured**: bytes and kernels
of decoding are read from compiled programs, everything else is counted from shapes, times follow from the maker's peaks
({CHIP.flops / 1e12:.0f} TFLOP/s of bfloat16, {CHIP.hbm_rate / 1e9:,.0f} GB/s). `python benchmarks/device.py` measures
the same cases; its aims: 70 % of decoding's floor at 8 to 128 slots, 50 % MFU, 1,600 tokens/s a GPU in a whole step at
8B.

## Decoding

Responses of as many tokens as the prompt; the floor reads weights and cache once, every slot at full length. "At most"
is the floor over the bytes that the program moves. "With kernels" adds {KERNEL_S * 1e6:g} us for each kernel, an
assumption, one after the other.
"""
UPDATE_HEAD = f"""
## Updates

{UPDATE_POSITIONS:,} positions in rows of equal length, two micro-batches, AdamW included. MFU counts the model's own
operations, not those of recomputation. At most: memory and arithmetic overlap; serial: they do not.
"""


STEP = """
## A whole RL step at 8B, beside a published one

{rows:,} responses of {mean:,} of {limit:,} tokens on {GPUs} H100, mesh {mesh} (data x fsdp x tensor), by formula: a
step takes at least {least:.0f} s, {most:,.0f} tokens/s a GPU; at 40 % of the arithmetic, 60 % of the memory's rate and
70 % of the links' {likely:.0f} s, {expected:,.0f} tokens/s. NeMo-RL publishes {tokens_per_s:,} for Llama-3.1-8B on as
many GPUs, measured; this is a bound and an estimate."""


def shape_of(name: str) -> Qwen3Config:
    return read_config(ROOT / "configs" / "models" / name / "config.json")


def decoding(config: Qwen3Config, slots: int, context: int, layers: int) -> tuple[int, int, int]:
    """(bytes of the floor, bytes moved, kernels) of a token of all slots, with that many layers."""
    devices = topology("h100:1").devices
    if devices is None:
        raise SystemExit('the GPU compiler is not installed; pip install -e ".[cuda]"')
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=devices)
    model = Qwen3(dataclasses.replace(config, num_hidden_layers=layers), compute_dtype=jnp.bfloat16, mesh=mesh)
    params = abstract_state(model, optax.adamw(1e-6), mesh).params
    engine = Engine(
        model,
        mesh,
        sampling=Sampling(),
        max_prompt_tokens=context,
        max_response_tokens=context,
        stop_ids=(0, 1),
        slots=slots,
    )
    with no_compilation_cache():
        loop = loop_of(engine.on_device.lower_segment(params).compile().as_text(), STEPS)
    view = jax.eval_shape(engine.on_device.view, params)
    tables = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # rows of it are looked up
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(view)) - 2 * tables
    geometry, pages = engine.geometry, engine.on_device.pool_sizes()[-1]
    places = pages * geometry.segment_tokens + slots * (geometry.home + geometry.segment_tokens)
    cache = layers * places * 2 * config.num_key_value_heads * config.head_dim * 2
    return weights + cache, loop.bytes_moved, loop.launches


def decoding_rows() -> Iterator[str]:
    yield "| model | slots | prompt | floor, ms | at most | kernels | with kernels | tokens/s, with kernels |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, slots, context in DECODING:
        config = shape_of(name)
        one, two = (decoding(config, slots, context, layers) for layers in (1, 2))
        floor, moved, kernels = (a + (config.num_hidden_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
        floor_s, moved_s = floor / CHIP.hbm_rate, moved / CHIP.hbm_rate
        whole_s = moved_s + kernels * KERNEL_S
        yield (
            f"| {name} | {slots} | {context:,} | {1e3 * floor_s:.2f} | {floor_s / moved_s:.0%} | {kernels:,} | "
            f"{floor_s / whole_s:.0%} | {slots / whole_s:,.0f} |"
        )
        print(f"{name}, {slots} slots", file=sys.stderr, flush=True)


def update_rows() -> Iterator[str]:
    yield "| model | row | remat | PFLOP | of it the model's | HBM, s | arithmetic, s | MFU at most | serial |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|"
    for name, length, remat in UPDATES:
        config, rows = shape_of(name), UPDATE_POSITIONS // length
        shape = UpdateShape(
            sequences=rows,
            length=length,
            response=length - 256,
            width=length,
            micro_batches=max(1, UPDATE_POSITIONS // 16_384),
            rows=max(1, 16_384 // length),
            tile_tokens=8192,
            remat=remat,
            tokenwise=True,
        )
        split = Split(1, 1, 1)
        work = update_work(config, split, shape)
        model = update_work(config, split, shape._replace(remat="none")).flops
        flops_s, bytes_s = work.flops / CHIP.flops, work.hbm_bytes / CHIP.hbm_rate
        best, serial = (model / CHIP.flops / s for s in (max(flops_s, bytes_s), flops_s + bytes_s))
        yield (
            f"| {name} | {length:,} | {remat} | {work.flops / 1e15:.2f} | {model / work.flops:.0%} | {bytes_s:.2f} | "
            f"{flops_s:.2f} | {best:.0%} | {serial:.0%} |"
        )


def step_row() -> str:
    path = ROOT / "configs" / "paper" / "qwen3_8b.yaml"
    changes = [
        f"phases.{phase}.{setting}"
        for phase in ("rl", "rl-again")
        for setting in (
            f"responses_per_prompt={NEMO['rows'] // 64}",
            f"max_response_tokens={NEMO['limit']}",
            "reward.overlong_buffer_tokens=512",
        )
    ]
    config, where = load_config(path, changes), topology(f"h100:{NEMO['GPUs']}")
    plans = by_formula(config, shape_of("Qwen3-8B-Base"), where, means=Means(prompt=128, response=NEMO["mean"]))
    plan = as_json(plans[0][1])
    tokens = NEMO["rows"] * NEMO["mean"] / NEMO["GPUs"]
    least, likely = (plan[key]["rl"] for key in ("step_seconds", "estimated_step_seconds"))
    return STEP.format(
        **NEMO,
        mesh=" x ".join(str(n) for n in plan["mesh"].values()),
        least=least,
        likely=likely,
        most=tokens / least,
        expected=tokens / likely,
    )


if __name__ == "__main__":
    print(HEAD)
    print("\n".join(decoding_rows()))
    print(UPDATE_HEAD)
    print("\n".join(update_rows()))
    print(step_row())
