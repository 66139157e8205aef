"""Rollout -> Batch on the host: rewards, the informative filter, drawing until full, advantages per token."""

import inspect
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.data import Problem
from tsopsd_jax.distributed import processes
from tsopsd_jax.judge.dynamic_sampling import ShortageError, collect, informative
from tsopsd_jax.judge.groups import Groups, RewardRule, join, judge, to_batch
from tsopsd_jax.judge.scoring import VERIFY_THREADS, accuracies, score_after, score_while
from tsopsd_jax.rewards import Rewards
from tsopsd_jax.rollout import Finished
from tsopsd_jax.types import Rollout

GROUP = 2


def rollout_of(lengths, *, prompt=2, width=8, first_token=1):
    """Rows of `prompt` prompt tokens and `lengths` response tokens; row i holds tokens 10 (first_token + i) + t."""
    lengths = np.asarray(lengths, np.int32)
    rows = np.arange(len(lengths), dtype=np.int32)[:, None] + first_token
    at = np.arange(width, dtype=np.int32)[None, :]
    live = at < prompt + lengths[:, None]
    rollout = Rollout(
        tokens=jnp.asarray(np.where(live, 10 * rows + at, 0), jnp.int32),
        prompt_length=jnp.full(len(lengths), prompt, jnp.int32),
        length=jnp.asarray(prompt + lengths, jnp.int32),
        logp=jnp.asarray(np.where(live & (at >= prompt), -0.25, 0.0), jnp.float32),
        stopped=jnp.ones(len(lengths), bool),
    )
    return jax.tree.map(np.asarray, rollout)


def groups_of(*accuracy, number=0, rule=None):
    """One group per tuple; the tokens of prompt i of batch `number` start with 10 (100 number + 1 + 2 i)."""
    flat = np.asarray(accuracy, np.float32).reshape(-1)
    rollout = rollout_of([3] * len(flat), first_token=100 * number + 1)
    return judge(rollout, flat, group=GROUP, rule=rule or RewardRule(), max_response_tokens=6)


def names(groups: Groups):
    """Which prompts, as (batch, index)."""
    first = groups.rollout.tokens[::GROUP, 0] // 10 - 1
    return [(int(x) // 100, int(x) % 100 // GROUP) for x in first]


def drawing(*batches):
    """A draw() of the given batches, and the list of those it served."""
    served = []

    def draw():
        served.append(len(served))
        return groups_of(*batches[served[-1]], number=served[-1])

    return draw, served


YES, NO, MIXED = (1, 1), (0, 0), (1, 0)


def test_rewards_are_accuracy_plus_overlong_penalty_in_tokens():
    # max 6, buffer 4: free up to 2 tokens, then -(length - 2) / 4 * factor 0.5: 3 -> -0.125, 5 -> -0.375, 6 -> -0.5
    rule = RewardRule(overlong_buffer_tokens=4, overlong_factor=0.5)
    groups = judge(
        rollout_of([2, 3, 5, 6]), np.array([1, 1, 0, 0], np.float32), group=GROUP, rule=rule, max_response_tokens=6
    )
    np.testing.assert_array_equal(groups.accuracy, [[1, 1], [0, 0]])
    np.testing.assert_allclose(groups.reward, [[1.0, 0.875], [-0.375, -0.5]])


def test_informative_looks_at_accuracy_not_at_the_reward():
    rule = RewardRule(overlong_buffer_tokens=4)
    # Group 0: both right, lengths differ, so only the penalties differ. Group 1: one right, one wrong.
    accuracy = np.array([1, 1, 1, 0], np.float32)
    groups = judge(rollout_of([2, 6, 2, 2]), accuracy, group=GROUP, rule=rule, max_response_tokens=6)
    assert groups.reward[0, 0] != groups.reward[0, 1]
    np.testing.assert_array_equal(informative(groups), [False, True])


def test_informative_where_the_penalty_levels_the_rewards():
    # Right and as long as allowed: 1 - 1 = 0, wrong and short: 0. Equal rewards, but not equal accuracies.
    rule = RewardRule(overlong_buffer_tokens=4)
    groups = judge(rollout_of([6, 2]), np.array([1, 0], np.float32), group=GROUP, rule=rule, max_response_tokens=6)
    np.testing.assert_array_equal(groups.reward, [[0, 0]])
    np.testing.assert_array_equal(informative(groups), [True])


def test_accuracies_verify_the_response_alone():
    seen = []

    def verify(response, answer):
        seen.append((response, answer))
        return float(response == answer)

    got = accuracies(rollout_of([1, 2]), ["12", "22 99"], lambda ids: " ".join(map(str, ids)), verify)
    assert sorted(seen) == [("12", "12"), ("22 23", "22 99")]
    np.testing.assert_array_equal(got, [1.0, 0.0])


def test_without_dynamic_sampling_one_batch_is_taken_as_it_is():
    draw, served = drawing([YES, MIXED, NO])
    out = collect(draw, prompts=3, leftover=None, rule=RewardRule())
    assert names(out.groups) == [(0, 0), (0, 1), (0, 2)]
    assert (served, out.leftover) == ([0], None)
    assert (out.generation_batches, out.sampled_groups, out.informative_groups, out.filled_groups) == (1, 3, 1, 0)


@pytest.mark.parametrize("surplus", ["drop", "keep"])
def test_collect_draws_until_full_in_order(surplus):
    rule = RewardRule(max_generation_batches=5, surplus=surplus)
    draw, served = drawing([YES, MIXED, NO], [NO, NO, NO], [MIXED, MIXED, MIXED], [MIXED] * 3)
    out = collect(draw, prompts=2, leftover=None, rule=rule)
    assert served == [0, 1, 2]
    assert names(out.groups) == [(0, 1), (2, 0)]
    assert (out.generation_batches, out.sampled_groups, out.informative_groups, out.filled_groups) == (3, 9, 4, 0)
    if surplus == "drop":
        assert out.leftover is None
    else:
        assert out.leftover is not None
        assert names(out.leftover) == [(2, 1), (2, 2)]


def test_leftover_comes_first_and_may_suffice():
    rule = RewardRule(max_generation_batches=2, surplus="keep")
    leftover = groups_of(MIXED, MIXED, MIXED, number=7)
    draw, served = drawing([MIXED, YES])
    out = collect(draw, prompts=2, leftover=leftover, rule=rule)
    assert names(out.groups) == [(7, 0), (7, 1)]
    assert out.leftover is not None
    assert (names(out.leftover), served, out.sampled_groups) == ([(7, 2)], [], 0)
    out = collect(draw, prompts=4, leftover=leftover, rule=rule)
    assert names(out.groups) == [(7, 0), (7, 1), (7, 2), (0, 0)]
    assert (out.leftover, served) == (None, [0])


def test_shortage_is_an_error_that_counts():
    rule = RewardRule(max_generation_batches=2)
    draw, served = drawing([YES, MIXED], [NO, NO], [MIXED, MIXED])
    with pytest.raises(ShortageError, match="1 of 2 groups are informative after 2 generation batches"):
        collect(draw, prompts=2, leftover=None, rule=rule)
    assert served == [0, 1]


def test_shortage_filled_with_groups_that_teach_nothing():
    rule = RewardRule(max_generation_batches=2, on_shortage="fill", surplus="keep")
    draw, _ = drawing([YES, MIXED], [NO, YES])
    out = collect(draw, prompts=3, leftover=None, rule=rule)
    assert names(out.groups) == [(0, 1), (0, 0), (1, 0)]  # informative first, then in the order drawn
    assert (out.filled_groups, out.informative_groups, out.leftover) == (2, 1, None)
    advantage = np.asarray(to_batch(out.groups).advantage)
    assert np.all(advantage[:2, 2:5] != 0)
    np.testing.assert_array_equal(advantage[2:], np.zeros_like(advantage[2:]))


def test_join_and_take_keep_the_responses_of_a_prompt_together():
    groups = join([groups_of(YES, MIXED, number=1), groups_of(NO, number=2)])
    assert len(groups) == 3
    assert names(groups.take(np.array([2, 0]))) == [(2, 0), (1, 0)]
    np.testing.assert_array_equal(groups.take(np.array([False, True, False])).accuracy, [[1, 0]])
    np.testing.assert_array_equal(groups.take(slice(1, 2)).rollout.tokens, groups.rollout.tokens[2:4])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_to_batch_spreads_the_advantage_over_the_response(normalize_std):
    # Rewards 1 and 0: mean 1/2; std (ddof 1) sqrt(1/2) = 0.70710678: advantage +-0.5 / 0.70710778 = +-0.7071058
    groups = judge(
        rollout_of([1, 3]), np.array([1, 0], np.float32), group=GROUP, rule=RewardRule(), max_response_tokens=6
    )
    batch = to_batch(groups, normalize_std=normalize_std)
    a = 0.7071058 if normalize_std else 0.5
    want = [[0, 0, a, 0, 0, 0, 0, 0], [0, 0, -a, -a, -a, 0, 0, 0]]
    np.testing.assert_allclose(batch.advantage, want, rtol=1e-6)
    np.testing.assert_array_equal(batch.mask, np.asarray(want) != 0)
    np.testing.assert_array_equal(batch.old_logp, np.where(batch.mask, -0.25, 0.0))
    np.testing.assert_array_equal(batch.tokens, groups.rollout.tokens)


def test_advantages_compare_the_responses_of_one_prompt():
    # Prompt 0: rewards (1, 0), prompt 1: (0, 0). Grouped the other way both groups would be (1, 0), (0, 0) mixed up.
    advantage = np.asarray(to_batch(groups_of(MIXED, NO, YES), normalize_std=False).advantage)[:, 2]
    np.testing.assert_array_equal(advantage, [0.5, -0.5, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"surplus": "burn"}, "surplus must be 'drop' or 'keep', got 'burn'"),
        ({"on_shortage": "cry"}, "on_shortage must be 'error' or 'fill', got 'cry'"),
        ({"overlong_buffer_tokens": -1}, "overlong_buffer_tokens must be at least 0, got -1"),
    ],
)
def test_reward_rule_refuses(setting, words):
    with pytest.raises(ValueError, match=words):
        RewardRule(**setting)


def test_judge_takes_what_the_loop_needs_and_no_config():
    assert list(inspect.signature(judge).parameters) == [
        "rollout",
        "accuracy",
        "group",
        "rule",
        "max_response_tokens",
        "reward",
    ]


def asked(*answers):
    """A problem for each answer."""
    return [Problem(str(i), "", answer) for i, answer in enumerate(answers)]


def sampling(lengths, *, between=lambda: None):
    """A sampler of rows whose tokens are their number, which end in falling order."""

    def sample(on_finished):
        for row in reversed(range(len(lengths))):
            on_finished(Finished(row, np.full(lengths[row], row, np.int32), np.zeros(lengths[row], np.float32), True))
            between()
        return "the rollout"

    return sample


def test_responses_are_scored_while_others_are_sampled():
    seen, ends = [], iter([1, 2, 3])

    def wait():  # every row is scored before the next ends
        deadline = time.monotonic() + 60
        ended = next(ends)
        while len(seen) < ended and time.monotonic() < deadline:
            time.sleep(0.001)

    def verify(text, answer):
        seen.append(text)
        return float(text == answer)

    got = score_while(
        sampling([1, 2, 3], between=wait),
        asked("0", "1 1", "no"),
        lambda ids: " ".join(map(str, ids)),
        Rewards.of(verify),
    )
    assert seen == ["2 2 2", "1 1", "0"], "in the order of ending, before the rollout was over"
    np.testing.assert_array_equal(got.accuracy, [1, 1, 0])
    assert got.rollout == "the rollout"


def test_what_a_verifier_raises_while_sampling_is_raised():
    def verify(_text, _answer):
        raise RuntimeError("broken verifier")

    with pytest.raises(RuntimeError, match="broken verifier"):
        score_while(sampling([1]), asked("0"), str, Rewards.of(verify))


def test_two_processes_divide_the_scoring_and_know_all_of_it(monkeypatch):
    """Each scores every second row; what they exchange is JSON; failures come along."""
    rollout = rollout_of([1, 2, 3, 1])
    rewards = Rewards({"first": lambda text, answer, row: {"a": float(answer), "b": row["x"] + len(text)}})
    problems = [Problem(str(i), "", str(i), {"x": 10.0 * i}) for i in range(4)]
    alone = score_after(rollout, problems, lambda ids: "y" * len(ids), rewards)
    # a is the answer, b is 10 x row + the response's length; the reward is their sum, the accuracy the first
    assert [v.parts for v in alone.verdicts] == [{"a": i, "b": 10 * i + n} for i, n in enumerate([1, 2, 3, 1])]
    np.testing.assert_array_equal(alone.accuracy, [0, 1, 2, 3])
    np.testing.assert_array_equal(alone.reward, [1, 13, 25, 34])
    parts, seen = [], []

    class Exchanged(Exception):
        pass

    def send(mine):
        parts.append(json.loads(json.dumps(mine)))
        raise Exchanged

    def counted(text, answer, row):
        seen.append(answer)
        return rewards(text, answer, row)

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(processes, "exchange", send)
        with pytest.raises(Exchanged):
            score_after(rollout, problems, lambda ids: "y" * len(ids), counted)
    assert [sorted(seen[:2]), sorted(seen[2:])] == [["0", "2"], ["1", "3"]]
    monkeypatch.setattr(processes, "exchange", lambda _: parts)
    got = score_after(rollout, problems, lambda ids: "y" * len(ids), rewards)
    assert [v.parts for v in got.verdicts] == [v.parts for v in alone.verdicts]
    np.testing.assert_array_equal(got.reward, alone.reward)


def test_the_judge_adds_the_penalty_to_the_reward_and_keeps_the_accuracy():
    # penalties of 3 and 6 tokens: -(3 - 2) / 4 = -0.25, -1
    rule = RewardRule(overlong_buffer_tokens=4)
    accuracy, reward = np.array([1, 0], np.float32), np.array([1.5, 0.25], np.float32)
    groups = judge(rollout_of([3, 6]), accuracy, group=GROUP, rule=rule, max_response_tokens=6, reward=reward)
    np.testing.assert_array_equal(groups.accuracy, [[1, 0]])
    np.testing.assert_allclose(groups.reward, [[1.25, -0.75]])


def test_a_rollout_that_is_left_does_not_wait_for_verifications_nobody_began():
    rows, seen, go = 5 * VERIFY_THREADS, [], threading.Event()

    def verify(text, _answer):
        seen.append(text)
        go.wait(60)
        return 0.0

    def left(on_finished):
        for row in range(rows):
            on_finished(Finished(row, np.array([row]), np.zeros(1), True))
        threading.Timer(0.5, go.set).start()  # those begun end after the rollout was left
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_while(left, asked(*["0"] * rows), str, Rewards.of(verify))
    assert 0 < len(seen) < rows
