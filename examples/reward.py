"""Rewards of one's own: is the last line an answer, and is it brief?

In a configuration:

    data:
      verifier: {accuracy: math, format: examples/reward.py:answers_last, brevity: examples/reward.py:brevity}
      reward_weights: {format: 0.2, brevity: 0.1}
"""


def answers_last(response: str, _answer: str) -> float:
    """1.0 if the last line of the response starts with `Answer:`, else 0.0."""
    lines = response.strip().splitlines()
    return float(bool(lines) and lines[-1].startswith("Answer:"))


def brevity(response: str, _answer: str, row: dict) -> float:
    """1 for no words, falling to 0 at as many as the row's column `words` says (400 where it has none)."""
    return max(0.0, 1.0 - len(response.split()) / row.get("words", 400))
