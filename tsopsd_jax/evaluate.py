"""avg@k and pass@k of a policy on held-out problems."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tsopsd_jax.judge import Scored
from tsopsd_jax.types import Prompts


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Mean over problems of the unbiased estimator 1 - C(n - c, k) / C(n, k).

    Args:
        correct: [problems, n] 0/1.
        k: at most n. With k = n: the share of problems with at least one right answer.

    Raises:
        ValueError: if k is not in 1..n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k expects 1 <= k <= {n} samples, got {k}")
    return float(np.mean([1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)]))


def evaluate(
    sample: Callable[[Prompts, Sequence[str]], Scored],
    *,
    prompts: Prompts,
    answers: Sequence[str],
    samples: int,
    decode: Callable[[Sequence[int]], str],
    examples: int = 3,
) -> dict[str, Any]:
    """Sample every problem `samples` times and score it.

    Args:
        sample: (prompts, answers), a row per response, those of a problem side by side -> scored rollout.
        prompts: one row per problem (host arrays).
        answers: gold answers, one per problem.
        samples: k of avg@k and pass@k.
        decode: token ids -> text.
        examples: how many problems to keep a response of.

    Returns:
        avg_at_k with its standard error over problems, pass_at_k, length_mean_tokens, truncated_fraction, examples.
    """
    problems = len(answers)
    which = np.repeat(np.arange(problems), samples)
    rows = Prompts(prompts.tokens[which], prompts.length[which], np.arange(len(which), dtype=np.uint32))
    scored = sample(rows, [answers[int(i)] for i in which])
    rollout, correct = scored.rollout, scored.accuracy.reshape(problems, samples)

    def example(row: int) -> dict[str, Any]:
        begin, end = rollout.prompt_length[row], rollout.length[row]
        return {
            "prompt": decode(rollout.tokens[row, :begin].tolist()),
            "response": decode(rollout.tokens[row, begin:end].tolist()),
            "answer": answers[row // samples],
            "correct": bool(scored.accuracy[row] > 0),
        }

    per_problem = correct.mean(axis=1)
    return {
        "problems": problems,
        "samples": samples,
        "avg_at_k": float(per_problem.mean()),
        "avg_at_k_stderr": float(per_problem.std(ddof=1) / math.sqrt(problems)) if problems > 1 else None,
        "pass_at_k": pass_at_k(correct, samples),
        "length_mean_tokens": float(np.mean(rollout.response_length)),
        "truncated_fraction": float(1.0 - np.mean(rollout.stopped)),
        "examples": [example(problem * samples) for problem in range(min(examples, problems))],
    }
