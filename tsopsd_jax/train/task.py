"""The problems of a run as tokens, and what is evaluated between its phases."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.data.encode import PackedPrompts, pack_prompts
from tsopsd_jax.rewards import Rewards
from tsopsd_jax.rollout import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated before the first phase and after each, and within phases at steps that `every_steps`
    divides."""

    benchmark: str
    problems: Sequence[Problem]
    rewards: Rewards
    max_prompt_tokens: int
    samples: int
    sampling: Sampling
    max_response_tokens: int
    rows_at_once: int
    every_steps: int | None = None

    def facts(self) -> dict[str, Any]:
        """What a record says of it, besides the results."""
        sampling = self.sampling.facts()
        sampling = {"temperature": sampling.pop("sampling_temperature"), **sampling}
        return {"benchmark": self.benchmark, "sampling": sampling}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The problems of a run, how they become tokens, and how responses are scored."""

    problems: Sequence[Problem]
    tokenizer: Tokenizer
    rewards: Rewards
    max_prompt_tokens: int
    seed: int

    @functools.cached_property
    def encoded(self) -> PackedPrompts:
        """The prompts' tokens, in the order of the problems."""
        return pack_prompts(self.problems, self.tokenizer, max_prompt_tokens=self.max_prompt_tokens)
