"""Benchmark worker: one GRPO update by Tunix (google-tunix): its Qwen3, its loss, its train step's order, on a CPU.

Run as `python benchmarks/learner_tunix.py SHAPE_AS_JSON` in an environment with google-tunix;
see `benchmarks/learner.py`.
"""

import importlib.metadata
import json
import os
import sys
import types

os.environ["JAX_PLATFORMS"] = "cpu"  # before the first import of jax

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from peers import gemm_gflops, memory_of, serve
from rollout_tunix import Job, build_sampler
from tunix.rl import algo_core


def main() -> None:
    asked = json.loads(sys.argv[1])
    job = Job(**asked)
    model = build_sampler(job).transformer
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)), wrt=nnx.Param)
    width = job.prompt_tokens + job.response_tokens
    tokens = np.random.default_rng(0).integers(0, job.vocab_size, (job.rows, width)).astype(np.int32)
    ones = jnp.ones((job.rows, job.response_tokens), jnp.float32)
    example = types.SimpleNamespace(
        prompt_ids=jnp.asarray(tokens[:, : job.prompt_tokens]),
        completion_ids=jnp.asarray(tokens[:, job.prompt_tokens :]),
        completion_mask=ones.astype(bool),
        advantages=jnp.asarray(np.random.default_rng(1).normal(size=job.rows), jnp.float32),
        old_per_token_logps=None,
        ref_per_token_logps=None,
    )
    algorithm = types.SimpleNamespace(
        beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_algo="grpo", loss_agg_mode="token-mean", temperature=1.0
    )

    def loss(model):
        return algo_core.grpo_loss_fn(model, example, algorithm, pad_id=-1, eos_id=-2)

    @nnx.jit
    def step(model, optimizer):
        (value, _), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        norm = optax.global_norm(grads)
        optimizer.update(model, grads)
        return value, norm

    def run() -> None:
        jax.block_until_ready((step(model, optimizer), nnx.state(model)))

    grown = memory_of(run)
    a, product = jnp.ones((1024, 1024)), jax.jit(lambda a: a @ a)
    version = importlib.metadata.version("google-tunix")
    gemm = gemm_gflops(lambda: product(a).block_until_ready())
    serve(run, {"name": f"tunix {version}", "grown_bytes": grown, "gemm_gflops": gemm}, turn_s=1.0)


if __name__ == "__main__":
    main()
