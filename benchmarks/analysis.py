"""What analyses of two policies cost beside the two forward passes that they need.

    python benchmarks/analysis.py --out benchmarks/results/analysis_cpu.json [--model configs/models/Qwen3-0.6B]
        [--layers 4] [--rows 2] [--width 256] [--rounds 5]

A model of the given shape with random weights stands for both policies (two forward passes are computed all the same);
the second half of each row is its response. In one process and in turns: the two passes, then the same batch by
`tsopsd analyse distributions`; likewise for `tsopsd analyse representations`. A pass of the former forms the logits of
each response token, tile by tile, and the sum of their exponentials; one of the latter ends before the head.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import about

from tsopsd_jax.analysis.batches import Answered, GivenBatch, batches_of
from tsopsd_jax.analysis.distributions import OnMesh, compare_tokens
from tsopsd_jax.analysis.representations import layer_similarity
from tsopsd_jax.distributed.sharding import make_mesh, put, row_sharding
from tsopsd_jax.head import batch_stats
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model.hf_config import read_config

TILE_TOKENS = 256


def given(vocab_size: int, rows: int, width: int) -> GivenBatch:
    """Rows of random tokens, the second half of each its response."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, width)).tolist()
    answered = [Answered(row[: width // 2], row[width // 2 :]) for row in tokens]
    return next(batches_of(answered, tokens_at_once=rows * width, multiple=1, limit=width))


def seconds_of(run: Callable[[], Any]) -> float:
    """The time of a run, to the end of its computation."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


class Turns:
    """Yields a batch again and again, timing what an analysis does with it; before each, the passes."""

    def __init__(self, part: GivenBatch, passes: Callable[[], Any], rounds: int):
        self.part, self.passes, self.rounds = part, passes, rounds
        self.needed_s: list[float] = []
        self.taken_s: list[float] = []

    def __iter__(self) -> Iterator[GivenBatch]:
        for number in range(-1, self.rounds):
            needed = seconds_of(self.passes)
            began = time.perf_counter()
            yield self.part
            if number >= 0:  # the first time it was compiled
                self.needed_s.append(needed)
                self.taken_s.append(time.perf_counter() - began)

    def row(self, name: str) -> dict[str, Any]:
        needed, taken = statistics.median(self.needed_s), statistics.median(self.taken_s)
        return {
            "analysis": name,
            "passes_s": needed,
            "analysis_s": taken,
            "ratio": statistics.median(t / n for t, n in zip(self.taken_s, self.needed_s, strict=True)),
            "all_passes_s": self.needed_s,
            "all_analysis_s": self.taken_s,
        }


def measure(config: Qwen3Config, rows: int, width: int, rounds: int, which: list[str]) -> list[dict[str, Any]]:
    """A row for each analysis."""
    mesh = make_mesh()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = Qwen3(config, compute_dtype=dtype, mesh=mesh)
    params = jax.jit(model.init)(jax.random.key(0))
    policy, part = OnMesh(model, params), given(config.vocab_size, rows, width)
    batch = put(part.batch, row_sharding(mesh))

    @jax.jit
    def logits(params, batch):
        def stats(z, _tokens):
            return {"logsumexp": jax.nn.logsumexp(z, axis=-1)}

        hidden = model.hidden(params, batch.tokens)
        return batch_stats(stats, hidden, model.unembed(params), batch, tile_tokens=TILE_TOKENS, mesh=mesh)

    states = jax.jit(lambda params, batch: model.layer_states(params, batch.tokens))
    found = []
    if "distributions" in which:
        turns = Turns(part, lambda: [logits(params, batch) for _ in range(2)], rounds)
        for _ in compare_tokens(policy, policy, iter(turns), k=10, tile_tokens=TILE_TOKENS, mesh=mesh):
            pass
        found.append(turns.row("distributions"))
    if "representations" in which:
        turns = Turns(part, lambda: [states(params, batch) for _ in range(2)], rounds)
        first = [iter([part])]  # the means of the first batch
        layer_similarity(
            policy, policy, lambda *_: first.pop() if first else iter(turns), mesh=mesh, memory_bytes=16 << 30
        )
        found.append(turns.row("representations"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "configs/models/Qwen3-0.6B")
    parser.add_argument("--layers", type=int, default=4, help="of the model; fewer make the head a larger part")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["distributions", "representations"])
    args = parser.parse_args()
    shape = dataclasses.replace(read_config(args.model / "config.json"), num_hidden_layers=args.layers)
    cases = measure(shape, args.rows, args.width, args.rounds, args.only)
    for case in cases:
        took = f"{case['analysis_s']:.2f} s, passes {case['passes_s']:.2f} s"
        print(f"{case['analysis']}: {took}, ratio {case['ratio']:.2f}")
    if args.out:
        settings = {
            "model": args.model.name,
            "layers": args.layers,
            "rows": args.rows,
            "width": args.width,
            "jax": jax.__version__,
        }
        args.out.write_text(json.dumps({**about(), **settings, "cases": cases}, indent=1) + "\n")
