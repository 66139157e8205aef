"""The problems of a run as tokens, and what is evaluated between its phases."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.judge import Verifier
from tsopsd_jax.rollout import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated before the first phase and after each."""

    benchmark: str
    problems: Sequence[Problem]
    samples: int
    sampling: Sampling
    max_response_tokens: int
    rows_at_once: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The problems of a run, how they become tokens, and how responses are scored."""

    problems: Sequence[Problem]
    tokenizer: Tokenizer
    verify: Verifier
    max_prompt_tokens: int
    seed: int

    @functools.cached_property
    def encoded(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [problems, max_prompt_tokens], lengths)."""
        return encode_prompts(self.problems, self.tokenizer, max_prompt_tokens=self.max_prompt_tokens)


def encode_prompts(problems: Sequence[Problem], tokenizer: Tokenizer, *, max_prompt_tokens: int):
    """Right-padded prompt tokens [N, max_prompt_tokens] and their lengths [N].

    Raises:
        ValueError: for a prompt that is empty or longer than the limit, naming it.
    """
    tokens = np.zeros((len(problems), max_prompt_tokens), np.int32)
    lengths = np.zeros(len(problems), np.int32)
    for row, problem in enumerate(problems):
        ids = tokenizer.encode(problem.prompt)
        if not 0 < len(ids) <= max_prompt_tokens:
            raise ValueError(
                f"prompt {problem.id!r} has {len(ids)} tokens, expected 1 to {max_prompt_tokens}; "
                "raise data.max_prompt_tokens or leave the problem out"
            )
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths
