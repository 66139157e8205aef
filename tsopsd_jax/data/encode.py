"""Prompts as right-padded arrays of tokens."""

from collections.abc import Sequence

import numpy as np

from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.distributed import processes

Prompt = tuple[str, tuple[tuple[str, str], ...]]
"""The user's text, and the (role, content) of the messages before it."""


def encode_prompts(problems: Sequence[Problem], tokenizer: Tokenizer, *, max_prompt_tokens: int):
    """Tokenise prompts: right-padded tokens [N, max_prompt_tokens] and lengths [N]; each process takes its share.

    Raises:
        ValueError: for a prompt that is empty or longer than the limit, naming it.
    """
    ids = processes.divided(lambda i: tokenizer.encode(problems[i].prompt, problems[i].before), len(problems))
    return pad_prompts([problem.id for problem in problems], ids, max_prompt_tokens=max_prompt_tokens)


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
        if not len(prompt):
            raise ValueError(f"prompt {name!r}: expected a text, got no token; remove the row, or see data.template")
        if len(prompt) > max_prompt_tokens:
            raise ValueError(
                f"prompt {name!r} has {len(prompt)} tokens, expected 1 to {max_prompt_tokens}; raise "
                "max_prompt_tokens of its data section, or leave long training problems out with data.drop_longer: true"
            )
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths
