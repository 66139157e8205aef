"""The processes that `benchmarks/rollout.py` times: this sampler and transformers' `generate`.

Run as `python benchmarks/rollout_workers.py ours|transformers SHAPE_AS_JSON float32|bfloat16`. A worker prints a line
when it is ready, and for each line on stdin samples once and prints the seconds.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np


def gemm_gflops(multiply: Any, n: int = 1024) -> float:
    """Of a float32 n x n x n product; `multiply` runs one and waits."""
    multiply()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times) / 1e9


def serve(run: Any, ready: dict[str, Any], tokens: int) -> None:
    """Answer each line on stdin with the seconds of one run."""
    print(json.dumps(ready | {"ready": True}), flush=True)
    for index, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        run(index)
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), flush=True)


def our_engine(asked: dict[str, Any], dtype: str, *, slots: int | None = None):
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.model import Qwen3, Qwen3Config
    from tsopsd_jax.rollout import Engine, Sampling
    from tsopsd_jax.sharding import make_mesh

    names = Qwen3Config.__dataclass_fields__
    model = Qwen3(Qwen3Config(**{k: v for k, v in asked.items() if k in names}), compute_dtype=jnp.dtype(dtype))
    engine = Engine(
        model,
        make_mesh(fsdp=1, devices=jax.devices()[:1]),
        sampling=Sampling(),
        max_prompt_tokens=asked["prompt_tokens"],
        max_response_tokens=asked["response_tokens"],
        stop_ids=(model.vocab_size,),  # no such token: nothing ends early
        slots=slots or asked["rows"],
    )
    return model, engine


def our_prompts(asked: dict[str, Any], rows: int | None = None):
    from tsopsd_jax.types import Prompts

    n, p = rows or asked["rows"], asked["prompt_tokens"]
    tokens = np.random.default_rng(0).integers(0, asked["vocab_size"], (n, p)).astype(np.int32)
    return Prompts(tokens, np.full(n, p, np.int32), np.arange(n, dtype=np.uint32))


def work_ours(asked: dict[str, Any], dtype: str) -> None:
    """The engine, the making of the rollout view included: as a training step calls it."""
    began = time.perf_counter()
    import jax
    import jax.numpy as jnp

    model, engine = our_engine(asked, dtype)
    prompts, params = our_prompts(asked), model.init(jax.random.key(0))
    a = jnp.ones((1024, 1024))
    product = jax.jit(lambda a: a @ a)
    built = time.perf_counter()

    def run(index: int) -> None:
        rollout = engine.run(engine.view(params), prompts, jax.random.key(index))
        assert rollout.response_length.sum() == asked["rows"] * asked["response_tokens"]

    run(0)
    first = engine.progress.first_token_s
    ready = {
        "peer": f"tsopsd_jax {dtype}",
        "versions": {"jax": jax.__version__},
        "gemm_gflops": gemm_gflops(lambda: product(a).block_until_ready()),
        "programs": engine.programs,
        "start_s": built - began,
        "first_tokens_s": first,
        "first_run_s": time.perf_counter() - built,
        "backend": jax.devices()[0].device_kind,
    }
    serve(run, ready, asked["rows"] * asked["response_tokens"])


def work_transformers(asked: dict[str, Any], dtype: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.Qwen3Config(
        **{k: v for k, v in asked.items() if k not in ("rows", "prompt_tokens", "response_tokens")}
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype)).eval()
    prompts = torch.from_numpy(our_prompts(asked).tokens).long()
    n = asked["response_tokens"]
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    generation = transformers.GenerationConfig(max_new_tokens=n, min_new_tokens=n, **settings)

    def run(index: int) -> None:
        torch.manual_seed(index)
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=generation)
        assert out.shape[1] == asked["prompt_tokens"] + n

    run(0)
    a = torch.ones(1024, 1024)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    ready = {"peer": f"transformers {dtype}", "versions": versions, "gemm_gflops": gemm_gflops(lambda: a @ a)}
    serve(run, ready, asked["rows"] * n)


if __name__ == "__main__":
    {"ours": work_ours, "transformers": work_transformers}[sys.argv[1]](json.loads(sys.argv[2]), sys.argv[3])
