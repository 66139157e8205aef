"""Responses that a run keeps, made ready for programs that show them: shortened, as a table or as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

SAMPLE_COLUMNS = ("step", "phase", "which", "reward", "accuracy", "prompt", "response", "answer", "length_tokens")
"""What a table of samples shows of a record of samples.jsonl."""
CELL_CHARACTERS = 4_000
"""Characters of a text that trackers get; samples.jsonl holds more."""


def shortened(text: str, characters: int) -> str:
    """Keep of a longer text three quarters of so many characters from its beginning, the rest from its end."""
    if len(text) <= characters:
        return text
    head, tail = characters * 3 // 4, characters // 4
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"


def cell(value: Any) -> Any:
    """A value of a record as trackers take it: texts are shortened, and hold nothing that UTF-8 cannot."""
    return shortened(value, CELL_CHARACTERS).encode("utf-8", "replace").decode() if isinstance(value, str) else value


def sample_rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The cells of a table with `SAMPLE_COLUMNS`, a row for each record; None where a record lacks a value."""
    return [[cell(record.get(name)) for name in SAMPLE_COLUMNS] for record in records]


def samples_as_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """All records as one page. Texts stand in indented blocks, so that nothing in them acts as Markdown or HTML."""
    parts = []
    for record in records:
        facts = (f"{record.get('which')}: reward {record.get('reward')}", f"{record.get('length_tokens')} tokens")
        parts.append(f"**{', '.join(facts)}**")
        for name in ("prompt", "response", "answer"):
            lines = str(cell(record.get(name, ""))).splitlines() or [""]
            parts.append(f"{name}:\n\n" + "\n".join(f"    {line}" for line in lines))
    return "\n\n".join(parts)
