"""A whole training step, sample - reward - update, and the time from the shell to the second step, against TRL.

    python benchmarks/step.py --out benchmarks/results/step_cpu.json [--trl-python PATH] [--rounds 3] [--steps 12]

64 prompts x 8 responses of at most 19 tokens, the demo's model with random weights, float32, AdamW, no reference model,
no dynamic sampling. Ours is the program itself (`tsopsd train`, its log read), on one CPU device and on two; TRL is a
GRPOTrainer in its own environment. Each run is a process from start to end; runs are interleaved. Both have compiled
before (ours: warm compilation cache), as on a second start. The step's time is the median after the second; start-up is
the time from launching the process until the second step is done.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import about
from rollout import SHAPES

SHAPE, PROMPTS, GROUP = SHAPES["demo-512"], 64, 8


def ours(steps: int, devices: int, folder: Path) -> list[float]:
    """Seconds from launch at which each step was done."""
    import yaml

    phase = {
        "name": "rl",
        "objective": {"name": "dapo"},
        "prompts_per_step": PROMPTS,
        "responses_per_prompt": GROUP,
        "max_response_tokens": SHAPE["response_tokens"],
        "optimizer": {"learning_rate": 1e-6},
        "reward": {},
        "stop": {"steps": steps},
    }
    config = {
        "model": {"path": "countdown-tiny", "random_init": True},
        "data": {"name": "countdown", "verifier": "countdown", "max_prompt_tokens": SHAPE["prompt_tokens"]},
        "mesh": {"cpu_devices": devices},
        "cache_dir": str(folder / "cache"),
        "phases": [phase],
    }
    file, run = folder / "step.yaml", Path(tempfile.mkdtemp(dir=folder)) / "run"
    file.write_text(yaml.safe_dump(config))
    began = time.time()
    command = [sys.executable, "-m", "tsopsd_jax", "train", str(file), "--run-dir", str(run)]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ, JAX_PLATFORMS="cpu"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The file's clock starts when the trainer is built: its end is the file's last change.
    end = (run / "metrics.jsonl").stat().st_mtime - began
    return [end - (lines[-1]["time_s"] - line["time_s"]) for line in lines]


def trl(python: str, steps: int) -> list[float]:
    began = time.time()
    done = subprocess.run([python, __file__, "--worker", str(steps)], check=True, capture_output=True, text=True)
    return [at - began for at in json.loads(done.stdout.splitlines()[-1])]


def work_trl(steps: int) -> None:
    """GRPOTrainer.train on a random Qwen3; prints the clock after each step."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    skip = ("rows", "prompt_tokens", "response_tokens")
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{k: v for k, v in SHAPE.items() if k not in skip}))
    words = {str(i): i for i in range(SHAPE["vocab_size"] - 1)} | {"<end>": SHAPE["vocab_size"] - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>", eos_token="<end>")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts = [" ".join(str((i + j) % 99) for j in range(SHAPE["prompt_tokens"])) for i in range(PROMPTS * (steps + 1))]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.time())

    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=SHAPE["response_tokens"],
        max_steps=steps,
        beta=0.0,
        loss_type="dapo",
        epsilon_high=0.28,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c) % 2) for c in completions],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    print(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of an environment with trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work_trl(args.worker)
        return
    with tempfile.TemporaryDirectory() as name:
        runs: dict[str, Callable[[], list[float]]] = {
            f"tsopsd_jax, {n} device{'s' * (n > 1)}": functools.partial(ours, args.steps, n, Path(name)) for n in (1, 2)
        }
        if args.trl_python:
            runs["trl"] = lambda: trl(args.trl_python, args.steps)
        for run in runs.values():
            run()  # fills the caches
        found: dict[str, list[list[float]]] = {key: [] for key in runs}
        for _ in range(args.rounds):
            for key, run in runs.items():
                found[key].append(run())
    result = about() | {"runs": []}
    for key, ends in found.items():
        steps = [b - a for at in ends for a, b in zip(at[1:], at[2:], strict=False)]
        row = {
            "name": key,
            "step_s": statistics.median(steps),
            "to_second_step_s": statistics.median(e[1] for e in ends),
        }
        result["runs"].append(row | {"ends_s": ends})
        print(
            f"{key:22} step {row['step_s']:.3f} s, second step done after {row['to_second_step_s']:.1f} s", flush=True
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
