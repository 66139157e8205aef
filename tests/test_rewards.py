"""Verifiers and reward shaping: right answers, wrong answers, and text that means harm."""

import contextlib
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.rewards import VERIFIERS, overlong_penalty, verify_countdown, verify_last_number, verify_math
from tsopsd_jax.rewards import math as verifier


@contextlib.contextmanager
def must_end_within(seconds: float):
    """Turn a hang (quadratic time on 10 MB is hours) into a failure; not a measurement."""

    def stop(*_):
        raise TimeoutError(f"did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- overlong penalty ---


def test_overlong_penalty_by_hand():
    # max 10, buffer 4: free up to 6. 5 -> 0; 6 -> 0; 7 -> -1/4; 9 -> -3/4; 10 -> -1.
    got = overlong_penalty(np.array([5, 6, 7, 9, 10]), max_tokens=10, buffer_tokens=4)
    np.testing.assert_array_equal(got, np.array([0.0, 0.0, -0.25, -0.75, -1.0], np.float32))
    assert got.dtype == np.float32
    # factor 0.5: 9 -> -3/4 * 0.5 = -0.375
    assert overlong_penalty(9, max_tokens=10, buffer_tokens=4, factor=0.5) == -0.375


def test_overlong_penalty_keeps_shape_and_kind():
    lengths = np.array([[7, 10], [1, 8]], np.int32)
    expected = np.array([[-0.25, -1.0], [0.0, -0.5]], np.float32)
    on_host = overlong_penalty(lengths, max_tokens=10, buffer_tokens=4)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_array_equal(on_host, expected)
    on_device = overlong_penalty(jnp.asarray(lengths), max_tokens=10, buffer_tokens=4)
    assert isinstance(on_device, jax.Array)
    np.testing.assert_array_equal(np.asarray(on_device), expected)
    traced = jax.jit(lambda x: overlong_penalty(x, max_tokens=10, buffer_tokens=4))(jnp.asarray(lengths))
    np.testing.assert_array_equal(np.asarray(traced), expected)
    scalar = overlong_penalty(7, max_tokens=10, buffer_tokens=4)
    assert isinstance(scalar, np.ndarray)
    assert scalar.shape == ()


def test_overlong_penalty_without_buffer_is_zero():
    got = overlong_penalty(np.array([1, 10, 11]), max_tokens=10, buffer_tokens=0)
    np.testing.assert_array_equal(got, np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("max_tokens", "buffer_tokens", "factor"), [(10, 11, 1.0), (10, -1, 1.0), (-1, 0, 1.0), (10, 4, -1.0)]
)
def test_overlong_penalty_rejects(max_tokens, buffer_tokens, factor):
    with pytest.raises(ValueError, match="buffer_tokens"):
        overlong_penalty(5, max_tokens=max_tokens, buffer_tokens=buffer_tokens, factor=factor)


# --- countdown ---

GOLD = "3 7 11 2 -> 34"


@pytest.mark.parametrize(
    "response",
    [
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34",
        "11 + 2 = 13 ; 7 * 3 = 21 ; 13 + 21 = 34",  # another order
        "  3 * 7 = 21 ; 2 + 21 = 23 ; 23 + 11 = 34\n",  # another solution, outer white space
    ],
)
def test_countdown_right(response):
    assert verify_countdown(response, GOLD) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        ";",
        "34",
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 35",  # arithmetic
        "3 * 7 = 21 ; 11 + 2 = 14 ; 21 + 13 = 34",  # arithmetic in the middle
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 - 13 = 8",  # not the target
        "3 * 7 = 21 ; 21 + 11 = 32 ; 21 + 13 = 34",  # an intermediate result used twice
        "3 * 7 = 21 ; 11 + 2 = 13 ; 17 + 17 = 34",  # numbers that are not there
        "7 * 7 = 49 ; 11 + 2 = 13 ; 49 - 13 = 36",  # a number used twice
        "3 * 7 = 21 ; 21 + 13 = 34",  # too few steps
        "11 + 2 = 13 ; 21 + 13 = 34",
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34 ;",  # trailing separator
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34 34",  # trailing text
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34 ; 34 + 0 = 34",  # a step too many
        "3 * 7 = 21 , 11 + 2 = 13 , 21 + 13 = 34",  # separator
        "3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 : 34",
        "3 x 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34",  # operator
        "3 * 07 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34",  # spelling
        "3 * ٧ = 21 ; 11 + 2 = 13 ; 21 + 13 = 34",  # another script's 7, for which int() says 7
        "3*7=21;11+2=13;21+13=34",
        "\x00" * 50,
        "= = = = =",
    ],
)
def test_countdown_wrong(response):
    assert verify_countdown(response, GOLD) == 0.0


def test_countdown_needs_every_number():
    # 3 + 7 = 10 reaches the target, with 11 and 2 left over
    assert verify_countdown("3 + 7 = 10", "3 7 11 2 -> 10") == 0.0
    assert verify_countdown("3 + 7 = 10 ; 11 - 10 = 1 ; 1 * 2 = 2", "3 7 11 2 -> 2") == 1.0
    assert verify_countdown("3 + 7 = 10 ; 11 - 10 = 1", "3 7 11 2 -> 2") == 0.0  # 2 is there, but was given


def test_countdown_values_stay_in_0_to_99():
    # 11 * 10 = 110 leaves the range though 110 - 9 = 101, 101 - 2 = 99 would come back.
    assert verify_countdown("11 * 10 = 110 ; 110 - 9 = 101 ; 101 - 2 = 99", "11 10 9 2 -> 99") == 0.0
    # 2 - 3 = -1, -1 + 5 = 4, 4 + 6 = 10
    assert verify_countdown("2 - 3 = -1 ; -1 + 5 = 4 ; 4 + 6 = 10", "2 3 5 6 -> 10") == 0.0
    assert verify_countdown("9 * 11 = 99 ; 5 - 5 = 0 ; 99 + 0 = 99", "9 11 5 5 -> 99") == 1.0


def test_countdown_counts_equal_numbers():
    # two fives and an intermediate five: three in all, and each may be used once
    assert verify_countdown("2 + 3 = 5 ; 5 * 5 = 25 ; 25 + 5 = 30", "5 5 2 3 -> 30") == 1.0
    assert verify_countdown("5 * 5 = 25 ; 25 + 5 = 30 ; 30 + 2 = 32", "5 5 2 3 -> 32") == 0.0


@pytest.mark.parametrize("gold", ["", "->", "3 7 11 2 34", "3 7 11 2 -> x", "3 7 11 2 ->", "a b c d -> 34"])
def test_countdown_junk_gold_is_zero(gold):
    assert verify_countdown("3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34", gold) == 0.0


def test_countdown_never_raises():
    rng = np.random.default_rng(0)
    words = ["3", "7", "99", "100", "-1", "+", "-", "*", "=", ";", "->", ":", "\ud800", "𝟛", "<eos>", "\n"]
    for _ in range(2000):
        text = " ".join(rng.choice(words, size=rng.integers(0, 20)))
        assert verify_countdown(text, GOLD) == 0.0
    assert verify_countdown("3 " * 5_000_000, GOLD) == 0.0


# --- mathematics ---


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("Thus.\nAnswer: 34", "34"),
        ("Answer: $34$.", "34"),
        ("Answer:\n\n34\n", "34"),  # on the line after the mark
        ("**Answer:** 34", "34"),
        ("**Answer: 34**", "34"),
        ("**Answer**: 34", "34"),
        ("Answer: 3\n\n**Answer**: 34", "34"),
        ("So \\boxed{34}. We check our answer: 2 + 32.", "34"),
        ("Answer: 3\nNo, wait.\nAnswer: 34", "34"),  # the last one counts
        ("Answer: \\(34\\)", "34"),
        ("Answer: \\boxed{34}", "34"),
        ("So \\boxed{34}.", "34"),
        ("\\boxed{1} no, \\boxed{34}", "34"),
        ("\\boxed{\\boxed{34}}", "34"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),  # balanced braces
        ("\\boxed{\\{1, 2\\}}", "\\{1,2\\}"),  # escaped braces do not count
        ("\\boxed{[0, 1\\}}", "[0,1\\}"),
        ("\\boxed{7} Answer: ", "7"),  # an empty mark falls back to the box
        ("Answer: \\dfrac{1}{2}", "0.5"),
        ("Answer: \\tfrac12", "1/2"),
        ("Answer: -1/2", "-\\frac{1}{2}"),
        ("Answer: \\frac{-1}{2}", "-\\frac12"),
        ("Answer: −3", "-3"),  # the typographic minus
        ("Answer: +3", "3"),
        ("Answer: 2/4", "1/2"),
        ("Answer: 50%", "1/2"),
        ("Answer: 50\\%", "0.5"),
        ("Answer: 1,234,567", "1234567"),
        ("Answer: 1{,}234", "1234"),
        ("Answer: 1,\\!234", "1234"),
        ("Answer: 34.0", "34"),
        ("Answer: .5", "0.50"),
        ("Answer: 1\\frac{1}{2}", "3/2"),
        ("Answer: -1\\frac{1}{2}", "-1.5"),
        ("Answer: \\text{Evelyn}", "Evelyn"),
        ("Answer: \\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\dfrac{\\pi}{2})"),
        ("Answer: 90^\\circ", "90"),
        ("Answer: \\$5", "5"),
        ("Answer: 2 \\sqrt{2}", "2\\sqrt{2}"),
        ("Answer: 34e1", "340"),
        ("Answer: ３４", "34"),  # digits of another width
        ("Answer: " + "9" * 290, "9" * 290),
    ],
)
def test_math_right(response, gold):
    assert verify_math(response, gold) == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("", "34"),
        ("34", "34"),  # no mark: not an answer
        ("Answer: 35", "34"),
        ("Answer: 34\nAnswer: 3", "34"),
        ("\\boxed{34} then \\boxed{3}", "34"),
        ("\\boxed{34}\nAnswer: 3", "34"),  # the line wins over the box
        ("Answer: 34 or 35", "34"),
        ("Answer: 34, 35", "34"),
        ("Answer: 3 4", "34"),
        ("Answer: 1 1/2", "11/2"),
        ("Answer: -34", "34"),
        ("Answer: 34x", "34"),
        ("Answer: 0.333", "1/3"),
        ("Answer: 2", "1/2"),
        ("Answer: 1/0", "0"),
        ("Answer: 1\\frac{3}{2}", "5/2"),  # not a mixed number
        ("Answer: 12,34", "1234"),  # not thousands
        ("Answer: (1,2)", "(2,1)"),
        ("Answer: 34e1", "341"),
        ("Answer: ３５", "34"),  # digits of another width
        ("Answer: ٣٤", "34"),  # digits of another script
        ("Answer: Evelyn", "Evelyne"),
        ("\\boxed{34", "34"),  # never closed
        ("\\boxed{}", ""),
        ("Answer: $", "$"),
        ("Answer: 10**10**10", "10"),
        ("Answer: " + "9" * 401, "9" * 401),  # too long to be an answer
        ("Answer: 0." + "0" * 280 + "1", "0"),
    ],
)
def test_math_wrong(response, gold):
    assert verify_math(response, gold) == 0.0


MEGA = 10_000_000
HOSTILE = {
    "boxes": "\\boxed{" * (MEGA // 7),
    "braces": "\\boxed{" + "{" * MEGA,
    "closing": "\\boxed{" + "{" * (MEGA // 2) + "}" * (MEGA // 2),
    "marks": "Answer:" * (MEGA // 7),
    "mark, blanks": "Answer:" + " \n" * (MEGA // 2),
    "mark, stars": "Answer:" + "*" * MEGA,
    "mark, digits": "Answer: " + "9" * MEGA,
    "mark, fractions": "Answer: " + "\\frac{" * (MEGA // 6),
    "mark, commas": "Answer: 1" + ",000" * (MEGA // 4),
    "mark, box in a long line": "Answer: " + "\\boxed{" * (MEGA // 7),
    "backslashes": "\\boxed{" + "\\" * MEGA,
    "almost marks": "Answer" * (MEGA // 6),
    "blanks": " " * MEGA,
    "surrogates": "\ud800" * MEGA + "Answer: \ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_math_is_linear_in_hostile_text(name):
    with must_end_within(20):
        assert verify_math(HOSTILE[name], "34") == 0.0
        assert verify_math("Answer: 34", HOSTILE[name]) == 0.0


def test_what_plain_rules_do_never_raises(monkeypatch):
    monkeypatch.setattr(verifier, "WORKERS", SimpleNamespace(order=lambda *_: None))
    rng = np.random.default_rng(0)
    pieces = [
        "Answer:",
        "\\boxed{",
        "}",
        "{",
        "\\frac",
        "\\text",
        "1",
        "/",
        "0",
        "%",
        ",",
        ".",
        "-",
        " ",
        "\n",
        "²",
        "$",
    ]
    for _ in range(5000):
        response = "".join(rng.choice(pieces, size=rng.integers(0, 12)))
        gold = "".join(rng.choice(pieces, size=rng.integers(0, 4)))
        assert verify_math("Answer: " + response, gold) in (0.0, 1.0)


def test_verifiers_by_name():
    assert {"countdown": verify_countdown, "math": verify_math, "last_number": verify_last_number} == VERIFIERS
