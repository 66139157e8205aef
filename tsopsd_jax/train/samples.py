"""Responses of a run that are kept for people to read: of some prompts the best and the worst one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tsopsd_jax.judge.scoring import Decode
from tsopsd_jax.rundir.log import shortened
from tsopsd_jax.train.metrics import Drawn

LONGEST_CHARACTERS = 20_000
"""Characters of a prompt or a response that are kept: of a longer one the beginning and the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Which responses are kept. Sources: `config.schema`."""

    every_steps: int | None = 20
    """Steps between two of which responses are kept, and the first; None or 0: none are."""
    groups: int = 4
    """Prompts of such a step of which the best and the worst response are kept."""

    def __post_init__(self):
        if self.every_steps is not None and self.every_steps < 0:
            raise ValueError(f"every_steps must be at least 1, or 0 or null for none, got {self.every_steps}")
        if not 1 <= self.groups <= 64:
            raise ValueError(f"groups must be in 1..64, got {self.groups}")

    def due(self, step: int) -> bool:
        """Whether responses of this step (from 1) are kept."""
        return bool(self.every_steps) and (step == 1 or step % (self.every_steps or 1) == 0)


def samples_of(drawn: Drawn, *, groups: int, group: int, decode: Decode) -> list[dict[str, Any]]:
    """The best and the worst response of a step's first prompts, by reward; of equal ones the first and the last.

    Args:
        drawn: what the step sampled; its first generation batch is looked at.
        groups: prompts at most.
        group: responses per prompt; of a single one there is no worst.
        decode: token ids -> text.

    Returns:
        Records of plain data: prompt, response, answer, which (`best`, `worst`), reward (with penalties), accuracy,
        rewards (by name, without weights), failed (what functions did wrong), length_tokens, stopped, logp_mean_nats
        (of the response's tokens where they were drawn).
    """
    scored = drawn.scored[0]
    reward = np.asarray(drawn.judged[0].reward if drawn.judged else scored.reward).reshape(-1)
    rollout, kept = scored.rollout, []
    for start in range(0, min(groups * group, len(reward)), group):
        rows = np.arange(start, start + group)
        best = int(rows[reward[rows].argmax()])
        worst = int(rows[::-1][reward[rows][::-1].argmin()])
        for which, row in {"best": best, "worst": worst}.items() if group > 1 else [("best", best)]:
            prompt_end, end = int(rollout.prompt_length[row]), int(rollout.length[row])
            verdict, tokens = scored.verdicts[row], np.asarray(rollout.tokens[row])
            kept.append(
                {
                    "which": which,
                    "problem": scored.asked[row].id,
                    "prompt": shortened(decode(tokens[:prompt_end].tolist()), LONGEST_CHARACTERS),
                    "response": shortened(decode(tokens[prompt_end:end].tolist()), LONGEST_CHARACTERS),
                    "answer": shortened(scored.asked[row].answer, LONGEST_CHARACTERS),
                    "reward": float(reward[row]),
                    "accuracy": verdict.accuracy,
                    "rewards": dict(verdict.parts),
                    "failed": list(verdict.failures),
                    "length_tokens": end - prompt_end,
                    "stopped": bool(rollout.stopped[row]),
                    "logp_mean_nats": float(np.asarray(rollout.logp[row, prompt_end:end]).mean()),
                }
            )
    return kept


def kept_samples(
    samples: Samples, drawn: Drawn, *, step: int, phase: str, group: int, decode: Decode
) -> Sequence[dict[str, Any]]:
    """The records of a step (see `samples_of`) with its number and phase; none where none are due."""
    if not samples.due(step):
        return []
    where = {"step": step, "phase": phase}
    return [where | record for record in samples_of(drawn, groups=samples.groups, group=group, decode=decode)]
