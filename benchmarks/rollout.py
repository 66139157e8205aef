"""Sampling against its peers and its floor: one run, one table, one JSON file.

    python benchmarks/rollout.py --out benchmarks/results/rollout_cpu.json [--shapes demo-64,demo-512,small,0.6b]
        [--tunix-python PATH] [--rounds 5] [--parts peers,slots,sharing,ragged,floor,gap,start]

peers   tokens/s of this sampler, of transformers' `generate` (torch) and of Tunix's `Sampler` on equal shapes: random
        weights, temperature 1, top-p 1, no early stop. Each is a process of its own that waits for its turn; rounds are
        interleaved. Beside each stands its library's own matrix-product rate.
slots   share of decoded slot-steps that give a kept token, and peak cache bytes, for log-normal response lengths; a
        static batch beside it. Follows from lengths alone: no model is run.
sharing the most pages in use, with a copy of its prompt's for each row and with one for a group of 8. No model either.
ragged  cache read and steps taken by the TPU kernel and by jax's ragged paged attention, counted. No model either.
floor   a decoding step's time against the time to read weights and live cache once at the machine's measured rate.
gap     |sampler's - learner's log-probability| of the same tokens, of the packaged pretrained model.
start   seconds to the first tokens and programs compiled, without and with the persistent compilation cache.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers import Peer, about, in_turns
from rollout_workers import our_engine, our_prompts

HERE = Path(__file__).resolve().parent


def shape(
    hidden: int, layers: int, vocab: int, heads: int, kv: int, dim: int, inter: int, **run: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    } | run


DEMO = (96, 3, 128, 4, 2, 24, 256)
SHAPES = {
    "demo-64": shape(*DEMO, rows=64, prompt_tokens=7, response_tokens=19),
    "demo-512": shape(*DEMO, rows=512, prompt_tokens=7, response_tokens=19),
    "small": shape(512, 8, 8192, 8, 2, 64, 1536, rows=32, prompt_tokens=64, response_tokens=128),
    "0.6b": shape(1024, 28, 151_936, 16, 8, 128, 3072, rows=8, prompt_tokens=64, response_tokens=32),
}
LARGE = {  # of the floor, on an accelerator
    "4b": shape(2560, 36, 151_936, 32, 8, 128, 9728),
    "8b": shape(4096, 36, 151_936, 32, 8, 128, 12_288) | {"tie_word_embeddings": False},
}


# --------------------------------------------------------------------- parts


def worker(kind: str, asked: dict[str, Any], dtype: str) -> list[str]:
    return [sys.executable, str(HERE / "rollout_workers.py"), kind, json.dumps(asked), dtype]


def peers(shapes: list[str], rounds: int, tunix_python: str | None) -> list[dict[str, Any]]:
    rows = []
    for name in shapes:
        asked = SHAPES[name]
        tokens, both = asked["rows"] * asked["response_tokens"], asked | {"cpu_devices": 2}
        commands = [worker("ours", asked, "float32"), worker("ours", both, "float32"), worker("ours", both, "bfloat16")]
        if importlib.util.find_spec("torch"):
            commands += [worker("transformers", asked, dtype) for dtype in ("float32", "bfloat16")]
        if tunix_python:
            commands.append([tunix_python, str(HERE / "rollout_tunix.py"), json.dumps(asked)])
        for found in in_turns(commands, rounds):
            row = {"shape": name, **found, "tokens_per_s": tokens / found["seconds"]}
            rows.append(row)
            low, high = tokens / max(found["all"]), tokens / min(found["all"])
            print(
                f"{name:9} {row['peer']:30} {row['tokens_per_s']:>10,.0f} tokens/s ({low:,.0f} to {high:,.0f})"
                f"   its GEMM {row['gemm_gflops']:.0f} GFLOP/s",
                flush=True,
            )
    return rows


def turns(schedule: Any, lengths: np.ndarray) -> Iterator[int]:
    """Run a schedule to its end with given response lengths; after each admission yields the size that the pool had
    before it was changed, 0 where it was not."""
    r = schedule.geometry.segment_tokens
    while not schedule.over:
        before = schedule.pool
        grown = schedule.grow()
        if schedule.live.any():
            schedule.commit()
        changed = schedule.shrink() is not None or grown is not None
        schedule.admit()
        yield before if changed else 0
        left = np.where(schedule.live, lengths[schedule.row] - schedule.drawn, 0)
        schedule.advance(np.minimum(left, r), schedule.live & (left <= r))


def sharing(rows: int = 2048, at_once: int = 128, group: int = 8) -> list[dict[str, Any]]:
    """The most pages in use at once, prompts' pages copied for each row and shared by a group's, by mean lengths."""
    from tsopsd_jax.rollout.schedule import Geometry, Schedule

    found = []
    for prompt, response in ((120, 1000), (120, 6000), (600, 2000), (1500, 2000), (4000, 500)):
        rng = np.random.default_rng(0)
        limit, longest = 4 * response, 2 * prompt
        lengths = np.clip(rng.lognormal(np.log(response) - 0.5, 1.0, rows).astype(int), 1, limit)
        of_group = rng.integers(prompt // 2, 3 * prompt // 2, rows // group)
        most = {}
        for shares in (False, True):
            settings = {"slots": at_once, "geometry": Geometry(64, longest, limit), "shares": shares}
            schedule = Schedule(np.repeat(of_group, group), group=np.arange(rows) // group, **settings)
            most[shares] = max(int((schedule.uses > 0).sum()) for _ in turns(schedule, lengths))
        saved = 1 - most[True] / most[False]
        found.append(
            {"prompt_tokens": prompt, "response_tokens": response, "copied": most[False], "shared": most[True]}
        )
        print(f"sharing   prompts of {prompt}, responses of {response} tokens: {saved:.1%} fewer pages", flush=True)
    return found


def ragged(rows: int = 1024, at_once: int = 64) -> list[dict[str, Any]]:
    """What attention reads at a decoding step, means over a rollout, with pages of 128 tokens.

    Ours for TPUs: exact pages, some to a grid step, and every place of a tail by XLA. jax's ragged_paged_attention:
    blocks of pages, of which the last of a row is fetched whole; 4 or 8 pages are the sizes in its table for 32 heads
    of queries and 8 of keys, 128 wide.
    """
    from tsopsd_jax.rollout.paged_attention import PAGES_PER_STEP
    from tsopsd_jax.rollout.schedule import Geometry, Schedule

    r, found = 128, []
    for prompt, response in ((120, 1000), (120, 6000), (1500, 2000)):
        rng = np.random.default_rng(0)
        limit = 4 * response
        geometry = Geometry(r, 2 * prompt, limit)
        lengths = np.clip(rng.lognormal(np.log(response) - 0.5, 1.0, rows).astype(int), 1, limit)
        of_row = rng.integers(prompt // 2, 3 * prompt // 2, rows)
        schedule, seen = Schedule(of_row, slots=at_once, geometry=geometry), []
        for _ in turns(schedule, lengths):
            live = schedule.live
            tokens = of_row[schedule.row[live]] + schedule.drawn[live] + r // 2  # halfway through the segment
            count = schedule.table.count[live]
            blocks = [(-(-tokens // (r * size))).sum() for size in (4, 8)]
            read = count.sum() * r + live.size * (geometry.home + r)
            seen.append((tokens.sum(), read, (-(-count // PAGES_PER_STEP)).sum(), *blocks))
        live, ours, steps, *blocks = (float(x) for x in np.mean(seen, axis=0))
        row: dict[str, Any] = {"prompt_tokens": prompt, "response_tokens": response, "slots": at_once}
        row["ours"] = {"read_of_live": ours / live, "grid_steps": steps}
        said = f"ours reads {ours / live:.2f} of the live cache in {steps:.0f} steps"
        for size, count in zip((4, 8), blocks, strict=True):
            share = count * size * r / live
            row[f"jax_{size}_pages"] = {"read_of_live": share, "blocks": count, "copies": count * size}
            said += f"; jax's, {size} pages, {share:.2f} in {count:.0f} blocks of {count * size:.0f} copies"
        found.append(row)
        print(f"ragged    prompts of {prompt}, responses of {response} tokens: {said}", flush=True)
    return found


def slots(rows: int = 4096, at_once: int = 256, limit: int = 8192, mean: int = 1000) -> dict[str, Any]:
    """Log-normal lengths (sigma 1) cut at the limit, prompts of 20 to 512 tokens."""
    from tsopsd_jax.rollout.schedule import Geometry, Schedule

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, rows).astype(int), 1, limit)
    prompts = rng.integers(20, 513, rows)
    geometry = Geometry(64, 512, limit)
    schedule = Schedule(prompts, slots=at_once, geometry=geometry)
    peak, programs = 0, set()
    for before in turns(schedule, lengths):
        size = schedule.pool
        # While it is copied, one of the pool's layers exists twice: of 36, say.
        tails = schedule.row.size * (geometry.home + geometry.segment_tokens)
        peak = max(peak, (max(size, before) + min(size, before) / 36) * geometry.segment_tokens + tails)
        programs.add((schedule.row.size, size))
    # A static batch: every slot waits for the longest row of its batch.
    static = lengths.sum() / (lengths.reshape(-1, at_once).max(axis=1) * at_once).sum()
    result = {
        "rows": rows,
        "slots": at_once,
        "mean_tokens": float(lengths.mean()),
        "limit_tokens": limit,
        "slot_use": schedule.kept_tokens / schedule.slot_steps,
        "slot_use_static_batch": float(static),
        "peak_cache_positions": int(peak),
        "full_cache_positions": at_once * (limit + 512),
        "segment_programs": len(programs),
    }
    result["peak_share_of_full"] = result["peak_cache_positions"] / result["full_cache_positions"]
    print(
        f"slots     {result['slot_use']:.1%} of slot-steps give a kept token (a static batch: {static:.1%}); "
        f"peak cache {result['peak_share_of_full']:.1%} of slots x limit; {len(programs)} segment programs",
        flush=True,
    )
    return result


def copy_bandwidth() -> float:
    """Bytes/s read and written by a large copy on the device."""
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    x = jnp.ones((1 << (27 if cpu else 30),), jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        x = step(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * x.nbytes / best


def floor(cases: list[tuple[str, int, int]], dtype: str) -> list[dict[str, Any]]:
    """(shape, rows, live tokens a row): steps of a segment in the middle of a response, over pages."""
    import jax

    rate = copy_bandwidth()
    print(f"floor     measured copy rate {rate / 1e9:.0f} GB/s")
    rows = []
    for name, count, length in cases:
        asked = (SHAPES | LARGE)[name] | {"rows": count, "prompt_tokens": length, "response_tokens": 257}
        model, engine = our_engine(asked, dtype)
        params = model.init(jax.random.key(0))
        view = engine.view(params)
        weights = sum(x.nbytes for x in jax.tree.leaves(view)) - (
            view["embed"].nbytes if asked["tie_word_embeddings"] else 0
        )
        del params
        segments: list[float] = []

        def told(progress, into=segments):
            into.append(progress.seconds)

        for turn in range(2):  # the first compiles
            segments.clear()
            for _ in engine.stream(view, our_prompts(asked), jax.random.key(turn), on_progress=told):
                pass
        steps = np.diff(segments)[:-1] / engine.segment  # whole segments; the first one holds the prefill
        c = model.config
        token_bytes = (
            2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * np.dtype(jax.numpy.dtype(dtype)).itemsize
        )
        live = count * (length + 2 * engine.segment) * token_bytes
        seconds = float(np.median(steps))
        row = {
            "shape": name,
            "dtype": dtype,
            "rows": count,
            "live_tokens": length,
            "step_ms": 1e3 * seconds,
            "tokens_per_s": count / seconds,
            "weights_bytes": int(weights),
            "cache_bytes": int(live),
            "floor_share": (weights + live) / rate / seconds,
        }
        rows.append(row)
        print(
            f"floor     {name} {dtype} {count} rows x {length} tokens: {row['step_ms']:.2f} ms a step, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['floor_share']:.0%} of the bandwidth floor",
            flush=True,
        )
    return rows


def gap(rows: int = 512) -> list[dict[str, Any]]:
    """nats, over the response tokens of `rows` samples at temperature 1."""
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.config.places import DEMO_CONFIG
    from tsopsd_jax.data import Tokenizer, load_problems
    from tsopsd_jax.data.encode import pad_prompts
    from tsopsd_jax.distributed.sharding import make_mesh
    from tsopsd_jax.learn.update import distillation_batch, per_token_stats
    from tsopsd_jax.model import load_pretrained
    from tsopsd_jax.objectives import OBJECTIVES
    from tsopsd_jax.rollout import Engine, Sampling
    from tsopsd_jax.types import Prompts

    folder = DEMO_CONFIG.parent / "countdown-tiny"
    tokenizer, objective = Tokenizer.load(folder), OBJECTIVES["dapo"]()
    with tempfile.TemporaryDirectory() as cache:
        problems = load_problems("countdown", split="test", path=None, directory=cache, first=rows, template="plain")
    ids = [tokenizer.encode(p.prompt) for p in problems]
    tokens, length = pad_prompts([p.id for p in problems], ids, max_prompt_tokens=max(map(len, ids)))
    prompts = Prompts(tokens, length, np.arange(rows, dtype=np.uint32))
    found = []
    for dtype in ("float32", "bfloat16"):
        model, _ = load_pretrained(folder, dtype=jnp.dtype(dtype))
        params = load_pretrained(folder)[1]  # float32 master weights, as in training
        mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
        settings = {"max_prompt_tokens": tokens.shape[1], "max_response_tokens": 19, "stop_ids": tokenizer.stop_ids}
        engine = Engine(model, mesh, sampling=Sampling(), slots=rows // 2, segment=8, **settings)
        rollout = engine.run(engine.view(params), prompts, jax.random.key(0))

        def learner(params, batch, model=model):
            return per_token_stats(model, params, batch, objective)["logp"]

        logp = jax.jit(learner)(params, distillation_batch(rollout))
        difference = np.abs(np.asarray(logp) - rollout.logp)[rollout.mask]
        row = {"dtype": dtype, "tokens": len(difference), "mean_nats": float(difference.mean())}
        found.append(row | {"max_nats": float(difference.max())})
        print(f"gap       {dtype}: mean {difference.mean():.2e} nats, largest {difference.max():.2e}", flush=True)
    return found


def start(shapes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in shapes:
        with tempfile.TemporaryDirectory() as cache:
            env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
            for state in ("cold", "warm"):
                peer = Peer(worker("ours", SHAPES[name], "float32"), env)
                seconds = peer.go()["seconds"]
                peer.close()
                row = {"shape": name, "cache": state} | {
                    key: peer.ready[key] for key in ("programs", "start_s", "first_tokens_s", "first_run_s")
                }
                row["steady_run_s"] = seconds
                rows.append(row)
                print(
                    f"start     {name} {state}: {row['programs']} programs, first run {row['first_run_s']:.1f} s, "
                    f"later runs {row['steady_run_s']:.2f} s",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="demo-64,demo-512,small")
    parser.add_argument("--parts", default="peers,slots,sharing,ragged,floor,gap,start")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tunix-python", help="python of an environment with google-tunix")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shapes, parts = args.shapes.split(","), args.parts.split(",")
    result = about()
    if "peers" in parts:
        result["peers"] = peers(shapes, args.rounds, args.tunix_python)
    if "slots" in parts:
        result["slots"] = slots()
    if "ragged" in parts:
        result["ragged"] = ragged()
    if "sharing" in parts:
        result["sharing"] = sharing()
    if "floor" in parts:
        import jax

        result["device"] = jax.devices()[0].device_kind
        if jax.default_backend() == "cpu":
            result["floor"] = floor([("small", 32, 512), ("small", 8, 2048)], "float32")
        else:
            cases = [(name, rows, length) for name in LARGE for rows in (64, 128, 256) for length in (512, 1536)]
            result["floor"] = floor(cases, "bfloat16")
    if "gap" in parts:
        result["gap"] = gap()
    if "start" in parts:
        result["start"] = start(shapes)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(args.out)


if __name__ == "__main__":
    main()
