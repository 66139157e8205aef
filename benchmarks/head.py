"""The vocabulary head, forward and backward, against what one would write first and against peers: time and memory.

    python benchmarks/head.py --out benchmarks/results/head_cpu.json [--trl-python PATH] [--rounds 3]
        [--cases 1024x1024,2560x1024] [--growth 1024,4096,16384] [--only WORD,WORD]

A case is hidden size x tokens, the vocabulary 151,936, float32 (bfloat16 on an accelerator). Every line is a process of
its own, rounds are interleaved. Memory is what the process grew by in its first run, the results (gradients of hidden
states and unembedding) included; `temp` is the compiler's figure without them.

Floating-point operations: 2 N D V for each product; three are needed (logits, and a gradient for each operand), a
fourth where logits are formed twice.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from peers import about, in_turns, memory_of, serve

V, T = 151_936, 1.2
OURS = ("ts_opsd, one pass", "dapo, one pass", "ts_opsd, two passes")
NAIVE = ("cross-entropy, all logits", "ts_opsd, all logits", "ts_opsd, rematerialised chunks")
TORCH = ("torch: cross-entropy, all logits", "torch: ts_opsd, all logits", "trl: tiled divergence")


def inputs(d: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(n, d)).astype(np.float32)
    unembed = rng.normal(size=(d, V)).astype(np.float32)
    unembed *= 3 / np.sqrt(d)  # logits of size 3
    return hidden, unembed, rng.integers(0, V, n).astype(np.int32)


def jax_case(name: str, tokens: Any, tile: int):
    """hidden, unembed -> the loss, to be differentiated in both."""
    import jax
    import jax.numpy as jnp

    from tsopsd_jax import losses
    from tsopsd_jax.head import token_loss, token_stats
    from tsopsd_jax.head_tiles import tiling_for
    from tsopsd_jax.objectives import OBJECTIVES
    from tsopsd_jax.types import Batch

    n = len(tokens)
    ones = jnp.ones((1, n), jnp.float32)
    batch = Batch(tokens[None], ones > 0, ones, -10 * ones)

    def product(h, w):
        return jnp.einsum("ND,DV->NV", h, w.astype(h.dtype), preferred_element_type=jnp.float32)

    def cross_entropy(h, w):
        z = product(h, w)
        of_token = jnp.take_along_axis(z, tokens[:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(z, axis=-1) - of_token)

    def kl(z):
        return losses.forward_kl(jax.lax.stop_gradient(z) / T, z)

    def one_pass(objective):
        def loss(h, w):
            found: Any = token_loss(objective.stats, objective.loss, tiling_for(tile), h, w, batch)
            return found.out.loss.total / n

        return loss

    def two_passes(h, w):
        objective = OBJECTIVES["ts_opsd"]()
        stats: Any = token_stats(objective.stats, tiling_for(tile), h, w, tokens, batch.mask[0])
        return objective.loss({name: x[None] for name, x in stats.items()}, batch).loss.total / n

    def chunks(h, w):
        return jnp.mean(jax.lax.map(jax.checkpoint(lambda x: kl(product(x, w))), h.reshape(-1, tile, h.shape[1])))

    return {
        OURS[0]: one_pass(OBJECTIVES["ts_opsd"]()),
        OURS[1]: one_pass(OBJECTIVES["dapo"]()),
        OURS[2]: two_passes,
        NAIVE[0]: cross_entropy,
        NAIVE[1]: lambda h, w: jnp.mean(kl(product(h, w))),
        NAIVE[2]: chunks,
    }[name]


def compiled(name: str, d: int, n: int, tile: int):
    """(program, its arguments' shapes); nothing is computed."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, n), jnp.int32)
    shapes = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, V), jnp.float32)
    return jax.jit(jax.value_and_grad(jax_case(name, tokens, tile), argnums=(0, 1))).lower(*shapes).compile(), shapes


def work_jax(name: str, d: int, n: int, tile: int) -> None:
    import jax

    program, shapes = compiled(name, d, n, tile)
    arrays = [jax.device_put(x.astype(s.dtype)) for x, s in zip(inputs(d, n), shapes, strict=False)]

    values = []

    def run() -> None:
        values[:] = [float(jax.block_until_ready(program(*arrays))[0])]

    temp = program.memory_analysis().temp_size_in_bytes
    grown = memory_of(run) if jax.default_backend() == "cpu" else run()
    device = jax.devices()[0].device_kind
    serve(run, {"name": name, "loss": values[0], "temp_bytes": temp, "grown_bytes": grown, "device": device})


def work_torch(name: str, d: int, n: int, _tile: int) -> None:
    import torch

    hidden, unembed, tokens = inputs(d, n)
    h = torch.from_numpy(hidden).requires_grad_()
    w = torch.from_numpy(np.ascontiguousarray(unembed.T)).requires_grad_()
    t = torch.from_numpy(tokens).long()

    def loss():
        if name == TORCH[2]:
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

            teacher = h.detach(), w.detach(), None
            found = ChunkedDivergenceFunction.apply(h, w, None, *teacher, 0.0, 1.0, 1.0, None, 1 / T, None)
            return found[0].mean()
        z = h @ w.T
        if name == TORCH[0]:
            return torch.nn.functional.cross_entropy(z, t)
        logq = torch.log_softmax(z.detach() / T, -1)
        return torch.nn.functional.kl_div(torch.log_softmax(z, -1), logq, log_target=True, reduction="batchmean")

    values = []

    def run() -> None:
        h.grad = w.grad = None
        value = loss()
        value.backward()
        values.append(float(value))

    serve(run, {"name": name, "grown_bytes": memory_of(run), "loss": values[-1], "torch": torch.__version__})


def growth(sizes: list[int], tile: int) -> list[dict[str, Any]]:
    """The compiler's temporaries by number of tokens, hidden size 1024; nothing is run."""
    rows = []
    for name in (OURS[0], OURS[2], NAIVE[0], NAIVE[2]):
        temp = [compiled(name, 1024, n, tile)[0].memory_analysis().temp_size_in_bytes for n in sizes]
        rows.append({"name": name, "tokens": sizes, "temp_bytes": temp})
        print(
            f"{name:34} temporaries, GB: "
            + ", ".join(f"{n:,}: {x / 1e9:.2f}" for n, x in zip(sizes, temp, strict=True))
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="1024x1024")
    parser.add_argument("--growth", default="1024,4096,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="words, one of which a line's name must contain, separated by commas")
    parser.add_argument("--tile", type=int, default=1024, help="tokens of a tile")
    parser.add_argument("--trl-python", help="python of an environment with trl")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, d, n = json.loads(args.worker)
        (work_torch if name in TORCH else work_jax)(name, d, n, args.tile)
        return
    result: dict[str, Any] = {"cases": []}
    if args.out and args.out.is_file():  # what was measured of other sizes is kept
        result = json.loads(args.out.read_text())
    result |= about() | {"vocabulary": V}
    for case in args.cases.split(","):
        d, n = map(int, case.split("x"))

        def command(name: str, python: str = sys.executable, size: tuple[int, int] = (d, n)) -> list[str]:
            return [python, __file__, "--tile", str(args.tile), "--worker", json.dumps([name, *size])]

        commands = [command(name) for name in OURS + NAIVE]
        if args.trl_python:
            commands += [command(name, args.trl_python) for name in TORCH]
        if args.only:
            words = args.only.split(",")
            commands = [c for c in commands if any(word in c[-1] for word in words)]
        rows = in_turns(commands, args.rounds)
        plain = next((row["seconds"] for row in rows if row["name"] == NAIVE[0]), None)
        for row in rows:
            row |= {
                "hidden": d,
                "tokens": n,
                "tile_tokens": args.tile,
                "to_cross_entropy": plain and row["seconds"] / plain,
            }
            memory = f"{row['grown_bytes'] / 1e9:5.2f} GB" if row["grown_bytes"] is not None else ""
            ratio = f"{row['to_cross_entropy']:.2f} x" if plain else ""
            print(f"{d} x {n:,}  {row['name']:34} {row['seconds']:7.2f} s  {ratio:6}  {memory}", flush=True)
        measured = {(row["name"], d, n) for row in rows}
        kept = [row for row in result["cases"] if (row["name"], row["hidden"], row["tokens"]) not in measured]
        result["cases"] = kept + rows
    if args.growth:
        result["growth"] = growth([int(n) for n in args.growth.split(",")], args.tile)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
