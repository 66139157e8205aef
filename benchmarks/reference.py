"""What a frozen reference costs an update: the update with one over the update without, in one process, interleaved.

    JAX_PLATFORMS=cpu python benchmarks/reference.py --out benchmarks/results/reference_cpu.json [--rounds 7]

The demo's model with random weights, 128 rows of 7 + 19 tokens in pieces of 2,048 tokens, float32, one CPU device.
A forward pass is a third of an update without recomputation (forward, and twice that backward); beside it come the
reference's statistics. Beside the clock, which other work on the machine disturbs, stands the processor's time, in
which waiting threads that spin count too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from learner import full_batch, our_model
from peers import about
from rollout import SHAPES

PAIRS = {
    "ts_opsd, live -> frozen teacher": (("ts_opsd", {}), ("ts_opsd", {"teacher": "frozen"})),
    "dapo, no KL -> k3": (("dapo", {}), ("dapo", {"kl_coefficient": 0.1})),
    "dapo, no KL -> exact KL": (("dapo", {}), ("dapo", {"kl_coefficient": 0.1, "kl_estimator": "exact"})),
}
ROWS = 128


def updater(objective: str, settings: dict[str, Any], asked: dict[str, Any]):
    """() -> (seconds, seconds of the processor) of one update of a donated state."""
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.learn.reference import start_policy
    from tsopsd_jax.learn.update import abstract_state, fresh_optimizer_state, make_optimizer, make_update
    from tsopsd_jax.objectives import OBJECTIVES
    from tsopsd_jax.types import TrainState

    model, optimizer, made = our_model(asked), make_optimizer(learning_rate=1e-6), OBJECTIVES[objective](**settings)
    assert model.mesh is not None
    like = abstract_state(model, optimizer, model.mesh)
    layout = jax.tree.map(lambda x: x.sharding, like)
    params = model.init(jax.random.key(0), shardings=layout.params)
    state = [jax.device_put(TrainState(jnp.int32(0), params, fresh_optimizer_state(optimizer, like, params)), layout)]
    reference = start_policy(model, params) if made.reference else None
    width = asked["prompt_tokens"] + asked["response_tokens"]
    pieces = next(n for n in range(1, ROWS + 1) if ROWS % n == 0 and ROWS // n * width <= 2048)
    update = make_update(model, made, optimizer, micro_batches=pieces)
    jitted, batch = jax.jit(update, donate_argnums=0, out_shardings=(layout, None)), full_batch(asked)

    def run() -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        state[0], out = jitted(state[0], batch, jnp.float32(jnp.inf), {}, reference)
        jax.block_until_ready((state[0], out))
        return time.perf_counter() - began[0], time.process_time() - began[1]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    asked = SHAPES["demo-512"] | {"rows": ROWS}
    result = about() | {"rows": ROWS, "rounds": args.rounds, "runs": []}
    for name, pair in PAIRS.items():
        runs = [updater(objective, settings, asked) for objective, settings in pair]
        for run in runs:
            run()  # compiles
        found = [[run() for run in runs] for _ in range(args.rounds)]
        ratio, processor = (statistics.median(with_it[k] / without[k] for without, with_it in found) for k in range(2))
        result["runs"].append({"name": name, "ratio": ratio, "processor_ratio": processor, "seconds": found})
        print(f"{name:34} {ratio:.2f} times the update without; {processor:.2f} by processor time", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
