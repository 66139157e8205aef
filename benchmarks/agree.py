"""Reward and entropy of RL here and in TRL, step by step, on the same task from the same weights: do the two agree?

    python benchmarks/agree.py --trl-python PATH [--seeds 1 2 3 4 5] [--steps 100] [--out FILE.json]

The demo's model and task, 64 prompts x 8 responses a step in the same order of the problems for the same seed, AdamW at
a constant rate, DAPO's clips and token mean, no dynamic sampling, no reference. Ours is `tsopsd train`, its log read;
TRL is a GRPOTrainer (`loss_type="dapo"`) in an environment of its own. What cannot be the same is the random stream of
the samplers, so the two are compared over seeds: for each window of steps the means over seeds, and an interval of
their difference, paired by seed (Student's t, 95 %). FILE.json is written after each run, and a run that stands there
is not made again.

Left as each library has it: the epsilon under the advantage's standard deviation (1e-6 here, 1e-4 there).
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

from peers import about

PROMPTS, GROUP, RESPONSE_TOKENS = 64, 8, 19
OPTIMIZER = {"learning_rate": 3e-4, "weight_decay": 0.0, "clip_norm": 1.0}
WINDOW = 10
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles of Student's t for n seeds, n - 1 degrees of freedom."""


def ours(seed: int, steps: int, folder: Path) -> dict[str, list[float]]:
    """Reward and entropy of each step of `tsopsd train`."""
    import yaml

    data = {"name": "countdown", "split": "train", "first": PROMPTS * steps, "verifier": "countdown"}
    phase = {
        "name": "rl",
        "objective": {"name": "dapo"},
        "prompts_per_step": PROMPTS,
        "responses_per_prompt": GROUP,
        "max_response_tokens": RESPONSE_TOKENS,
        "optimizer": OPTIMIZER,
        "reward": {},
        "stop": {"steps": steps},
    }
    config = {
        "seed": seed,
        "model": {"path": "countdown-tiny"},
        "data": data | {"max_prompt_tokens": 7},
        "checkpoint_every_steps": steps,
        "phases": [phase],
    }
    file, run = folder / f"{seed}.yaml", folder / f"{seed}-{steps}"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tsopsd_jax", "train", str(file), "--run-dir", str(run)]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ, JAX_PLATFORMS="cpu"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"reward": [x["reward/mean"] for x in lines], "entropy_nats": [x["policy/entropy_nats"] for x in lines]}


def in_our_order(seed: int, steps: int) -> list[dict[str, str]]:
    """The problems of our run of this seed, in its order."""
    from tsopsd_jax.data.cursor import indices
    from tsopsd_jax.data.sources import load_problems

    count = PROMPTS * steps
    with tempfile.TemporaryDirectory() as name:
        problems = load_problems("countdown", split="train", directory=Path(name), first=count)
    order = indices(count, seed=seed, position=0, count=count)
    return [{"prompt": problems[at].prompt, "answer": problems[at].answer} for at in order]


def trl(python: str, seed: int, steps: int, folder: Path) -> dict[str, list[float]]:
    """Reward and entropy of each step of TRL's GRPOTrainer."""
    from tsopsd_jax.model.packaged import PACKAGED_MODEL, model_directory

    problems = folder / f"{seed}.json"
    problems.write_text(json.dumps(in_our_order(seed, steps)))
    work = [python, __file__, "--worker", str(model_directory(PACKAGED_MODEL)), str(problems), str(seed), str(steps)]
    done = subprocess.run(work, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def work_trl(model: str, problems: str, seed: int, steps: int) -> None:
    """Train, and print the course."""
    import importlib.util

    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    source = Path(__file__).resolve().parents[1] / "tsopsd_jax" / "rewards" / "countdown.py"
    spec = importlib.util.spec_from_file_location("countdown", source)  # alone: this environment has no JAX
    assert spec is not None
    assert spec.loader is not None
    countdown = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(countdown)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [countdown.verify_countdown(c.strip(), a) for c, a in zip(completions, answer, strict=True)]

    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=RESPONSE_TOKENS,
        max_steps=steps,
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=1.0,
        top_p=1.0,
        learning_rate=OPTIMIZER["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER["weight_decay"],
        max_grad_norm=OPTIMIZER["clip_norm"],
        shuffle_dataset=False,
        seed=seed,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(json.loads(Path(problems).read_text())),
        processing_class=transformers.AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    print(json.dumps({"reward": [x["reward"] for x in lines], "entropy_nats": [x["entropy"] for x in lines]}))


def windows(course: list[float]) -> list[float]:
    """Means of `WINDOW` steps each."""
    return [statistics.fmean(course[at : at + WINDOW]) for at in range(0, len(course) - WINDOW + 1, WINDOW)]


def difference(here: list[float], there: list[float]) -> tuple[float, float, float]:
    """Mean of the paired differences, and the ends of its 95 % interval."""
    paired = [a - b for a, b in zip(here, there, strict=True)]
    mean = statistics.fmean(paired)
    half = T_975[len(paired)] * statistics.stdev(paired) / len(paired) ** 0.5
    return mean, mean - half, mean + half


def summary(runs: dict[str, dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """For each window and quantity: means over seeds, the interval of their difference, and whether bands overlap."""
    seeds = sorted(runs["tsopsd_jax"].keys() & runs["trl"].keys())
    rows: list[dict[str, Any]] = []
    for name in ("reward", "entropy_nats"):
        here, there = ([windows(runs[stack][seed][name]) for seed in seeds] for stack in ("tsopsd_jax", "trl"))
        for at in range(len(here[0])):
            a, b = [each[at] for each in here], [each[at] for each in there]
            mean, low, high = difference(a, b)
            rows.append(
                {
                    "quantity": name,
                    "steps": [WINDOW * at + 1, WINDOW * (at + 1)],
                    "tsopsd_jax": statistics.fmean(a),
                    "trl": statistics.fmean(b),
                    "difference": mean,
                    "interval": [low, high],
                    "bands_overlap": max(min(a), min(b)) <= min(max(a), max(b)),
                }
            )
    return rows


def main() -> None:
    """Make the runs that are missing, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of an environment with torch and trl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("agree.json"))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        model, problems, seed, steps = args.worker
        work_trl(model, problems, int(seed), int(steps))
        return
    facts = {"steps": args.steps, "optimizer": OPTIMIZER}
    result = json.loads(args.out.read_text()) if args.out.exists() else about() | facts | {"runs": {}}
    if args.steps < WINDOW:
        parser.error(f"--steps: expected at least {WINDOW}, got {args.steps}")
    if {key: result[key] for key in facts} != facts:
        parser.error(f"{args.out} holds runs of other settings; choose another --out")
    runs = result["runs"]
    with tempfile.TemporaryDirectory() as name:
        for seed in map(str, args.seeds):
            for stack in ("tsopsd_jax", "trl"):
                if seed in runs.setdefault(stack, {}):
                    continue
                made = ours if stack == "tsopsd_jax" else lambda *rest: trl(args.trl_python, *rest)
                course = made(int(seed), args.steps, Path(name))
                runs[stack][seed] = {key: [round(x, 5) for x in values] for key, values in course.items()}
                args.out.write_text(json.dumps(result) + "\n")
                print(f"{stack}, seed {seed}: reward of the last steps {windows(course['reward'])[-1]:.3f}", flush=True)
    if len(runs["trl"]) > 1:
        result["summary"] = summary(runs)
        args.out.write_text(json.dumps(result) + "\n")
        print("| | steps | here | TRL | difference, 95 % | bands overlap |\n|---|---|---|---|---|---|")
        for row in result["summary"]:
            (low, high), overlap = row["interval"], "yes" if row["bands_overlap"] else "no"
            print(
                f"| {row['quantity']} | {row['steps'][0]}-{row['steps'][1]} | {row['tsopsd_jax']:.3f} "
                f"| {row['trl']:.3f} | {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}] | {overlap} |"
            )


if __name__ == "__main__":
    main()
