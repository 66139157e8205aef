"""The paper's findings at small size, each with its figure: `python scripts/small_figures.py WORK [--seed 1]`.

Goes on from what `scripts/reproduce_small.py WORK --seeds 1` left: the collapsed policy, the runs and the reheated
policies of pr_fkl and pr_rkl. What is missing is run here: reheating the base model, reheating without an end, cooling
the reheated policy, little data. Figures and their numbers go to --out; what stands there is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SMALL, ARMS = ROOT / "configs" / "small", ROOT / "configs" / "arms"
PROMPTS, SAMPLES = 128, 4
"""Problems and responses of the collapsed policy whose tokens are looked at."""
ALONE = ("phases.rl=null", "phases.rl-again=null")
"""Reheating alone, from a policy that is there."""
UNGUARDED = "phases.reheat.guard={max_start_entropy_nats: null, runaway_entropy_nats: null}"
LONG = (*ALONE, UNGUARDED, "phases.reheat.prompts_per_step=256", "phases.reheat.stop={steps: 150}")
COOLING = (
    *ALONE,
    UNGUARDED,
    "phases.reheat.objective.hyperparameters={direction: reverse, teacher_temperature: 0.8333}",
    "phases.reheat.stop={collapsed_below_nats: 0.08, window_steps: 1, steps: 300}",
)
"""The paper's cooling (section 4.6): the reverse KL to a sharper self-teacher, until the entropy is that of before."""
SCARCE = ("phases.rl=null", "data.sample=256", "phases.rl-again.stop={steps: 300}")
SCARCE_DAPO = (*SCARCE, "phases.reheat=null")


class Figure(NamedTuple):
    """An analysis, by the arguments of `tsopsd analyse`; `name` is that of its folder and of its image."""

    name: str
    arguments: list[str]


def tsopsd(*arguments: object) -> None:
    """Run a command of the package; its output goes on to ours.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "tsopsd_jax", *map(str, arguments)]
    print(" ".join(["tsopsd", *command[3:]]), file=sys.stderr, flush=True)
    done = subprocess.run(command, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)


def trained(run_dir: Path, config: Path, *settings: str) -> Path:
    """Train a run, or go on with it, or leave it where it is done."""
    tsopsd("train", config, "--run-dir", run_dir, *(part for each in settings for part in ("--set", each)))
    return run_dir


def runs(work: Path, seed: int) -> dict[str, Path]:
    """The runs that the comparison of arms has not, by name."""
    of_seed, seeded = work / f"seed-{seed}", f"seed={seed}"
    own, schedule = of_seed / "findings", SMALL / "schedule.yaml"
    collapsed, heated = (
        f"model.path={of_seed / 'policies' / arm / point}"
        for arm, point in (("collapse", "collapsed"), ("pr_fkl", "reheated"))
    )
    base = ("phases.reheat.stop={steps: 150}", "evaluation=null")
    return {
        "base": trained(own / "base reheated", ARMS / "base_reheated.yaml", seeded, *base),
        "long": trained(own / "reheated for long", schedule, seeded, collapsed, *LONG),
        "recooled": trained(own / "recooled", schedule, seeded, heated, *COOLING),
        "scarce": trained(own / "256 problems", schedule, seeded, collapsed, *SCARCE),
        "scarce_dapo": trained(own / "256 problems, not reheated", schedule, seeded, collapsed, *SCARCE_DAPO),
    }


def figures(work: Path, seed: int, found: dict[str, Path], responses: Path) -> Iterator[Figure]:
    """The analyses, in the order of the paper."""
    of_seed = work / f"seed-{seed}"
    collapsed, heated = of_seed / "policies" / "collapse" / "collapsed", of_seed / "policies" / "pr_fkl" / "reheated"
    pair = ["--before", str(collapsed), "--after", str(heated), "--responses", str(responses)]
    arms = [str(of_seed / "runs" / arm) for arm in ("dapo", "pr_fkl", "pr_rkl")]
    yield Figure("curves", ["curves", *arms])
    yield Figure("jump", ["jump", arms[1]])
    yield Figure("representations", ["representations", *pair])
    yield Figure("distributions", ["distributions", *pair])
    yield Figure("forks", ["forks", *pair, "--first", str(PROMPTS)])
    yield Figure("temperatures", ["temperatures", *pair[:2], *pair[4:], "--temperatures", "1.1", "1.2", "1.5", "2"])
    yield Figure("diverges", ["curves", str(found["base"]), str(found["long"])])
    yield Figure("scarce", ["curves", str(found["scarce_dapo"]), str(found["scarce"])])
    yield Figure("reversal", ["reversal", *pair[:4], "--recooled", f"{found['recooled']}"])


def sampled(work: Path, seed: int) -> Path:
    """Responses of the collapsed policy to problems that no run has seen."""
    folder = work / f"seed-{seed}" / "findings"
    problems, responses = folder / "problems.jsonl", folder / "responses.jsonl"
    if not problems.is_file():
        from tsopsd_jax.config.places import datasets_folder
        from tsopsd_jax.data import load_problems

        rows = load_problems("countdown", split="test", directory=datasets_folder(None), first=PROMPTS)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": str(at), "prompt": row.prompt, "answer": row.answer}) for at, row in enumerate(rows)]
        problems.write_text("\n".join(lines) + "\n")
    policy = work / f"seed-{seed}" / "policies" / "collapse" / "collapsed"
    asked = ("--prompts", problems, "--out", responses, "--samples", SAMPLES, "--max-tokens", 19, "--seed", seed)
    tsopsd("generate", "--model", policy, *asked, "--slots", 512, "--score", "countdown")
    return responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "small_scale", metavar="DIR")
    options = parser.parse_args()
    responses, found = sampled(options.work, options.seed), runs(options.work, options.seed)
    for figure in figures(options.work, options.seed, found, responses):
        made = options.out / f"{figure.name}.png"
        if made.is_file():
            continue
        folder = options.work / f"seed-{options.seed}" / "findings" / "figures" / figure.name
        tsopsd("analyse", *figure.arguments, "--out", folder)
        options.out.mkdir(parents=True, exist_ok=True)
        for kind in ("json", "png"):
            made.with_suffix(f".{kind}").write_bytes((folder / f"{figure.arguments[0]}.{kind}").read_bytes())


if __name__ == "__main__":
    main()
