"""Responses on the page of a run: of its evaluations, and those kept while it trained. All text is escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

from tsopsd_jax.display.html_parts import details, escape, shorten
from tsopsd_jax.display.numbers import finite, fixed

MAX_STAGES = 12
MAX_EXAMPLE_BYTES = 400_000
MAX_SAMPLES = 24
"""Latest responses of samples.jsonl that are shown."""


def evaluated(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Some responses of the latest evaluation of each stage and benchmark, right ones and wrong ones."""
    latest = {(str(each.get("stage")), str(each.get("benchmark"))): each for each in evaluations}
    parts: list[str] = []
    room_bytes = MAX_EXAMPLE_BYTES
    for (stage, benchmark), record in list(latest.items())[:MAX_STAGES]:
        examples = record.get("examples")
        examples = [each for each in examples if isinstance(each, dict)] if isinstance(examples, list) else []
        right = [each for each in examples if each.get("correct")]
        wrong = [each for each in examples if not each.get("correct")]
        chosen = right[:3] + wrong[:3]
        if not chosen:
            continue
        parts.append(f'<h3>Responses: {escape(stage)} <span class="muted">{escape(benchmark)}</span></h3>')
        for example in chosen:
            part = _example(example)
            room_bytes -= len(part.encode("utf-8", "replace"))
            if room_bytes < 0:
                parts.append('<p class="muted">More responses are in evaluations.jsonl.</p>')
                return "\n".join(parts)
            parts.append(part)
    return "\n".join(parts)


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


def _example(example: Mapping[str, Any]) -> str:
    right = bool(example.get("correct"))
    mark = f'<span class="mark {"good" if right else "bad"}">{"✓ correct" if right else "✗ wrong"}</span>'
    return _response(example, mark)


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
