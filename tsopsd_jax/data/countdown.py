"""The countdown-steps task: reach a target from four numbers in three written steps.

    prompt    3 7 11 2 -> 34 :
    response  3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34          (then the end of the sequence)

The four numbers lie in 1..19, every value in 0..99; each number and each intermediate result is used exactly
once and the last result is the target. One token per word, 109 vocabulary entries: small enough to pretrain,
collapse and reheat a policy on a laptop, with many right answers per prompt. The task is also a TFDS data set
(`builders.py`).
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LARGEST_NUMBER = 19
LARGEST_VALUE = 99
NUMBERS = 4
PAD, EOS = "<pad>", "<eos>"

VOCABULARY: tuple[str, ...] = (
    *(str(value) for value in range(LARGEST_VALUE + 1)),
    *("+", "-", "*", "=", ";", "->", ":"),
    PAD,
    EOS,
)
"""Entry i is the word of token id i; the id of an integer is that integer."""

MAX_PROMPT_TOKENS = NUMBERS + 3
MAX_RESPONSE_TOKENS = (NUMBERS - 1) * 6
"""Five words a step, two separators, and the end of the sequence."""

MOST_NUMBERS = 6
"""Numbers of the hardest problem: responses to more would be longer than the verifier reads."""


def lengths(numbers: int) -> tuple[int, int]:
    """Count the tokens of a prompt of so many numbers, and of a response to it with its end.

    Raises:
        ValueError: for fewer than two numbers, or more than `MOST_NUMBERS`.
    """
    if not 2 <= numbers <= MOST_NUMBERS:
        raise ValueError(f"countdown: expected 2 to {MOST_NUMBERS} numbers, got {numbers}")
    return numbers + 3, (numbers - 1) * 6


_HELD_OUT_ONE_IN = 16


def random_derivation(
    rng: np.random.Generator, *, held_out: bool = False, numbers: int = NUMBERS
) -> tuple[str, str, str]:
    """Draw a random problem with one of its solutions: (prompt, response without the end token, gold answer).

    `held_out` chooses between two disjoint sets of problems (see `is_held_out`): whatever pretrains or trains
    a model draws with False, the test split with True. `numbers`: how many a problem has.
    """
    while True:
        # All decisions from one draw: a call into numpy costs more than the rest of the function.
        draws = rng.random(numbers + 3 * (numbers - 1)).tolist()
        given = [1 + int(draw * LARGEST_NUMBER) for draw in draws[:numbers]]
        pool, steps = list(given), []
        for at in range(numbers, len(draws), 3):
            left = pool.pop(int(draws[at] * len(pool)))
            right = pool.pop(int(draws[at + 1] * len(pool)))
            if left + right > LARGEST_VALUE and left < right:
                left, right = right, left  # now the difference, at least, is in range
            choices = _possible_steps(left, right)
            operator, result = choices[int(draws[at + 2] * len(choices))]
            pool.append(result)
            steps.append(f"{left} {operator} {right} = {result}")
        target = pool[0]
        if is_held_out(given, target) == held_out:
            answer = f"{' '.join(map(str, given))} -> {target}"
            return f"{answer} :", " ; ".join(steps), answer


def _possible_steps(left: int, right: int) -> list[tuple[str, int]]:
    results = (("+", left + right), ("-", left - right), ("*", left * right))
    return [(operator, value) for operator, value in results if 0 <= value <= LARGEST_VALUE]


def is_held_out(numbers: list[int], target: int) -> bool:
    """Whether a problem belongs to the test set: one in 16, by a checksum that ignores the numbers' order.

    A rule instead of a list, so that a generator of training problems needs no data set to stay clear of the
    test.
    """
    key = f"{sorted(numbers)} {target}"
    return zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0


def distinct_problems(count: int, *, seed: int, held_out: bool) -> list[tuple[str, str]]:
    """Draw `count` different problems as (prompt, gold answer); the arguments decide them, on every machine."""
    rng = np.random.default_rng(seed)
    problems: dict[str, str] = {}
    while len(problems) < count:
        prompt, _, answer = random_derivation(rng, held_out=held_out)
        problems[prompt] = answer
    return list(problems.items())


def write_tokenizer(directory: str | Path, *, longest: int = sum(lengths(NUMBERS)), more: Sequence[str] = ()) -> None:
    """Write the task's tokenizer as Hugging Face files: one token per word of `VOCABULARY`.

    Makes `directory` if needed; adds tokenizer.json, tokenizer_config.json and special_tokens_map.json to it.

    Args:
        longest: tokens of a prompt and a response together, at most.
        more: words of a task that is built on this one; their tokens follow.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    # No unknown-word token: a word outside the task is an error, not a silent substitute.
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate((*VOCABULARY, *more))}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, EOS])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
