"""Statistics of evaluations, by hand."""

import jax
import numpy as np
import pytest

from tsopsd_jax.evaluation.evaluate import (
    Response,
    alike,
    evaluation_key,
    every_row,
    paired_bootstrap,
    pass_per_problem,
    summarise,
)


def responses(correct, tokens, stopped, entropy):
    each = zip(correct, tokens, stopped, entropy, strict=True)
    return [Response(row, "", n, stop, bool(right), nats) for row, (right, n, stop, nats) in enumerate(each)]


def test_a_summary_by_hand():
    """Two of four, none, all four: accuracies 1/2, 0, 1 with mean 1/2 and deviation 1/2;
    standard error 1/2 / sqrt 3."""
    got = summarise(
        responses(
            [1, 0, 1, 0] + [0] * 4 + [1] * 4,
            [10, 30] + [2] * 10,
            [True, False] + [True] * 8 + [False] * 2,
            [0.5, 0.1] + [0.2] * 10,
        ),
        samples=4,
        k=2,
    )
    assert (got["problems"], got["samples"], got["k"]) == (3, 4, 2)
    assert got["avg_at_k"] == 0.5
    assert got["avg_at_k_stderr"] == pytest.approx(0.5 / 3**0.5)
    # 1 - C(2, 2) / C(4, 2) = 5/6; 0; 1.
    assert got["pass_at_k"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert got["length_mean_tokens"] == pytest.approx(60 / 12)
    assert got["truncated_fraction"] == pytest.approx(3 / 12)
    # Over tokens, not over responses: (10 x 0.5 + 30 x 0.1 + 20 x 0.2) / 60.
    assert got["entropy_nats"] == pytest.approx(12 / 60)
    alone = summarise(responses([1, 0], [1, 1], [True, True], [0.0, 0.0]), samples=2, k=2)
    assert (alone["avg_at_k"], alone["avg_at_k_stderr"], alone["pass_at_k"]) == (0.5, None, 1.0)


def test_pass_at_k_by_hand():
    correct = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert pass_per_problem(correct, 1) == pytest.approx([1 / 5, 3 / 5, 0, 1])  # plain accuracy
    # One of five right: three drawn miss it in C(4, 3) of C(5, 3) cases, 4 of 10. Three right: never.
    assert pass_per_problem(correct, 3) == pytest.approx([6 / 10, 1, 0, 1])
    assert pass_per_problem(correct, 5) == pytest.approx([1, 1, 0, 1])
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"1 <= k <= 5 samples, got {k}"):
            pass_per_problem(correct, k)


def test_rows_of_a_problem_stand_side_by_side():
    rows = every_row(np.array([[1, 2], [3, 0]]), np.array([2, 1]), 3)
    assert rows.tokens[:, 0].tolist() == [1, 1, 1, 3, 3, 3]
    assert rows.length.tolist() == [2, 2, 2, 1, 1, 1]
    assert rows.row_id.tolist() == [0, 1, 2, 3, 4, 5]


def test_evaluations_have_a_key_of_their_own():
    key = jax.random.key(3)
    steps = [jax.random.key_data(jax.random.fold_in(key, step)).tolist() for step in range(50)]
    assert jax.random.key_data(evaluation_key(key)).tolist() not in steps


def test_bootstrap_of_a_known_case():
    """200 problems, +1 on half of them: the resampled mean is Binomial(200, 1/2) / 200, deviation sqrt(1/4 / 200) =
    0.03536; its 2.5 and 97.5 percentiles are 86/200 and 114/200."""
    differences = np.repeat([1.0, 0.0], 100)
    (one, average) = paired_bootstrap([differences], seed=0)
    assert one.mean == 0.5
    assert (one.low, one.high) == pytest.approx((0.43, 0.57), abs=0.0051)
    assert average == one, "the average over one benchmark is that benchmark"
    assert paired_bootstrap([differences], seed=0)[0] == one
    assert paired_bootstrap([np.repeat([1.0, 0.0], 101)], seed=1)[0] != one
    # Equal everywhere: no width. The average of two benchmarks, each a problem's weight by itself: (0.25 + 0.5) / 2,
    # and half of the first one's spread.
    flat, first, both = paired_bootstrap([np.full(5, 0.25), differences], seed=0)
    assert flat == (0.25, 0.25, 0.25)
    assert both.mean == 0.375
    assert both.high - both.low == pytest.approx((first.high - first.low) / 2)


def test_responses_that_are_alike_are_counted():
    texts = ["a", "b", "a", "c" * 5000, "a", "b"]
    got = alike([Response(row, text, 1, True, text == "b", 0.0) for row, text in enumerate(texts)])
    assert [(each["response"][:4], each["correct"], each["count"]) for each in got] == [
        ("a", False, 3),
        ("b", True, 2),
        ("cccc", False, 1),
    ]
    # Of 5,000 characters 3,000 from the beginning and 1,000 from the end are kept.
    assert got[2]["response"] == "c" * 3000 + " [... 1,000 characters ...] " + "c" * 1000
