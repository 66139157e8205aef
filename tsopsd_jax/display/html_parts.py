"""Parts of a page as HTML: escaped text, folded sections, tables."""

import html
import re
from collections.abc import Sequence
from typing import Any

from tsopsd_jax.display.foreign_text import CONTROLS, HALVES, TURNS


def escape(value: Any) -> str:
    text = re.sub(f"[{CONTROLS}{TURNS}{HALVES}]", "\ufffd", str(value).replace("\r\n", "\n"))
    return html.escape(text)


def shorten(text: str, limit: int) -> str:
    """Escape `text` and cut it to at most about `limit` characters: three quarters from its start,
    the rest from its end."""
    if len(text) <= limit:
        return escape(text)
    head, tail = text[: limit * 3 // 4], text[-limit // 4 :]
    left_out = len(text) - len(head) - len(tail)
    return f"{escape(head)}\n\n[&hellip; {left_out:,} characters left out &hellip;]\n\n{escape(tail)}"


def details(summary: str, body: str) -> str:
    return f'<details><summary>{summary}</summary><div class="body">{body}</div></details>'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], numeric: set[int]) -> str:
    """Make a table from cells that are HTML already; the columns in `numeric` stand to the right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        classes = ["n" if at in numeric else "name" if at == 0 else "" for at in range(len(cells))]
        inner = (
            f'<{tag} class="{name}">{cell}</{tag}>' if name else f"<{tag}>{cell}</{tag}>"
            for name, cell in zip(classes, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(row("td", cells) for cells in rows)
    head = row("th", titles)
    return f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'
