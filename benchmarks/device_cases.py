"""The cases of device.py, each in a process of its own: `device_cases.py KIND '{"shape": "4b", ...}'`.

The last line of output is a JSON object: what was measured, and `device`. Compilation is not measured: what is timed
has run before.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_models import chip, config_of, engine_of, fitting, layout_of, median_s, model_of, prompts_of, shares

from tsopsd_jax.hardware.speed import decode_floor_s, update_model_flops
from tsopsd_jax.hardware.work import Split, attention_flops, cache_bytes_per_token, layer_weights
from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.learn.micro_batches import device_bytes
from tsopsd_jax.learn.update import fresh_optimizer_state, make_optimizer
from tsopsd_jax.model import Qwen3Config
from tsopsd_jax.objectives import dapo, ts_opsd
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.rollout.slot_attention import Seen, SlotAttention
from tsopsd_jax.train.phase import Guard, Phase
from tsopsd_jax.train.phase_update import Updater
from tsopsd_jax.train.stopping import StopRule
from tsopsd_jax.types import Batch, TrainState

ONE = Split(1, 1, 1)
HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------ sampling


def decode(*, shape: str, rows: int, context: int) -> dict[str, Any]:
    """Steps of whole segments, over prompts of `context` tokens: the first segment, which holds the prefill, and the
    last are left out."""
    config = config_of(shape)
    model, response = model_of(config), 257 if chip() else 33
    engine = engine_of(model, slots=rows, prompt=context, response=response)
    view = engine.view(model.init(jax.random.key(0), shardings=layout_of(model)))
    segments: list[float] = []
    for turn in range(2):  # the first compiles
        segments.clear()
        stream = engine.stream(
            view,
            prompts_of(config, rows, context),
            jax.random.key(turn),
            on_progress=lambda progress: segments.append(progress.seconds),
        )
        for _ in stream:
            pass
    steps = np.diff(segments)[:-1] / engine.segment if len(segments) > 2 else np.diff([0.0, *segments]) / engine.segment
    step_s = float(np.median(steps))
    weights = 2 * (config.num_hidden_layers * layer_weights(config) + config.hidden_size * config.vocab_size)
    cache = rows * (context + response / 2) * cache_bytes_per_token(config, 2)
    found = {"step_ms": 1e3 * step_s, "tokens_per_s": rows / step_s, "segments": len(segments)}
    return found | shares(step_s, moved=weights + cache)


def prefill(*, shape: str, rows: int, length: int) -> dict[str, Any]:
    """Prompts through the layers into the cache, in the engine's own program."""
    config = config_of(shape)
    model = model_of(config)
    engine = engine_of(model, slots=rows, prompt=length, response=16)
    view = engine.view(model.init(jax.random.key(0), shardings=layout_of(model)))
    tokens = engine.on_device.put(prompts_of(config, rows, length).tokens)
    seconds = median_s(lambda: engine.on_device.prefill(view, tokens))
    flops = 2 * rows * length * config.num_hidden_layers * layer_weights(config) + rows * attention_flops(
        config, length
    )
    return {"ms": 1e3 * seconds, "tokens_per_s": rows * length / seconds} | shares(seconds, flops=flops)


def attention(*, shape: str, rows: int, context: int) -> dict[str, Any]:
    """One layer's attention of a decoding step: each implementation's time, and how far the device's own is from XLA's,
    in bfloat16 and in float32."""
    config, r = config_of(shape), 64 if chip() else 16
    k, g, h = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim
    each = max(1, context // r)
    pool = rows * each
    page = np.random.default_rng(0).permutation(pool).reshape(1, rows, each).astype(np.int32)
    table = PageTable(page, np.full((1, rows), each, np.int32))
    names = {"cpu": ("xla",), "tpu": ("xla", "pallas")}.get(jax.default_backend(), ("xla", "triton"))
    found: dict[str, Any] = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        keys = iter(jax.random.split(jax.random.key(1), 5))
        q = jax.random.normal(next(keys), (rows, k * g, h), dtype)
        tail = (jax.random.normal(next(keys), (rows, k, h, 2 * r), dtype),)
        tail += (jax.random.normal(next(keys), (rows, k, 2 * r, h), dtype),)
        pages = (jax.random.normal(next(keys), (1, pool, k, h, r), dtype),)
        pages += (jax.random.normal(next(keys), (1, pool, k, r, h), dtype),)
        place = jnp.arange(2 * r)[None, :]
        seen = Seen(jnp.full((rows,), 3), jnp.int32(r + 9), (place < 3) | ((place >= r) & (place <= r + 9)))
        made = {}
        for name in names:
            way = SlotAttention(name)
            prepared = jax.jit(functools.partial(way.prepare, places=2 * r))(table, pages)
            run = jax.jit(functools.partial(way.attend, seen=seen, home=r, pages=pages, prepared=prepared))
            made[name] = np.asarray(run(q, tail), np.float32)
            label = f"{name} {jnp.dtype(dtype).name}"
            seconds = median_s(lambda run=run, q=q, tail=tail: run(q, tail), times=20)
            moved = 2 * rows * (context + 13) * k * h * jnp.dtype(dtype).itemsize
            found[label] = {"us": 1e6 * seconds} | shares(seconds, moved=moved)
            found[label]["largest_difference"] = float(np.abs(made[name] - made["xla"]).max())
    return found


# ------------------------------------------------------------------ learning


def phase_of(*, rows: int, response: int, reheat: bool = False, pack: bool = True) -> Phase:
    return Phase(
        name="reheat" if reheat else "rl",
        outcome="",
        objective=ts_opsd() if reheat else dapo(),
        optimizer=make_optimizer(learning_rate=1e-6),
        reset_optimizer=False,
        sampling=Sampling(),
        max_response_tokens=response,
        prompts_per_step=rows,
        responses_per_prompt=1,
        rows_at_once=None,
        micro_batches=None,
        tile_tokens=None,
        pack=pack,
        reward=None if reheat else RewardRule(),
        stop=StopRule(steps=1),
        guard=Guard(),
    )


class Learner:
    """A model, its state and the updates of phases, as a run has them."""

    def __init__(self, config: Qwen3Config, *, remat: str):
        self.model = model_of(config, remat=remat)
        self.config = config
        self.params = self.model.init(jax.random.key(0), shardings=layout_of(self.model))
        self.state: TrainState | None = None

    def updater(self, phase: Phase, prompt: int) -> Updater:
        mesh = self.model.mesh
        assert mesh is not None
        made = Updater(self.model, phase, mesh, max_prompt_tokens=prompt, limit_bytes=device_bytes(mesh))
        if self.state is None:
            opt_state = fresh_optimizer_state(phase.optimizer, made.state, self.params)
            self.state = TrainState(jnp.zeros((), jnp.int32), self.params, opt_state)
            del self.params
        return made

    def update(self, updater: Updater, batch: Batch, length: np.ndarray) -> tuple[float, Any, float]:
        """(seconds, what the update reports, share of positions that hold a token)."""
        assert self.state is not None
        began = time.perf_counter()
        state, out, useful = updater(self.state, batch, length, jnp.float32(jnp.inf), {})
        jax.block_until_ready(state)
        self.state = state
        return time.perf_counter() - began, out, useful


def batch_of(tokens: Any, prompt: Any, length: Any, logp: Any) -> Batch:
    """Rows of `prompt` [B] tokens and responses up to `length` [B], with advantages drawn once for all."""
    tokens, prompt, length, logp = map(np.asarray, (tokens, prompt, length, logp))
    place = np.arange(tokens.shape[1])[None, :]
    mask = (place >= prompt[:, None]) & (place < length[:, None])
    advantage = np.random.default_rng(1).normal(size=(len(tokens), 1)) * np.ones(tokens.shape)
    return Batch.of(tokens=tokens, mask=mask, advantage=advantage, old_logp=logp)


def lengths_of(rows: int, limit: int, mean: float) -> np.ndarray:
    """Log-normal lengths (sigma 1) cut at the limit."""
    drawn = np.random.default_rng(2).lognormal(np.log(mean) - 0.5, 1.0, rows)
    return np.clip(drawn.astype(np.int64), 1, limit)


def update(*, shape: str, rows: int, length: int, remat: str = "full", packed: bool = False) -> dict[str, Any]:
    """An update of full rows, or of packed responses a quarter as long in the mean; after two, three are timed."""
    whole = config_of(shape)
    config = fitting(whole, left_bytes=12e9)
    prompt = min(256, length // 4)
    response = length - prompt
    drawn = lengths_of(rows, response, response / 4) if packed else np.full(rows, response)
    total = prompt + drawn
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    batch = batch_of(tokens, np.full(rows, prompt), total, np.full(tokens.shape, -np.log(config.vocab_size)))
    learner = Learner(config, remat=remat)
    updater = learner.updater(phase_of(rows=rows, response=response, pack=packed), prompt)
    times = [learner.update(updater, batch, total) for _ in range(5)]
    seconds, useful = float(np.median([each[0] for each in times[2:]])), times[-1][2]
    flops = update_model_flops(config, np.full(rows, prompt), drawn)
    found = {
        "layers": f"{config.num_hidden_layers} of {whole.num_hidden_layers}",
        "seconds": seconds,
        "tokens_per_s": float(total.sum()) / seconds,
        "micro_batches": updater.micro_batches,
        "useful_fraction": useful,
        "tflops": flops / seconds / 1e12,
    }
    return found | {name.replace("flops_share", "mfu"): x for name, x in shares(seconds, flops=flops).items()} | peak()


def peak() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def parity(*, shape: str) -> dict[str, Any]:
    """The update's own report of |sampler's - learner's log-probability|, on responses of the engine."""
    config = config_of(shape)
    rows, prompt, response = (32, 128, 256) if chip() else (4, 8, 24)
    learner = Learner(config, remat="full")
    engine = engine_of(learner.model, slots=rows, prompt=prompt, response=response)
    rollout = engine.run(engine.view(learner.params), prompts_of(config, rows, prompt), jax.random.key(1))
    batch = batch_of(rollout.tokens, rollout.prompt_length, rollout.length, rollout.logp)
    updater = learner.updater(phase_of(rows=rows, response=response), prompt)
    _, out, _ = learner.update(updater, batch, np.asarray(rollout.length))
    metrics = {name: float(x) for name, x in jax.device_get(out.metrics).items() if name.startswith("rollout/")}
    return {"tokens": int(np.sum(rollout.response_length))} | metrics


def determinism(*, shape: str) -> dict[str, Any]:
    """A rollout and the update on it, twice from one key: whether tokens, log-probabilities and parameters are equal
    bit for bit, and the largest difference of a parameter."""
    config = config_of(shape)
    rows, prompt, response = (32, 128, 256) if chip() else (4, 8, 24)
    seen = []
    for _ in range(2):
        learner = Learner(config, remat="full")
        engine = engine_of(learner.model, slots=rows, prompt=prompt, response=response)
        rollout = engine.run(engine.view(learner.params), prompts_of(config, rows, prompt), jax.random.key(1))
        batch = batch_of(rollout.tokens, rollout.prompt_length, rollout.length, rollout.logp)
        learner.update(
            learner.updater(phase_of(rows=rows, response=response), prompt), batch, np.asarray(rollout.length)
        )
        assert learner.state is not None
        seen.append((rollout.tokens, rollout.logp, jax.tree.map(np.asarray, learner.state.params)))
    (tokens, logp, params), (again, logp_again, params_again) = seen
    apart = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_again), strict=True)]
    return {
        "tokens_equal": bool(np.array_equal(tokens, again)),
        "logp_equal": bool(np.array_equal(logp, logp_again)),
        "parameters_equal": bool(max(apart) == 0),
        "largest_difference": float(max(apart)),
    }


def step(*, shape: str, rows: int, mean: int, limit: int) -> dict[str, Any]:
    """A step of RL and one of reheating, responses of `mean` tokens, cut at `limit`: rollout view, sampling, update.

    Random weights draw nearly uniformly, so that V / `mean` stop tokens give geometric lengths. Where not all layers
    fit, `scaled_seconds` is that of all: time beyond the head and the draw grows with the layers (measured with all
    that fit and with half of them).
    """
    whole = config_of(shape)
    config = fitting(whole, left_bytes=16e9)
    prompt = 128 if chip() else 8
    found: dict[str, Any] = {"layers": f"{config.num_hidden_layers} of {whole.num_hidden_layers}"}
    half = dataclasses.replace(config, num_hidden_layers=max(1, config.num_hidden_layers // 2))
    many = config.num_hidden_layers < whole.num_hidden_layers
    for reheat in (False, True):
        name, times = "reheat" if reheat else "rl", []
        for each in (config, half) if many else (config,):
            times.append(_steps(each, rows=rows, prompt=prompt, mean=mean, limit=limit, reheat=reheat))
        found[name] = times[0]
        if many:
            fewer = config.num_hidden_layers - half.num_hidden_layers
            per_layer = (times[0]["seconds"] - times[1]["seconds"]) / fewer
            scaled = times[0]["seconds"] + per_layer * (whole.num_hidden_layers - config.num_hidden_layers)
            found[name] |= {"scaled_seconds": scaled, "scaled_tokens_per_s": times[0]["tokens"] / scaled}
    return found | peak()


def _steps(config: Qwen3Config, *, rows: int, prompt: int, mean: int, limit: int, reheat: bool) -> dict[str, Any]:
    """The second of two steps; the first compiles."""
    learner = Learner(config, remat="full")
    stops = tuple(range(max(1, round(config.vocab_size / mean))))
    engine = engine_of(learner.model, slots=rows, prompt=prompt, response=limit, stop_ids=stops)
    updater = learner.updater(phase_of(rows=rows, response=limit, reheat=reheat), prompt)
    rollout, rollout_s, update_s, useful = None, 0.0, 0.0, 0.0
    for turn in range(2):
        assert learner.state is not None
        began = time.perf_counter()
        rollout = engine.run(engine.view(learner.state.params), prompts_of(config, rows, prompt), jax.random.key(turn))
        rollout_s = time.perf_counter() - began
        batch = batch_of(rollout.tokens, rollout.prompt_length, rollout.length, rollout.logp)
        update_s, _, useful = learner.update(updater, batch, np.asarray(rollout.length))
    assert rollout is not None
    tokens = int(np.sum(rollout.response_length))
    found = {
        "seconds": rollout_s + update_s,
        "rollout_s": rollout_s,
        "update_s": update_s,
        "tokens": tokens,
        "tokens_per_s": tokens / (rollout_s + update_s),
        "useful_fraction": useful,
        "slot_use": engine.progress.slot_use,
    }
    if (known := chip()) is not None:
        sizes = np.asarray(rollout.prompt_length), np.asarray(rollout.response_length)
        floor = decode_floor_s(config, ONE, known, *sizes, slots=rows, itemsize=2)
        flops = update_model_flops(config, *sizes)
        found |= {"decode_of_floor": floor / rollout_s, "mfu": flops / update_s / known.flops}
    return found


# ------------------------------------------------------------------ programs


def head(*, cases: str) -> dict[str, Any]:
    """benchmarks/head.py, one round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "head.json"
        asked = ["--out", str(out), "--rounds", "1", "--cases", cases, "--growth", ""]
        subprocess.run([sys.executable, str(HERE / "head.py"), *asked], check=True, capture_output=True)
        return json.loads(out.read_text())


def demo(*, settings: list[str]) -> dict[str, Any]:
    """`tsopsd demo` as a user starts it, with a cold cache."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir, began = Path(folder) / "run", time.perf_counter()
        asked = ["demo", "--run-dir", str(run_dir), "--set", f"cache_dir={folder}/cache", *settings]
        subprocess.run([sys.executable, "-m", "tsopsd_jax", *asked], check=True, capture_output=True)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = {name: [x["time/step_s"] for x in lines if x["phase"] == name] for name in ("rl", "reheat")}
        return {
            "seconds": time.perf_counter() - began,
            "steps": len(lines),
            "step_s": {name: float(np.median(each)) for name, each in steps.items()},
        }


KINDS = {f.__name__: f for f in (decode, prefill, attention, update, parity, determinism, step, head, demo)}

if __name__ == "__main__":
    measured = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(measured | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}))
