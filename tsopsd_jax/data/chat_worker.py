"""Chat templates rendered by transformers, in its sandbox, in a process that has little time and memory for it.

`python -P chat_worker.py`, started by `chat.py`. A template is a program that came with a model: the sandbox keeps it
from files and from Python, but not from a loop of a billion rounds or a text of 100 GB. It writes a line `ready`, then
for each JSON line {template, messages, options} on stdin a JSON line: {"text": ...} or {"failed": ...}. It ends with
its input. It knows neither JAX nor this package.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

ROOM_BYTES = 512 << 20
"""Memory that rendering may take."""
LONGEST_TURN = 1_000_000
"""Characters of a template, and of a rendered turn: it stands in every prompt."""


def limit_memory(room_bytes: int) -> None:
    """Let this process have so much memory beyond what it has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux: time is limited all the same
        return
    limit = pages * resource.getpagesize() + room_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def rendered(render: Any, asked: dict[str, Any]) -> dict[str, str]:
    """Render what a line asks for; whatever a template raises is its directory's fault."""
    try:
        [text], _ = render([asked["messages"]], chat_template=asked["template"], **asked["options"])
        if len(text) > LONGEST_TURN:
            raise ValueError(f"it makes {len(text):,} characters, expected at most {LONGEST_TURN:,}")
        return {"text": text}
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def serve_templates() -> None:
    """Serve until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] - not installed, as far as transformers is concerned
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(ROOM_BYTES)
    replies.write("ready\n")
    for line in sys.stdin.buffer:
        replies.write(json.dumps(rendered(render_jinja_template, json.loads(line))) + "\n")


if __name__ == "__main__":
    serve_templates()
