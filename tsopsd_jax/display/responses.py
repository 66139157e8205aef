"""Responses on the page of a run: of its evaluations, and those kept while it trained. All text is escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

from tsopsd_jax.display.html_parts import details, escape, shorten
from tsopsd_jax.display.numbers import finite, fixed

MAX_STAGES = 8
"""Stages of an evaluation that are shown side by side: of more the first, the last and some between."""
MAX_PROBLEMS = 6
SHORT_CHARACTERS = 160
"""Longer responses are folded."""
MAX_EXAMPLE_BYTES = 400_000
MAX_SAMPLES = 24
"""Latest responses of samples.jsonl that are shown."""


def compared(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Show all responses to some problems, a column for each stage: what they became, and how many are alike."""
    latest = {(str(each.get("stage")), str(each.get("benchmark"))): each for each in evaluations}
    problems: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for (stage, benchmark), record in latest.items():
        for example in _mappings(record.get("examples")):
            columns = problems.setdefault((benchmark, str(example.get("prompt", ""))), {})
            columns[f"{escape(stage)} <span>step {fixed(record.get('step'))}</span>"] = example
    parts, room_bytes = [], MAX_EXAMPLE_BYTES
    for (benchmark, prompt), columns in list(problems.items())[:MAX_PROBLEMS]:
        stages = _spread(list(columns), MAX_STAGES)
        cells = "".join(_column(stage, columns[stage]) for stage in stages)
        left_out = len(columns) - len(stages)
        note = f'<p class="muted">{left_out} stages between them are left out.</p>' if left_out else ""
        part = f'{_problem(benchmark, prompt, columns[stages[0]])}{note}<div class="stages">{cells}</div>'
        room_bytes -= len(part.encode("utf-8", "replace"))
        if room_bytes < 0:
            parts.append('<p class="muted">More responses are in evaluations.jsonl.</p>')
            break
        parts.append(part)
    return "\n".join(parts)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _spread(items: list[str], most: int) -> list[str]:
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _problem(benchmark: str, prompt: str, example: Mapping[str, Any]) -> str:
    """The head over a problem's responses."""
    answer = "" if example.get("answer") is None else f" &middot; answer {shorten(str(example['answer']), 200)}"
    title = f'<h3>Responses to one problem <span class="muted">{escape(benchmark)}{answer}</span></h3>'
    short = " ".join(prompt.split())
    if len(short) <= SHORT_CHARACTERS:
        return f"{title}<pre>{escape(prompt)}</pre>"
    return title + details(escape(short[:SHORT_CHARACTERS] + "…"), f"<pre>{shorten(prompt, 3000)}</pre>")


def _column(stage: str, example: Mapping[str, Any]) -> str:
    """The different responses of a stage (`stage` is HTML), each with how many are like it; older runs have one."""
    found = _mappings(example.get("responses")) or [example]
    counts = [max(1, round(finite(each.get("count")) or 1)) for each in found]
    total = sum(counts)
    right = sum(count for each, count in zip(found, counts, strict=True) if each.get("correct"))
    alike = "all alike" if len(found) == 1 and total > 1 else f"{len(found)} different"
    words = f"{right} of {total} right" + (f", {alike}" if total > 1 else "")
    shown = "".join(_one(each, count) for each, count in zip(found, counts, strict=True))
    return f'<div><p class="stage">{stage}</p><p class="muted">{words}</p>{shown}</div>'


def _one(response: Mapping[str, Any], count: int) -> str:
    right = bool(response.get("correct"))
    text = str(response.get("response", ""))
    times = f"{count} &times; " if count > 1 else ""
    mark = f'<span class="{"good" if right else "bad"}">{times}{"✓ correct" if right else "✗ wrong"}</span>'
    first = " ".join(text.split())
    if len(first) <= SHORT_CHARACTERS:
        return f'<div class="one">{mark}<pre>{escape(text)}</pre></div>'
    return details(f"{mark} {escape(first[:SHORT_CHARACTERS])}…", f"<pre>{shorten(text, 8000)}</pre>")


def kept(samples: Sequence[Mapping[str, Any]]) -> str:
    """The latest of the responses that a run kept, the newest step first."""
    if not samples:
        return '<p class="muted">This run has kept no responses.</p>'
    parts, room_bytes = [], MAX_EXAMPLE_BYTES
    for sample in sorted(samples[-MAX_SAMPLES:], key=lambda each: -(finite(each.get("step")) or 0)):
        which = str(sample.get("which", ""))
        words = f"step {sample.get('step')} {sample.get('phase')}: reward {fixed(sample.get('reward'), '.3g')}"
        mark = (
            f'<span class="mark {"good" if which == "best" else "bad"}">{escape(which)}</span>{escape(words)} &middot; '
        )
        part = _response(sample, mark)
        room_bytes -= len(part.encode("utf-8", "replace"))
        if room_bytes < 0:
            break
        parts.append(part)
    more = len(samples) - len(parts)
    return "\n".join(parts) + (f'<p class="muted">{more} more in samples.jsonl.</p>' if more else "")


def _response(example: Mapping[str, Any], mark: str) -> str:
    """A response, folded; `mark` is HTML."""
    prompt = str(example.get("prompt", ""))
    first = " ".join(prompt.split())
    summary = mark + escape(first[:110] + ("…" if len(first) > 110 else ""))
    parts = (
        ("Prompt", prompt, 3000),
        ("Response", example.get("response"), 8000),
        ("Answer", example.get("answer"), 500),
    )
    body = "".join(
        f'<p class="label">{name}</p><pre>{shorten(str(text), limit)}</pre>'
        for name, text, limit in parts
        if text is not None
    )
    return details(summary, body)
