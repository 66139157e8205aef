"""The contract of a reward function, checked on toy responses: for people's own, and before every run."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax.rewards.named import RewardFunction, Rewards, check_names, make_rewards
from tsopsd_jax.rewards.own import LIMIT_S, OwnReward
from tsopsd_jax.rewards.own_worker import RewardError, call_reward, takes_row

JUNK = {
    "an empty response": "",
    "white space": " \n\t\r ",
    "a long response": "step by step, " * 10_000,
    "other scripts": "Ünïcödé ∑ 数 🙂 \u2028 \u202e \x00",
    "half a character": "Answer: \ud83d",
    "odd numbers": "1e999 nan inf -0 ½ ² 1/0 0x",
    "open brackets": "\\boxed{" * 2_000,
}
"""What a model may say, by name."""


def check_reward(
    function: Callable[..., Any] | str, *, answer: str = "4", row: Mapping[str, Any] | None = None
) -> None:
    """Check that a reward function keeps its contract, on a right response and on junk.

    It takes (response, answer) or (response, answer, row), returns a finite float or {name: float}, always the same for
    the same input and under the same names, within five seconds, and raises nothing.

    Args:
        function: itself, or `path/to/file.py:function`.
        answer: a gold answer of its problems.
        row: other columns of their rows.

    Raises:
        ValueError: one line that says what is broken: file, function, line, expected, got.
    """
    if isinstance(function, str):
        own = OwnReward(function)
        try:
            _names(own, function, answer, row or {})
        finally:
            own.close()
        return
    place = _place(function)
    if not callable(function):
        raise ValueError(f"expected a reward function, got {place}")
    with_row = takes_row(function, place)

    def limited(response: str, answer: str, row: Mapping[str, Any]) -> float | Mapping[str, float]:
        return _within(
            LIMIT_S, place, lambda: call_reward(function, place, response, answer, row if with_row else None)
        )

    _names(limited, place, answer, row or {})


def check_rewards(rewards: Rewards, *, answer: str, row: Mapping[str, Any]) -> None:
    """Check the functions of one's own among the rewards of a run, and that weights and accuracy name rewards.

    Args:
        rewards: whose functions are called.
        answer, row: of a problem of the run.

    Raises:
        ValueError: as `check_reward` does; two rewards of one name; a weight or an accuracy of no reward.
    """
    known: list[str] = []
    for name, function in rewards.functions.items():
        found = _names(function, function.name, answer, row) if isinstance(function, OwnReward) else None
        known += found or [name]
    if twice := [name for name in dict.fromkeys(known) if known.count(name) > 1]:
        raise ValueError(f"verifier: expected rewards of different names, got {twice[0]!r} twice; rename one")
    check_names(list(rewards.functions), rewards.weights, rewards.accuracy, known=known)


def make_checked_rewards(
    verifier: str | Mapping[str, str],
    *,
    weights: Mapping[str, float] | None = None,
    accuracy: str | None = None,
    answer: str,
    row: Mapping[str, Any],
) -> Rewards:
    """Make the rewards of a run, and check them on the answer and the row of one of its problems.

    Raises:
        ValueError: as `make_rewards` and `check_rewards` do.
    """
    rewards = make_rewards(verifier, weights=weights, accuracy=accuracy)
    check_rewards(rewards, answer=answer, row=row)
    return rewards


def _names(function: RewardFunction, place: str, answer: str, row: Mapping[str, Any]) -> Sequence[str]:
    """The names under which a function returns rewards, none where it returns a number, which are always the same."""
    names: Sequence[str] | None = None
    for what, response in {"a right response": f"So \\boxed{{{answer}}}.\nAnswer: {answer}", **JUNK}.items():
        values = []
        for _ in range(2):
            try:
                values.append(function(response, answer, row))
            except RewardError as error:
                raise ValueError(f"{error} (for {what}, with answer {answer[:40]!r})") from error
        if values[0] != values[1]:
            raise ValueError(
                f"{place}: expected the same reward for the same input, got {values[0]} and {values[1]} for {what}"
            )
        found = list(values[0]) if isinstance(values[0], Mapping) else []
        if names is not None and found != names:
            raise ValueError(
                f"{place}: expected rewards of the same names for every input, got {_listed(names)}, then "
                f"{_listed(found)} for {what}"
            )
        names = found
    return names or []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "a number"


def _within(seconds: float, place: str, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; it runs in a thread that is left where it takes too long."""
    done: list[tuple[Any, RewardError | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except RewardError as error:
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise RewardError(f"{place}: took more than {seconds:g} s")
    value, error = done[0]
    if error is not None:
        raise error
    return value


def _place(function: Any) -> str:
    """`file.py:name` of a function."""
    try:
        return f"{Path(function.__code__.co_filename).name}:{function.__name__}"
    except AttributeError:  # another callable
        return " ".join(repr(function).split())[:80]
