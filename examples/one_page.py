"""Policy reheating on one page: RL until the entropy collapses, the reheater until it has recovered, RL again.

    python examples/one_page.py [--steps N]

What `tsopsd demo` does, from public functions alone and with nothing around it: no checkpoints, no log, no evaluation.
A small Qwen3 plays countdown: four numbers and a target; the response is three steps `a op b = c` that end at the
target. One train state goes through all phases, and each step is three verbs:

    sample : params, prompts -> Rollout      judge : Rollout -> Batch      update : TrainState, Batch -> TrainState
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tsopsd_jax
from tsopsd_jax.data import Tokenizer, indices, load_problems
from tsopsd_jax.data.encode import encode_prompts
from tsopsd_jax.judge.groups import RewardRule, judge, to_batch
from tsopsd_jax.judge.scoring import accuracies
from tsopsd_jax.learn.update import distillation_batch, make_optimizer, make_update
from tsopsd_jax.model import Qwen3, load_pretrained
from tsopsd_jax.objectives import Objective, dapo, ts_opsd
from tsopsd_jax.rewards import verify_countdown
from tsopsd_jax.rollout import Sampling, sample
from tsopsd_jax.types import Batch, Prompts, Rollout, TrainState

MODEL = Path(tsopsd_jax.__file__).parent / "assets" / "countdown-tiny"
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 7, 19


class Phase(NamedTuple):
    """A stretch of the schedule: what is optimised, on how many responses, until which entropy (nats)."""

    name: str
    objective: Objective
    learning_rate: float
    prompts: int
    group: int
    rewarded: bool
    over: Callable[[float], bool]


RL = Phase("rl", dapo(), 5e-4, 64, 8, True, lambda nats: nats < 0.15)
SCHEDULE = (
    RL,
    # The self-teacher is softmax(z / 1.2) of the policy's own logits z: the same ranking, a little more entropy.
    Phase("reheat", ts_opsd(teacher_temperature=1.2), 2e-5, 512, 1, False, lambda nats: nats >= 0.19),
    RL._replace(name="rl-again", over=lambda nats: nats < 0.12),
)


class Problems:
    """Countdown's problems as tokens, in a shuffled order without end."""

    def __init__(self, directory: Path):
        self.tokenizer = Tokenizer.load(MODEL)
        self.problems = load_problems("countdown", split="train", directory=directory)
        self.encoded = encode_prompts(self.problems, self.tokenizer, max_prompt_tokens=MAX_PROMPT_TOKENS)
        self.position = 0

    def next(self, count: int, group: int) -> tuple[Prompts, list[str]]:
        """The next `count` prompts, each `group` times, and the answer of each row."""
        tokens, lengths = self.encoded
        rows = np.repeat(indices(len(lengths), seed=0, position=self.position, count=count), group)
        self.position += count
        row_id = np.arange(len(rows), dtype=np.uint32)  # names a row's randomness within a step
        return Prompts(tokens[rows], lengths[rows], row_id), [self.problems[int(i)].answer for i in rows]


def judged(phase: Phase, rollout: Rollout, answers: list[str], tokenizer: Tokenizer) -> tuple[Batch, float]:
    """The batch of a rollout, and the share of right responses."""
    accuracy = accuracies(rollout, answers, tokenizer.decode, verify_countdown)
    if not phase.rewarded:  # the reheater needs no reward: on-policy responses are all it looks at
        return distillation_batch(rollout), float(accuracy.mean())
    groups = judge(rollout, accuracy, group=phase.group, rule=RewardRule(), max_response_tokens=MAX_RESPONSE_TOKENS)
    return to_batch(groups), float(accuracy.mean())  # group-relative advantages


def run_phase(
    phase: Phase, model: Qwen3, state: TrainState, problems: Problems, key: jax.Array, steps: int
) -> Iterator[tuple[TrainState, float, float]]:
    """Take steps until the phase is over, or `steps`; yields (state, entropy in nats, accuracy)."""
    optimizer = make_optimizer(learning_rate=phase.learning_rate, weight_decay=0.1 if phase.rewarded else 0.0)
    state = TrainState(state.step, state.params, optimizer.init(state.params))
    draw = jax.jit(
        functools.partial(
            sample,
            model,
            sampling=Sampling(sampling_temperature=1.0),
            max_response_tokens=MAX_RESPONSE_TOKENS,
            stop_ids=problems.tokenizer.stop_ids,
            group=phase.group,
        )
    )
    update = jax.jit(make_update(model, phase.objective, optimizer), donate_argnums=0)
    for _ in range(steps):
        prompts, answers = problems.next(phase.prompts, phase.group)
        rollout = jax.device_get(draw(state.params, prompts, jax.random.fold_in(key, state.step)))
        batch, accuracy = judged(phase, rollout, answers, problems.tokenizer)
        state, out = update(state, batch)
        entropy = float(out.metrics["policy/entropy_nats"])
        yield state, entropy, accuracy
        if phase.over(entropy):
            return


def main(steps: int, directory: Path) -> list[tuple[str, float, float]]:
    """Run the schedule, at most `steps` a phase; returns (phase, entropy, accuracy) of every step."""
    problems = Problems(directory)
    model, params = load_pretrained(MODEL)
    state, seen = TrainState(jnp.zeros((), jnp.int32), params, ()), []
    for phase in SCHEDULE:
        taken = run_phase(phase, model, state, problems, jax.random.key(0), steps)
        for state, entropy, accuracy in taken:
            seen.append((phase.name, entropy, accuracy))
            print(f"{int(state.step):4}  {phase.name:9} entropy {entropy:.3f} nats  accuracy {100 * accuracy:.1f} %")
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="RL, policy reheating, RL again, on one page.")
    parser.add_argument("--steps", type=int, default=90, help="at most so many a phase; default 90")
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args().steps, Path(folder))
