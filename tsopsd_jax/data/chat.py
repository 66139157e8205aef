"""What a model directory's own chat template puts around the texts of a conversation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax import huggingface

CHATS = ("none", "direct", "thinking")
"""none: the bare text, for base models; direct, thinking: a user's turn, `enable_thinking` false or true."""
_TEXT = re.compile("\ue000([0-9]+)\ue001")
"""Stands for a text while a template is rendered: private characters that no template has."""


def read_frame(tokenizer: Any, folder: Path, roles: Sequence[str], *, thinking: bool) -> list[str]:
    """Render the chat template of a model directory by transformers, in its sandbox, for messages of these roles.

    The template is run on placeholders: no problem's text is ever part of it.

    Args:
        tokenizer: transformers' own, of that directory.
        roles: the last is `user`: the assistant is to begin; or `assistant`: its message is ended.

    Returns:
        What stands before, between and after the messages' texts: one more than there are messages.

    Raises:
        ValueError: if there is no template, it cannot be rendered,
            or it does not show the messages' texts once and in order.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"chat template: expected chat_template.jinja in {folder} or chat_template in its tokenizer_config.json, "
            f"got none: use an instruct model's directory, or data.chat: none"
        )
    messages = [{"role": role, "content": f"\ue000{at}\ue001"} for at, role in enumerate(roles)]
    # A template is a program: whatever it may raise is the directory's fault.
    with huggingface.reading(f"chat template of {folder} for {', '.join(roles)}: cannot be rendered"):
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=_without_clock(tokenizer.get_chat_template()),
            add_generation_prompt=roles[-1] == "user",
            enable_thinking=thinking,
            tokenize=False,
        )
    if _TEXT.findall(rendered) != [str(at) for at in range(len(roles))]:
        raise ValueError(
            f"chat template of {folder} for {', '.join(roles)}: expected every message's text once in the rendered turn"
        )
    return _TEXT.split(rendered)[::2]


def _without_clock(template: str) -> str:
    """A template that finds no clock, so that a prompt is the same every day;
    those that ask for one have a date for that."""
    return "{% set strftime_now = there_is_no_clock %}{{ '' }}" + template if "strftime_now" in template else template
