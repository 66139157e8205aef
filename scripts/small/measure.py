"""What is measured of a policy of the comparison: right answers, entropy, and how a reheated policy differs from the
collapsed one.

All policies answer the same problems with the same randomness, so that what two of them have in common cancels in
their difference.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tsopsd_jax.analysis.batches import Answered, batches_of
from tsopsd_jax.analysis.distributions import OnMesh, compare_tokens
from tsopsd_jax.data import Problem
from tsopsd_jax.distributed.sharding import make_mesh, row_multiple
from tsopsd_jax.policy import Policy, Sample
from tsopsd_jax.rollout import Sampling

WHOLE, NUCLEUS = Sampling(), Sampling(top_p=0.7)
"""The policy itself, and the paper's sampling in evaluations."""
GREEDY = Sampling(sampling_temperature=0.0)
SAMPLINGS = {"1": WHOLE, "0.7": NUCLEUS}
"""By the top-p, as results name them."""
UNCERTAIN_NATS = 0.5
"""Tokens of at least this entropy are called uncertain."""
COMPARED, SLOTS = 1024, 1024
"""Responses on whose tokens policies are compared; responses decoded side by side."""
STEPS_OF_TEMPERATURE = 8


class Questions(NamedTuple):
    """Problems that no run has seen, and how many responses are drawn to each."""

    problems: Sequence[Problem]
    samples: int
    max_tokens: int
    """Of a response, its end included."""
    verify: Callable[[str, str], float]
    """(response, gold answer) -> 1 or 0."""


def draw(policy: Policy, questions: Questions, sampling: Sampling) -> list[list[Sample]]:
    """Draw responses to every problem, a list for each; the same randomness for every policy."""
    prompts = [problem.prompt for problem in questions.problems]
    return policy.sample(
        prompts, samples=questions.samples, max_tokens=questions.max_tokens, sampling=sampling, slots=SLOTS
    )


def right_of(drawn: Sequence[Sequence[Sample]], questions: Questions) -> list[int]:
    """Count the right responses to each problem."""
    pairs = zip(drawn, questions.problems, strict=True)
    return [int(sum(questions.verify(sample.text, problem.answer) for sample in each)) for each, problem in pairs]


def entropy_of(drawn: Sequence[Sequence[Sample]]) -> float:
    """Average the policy's exact entropy over all tokens of responses, in nats."""
    flat = [sample for each in drawn for sample in each]
    return float(np.average([s.entropy_nats for s in flat], weights=[len(s.tokens) for s in flat]))


def measure(policy: Policy, questions: Questions) -> dict[str, Any]:
    """Measure a policy.

    Returns:
        Plain data: problems, samples; right {top-p: right responses to each problem}; greedy, 0 or 1 a problem;
        entropy_nats, response_tokens (mean of a response) and uncertain_fraction where it is sampled as it is.
    """
    drawn = {name: draw(policy, questions, sampling) for name, sampling in SAMPLINGS.items()}
    flat = [sample for each in drawn["1"] for sample in each]
    some = flat[:: max(1, len(flat) // COMPARED)][:COMPARED]
    nats = np.concatenate([stats.entropy for stats in policy.stats(some)])
    return {
        "problems": len(questions.problems),
        "samples": questions.samples,
        "right": {name: right_of(of, questions) for name, of in drawn.items()},
        "greedy": right_of(draw(policy, questions._replace(samples=1), GREEDY), questions),
        "entropy_nats": round(entropy_of(drawn["1"]), 5),
        "response_tokens": round(float(np.mean([len(sample.tokens) for sample in flat])), 3),
        "uncertain_fraction": round(float(np.mean(nats >= UNCERTAIN_NATS)), 5),
    }


def tempered(policy: Policy, temperature: float) -> Policy:
    """Divide a policy's logits by a temperature: softmax(z / T) as a policy, by the scale of its last norm."""
    scale = jnp.asarray(1.0 / temperature, policy.params["final_norm"].dtype)
    return dataclasses.replace(policy, params={**policy.params, "final_norm": policy.params["final_norm"] * scale})


def temperature_of_entropy(policy: Policy, questions: Questions, nats: float) -> float:
    """Find the temperature at which a policy, sampled there, has a mean token entropy, by bisection of its logarithm
    between 1 and 8.

    Args:
        questions: few suffice; the first of them are answered once each.
        nats: aimed at; at or below the policy's own: 1.
    """
    few = questions._replace(problems=questions.problems[:COMPARED], samples=1)
    low, high = 0.0, float(np.log(8.0))
    if entropy_of(draw(policy, few, WHOLE)) >= nats:
        return 1.0
    for _ in range(STEPS_OF_TEMPERATURE):
        middle = (low + high) / 2
        below = entropy_of(draw(tempered(policy, float(np.exp(middle))), few, WHOLE)) < nats
        low, high = (middle, high) if below else (low, middle)
    return float(np.exp((low + high) / 2))


def likeness(collapsed: Policy, reheated: Policy, questions: Questions) -> dict[str, float]:
    """Compare a reheated policy with the collapsed one at the tokens of the collapsed one's own responses.

    Returns:
        top_1_agreement: the share of tokens at which the likeliest token is the same; top_10_overlap: of the ten
        likeliest, those in common; top_10_mass: their probability under the reheated policy; forward_kl_nats:
        KL(collapsed || reheated).
    """
    drawn = draw(collapsed, questions._replace(problems=questions.problems[:COMPARED], samples=1), WHOLE)
    answered = [Answered(each[0].prompt_tokens.tolist(), each[0].tokens.tolist()) for each in drawn]
    mesh = make_mesh()
    limit = collapsed.model.config.max_position_embeddings
    parts = list(batches_of(answered, tokens_at_once=16384, multiple=row_multiple(mesh), limit=limit))
    before, after = (OnMesh(policy.model, policy.params) for policy in (collapsed, reheated))

    def means(k: int) -> dict[str, float]:
        found = list(compare_tokens(before, after, parts, k=k, tile_tokens=1024, mesh=mesh))
        return {name: float(np.mean(np.concatenate([part[name] for part in found]))) for name in found[0]}

    one, ten = means(1), means(10)
    return {
        "top_1_agreement": round(one["top_k_overlap"], 5),
        "top_10_overlap": round(ten["top_k_overlap"], 5),
        "top_10_mass": round(ten["top_k_mass_after"], 5),
        "forward_kl_nats": round(ten["forward_kl_nats"], 5),
    }
