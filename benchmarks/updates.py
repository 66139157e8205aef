"""What several updates of one rollout cost, and what `select` costs by the sampler's log-probabilities or by a forward
pass.

    python benchmarks/updates.py --out benchmarks/results/updates_cpu.json [--rounds 3] [--steps 8]

64 prompts x 8 responses of at most 19 tokens, the packaged model with random weights, float32, no dynamic sampling:
`tsopsd train` itself, a process for each run, its log read; runs take turns, after one round that fills the compilation
cache. The time of a step and of its updates is the median over the steps from the third on; the ratios are to DAPO with
one update.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from peers import about

from tsopsd_jax.objectives import Objective, clip_cov

RUNS: dict[str, dict[str, Any]] = {
    "dapo, 1 update": {"objective": {"name": "dapo"}},
    "dapo, 4 updates": {"objective": {"name": "dapo"}, "updates_per_rollout": 4},
    "dapo, 16 updates": {"objective": {"name": "dapo"}, "updates_per_rollout": 16},
    "dapo, 4 passes of 1": {"objective": {"name": "dapo"}, "passes_per_rollout": 4},
    "clip_cov, sampler's logp": {"objective": {"name": "clip_cov"}},
    "clip_cov, forward pass": {"objective": {"name": f"{__file__}:clip_cov_by_forward_pass"}},
}


def clip_cov_by_forward_pass() -> Objective:
    """Clip-Cov whose `select` does not say that it reads `logp` alone."""
    return clip_cov()._replace(select_reads=None)


def measure(changes: dict[str, Any], steps: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step from the third on, and of its updates."""
    phase = {
        "name": "rl",
        "prompts_per_step": 64,
        "responses_per_prompt": 8,
        "max_response_tokens": 19,
        "optimizer": {"learning_rate": 1e-6},
        "reward": {},
        "stop": {"steps": steps},
    }
    config = {
        "model": {"path": "countdown-tiny", "random_init": True},
        "data": {"name": "countdown", "verifier": "countdown", "max_prompt_tokens": 24},
        "cache_dir": str(folder / "cache"),
        "phases": [phase | changes],
    }
    run = Path(tempfile.mkdtemp(dir=folder))
    file = run / "updates.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tsopsd_jax", "train", str(file), "--run-dir", str(run / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, JAX_PLATFORMS="cpu"))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()][2:]
    return {name: [line[f"time/{name}"] for line in lines] for name in ("step_s", "update_s")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {name: {"step_s": [], "update_s": []} for name in RUNS}
    with tempfile.TemporaryDirectory() as name:
        for round_ in range(args.rounds + 1):
            for run, changes in RUNS.items():
                seconds = measure(changes, args.steps if round_ else 3, Path(name))
                for kind in seconds if round_ else ():  # the first round fills the cache
                    found[run][kind] += seconds[kind]
    base = {kind: statistics.median(x) for kind, x in found["dapo, 1 update"].items()}
    rows = []
    print(f"{'':26} {'step, s':>8} {'ratio':>6} {'updates, s':>11} {'ratio':>6}")
    for run, seconds in found.items():
        middle = {kind: statistics.median(x) for kind, x in seconds.items()}
        ratio = {kind: middle[kind] / base[kind] for kind in middle}
        rows.append({"name": run} | middle | {f"{kind}_ratio": x for kind, x in ratio.items()})
        step, update = (f"{middle[k]:.3f} {ratio[k]:6.2f}" for k in ("step_s", "update_s"))
        print(f"{run:26} {step:>15} {update:>18}")
    if args.out:
        args.out.write_text(json.dumps(about() | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
