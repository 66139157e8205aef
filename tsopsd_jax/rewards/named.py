"""The rewards of a run: functions by name with weights, and what they say of a response."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tsopsd_jax.loading import is_own
from tsopsd_jax.rewards.countdown import verify_countdown
from tsopsd_jax.rewards.math import verify_math
from tsopsd_jax.rewards.number import verify_last_number
from tsopsd_jax.rewards.own import OwnReward
from tsopsd_jax.rewards.own_worker import REWARD_NAME, RewardError

RewardFunction = Callable[[str, str, Mapping[str, Any]], float | Mapping[str, float]]
"""(response, answer, the data row's other columns) -> a reward, or rewards by name. It may raise RewardError,
and nothing else."""

VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "countdown": verify_countdown,
    "math": verify_math,
    "last_number": verify_last_number,
}
"""(response text, gold text) -> 1.0 or 0.0. A verifier never raises: model output must not stop a run."""

ONE = "accuracy"
"""Name of a reward that was given without one."""
RIGHT_ABOVE = 0.5
"""A response counts as right where its accuracy is above this."""


class Verdict(NamedTuple):
    """What the rewards of a run say of a response. Plain JSON."""

    accuracy: float
    reward: float
    """sum of weight x reward, before penalties"""
    parts: dict[str, float]
    """Rewards by name, without weights; a function that failed has none here."""
    failures: Sequence[str] = ()
    """What functions did wrong, which count as 0: a sentence each."""

    @property
    def right(self) -> bool:
        """Whether the response counts as right."""
        return self.accuracy > RIGHT_ABOVE


def failed_fraction(verdicts: Sequence[Verdict]) -> float:
    """The share of responses of which a reward failed."""
    return sum(bool(verdict.failures) for verdict in verdicts) / max(len(verdicts), 1)


def failure_words(verdicts: Sequence[Verdict]) -> str | None:
    """What went wrong with rewards, in a line that names the most frequent failure; None: nothing."""
    said = Counter(words for verdict in verdicts for words in verdict.failures)
    if not said:
        return None
    words, times = said.most_common(1)[0]
    failed = sum(bool(verdict.failures) for verdict in verdicts)
    often = f" ({times} times)" if times < failed else ""
    return f"rewards of {failed} of {len(verdicts)} responses failed and count as 0: {words}{often}"


class Rewards:
    """Reward functions by name; called with (response, answer, row), from several threads at once.

    Args:
        functions: name -> function; what a function returns by name has these names instead of its own.
        weights: name -> weight in the sum, of a function or of what it returns by name; 1 where there is none.
        accuracy: name of the reward that dynamic sampling and avg@k look at; None: the first.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        *,
        weights: Mapping[str, float] | None = None,
        accuracy: str | None = None,
    ):
        self.functions, self.weights, self.accuracy = dict(functions), dict(weights or {}), accuracy

    @classmethod
    def of(cls, verify: Callable[[str, str], float]) -> "Rewards":
        """A single verifier, which is the accuracy."""
        return cls({ONE: without_row(verify)})

    def __call__(self, response: str, answer: str, row: Mapping[str, Any]) -> Verdict:
        found: dict[str, dict[str, float]] = {}
        failures = []
        for name, function in self.functions.items():
            try:
                value = function(response, answer, row)
                found[name] = dict(value) if isinstance(value, Mapping) else {name: value}
            except RewardError as error:
                found[name] = {}
                failures.append(str(error))
        parts = {part: value for each in found.values() for part, value in each.items()}
        total = sum(self._weight(part, name) * x for name, each in found.items() for part, x in each.items())
        first = next(iter(found.values()))
        accuracy = next(iter(first.values()), 0.0) if self.accuracy is None else parts.get(self.accuracy, 0.0)
        return Verdict(float(accuracy), float(total), parts, failures)

    def _weight(self, part: str, function: str) -> float:
        return self.weights.get(part, self.weights.get(function, 1.0))


def without_row(verify: Callable[[str, str], float]) -> RewardFunction:
    """A verifier as a reward function that has no use for the row."""
    return lambda response, answer, _row: verify(response, answer)


def check_setting(verifier: str | Mapping[str, Any], weights: Mapping[str, float], accuracy: str | None) -> None:
    """Check what can be checked of a setting (see `make_rewards`) before a function is called.

    Raises:
        ValueError: an unknown verifier, a name that cannot name a metric, weights or an accuracy of another name.
    """
    functions = named_functions(verifier)
    if not functions:
        raise ValueError("verifier: expected at least one reward, got none")
    for name, function in functions.items():
        if not isinstance(function, str) or not (is_own(function) or function in VERIFIERS):
            raise ValueError(
                f"verifier: expected one of {', '.join(VERIFIERS)} or path/to/file.py:function, got {function!r}"
            )
        if not REWARD_NAME.fullmatch(name):
            raise ValueError(f"verifier: expected names of letters, digits and _, got {name!r}")
    if not any(is_own(function) for function in functions.values()):  # which may return rewards of other names
        check_names(list(functions), weights, accuracy, known=list(functions))


def check_names(
    functions: Sequence[str], weights: Iterable[str], accuracy: str | None, *, known: Sequence[str]
) -> None:
    """Check that weights are those of functions or rewards, and that the accuracy is a reward.

    Args:
        functions: their names.
        weights: names that have one.
        accuracy: a name; None: the first reward's.
        known: names of the rewards.

    Raises:
        ValueError: a name is another.
    """
    for name in weights:
        if name not in (*functions, *known):
            raise ValueError(f"reward_weights: no reward is called {name!r}; expected one of {', '.join(known)}")
    if accuracy is not None and accuracy not in known:
        raise ValueError(f"accuracy: no reward is called {accuracy!r}; expected one of {', '.join(known)}")


def named_functions(verifier: str | Mapping[str, Any]) -> dict[str, Any]:
    """Name -> verifier; one that stands alone is the accuracy."""
    return {ONE: verifier} if isinstance(verifier, str) else dict(verifier)


def make_rewards(
    verifier: str | Mapping[str, Any],
    *,
    weights: Mapping[str, float] | None = None,
    accuracy: str | None = None,
) -> Rewards:
    """Make the rewards of a run.

    Args:
        verifier: a key of VERIFIERS or `path/to/file.py:function`, or several of them by name.
        weights, accuracy: see `Rewards`.

    Raises:
        ValueError: as `check_setting` does, or a function that cannot be had.
    """
    check_setting(verifier, weights or {}, accuracy)
    functions = {
        name: OwnReward(function) if is_own(function) else without_row(VERIFIERS[function])
        for name, function in named_functions(verifier).items()
    }
    return Rewards(functions, weights=weights, accuracy=accuracy)
