"""Evaluation: responses to held-out problems, scored as they end; avg@k, pass@k and what goes with them; paired
bootstrap."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from tsopsd_jax.data import Problem
from tsopsd_jax.judge.scoring import Decode, Score, verifying
from tsopsd_jax.rewards import Verdict
from tsopsd_jax.rollout import Engine, Finished, Progress
from tsopsd_jax.rundir.sample_texts import shortened
from tsopsd_jax.types import Prompts, PyTree

RESAMPLES = 10_000
"""Resamples of the paired bootstrap."""
EXAMPLE_CHARACTERS = 4_000
"""Characters of a prompt or a response that an evaluation keeps for people to read."""


class Response(NamedTuple):
    """A scored response: of which row, its text, its tokens (stop token included), their mean entropy, its rewards, and
    its tokens' ids where they were sampled here."""

    row: int
    text: str
    tokens: int
    stopped: bool
    correct: bool
    entropy_nats: float
    rewards: Mapping[str, float] = MappingProxyType({})
    """By name, without weights."""
    failures: Sequence[str] = ()
    """What functions of one's own did wrong; the response counts as wrong."""
    ids: tuple[int, ...] = ()


def evaluation_key(key: Array) -> Array:
    """The key of evaluations under a run's key: no training step's, and the same whenever it is asked for."""
    return jax.random.fold_in(key, np.uint32(0xFFFFFFFF))


def every_row(tokens: np.ndarray, length: np.ndarray, samples: int) -> Prompts:
    """`samples` rows of each problem, side by side; sample s of problem i has the row id i x samples + s.

    Args:
        tokens: [problems, P], right-padded.
        length: [problems].
        samples: per problem.
    """
    which = np.repeat(np.arange(len(length)), samples)
    return Prompts(tokens[which], length[which], np.arange(len(which), dtype=np.uint32))


def respond(
    engine: Engine,
    view: PyTree,
    rows: Prompts,
    key: Array,
    *,
    group: int | np.ndarray,
    decode: Decode,
    score: Callable[[int, str], Verdict],
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Response]:
    """Sample every row, and score each in one of a few threads as soon as it ended, while others are still decoded.

    Args:
        engine: with `entropy=True`.
        view, rows, key, group, on_progress: see `Engine.stream`.
        decode: token ids -> text.
        score: (row, text) -> its rewards. What it raises is raised here.
    """

    def judged(done: Finished) -> Response:
        text = decode(done.tokens.tolist())
        verdict, ids = score(done.row, text), tuple(done.tokens.tolist())
        return Response(
            done.row,
            text,
            len(ids),
            done.stopped,
            verdict.right,
            done.entropy_nats,
            verdict.parts,
            verdict.failures,
            ids,
        )

    with verifying() as threads:
        waiting: deque[Future[Response]] = deque()
        for done in engine.stream(view, rows, key, group=group, on_progress=on_progress):
            waiting.append(threads.submit(judged, done))
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def pass_per_problem(correct: np.ndarray, k: int) -> Float[np.ndarray, " problems"]:
    """The unbiased estimator of pass@k for each problem, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    Args:
        correct: [problems, n] 0/1; c of the n are right.
        k: at most n. With k = n: whether any is right.

    Raises:
        ValueError: if k is not in 1..n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k expects 1 <= k <= {n} samples, got {k}")
    return np.asarray([1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)])


def summarise(responses: Sequence[Response], *, samples: int, k: int) -> dict[str, Any]:
    """What the responses to a benchmark say.

    Args:
        responses: `samples` of each problem, those of a problem side by side.
        samples: n; avg@n is the mean accuracy over all of them.
        k: of pass@k.

    Returns:
        problems, samples, k; avg_at_k, its standard error over problems (None for a single one) and pass_at_k, in 0..1;
        length_mean_tokens; truncated_fraction; entropy_nats, the mean over all tokens of the policy's exact entropy
        where they were drawn (at temperature 1, over the whole vocabulary, whatever the sampling settings);
        reward_failed_fraction: of the responses, those of which a reward of one's own failed (they count as wrong).
    """
    correct = np.asarray([r.correct for r in responses], np.float64).reshape(-1, samples)
    tokens = np.asarray([r.tokens for r in responses], np.float64)
    per_problem, problems = correct.mean(axis=1), len(correct)
    return {
        "problems": problems,
        "samples": samples,
        "k": k,
        "avg_at_k": float(per_problem.mean()),
        "avg_at_k_stderr": float(per_problem.std(ddof=1) / math.sqrt(problems)) if problems > 1 else None,
        "pass_at_k": float(pass_per_problem(correct, k).mean()),
        "length_mean_tokens": float(tokens.mean()),
        "truncated_fraction": float(np.mean([not r.stopped for r in responses])),
        "entropy_nats": float(np.average([r.entropy_nats for r in responses], weights=tokens)),
        "reward_failed_fraction": sum(bool(r.failures) for r in responses) / len(responses),
    }


def evaluate(
    engine: Engine,
    view: PyTree,
    key: Array,
    *,
    prompts: tuple[np.ndarray, np.ndarray],
    problems: Sequence[Problem],
    samples: int,
    decode: Decode,
    score: Score,
    on_progress: Callable[[Progress], None],
    examples: int = 3,
) -> dict[str, Any]:
    """A benchmark at once, as training does it: `summarise`, and all responses to the first `examples` problems.

    Args:
        engine, view, key: see `respond`.
        prompts: tokens [problems, P] and their lengths.
        problems: whose prompts these are.
        samples: per problem; the k of avg@k and pass@k.
        decode: token ids -> text.
        score: (response, answer, row) -> its rewards.
        on_progress: see `Engine.stream`; what it raises ends the evaluation.
    """

    def scored(row: int, text: str) -> Verdict:
        problem = problems[row // samples]
        return score(text, problem.answer, problem.row)

    found = sorted(
        respond(
            engine,
            view,
            every_row(*prompts, samples),
            key,
            group=samples,
            decode=decode,
            score=scored,
            on_progress=on_progress,
        )
    )
    shown = [
        {
            "prompt": shortened(decode(prompts[0][at, : prompts[1][at]].tolist()), EXAMPLE_CHARACTERS),
            "answer": problems[at].answer,
            "responses": alike(found[at * samples : (at + 1) * samples]),
        }
        for at in range(min(examples, len(problems)))
    ]
    return summarise(found, samples=samples, k=samples) | {"examples": shown}


def alike(responses: Sequence[Response]) -> list[dict[str, Any]]:
    """The different responses to one problem, the most frequent first: plain data with response (its beginning and its
    end, where it is long), correct, and count, how many have that text."""
    counts = Counter((each.text, each.correct) for each in responses)
    return [
        {"response": shortened(text, EXAMPLE_CHARACTERS), "correct": correct, "count": count}
        for (text, correct), count in counts.most_common()
    ]


class PairedDifference(NamedTuple):
    """A mean difference and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(differences: Sequence[np.ndarray], *, seed: int) -> list[PairedDifference]:
    """The mean of each benchmark's per-problem differences, and of all benchmarks' means, with percentile intervals.

    Problems are drawn with replacement within their benchmark, `RESAMPLES` times; both policies of a pair are taken
    together, so what a problem has in common for both cancels.

    Args:
        differences: for each benchmark, per problem: the one policy's score less the other's.
        seed: of the resampling.

    Returns:
        One entry per benchmark, then their average.
    """
    rng = np.random.default_rng(seed)
    means = np.asarray(
        [[d[rng.integers(len(d), size=len(d))].mean() for _ in range(RESAMPLES)] for d in differences]
    )  # [benchmarks, RESAMPLES]
    exact = np.asarray([d.mean() for d in differences])
    bounds = np.percentile(np.concatenate([means, means.mean(axis=0, keepdims=True)]), [2.5, 97.5], axis=1)
    return [PairedDifference(*map(float, each)) for each in zip([*exact, exact.mean()], *bounds, strict=True)]
