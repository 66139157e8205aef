"""The update against peers, against a supervised step, packed against padded, and in operations per second.

    python benchmarks/learner.py --out benchmarks/results/learner_cpu.json [--trl-python PATH] [--tunix-python PATH]
        [--rounds 5] [--parts update,supervised,packing,mfu]

update      one policy update (loss, gradient, clip, AdamW; no reference model) of this learner, of TRL's GRPOTrainer
            and of Tunix's GRPO loss in its train step: equal shapes, float32, every row full, each in a process of
            its own, in turns
supervised  the reheater's update against a plain supervised step
            (cross-entropy on all logits, same trunk and optimizer)
packing     one update of responses with log-normal lengths, rows packed and rows padded
mfu         floating-point operations per second of the update by row length, against the machine's own matrix product

Operations are counted by hand: 6 per parameter of a matrix product and token (the unembedding only at response tokens),
and 12 L / 2 N H of causal attention per layer and token, forward and backward; recomputation is not counted.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import about, divide_cpu, gemm_gflops, in_turns, memory_of, serve
from rollout import DEMO, shape

SHAPES = {
    "demo": shape(*DEMO, rows=64, prompt_tokens=7, response_tokens=19),
    "small": shape(512, 8, 8192, 8, 2, 64, 1536, rows=8, prompt_tokens=64, response_tokens=448),
}
LARGE = {  # on an accelerator
    "0.6b": shape(1024, 28, 151_936, 16, 8, 128, 3072),
    "4b": shape(2560, 36, 151_936, 32, 8, 128, 9728),
}
HERE = Path(__file__).resolve().parent


def tokens_of(asked: dict[str, Any]) -> np.ndarray:
    width = asked["prompt_tokens"] + asked["response_tokens"]
    return np.random.default_rng(0).integers(0, asked["vocab_size"], (asked["rows"], width)).astype(np.int32)


def our_model(asked: dict[str, Any], **settings: Any):
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.distributed.sharding import make_mesh
    from tsopsd_jax.model import Qwen3, Qwen3Config

    names = Qwen3Config.__dataclass_fields__
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    mesh = make_mesh(devices=jax.devices()[: asked.get("cpu_devices", 1)])
    config = Qwen3Config(**{k: v for k, v in asked.items() if k in names})
    return Qwen3(config, **({"compute_dtype": dtype, "mesh": mesh} | settings))


def our_update(asked: dict[str, Any], objective: str, *, tile: int = 1024, micro_batches: int = 1, **settings: Any):
    """(update, its batch -> seconds of one call): one jitted function with a donated state."""
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.learn.update import abstract_state, fresh_optimizer_state, make_optimizer, make_update
    from tsopsd_jax.objectives import OBJECTIVES
    from tsopsd_jax.types import TrainState

    model = our_model(asked, **settings)
    optimizer = make_optimizer(learning_rate=1e-6)
    made = make_update(model, OBJECTIVES[objective](), optimizer, micro_batches=micro_batches, tile_tokens=tile)
    assert model.mesh is not None
    like = abstract_state(model, optimizer, model.mesh)
    layout = jax.tree.map(lambda x: x.sharding, like)
    params = model.init(jax.random.key(0), shardings=layout.params)
    fresh = TrainState(jnp.zeros((), jnp.int32), params, fresh_optimizer_state(optimizer, like, params))
    state = [jax.device_put(fresh, layout)]
    update = jax.jit(made, donate_argnums=0, out_shardings=(layout, None))

    def run(batch: Any) -> float:
        began = time.perf_counter()
        state[0], out = update(state[0], batch, jnp.float32(jnp.inf))
        jax.block_until_ready((state[0], out))
        return time.perf_counter() - began

    return run


def full_batch(asked: dict[str, Any]):
    import jax.numpy as jnp

    from tsopsd_jax.types import Batch

    tokens = tokens_of(asked)
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= asked["prompt_tokens"], tokens.shape)
    advantage = np.random.default_rng(1).normal(size=(len(tokens), 1)) * np.ones(tokens.shape)
    logp = -np.log(asked["vocab_size"]) * np.ones(tokens.shape)
    return Batch.of(tokens=tokens, mask=mask, advantage=jnp.asarray(advantage), old_logp=jnp.asarray(logp))


# -------------------------------------------------------------------- update


def work_ours(asked: dict[str, Any]) -> None:
    devices = divide_cpu(asked)
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.distributed.sharding import make_mesh, row_sharding
    from tsopsd_jax.learn.micro_batches import TOKENS_PER_CPU, choose_micro_batches

    width = asked["prompt_tokens"] + asked["response_tokens"]
    pieces = choose_micro_batches(
        lambda _: 0, rows=asked["rows"], width=width, shards=devices, limit_bytes=None, tokens=TOKENS_PER_CPU
    )  # as a run does
    run = our_update(asked, "dapo", micro_batches=pieces)
    batch = jax.device_put(full_batch(asked), row_sharding(make_mesh(devices=jax.devices()[:devices])))
    grown = memory_of(lambda: run(batch))
    a = jnp.ones((1024, 1024))
    ready = {
        "name": f"tsopsd_jax, {devices} device{'s' * (devices > 1)}",
        "grown_bytes": grown,
        "micro_batches": pieces,
        "gemm_gflops": gemm_gflops(lambda: (a @ a).block_until_ready()),
    }
    serve(lambda: run(batch), ready, turn_s=1.0)


def work_trl(asked: dict[str, Any]) -> None:
    """GRPOTrainer's loss on prepared inputs, backward, clip, AdamW: what its training step does after generation."""
    import tempfile

    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    torch.manual_seed(0)
    keep = ("rows", "prompt_tokens", "response_tokens")
    config = transformers.Qwen3Config(**{k: v for k, v in asked.items() if k not in keep})
    model = transformers.Qwen3ForCausalLM(config)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=asked["rows"],
        num_generations=8,
        max_completion_length=asked["response_tokens"],
        beta=0.0,
        loss_type="dapo",
        epsilon_high=0.28,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * 64}),
        processing_class=tokenizer,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokens, p = torch.from_numpy(tokens_of(asked)).long(), asked["prompt_tokens"]
    inputs = {
        "prompt_ids": tokens[:, :p],
        "prompt_mask": torch.ones_like(tokens[:, :p]),
        "completion_ids": tokens[:, p:],
        "completion_mask": torch.ones_like(tokens[:, p:]),
        "advantages": torch.randn(len(tokens)),
        "num_items_in_batch": torch.tensor(tokens[:, p:].numel()),
    }
    trainer.current_gradient_accumulation_steps = 1
    model.train()

    def run() -> None:
        trainer.compute_loss(model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    grown = memory_of(run)
    a = torch.ones(1024, 1024)
    ready = {"name": f"trl {trl.__version__}", "grown_bytes": grown, "gemm_gflops": gemm_gflops(lambda: a @ a)}
    serve(run, ready | {"torch": torch.__version__}, turn_s=1.0)


def update(rounds: int, trl_python: str | None, tunix_python: str | None) -> list[dict[str, Any]]:
    found = []
    for name, asked in SHAPES.items():

        def command(kind: str, python: str = sys.executable, asked: dict[str, Any] = asked) -> list[str]:
            return [python, __file__, "--worker", kind, json.dumps(asked)]

        commands = [command("ours"), command("ours", asked=asked | {"cpu_devices": 2})]
        if trl_python:
            commands.append(command("trl", trl_python))
        if tunix_python:
            commands.append([tunix_python, str(HERE / "learner_tunix.py"), json.dumps(asked)])
        rows = in_turns(commands, rounds)
        best = min((row["seconds"] for row in rows if "tsopsd" not in row["name"]), default=float("nan"))
        for row in rows:
            row |= {"shape": name, "rows": asked["rows"], "to_best_peer": row["seconds"] / best}
            print(
                f"update      {name:6} {row['name']:21} {row['seconds']:7.3f} s  {row['to_best_peer']:.2f} "
                f"x the best peer"
                f"   grown {row['grown_bytes'] / 1e9:.2f} GB   its GEMM {row['gemm_gflops']:.0f} GFLOP/s",
                flush=True,
            )
        found += rows
    return found


# ---------------------------------------------------------------- supervised


def supervised(asked: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Both learn from all response tokens; the supervised step has the logits of all of them at once."""
    import jax
    import jax.numpy as jnp
    import optax

    from tsopsd_jax import losses
    from tsopsd_jax.learn.update import make_optimizer

    batch, model, optimizer = full_batch(asked), our_model(asked), make_optimizer(learning_rate=1e-6)
    p = asked["prompt_tokens"]

    def loss(params):
        hidden = model.hidden(params, batch.tokens)[:, p - 1 : -1]
        return -jnp.mean(losses.token_logp(model.project(params, hidden), batch.tokens[:, p:]))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, value

    params = model.init(jax.random.key(0))
    carried = [params, jax.jit(optimizer.init)(params)]

    def plain() -> float:
        began = time.perf_counter()
        *carried[:], value = step(*carried)
        jax.block_until_ready((carried, value))
        return time.perf_counter() - began

    reheat = our_update(asked, "ts_opsd")
    times: dict[str, list[float]] = {"supervised": [], "reheat": []}
    plain()
    reheat(batch)
    for _ in range(rounds):
        times["supervised"].append(plain())
        times["reheat"].append(reheat(batch))
    return {name: float(np.median(t)) for name, t in times.items()} | {"all": times}


# ------------------------------------------------------------- packing, mfu


def packing(asked: dict[str, Any], rounds: int, *, rows: int = 64, limit: int = 512, mean: int = 64) -> dict[str, Any]:
    """Responses as in the rollout benchmark, an eighth of their limit long on average,
    scaled to what a CPU can bear."""
    from tsopsd_jax.learn.packing import pack, useful_fraction
    from tsopsd_jax.types import Batch

    rng = np.random.default_rng(0)
    response = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, rows).astype(int), 1, limit)
    prompt = rng.integers(8, 33, rows)
    length, width = prompt + response, 32 + limit
    at = np.arange(width)[None, :]
    fields = {
        "tokens": np.where(at < length[:, None], rng.integers(0, asked["vocab_size"], (rows, width)), 0).astype(
            np.int32
        ),
        "mask": (at >= prompt[:, None]) & (at < length[:, None]),
        "advantage": np.ones((rows, width), np.float32),
        "old_logp": np.full((rows, width), -9, np.float32),
    }
    padded = Batch.of(**fields)
    pieces = rows // 4
    packed = pack(padded, length, micro_batches=pieces)
    run = our_update(asked, "dapo", micro_batches=pieces)
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    for batch in (padded, packed):
        run(batch)
    for _ in range(rounds):
        times["padded"].append(run(padded))
        times["packed"].append(run(packed))
    useful = {
        name: useful_fraction(batch, length, micro_batches=pieces)
        for name, batch in (("padded", padded), ("packed", packed))
    }
    return {"seconds": {name: float(np.median(t)) for name, t in times.items()}, "useful": useful, "all": times}


def papers_useful() -> dict[str, float]:
    """Share of computed positions that hold a token, at the paper's sizes; no model is run."""
    from tsopsd_jax.learn.packing import pack, useful_fraction
    from tsopsd_jax.types import Batch

    rng = np.random.default_rng(0)
    response = np.clip(rng.lognormal(np.log(1000) - 0.5, 1.0, 512).astype(int), 1, 8192)
    length = response + rng.integers(20, 513, 512)
    at = np.arange(10_240)[None, :]
    mask = at < length[:, None]
    zero = np.zeros(mask.shape, np.float32)
    fields: list[Any] = [zero.astype(np.int32), mask, zero, zero]
    batch = Batch(*fields)
    packed = pack(batch, length, micro_batches=64)
    return {
        "padded": useful_fraction(batch, length, micro_batches=64),
        "packed": useful_fraction(packed, length, micro_batches=64),
    }


def operations(asked: dict[str, Any], rows: int, length: int, responses: int) -> float:
    """Operations of one update, by hand; `responses` response tokens in all."""
    d, f, h = asked["hidden_size"], asked["intermediate_size"], asked["head_dim"]
    n, kv, layers = asked["num_attention_heads"], asked["num_key_value_heads"], asked["num_hidden_layers"]
    layer = d * h * (n + 2 * kv) + n * h * d + 3 * d * f
    attention = 12 * (length / 2) * n * h
    return rows * length * layers * (6 * layer + attention) + 6.0 * responses * d * asked["vocab_size"]


def mfu(rounds: int) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    a = jnp.ones((1024, 1024) if on_cpu else (8192, 8192), dtype)
    product = jax.jit(lambda a: a @ a)
    cases = [("small", 128, 32), ("small", 512, 8), ("small", 2048, 2)]
    if not on_cpu:
        cases = [(name, length, 16_384 // length) for name in LARGE for length in (1024, 4096, 8192)]
    found = []
    for name, length, rows in cases:
        asked = (SHAPES | LARGE)[name] | {"rows": rows, "prompt_tokens": 64, "response_tokens": length - 64}
        run, batch = our_update(asked, "dapo", remat="none" if on_cpu else "full"), full_batch(asked)
        run(batch)
        seconds, peak = [], []
        for _ in range(rounds):
            seconds.append(run(batch))
            peak.append(gemm_gflops(lambda: product(a).block_until_ready(), a.shape[0]))
        rate = operations(asked, rows, length, rows * (length - 64)) / float(np.median(seconds)) / 1e9
        row = {"shape": name, "length": length, "rows": rows, "seconds": float(np.median(seconds)), "gflops": rate}
        row["to_matrix_product"] = rate / float(np.median(peak))
        found.append(row)
        print(
            f"mfu         {name} {rows} x {length}: {rate:,.0f} GFLOP/s, "
            f"{100 * row['to_matrix_product']:.0f} % of a product",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="update,supervised,packing,mfu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl-python", help="python of an environment with trl")
    parser.add_argument("--tunix-python", help="python of an environment with google-tunix")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {"ours": work_ours, "trl": work_trl}[args.worker[0]](json.loads(args.worker[1]))
        return
    parts, result = args.parts.split(","), about()
    if "update" in parts:
        result["update"] = update(args.rounds, args.trl_python, args.tunix_python)
    if "supervised" in parts:
        result["supervised"] = {name: supervised(asked, args.rounds) for name, asked in SHAPES.items()}
        for name, row in result["supervised"].items():
            ratio = row["reheat"] / row["supervised"]
            print(
                f"supervised  {name}: {row['supervised']:.3f} s, reheater {row['reheat']:.3f} s: {ratio:.2f} x",
                flush=True,
            )
    if "packing" in parts:
        result["packing"] = packing(SHAPES["demo"], args.rounds) | {"papers_useful": papers_useful()}
        row = result["packing"]
        print(
            f"packing     useful {row['useful']}, seconds {row['seconds']}; paper's sizes {row['papers_useful']}",
            flush=True,
        )
    if "mfu" in parts:
        result["mfu"] = mfu(args.rounds)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
