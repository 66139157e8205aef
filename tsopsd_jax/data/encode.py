"""Prompts as arrays of tokens: packed for a whole data set, right-padded for those that are sampled from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.distributed import processes

Prompt = tuple[str, tuple[tuple[str, str], ...]]
"""The user's text, and the (role, content) of the messages before it."""


AT_ONCE = 8192
"""Prompts that are tokenised before they are packed: as lists of integers they take ten times the memory."""


class PackedPrompts(NamedTuple):
    """The prompts of a data set one behind the other: padded, a million of them would take gigabytes."""

    tokens: np.ndarray
    """int32 [all tokens]."""
    starts: np.ndarray
    """int64 [N + 1]: prompt i is `tokens[starts[i] : starts[i + 1]]`."""
    max_prompt_tokens: int

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return len(self.starts) - 1

    def padded(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompts with these numbers [B]: right-padded tokens [B, max_prompt_tokens] and lengths [B]."""
        tokens = np.zeros((len(which), self.max_prompt_tokens), np.int32)
        lengths = (self.starts[which + 1] - self.starts[which]).astype(np.int32)
        for row, (at, length) in enumerate(zip(which, lengths, strict=True)):
            tokens[row, :length] = self.tokens[self.starts[at] :][:length]
        return tokens, lengths


def pack_prompts(problems: Sequence[Problem], tokenizer: Tokenizer, *, max_prompt_tokens: int) -> PackedPrompts:
    """Tokenise the prompts of a data set; each process takes its share.

    Raises:
        ValueError: for a prompt that is empty or longer than the limit, naming it.
    """
    pieces, starts = [np.empty(0, np.int32)], np.zeros(len(problems) + 1, np.int64)
    for first in range(0, len(problems), AT_ONCE):
        part = problems[first : first + AT_ONCE]
        ids = processes.divided(lambda i, part=part: tokenizer.encode(part[i].prompt, part[i].before), len(part))
        for problem, prompt in zip(part, ids, strict=True):
            _check_length(problem.id, len(prompt), max_prompt_tokens)
        starts[first + 1 : first + 1 + len(part)] = [len(prompt) for prompt in ids]
        pieces.append(np.fromiter((token for prompt in ids for token in prompt), np.int32))
    return PackedPrompts(np.concatenate(pieces), np.cumsum(starts), max_prompt_tokens)


def encode_prompts(problems: Sequence[Problem], tokenizer: Tokenizer, *, max_prompt_tokens: int):
    """Tokenise prompts: right-padded tokens [N, max_prompt_tokens] and lengths [N]; each process takes its share.

    Raises:
        ValueError: for a prompt that is empty or longer than the limit, naming it.
    """
    packed = pack_prompts(problems, tokenizer, max_prompt_tokens=max_prompt_tokens)
    return packed.padded(np.arange(packed.count))


def encode_to_fit(
    names: Sequence[str], prompts: Sequence[Prompt], tokenizer: Tokenizer, *, max_tokens: int, positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise prompts that leave room for `max_tokens` in a model of `positions`: tokens [N, longest] and lengths [N].

    Args:
        names: of the prompts, for errors.
        prompts: the user's text, and the messages before it.
        tokenizer: of the model.
        max_tokens: room that a response needs.
        positions: of the model.

    Raises:
        ValueError: the longest does not, or one is empty.
    """
    ids = [tokenizer.encode(*prompt) for prompt in prompts]
    longest = max(len(i) for i in ids)
    if longest + max_tokens > positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with max_tokens {max_tokens} that is more than the model's "
            f"{positions} positions; lower --max-tokens"
        )
    return pad_prompts(names, ids, max_prompt_tokens=longest)


def pad_prompts(names: Sequence[str], ids: Sequence[Sequence[int]], *, max_prompt_tokens: int):
    """Right-pad prompts that are tokens already: tokens [N, max_prompt_tokens] and lengths [N].

    Raises:
        ValueError: for a prompt that is empty or longer than the limit, naming it.
    """
    tokens = np.zeros((len(ids), max_prompt_tokens), np.int32)
    lengths = np.zeros(len(ids), np.int32)
    for row, (name, prompt) in enumerate(zip(names, ids, strict=True)):
        _check_length(name, len(prompt), max_prompt_tokens)
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths


def _check_length(name: str, length_tokens: int, most: int) -> None:
    if not length_tokens:
        raise ValueError(f"prompt {name!r}: expected a text, got no token; remove the row, or see data.template")
    if length_tokens > most:
        raise ValueError(
            f"prompt {name!r} has {length_tokens} tokens, expected 1 to {most}; raise max_prompt_tokens of its data "
            "section, or leave long training problems out with data.drop_longer: true"
        )
