"""avg@k and pass@k of a policy on held-out problems."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tsopsd_jax.judge import Verifier, accuracies
from tsopsd_jax.types import Prompts, PyTree, Rollout


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
    sample: Callable[[PyTree, Prompts], Rollout],
    params: PyTree,
    *,
    prompts: Prompts,
    answers: Sequence[str],
    samples: int,
    rows_at_once: int,
    decode: Callable[[Sequence[int]], str],
    verify: Verifier,
    examples: int = 3,
) -> dict[str, Any]:
    """Sample every problem `samples` times and score it.

    Args:
        sample: jitted (params, prompts) -> Rollout for `rows_at_once` rows.
        params: the policy.
        prompts: one row per problem (host arrays).
        answers: gold answers, one per problem.
        samples: k of avg@k and pass@k.
        rows_at_once: rows per call of `sample`; the last call is filled up by repetition.
        decode: token ids -> text.
        verify: (response, gold) -> score.
        examples: how many problems to keep a response of.

    Returns:
        avg_at_k with its standard error over problems, pass_at_k, length_mean_tokens, truncated_fraction, examples.
    """
    problems = len(answers)
    which = np.repeat(np.arange(problems), samples)
    scores, lengths, stopped, kept = [], [], [], {}
    for start in range(0, len(which), rows_at_once):
        ids = np.arange(start, start + rows_at_once) % len(which)
        rows = which[ids]
        piece = Prompts(prompts.tokens[rows], prompts.length[rows], ids.astype(np.uint32))
        live = min(rows_at_once, len(which) - start)
        rollout: Rollout = jax.tree.map(lambda x, n=live: np.asarray(x)[:n], sample(params, piece))
        score = accuracies(rollout, [answers[int(i)] for i in rows[:live]], decode, verify)
        scores.append(score)
        lengths.append(rollout.response_length)
        stopped.append(rollout.stopped)
        for row in range(live):
            problem, copy = divmod(start + row, samples)
            if copy == 0 and problem < examples:
                begin, end = rollout.prompt_length[row], rollout.length[row]
                kept[problem] = {
                    "prompt": decode(rollout.tokens[row, :begin].tolist()),
                    "response": decode(rollout.tokens[row, begin:end].tolist()),
                    "answer": answers[problem],
                    "correct": bool(score[row] > 0),
                }
    correct = np.concatenate(scores).reshape(problems, samples)
    per_problem = correct.mean(axis=1)
    return {
        "problems": problems,
        "samples": samples,
        "avg_at_k": float(per_problem.mean()),
        "avg_at_k_stderr": float(per_problem.std(ddof=1) / math.sqrt(problems)) if problems > 1 else None,
        "pass_at_k": pass_at_k(correct, samples),
        "length_mean_tokens": float(np.concatenate(lengths).mean()),
        "truncated_fraction": float(1.0 - np.concatenate(stopped).mean()),
        "examples": [kept[i] for i in sorted(kept)],
    }
