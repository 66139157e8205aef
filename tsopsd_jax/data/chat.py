"""What a model directory's own chat template puts around the texts of a conversation."""

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax import huggingface
from tsopsd_jax.data.chat_worker import LONGEST_TURN
from tsopsd_jax.rewards.workers import CutOff, StartError, WorkerPool

_PROGRAM = Path(__file__).with_name("chat_worker.py")
_LIMIT_S = 10.0
"""Seconds in which a template must be rendered."""
CHATS = ("none", "direct", "thinking")
"""none: the bare text, for base models; direct, thinking: a user's turn, `enable_thinking` false or true."""
_TEXT = re.compile("\ue000([0-9]+)\ue001")
"""Stands for a text while a template is rendered: private characters that no template has."""


def read_frame(tokenizer: Any, folder: Path, roles: Sequence[str], *, thinking: bool) -> list[str]:
    """Render the chat template of a model directory by transformers, in its sandbox, for messages of these roles: in a
    process of its own, with limits of time and memory (`data.chat_worker`).

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
    what = f"chat template of {folder} for {', '.join(roles)}"
    with huggingface.reading(f"{what}: cannot be read"):
        template, named = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    options = {**named, "add_generation_prompt": roles[-1] == "user", "enable_thinking": thinking}
    rendered = _rendered(_without_clock(template), messages, options, what)
    if _TEXT.findall(rendered) != [str(at) for at in range(len(roles))]:
        raise ValueError(f"{what}: expected every message's text once in the rendered turn")
    return _TEXT.split(rendered)[::2]


def _rendered(template: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any], what: str) -> str:
    """Render a template in a worker: it is a program, which may loop for ever or ask for all memory."""
    if len(template) > LONGEST_TURN:
        raise ValueError(f"{what}: expected a template of at most {LONGEST_TURN:,} characters, got {len(template):,}")
    asked = {"template": template, "messages": messages, "options": dict(options)}
    try:
        reply = json.loads(_workers().ask(json.dumps(asked).encode()))
    except CutOff as error:
        raise ValueError(f"{what}: cannot be rendered (it {error})") from error
    except StartError as error:
        raise ValueError(f"{what}: cannot be rendered ({error})") from error
    if "failed" in reply:
        raise ValueError(f"{what}: cannot be rendered ({reply['failed']})")
    return reply["text"]


@functools.cache
def _workers() -> WorkerPool:
    """The processes that render templates; the first one is started when it is first asked."""
    return WorkerPool([sys.executable, "-P", str(_PROGRAM)], wall_s=_LIMIT_S, environment={"HF_HUB_OFFLINE": "1"})


def _without_clock(template: str) -> str:
    """A template that finds no clock, so that a prompt is the same every day;
    those that ask for one have a date for that."""
    return "{% set strftime_now = there_is_no_clock %}{{ '' }}" + template if "strftime_now" in template else template
