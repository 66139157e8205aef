"""The processes that `benchmarks/rollout.py` times: this sampler and transformers' `generate`.

Run as `python benchmarks/rollout_workers.py ours|transformers SHAPE_AS_JSON float32|bfloat16`. A worker prints a line
when it is ready, and for each line on stdin samples once and prints the seconds.
"""

import itertools
import json
import os
import sys
import time
from typing import Any

import numpy as np
from peers import divide_cpu, gemm_gflops, serve


def our_engine(asked: dict[str, Any], dtype: str, *, slots: int | None = None):
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.distributed.sharding import make_mesh
    from tsopsd_jax.model import Qwen3, Qwen3Config
    from tsopsd_jax.rollout import Engine, Sampling

    names = Qwen3Config.__dataclass_fields__
    mesh = make_mesh(devices=jax.devices()[: asked.get("cpu_devices", 1)])
    config = Qwen3Config(**{k: v for k, v in asked.items() if k in names})
    model = Qwen3(config, compute_dtype=jnp.dtype(dtype), mesh=mesh)
    engine = Engine(
        model,
        mesh,
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

    from tsopsd_jax.distributed.sharding import tree_shardings

    devices = divide_cpu(asked)
    model, engine = our_engine(asked, dtype)
    assert model.mesh is not None
    layout = tree_shardings(model.param_axes(), model.param_shapes(), model.mesh)
    prompts, params = our_prompts(asked), model.init(jax.random.key(0), shardings=layout)
    a = jnp.ones((1024, 1024))
    product = jax.jit(lambda a: a @ a)
    built = time.perf_counter()

    seeds = itertools.count()

    def run() -> None:
        rollout = engine.run(engine.view(params), prompts, jax.random.key(next(seeds)))
        assert rollout.response_length.sum() == asked["rows"] * asked["response_tokens"]

    run()
    first = engine.progress.first_token_s
    ready = {
        "peer": f"tsopsd_jax {dtype}, {devices} device{'s' * (devices > 1)}",
        "versions": {"jax": jax.__version__},
        "gemm_gflops": gemm_gflops(lambda: product(a).block_until_ready()),
        "programs": engine.programs,
        "start_s": built - began,
        "first_tokens_s": first,
        "first_run_s": time.perf_counter() - built,
        "backend": jax.devices()[0].device_kind,
    }
    serve(run, ready)


def work_transformers(asked: dict[str, Any], dtype: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.Qwen3Config(
        **{k: v for k, v in asked.items() if k not in ("rows", "prompt_tokens", "response_tokens", "cpu_devices")}
    )
    torch.manual_seed(0)
    model: Any = transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype)).eval()
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

    seeds = itertools.count()

    def run() -> None:
        torch.manual_seed(next(seeds))
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=generation)
        assert out.shape[1] == asked["prompt_tokens"] + n

    run()
    a = torch.ones(1024, 1024)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    ready = {"peer": f"transformers {dtype}", "versions": versions, "gemm_gflops": gemm_gflops(lambda: a @ a)}
    serve(run, ready)


if __name__ == "__main__":
    {"ours": work_ours, "transformers": work_transformers}[sys.argv[1]](json.loads(sys.argv[2]), sys.argv[3])
