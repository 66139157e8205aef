"""Benchmark worker: rollout speed of Tunix's Sampler (google-tunix) with its Qwen3 model, on CPU in float32.

    python benchmarks/rollout_tunix.py '{"hidden_size": 96, ..., "rows": 64, "prompt_tokens": 7, "response_tokens": 19}'

The one argument is a JSON object with the fields of `Job`. The worker builds the model with random weights, compiles
by generating a few times, and prints a line {"peer": ..., "ready": true, ...}. Then each line "go" on stdin makes it
generate rows x response_tokens tokens, sampled from the full distribution at temperature 1, and print
{"seconds": ...}. It exits at the end of stdin. Only these JSON lines go to stdout. It needs google-tunix,
which is best installed in a virtual environment of its own.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from typing import Any, TextIO

os.environ["JAX_PLATFORMS"] = "cpu"  # before the first import of jax

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from peers import gemm_gflops
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
WARM_UP_CALLS = 3  # the first compiles; the later ones show that nothing is left to compile


@dataclasses.dataclass(frozen=True)
class Job:
    """The model's sizes, named as in a Qwen3 checkpoint's configuration, and the rollout's shape."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rows: int
    prompt_tokens: int
    response_tokens: int
    tie_word_embeddings: bool = True


class StubTokenizer:
    """Turns any string into `length` pseudo-random token ids, and any ids into the empty string.

    The ids for padding and for the end of a sequence lie outside the vocabulary. So no response ends early, and no
    sampled token is taken for padding, which the Sampler would mask in attention.
    """

    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size = vocab_size
        self._length = length
        self._ids = functools.cache(self._drawn)  # drawing is no part of what is timed

    def _drawn(self, text: str) -> tuple[int, ...]:
        rng = random.Random(text)
        return tuple(rng.randrange(self._vocab_size) for _ in range(self._length))

    def encode(self, text: str) -> list[int]:
        return list(self._ids(text))

    def decode(self, _ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        """No such token: the Sampler then puts nothing before the prompt."""

    def eos_id(self) -> int:
        return self._vocab_size

    def pad_id(self) -> int:
        return self._vocab_size + 1


def build_sampler(job: Job) -> Sampler:
    """A Sampler over a randomly initialised Qwen3, with a cache of exactly prompt + response tokens."""
    config = ModelConfig(
        num_layers=job.num_hidden_layers,
        vocab_size=job.vocab_size,
        embed_dim=job.hidden_size,
        hidden_dim=job.intermediate_size,
        num_heads=job.num_attention_heads,
        head_dim=job.head_dim,
        num_kv_heads=job.num_key_value_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=job.tie_word_embeddings,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    cache = CacheConfig(
        cache_size=job.prompt_tokens + job.response_tokens,
        num_layers=job.num_hidden_layers,
        num_kv_heads=job.num_key_value_heads,
        head_dim=job.head_dim,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    return Sampler(model, StubTokenizer(job.vocab_size, job.prompt_tokens), cache)


def generate(sampler: Sampler, job: Job, seed: int) -> tuple[float, np.ndarray]:
    """One rollout: the seconds until its tokens are on the host, and the tokens, [rows, response_tokens]."""
    prompts = [f"p{row}" for row in range(job.rows)]
    start = time.perf_counter()
    # top_p=1.0 chooses sampling (without it the Sampler is greedy); with top_k=None nothing is cut off or sorted.
    output = sampler(
        prompts,
        max_generation_steps=job.response_tokens,
        max_prompt_length=job.prompt_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        seed=seed,
    )
    seconds = time.perf_counter() - start  # the Sampler has copied the tokens to the host
    tokens = np.stack(output.tokens)
    if tokens.shape != (job.rows, job.response_tokens) or tokens.min() < 0 or tokens.max() >= job.vocab_size:
        raise RuntimeError(f"expected {job.rows} full responses of {job.response_tokens} tokens, got {tokens.shape}")
    return seconds, tokens


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "jaxlib", "flax")}
    return {"python": platform.python_version(), **packages}


def claim_stdout() -> TextIO:
    """The real stdout; whatever else writes to stdout from now on, native code too, lands on stderr."""
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return real


def main() -> None:
    out = claim_stdout()
    job = Job(**json.loads(sys.argv[1]))
    compiles: list[float] = []

    def count(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    sampler = build_sampler(job)
    warm = [generate(sampler, job, seed)[1] for seed in range(WARM_UP_CALLS)]
    if np.array_equal(warm[0], warm[1]):
        raise RuntimeError("two seeds gave the same tokens: the Sampler is not sampling")
    a, product = jnp.ones((1024, 1024)), jax.jit(jnp.matmul)
    ready = {
        "peer": "tunix f32",
        "ready": True,
        "versions": versions(),
        "gemm_gflops": gemm_gflops(lambda: product(a, a).block_until_ready()),
        "tie_word_embeddings": job.tie_word_embeddings,
    }
    print(json.dumps(ready), file=out, flush=True)
    if not compiles:
        raise RuntimeError(f"jax reported no {COMPILE_EVENT}: recompilation would go unnoticed")
    seed = WARM_UP_CALLS
    for line in sys.stdin:
        if line.strip() != "go":
            continue
        before = len(compiles)
        seconds, _ = generate(sampler, job, seed)
        seed += 1
        if len(compiles) != before:
            raise RuntimeError("jax compiled during a timed rollout")
        print(json.dumps({"seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
