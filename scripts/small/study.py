"""The runs of the comparison at small size: one collapsed policy a seed, arms that go on from it, and the policies that
are kept on the way.

WORK/seed-N/runs/ARM is the run directory of an arm, WORK/seed-N/policies/ARM/POINT a Hugging Face directory of its
policy at a point, with `point.json`. Everything goes on where it was stopped.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsopsd_jax.commands.train import open_trainer
from tsopsd_jax.config import Config, load_config
from tsopsd_jax.config.places import datasets_folder, model_folder
from tsopsd_jax.data import Problem, load_problems
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.loading import load_function
from tsopsd_jax.metric_names import ACCURACY, ENTROPY, TOKENS
from tsopsd_jax.model import save_pretrained
from tsopsd_jax.rewards.named import VERIFIERS
from tsopsd_jax.rundir import files
from tsopsd_jax.rundir.log import read_metrics
from tsopsd_jax.train.signals import Interrupted
from tsopsd_jax.train.trainer import Trainer

COLLAPSE = "collapse"
"""The run whose last policy the arms go on from."""
COLLAPSED, REHEATED = "collapsed", "reheated"
"""Points of a run that are no number of tokens."""
RATE = "@"
"""ARM@RATE: the arm with another learning rate in what makes it an arm: its reheating, or its RL where it has none."""


class Point(NamedTuple):
    """A policy that is kept: its run's name, which point, the run's step, tokens sampled since the collapse (of the
    collapsed policy: since the start), and mean token entropy of the last steps before it."""

    arm: str
    point: str
    step: int
    tokens: int
    entropy_nats: float


class Study(NamedTuple):
    """Where runs and policies stand, and how far arms go."""

    work: Path
    configs: Path
    token_points: Sequence[int]
    """Tokens sampled since the collapse at which an arm's policy is kept; the last is its budget."""
    task: Path | None = None
    """A directory of `scripts/pretrain_countdown.py --task`, in the place of the packaged model and its problems."""

    def load_arm(self, arm: str, seed: int) -> Config:
        """Load the configuration of an arm for a seed; see `RATE`.

        Raises:
            ValueError: no such file, or a wrong setting.
        """
        name, _, rate = arm.partition(RATE)
        file = self.configs / f"{name}.yaml"
        phases = [phase.name for phase in load_config(file, []).phases]
        settings = [f"seed={seed}"]
        if rate:
            turned = "reheat" if "reheat" in phases else phases[-1]
            settings.append(f"phases.{turned}.optimizer.learning_rate={rate}")
        if self.task is not None:
            facts, rows = self._facts(), f"name: jsonl, path: {self.task}/train.jsonl"
            data = f"{{{rows}, verifier: {facts['verifier']}, max_prompt_tokens: {facts['max_prompt_tokens']}}}"
            settings += [f"model.path={self.task}/model", f"data={data}"]
            # One to spare, as the demo has it.
            length = facts["max_response_tokens"] + 1
            settings += [f"phases.{phase}.max_response_tokens={length}" for phase in phases]
        return load_config(file, settings)

    def test_problems(self, first: int) -> Sequence[Problem]:
        """Load the first problems that no run has seen."""
        if self.task is not None:
            return load_problems("jsonl", path=self.task / "test.jsonl", first=first)
        return load_problems("countdown", split="test", directory=datasets_folder(None), first=first)

    def verifier(self) -> Callable[[str, str], float]:
        """Return what judges a response to a problem: (response, gold answer) -> 1 or 0."""
        name = "countdown" if self.task is None else self._facts()["verifier"]
        return VERIFIERS[name] if name in VERIFIERS else load_function(name, what="verifier")

    def _facts(self) -> dict[str, Any]:
        """Read what `scripts/pretrain_countdown.py --task` says of its task."""
        assert self.task is not None
        return json.loads((self.task / "task.json").read_text(encoding="utf-8"))

    def run_dir(self, seed: int, arm: str) -> Path:
        """Return the run directory of an arm."""
        return self.work / f"seed-{seed}" / "runs" / arm

    def policy_dir(self, seed: int, arm: str, point: str) -> Path:
        """Return the directory of a policy that is kept."""
        return self.work / f"seed-{seed}" / "policies" / arm / point

    def points(self, seed: int, arm: str) -> list[Point]:
        """Return what is kept of an arm, in the order of its tokens."""
        folder = self.work / f"seed-{seed}" / "policies" / arm
        found = [Point(**json.loads(file.read_text())) for file in folder.glob("*/point.json")]
        return sorted(found, key=lambda point: (point.tokens, point.step))

    def is_trained(self, seed: int, arm: str) -> bool:
        """Return whether the run of an arm has reached its last point."""
        last = COLLAPSED if arm == COLLAPSE else named(self.token_points[-1])
        return self.policy_dir(seed, arm, last).is_dir()


def named(tokens: int) -> str:
    """Name the point of so many tokens, such as `2M`."""
    return f"{tokens / 1e6:g}M"


def from_the_start(config: Config, collapse: Config) -> bool:
    """Return whether an arm is a run of its own, since its first phase is not the collapse's."""
    return config.phases[0] != collapse.phases[0]


def fork(run_dir: Path, copy: Path) -> None:
    """Copy a run directory, whose copy may then go on by itself; nothing if the copy stands."""
    if copy.exists():
        return
    partial = copy.with_name(f".{copy.name}-copying")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run_dir, partial)
    partial.rename(copy)


def train(study: Study, seed: int, arm: str) -> None:
    """Run an arm up to its last point, keeping its policies on the way; the collapse until it has collapsed.

    Raises:
        Interrupted: a signal of somebody else.
        GuardError: a guard of the run stopped it.
        ValueError: the schedule ended before the last point.
    """
    config, run_dir = study.load_arm(arm, seed), study.run_dir(seed, arm)
    collapsed = study.run_dir(seed, COLLAPSE)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    if arm != COLLAPSE and not from_the_start(config, study.load_arm(COLLAPSE, seed)):
        fork(collapsed, run_dir)
    before = 0 if arm == COLLAPSE else sum(line[TOKENS] for line in read_metrics(collapsed))
    with open_trainer(config, run_dir, LiveTable(stream=sys.stderr)) as trainer:
        keeper = Keeper(study, seed, arm, trainer, model_folder(config), before)
        trainer.after_step = keeper.after_step
        try:
            trainer.run()
        except Interrupted:
            if not keeper.over:
                raise
    if not study.is_trained(seed, arm):
        raise ValueError(f"{run_dir}: its schedule ended before {named(study.token_points[-1])} tokens; lengthen it")


class Keeper:
    """Keeps the policies of a run that trains, and stops it at its budget.

    Args:
        study, seed, arm: whose run it is.
        trainer: of the run.
        tokenizer: directory of the tokenizer's files.
        before: tokens that were sampled until the collapse.
    """

    def __init__(self, study: Study, seed: int, arm: str, trainer: Trainer, tokenizer: Path, before: int):
        self.study, self.seed, self.arm, self.trainer, self.tokenizer = study, seed, arm, trainer, tokenizer
        lines = read_metrics(study.run_dir(seed, arm))
        self.tokens = sum(line[TOKENS] for line in lines if line["step"] <= trainer.run_state.step) - before
        self.over = False

    def after_step(self) -> None:
        """Keep the policy if this step reached a point; at the last, ask this process to stop, by a signal."""
        lines = read_metrics(self.trainer.run_dir)
        self.tokens += lines[-1][TOKENS]
        if "phase_end" in lines[-1]:
            if self.arm == COLLAPSE:
                self._keep(COLLAPSED, lines)
            elif lines[-1]["phase"].startswith("reheat"):
                self._keep(lines[-1]["phase"].replace("reheat", REHEATED), lines)
        if self.arm == COLLAPSE:
            return
        for tokens in self.study.token_points:
            if self.tokens >= tokens:
                self._keep(named(tokens), lines)
        if self.tokens >= self.study.token_points[-1] and not self.over:
            self.over = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _keep(self, point: str, lines: list[dict[str, Any]]) -> None:
        folder = self.study.policy_dir(self.seed, self.arm, point)
        if folder.exists():
            return
        partial = folder.with_name(f".{point}-writing")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model, params = self.trainer.shared.model, self.trainer.state.params
        save_pretrained(partial, model, params, tokenizer_from=self.tokenizer)
        last = [line[ENTROPY] for line in lines[-5:]] if not point.startswith(REHEATED) else [lines[-1][ENTROPY]]
        facts = Point(self.arm, point, lines[-1]["step"], self.tokens, sum(last) / len(last))
        (partial / "point.json").write_text(json.dumps(facts._asdict()) + "\n")
        partial.rename(folder)


def course(study: Study, seed: int, arm: str, *, points: int = 60) -> dict[str, Any]:
    """Summarise a run: steps and tokens of each phase, and entropy and accuracy of its rollouts along the tokens.

    Args:
        points: at most so many means of the course, each over steps that follow each other.

    Returns:
        Plain data: phases [{phase, steps, tokens, entropy_first_nats, entropy_last_nats}]; reheating_nats, the entropy
        of every step of the first reheating; and of equal length tokens (since the run began, at each mean's end),
        entropy_nats, accuracy_fraction.
    """
    lines = read_metrics(study.run_dir(seed, arm))
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        phases.setdefault(line["phase"], []).append(line)
    each = -(-len(lines) // points)
    pieces = [lines[at : at + each] for at in range(0, len(lines), each)]
    ends, total = [], 0
    for piece in pieces:
        total += sum(line[TOKENS] for line in piece)
        ends.append(total)
    return {
        "phases": [
            {
                "phase": name,
                "steps": len(of),
                "tokens": sum(line[TOKENS] for line in of),
                "entropy_first_nats": round(of[0][ENTROPY], 5),
                "entropy_last_nats": round(of[-1][ENTROPY], 5),
            }
            for name, of in phases.items()
        ],
        "reheating_nats": [round(line[ENTROPY], 5) for line in phases.get("reheat", [])],
        "tokens": ends,
        "entropy_nats": [_mean(piece, ENTROPY) for piece in pieces],
        "accuracy_fraction": [_mean(piece, ACCURACY) for piece in pieces],
    }


def _mean(lines: Sequence[dict[str, Any]], key: str) -> float:
    return round(sum(line[key] for line in lines) / len(lines), 5)


@contextlib.contextmanager
def writing_json(path: Path) -> Iterator[dict[str, Any]]:
    """Fill a mapping in the block; it is written as JSON, whole or not at all."""
    content: dict[str, Any] = {}
    yield content
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, [json.dumps(content, separators=(",", ":")).encode() + b"\n"])
