"""A policy in the hand: what it says of its samples is what the sampler and the losses say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import losses
from tsopsd_jax.objectives import dapo, ts_opsd
from tsopsd_jax.policy import Policy, Sample

PROMPTS = ["3 5 2 1 -> 24 :", "7 11 2 4 -> 30 :"]


@pytest.fixture(scope="module")
def policy():
    return Policy.load("countdown-tiny")


@pytest.fixture(scope="module")
def samples(policy):
    return policy.sample(PROMPTS, samples=3, max_tokens=6, seed=1)


@pytest.fixture(scope="module")
def flat(samples) -> list[Sample]:
    return [sample for group in samples for sample in group]


def test_samples_stand_by_prompt_and_repeat(policy, samples):
    assert [len(group) for group in samples] == [3, 3]
    for text, group in zip(PROMPTS, samples, strict=True):
        for sample in group:
            np.testing.assert_array_equal(sample.prompt_tokens, policy.tokenizer.encode(text))
            assert sample.text == policy.tokenizer.decode(sample.tokens)
            assert 0 < len(sample.tokens) <= 6
            assert sample.stopped or len(sample.tokens) == 6
    again = policy.sample(PROMPTS, samples=3, max_tokens=6, seed=1)
    for a, b in zip(jax.tree.leaves(samples), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({sample.text for group in samples for sample in group}) > 1


def test_statistics_are_those_of_the_whole_logits(policy, flat):
    """Against the model's own logits, position by position."""
    for sample, stats in zip(flat, policy.stats(flat, teacher_temperature=1.5), strict=True):
        tokens = np.concatenate([sample.prompt_tokens, sample.tokens])[None]
        z = policy.model.logits(policy.params, jnp.asarray(tokens))[0, len(sample.prompt_tokens) - 1 : -1]
        np.testing.assert_allclose(stats.logp, losses.token_logp(z, jnp.asarray(sample.tokens)), atol=2e-5)
        np.testing.assert_allclose(stats.entropy, losses.entropy(z), atol=2e-5)
        np.testing.assert_allclose(stats.forward_kl, losses.forward_kl(z / 1.5, z), atol=2e-5)
        np.testing.assert_allclose(stats.reverse_kl, losses.reverse_kl(z / 1.5, z), atol=2e-5)
        np.testing.assert_allclose(stats.logp, sample.logp, atol=2e-5)
        np.testing.assert_allclose(np.mean(stats.entropy), sample.entropy_nats, atol=2e-5)


def test_a_reheating_step_raises_the_entropy(policy, flat):
    hotter, metrics = policy.update(flat, ts_opsd(), learning_rate=1e-4)
    assert metrics["distil/forward_kl_nats"] > 0

    def entropy(of: Policy) -> float:
        return float(np.mean(np.concatenate([s.entropy for s in of.stats(flat)])))

    assert metrics["policy/entropy_nats"] == pytest.approx(entropy(policy), abs=1e-5)
    assert entropy(hotter) > entropy(policy) + 1e-3
    assert all(np.all(kl == 0) for kl in policy.kl_to(policy, flat)), "a policy is at no distance from itself"
    far = np.concatenate(hotter.kl_to(policy, flat))
    assert len(far) == sum(len(s.tokens) for s in flat)
    assert np.mean(far) > 1e-4


def test_advantages_raise_what_they_reward(policy, flat):
    rewarded, _ = policy.update(flat, dapo(), learning_rate=1e-4, advantages=[1.0] + [-0.2] * (len(flat) - 1))
    before, after = (float(np.sum(p.stats(flat[:1])[0].logp)) for p in (policy, rewarded))
    assert after > before + 1e-3


def test_a_saved_policy_is_the_policy(policy, tmp_path):
    policy.save(tmp_path)
    again = Policy.load(tmp_path)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(policy.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.tokenizer.encode(PROMPTS[0]) == policy.tokenizer.encode(PROMPTS[0])


def test_bad_input_is_named(policy, samples, flat):
    with pytest.raises(ValueError, match="expected a list of Sample, got a list of list"):
        policy.stats(samples)
    with pytest.raises(ValueError, match="expects advantages, one for each sample, got none"):
        policy.update(flat, dapo(), learning_rate=1e-4)
    with pytest.raises(ValueError, match="expected 6 advantages, one for each sample, got 1"):
        policy.update(flat, dapo(), learning_rate=1e-4, advantages=[1.0])
    with pytest.raises(ValueError, match="at least one sample, got none"):
        policy.stats([])
    with pytest.raises(ValueError, match="no such directory"):
        Policy.load("nowhere")
