"""The chat turn that a model directory's own template puts around a user's text."""

from pathlib import Path
from typing import Any, NamedTuple

from tsopsd_jax import huggingface

CHATS = ("none", "direct", "thinking")
"""none: the bare text, for base models; direct, thinking: a user's turn, `enable_thinking` false or true."""
_TEXT = "\ue000"
"""Stands for a text while a template is rendered: a private character that no template has."""


class Turn(NamedTuple):
    """What stands around a user's text up to where the assistant begins, and what ends the assistant's turn."""

    before: str
    after: str
    end: str


def read_turn(tokenizer: Any, folder: Path, *, thinking: bool) -> Turn:
    """Render the chat template of a model directory by transformers, in its sandbox.

    The template is run on a placeholder, once: no problem's text is ever part of it.

    Args:
        tokenizer: transformers' own, of that directory.

    Raises:
        ValueError: if there is no template, it cannot be rendered, or it does not show the user's text once.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"chat template: expected chat_template.jinja in {folder} or chat_template in its tokenizer_config.json, got none: "
            "use an instruct model's directory, or data.chat: none"
        )
    user, assistant = {"role": "user", "content": _TEXT}, {"role": "assistant", "content": _TEXT}

    def render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[str]:
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=_without_clock(tokenizer.get_chat_template()),
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
            tokenize=False,
        )
        return rendered.split(_TEXT)

    # A template is a program: whatever it may raise is the directory's fault.
    with huggingface.reading(f"chat template of {folder}: cannot be rendered"):
        prompt = render([user], add_generation_prompt=True)
        whole = render([user, assistant], add_generation_prompt=False)
    if len(prompt) != 2 or len(whole) != 3:
        raise ValueError(f"chat template of {folder}: expected every message's text once in the rendered turn")
    return Turn(prompt[0], prompt[1], whole[2])


def _without_clock(template: str) -> str:
    """A template that finds no clock, so that a prompt is the same every day; those that ask for one have a date for that."""
    return "{% set strftime_now = there_is_no_clock %}{{ '' }}" + template if "strftime_now" in template else template
