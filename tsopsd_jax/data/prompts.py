"""Prompt templates: the text around a problem."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tsopsd_jax.loading import is_own, load_function

TEMPLATES: dict[str, str] = {
    "plain": "{problem}",
    # The wording that every row of DAPO-Math-17k carries (arXiv 2503.14476).
    "dapo_answer": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # The wording that Qwen's model cards recommend for mathematics.
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
"""Name -> text in which the one `{problem}` is replaced; other braces stand for themselves."""
PLACE = "{problem}"

Template = Callable[[str, Mapping[str, Any]], str]
"""(problem, the data row's other columns) -> prompt"""


def make_template(template: str) -> Template:
    """Make a template: a name in TEMPLATES, a text with one `{problem}`,
    or `path/to/file.py:function` for one of your own.

    The function takes (problem) or (problem, row) and returns the prompt.

    Raises:
        ValueError: no such template, file or function, or a text in which `{problem}` stands more than once.
    """
    check_template(template)
    if PLACE not in template and is_own(template):
        return _own_template(template)
    before, after = TEMPLATES.get(template, template).split(PLACE)
    # Not str.format: problems are full of LaTeX braces, and so are templates.
    return lambda problem, _row: before + problem + after


def render(template: str, problem: str) -> str:
    """Put `problem` into a template (see `make_template`); braces in `problem` are left alone."""
    return make_template(template)(problem, {})


def check_template(template: str) -> None:
    """Check a template without a look at files.

    Raises:
        ValueError: it is no name, no path of a function, and no text with one `{problem}`.
    """
    if (times := template.count(PLACE)) > 1:
        raise ValueError(
            f"prompt template: expected {PLACE} once in the text, got it {times} times in {template[:80]!r}"
        )
    if not times and not is_own(template) and template not in TEMPLATES:
        nearest = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"prompt template: expected one of {', '.join(TEMPLATES)}, a text with {PLACE}, or "
            f"path/to/file.py:function, got {template[:80]!r}: did you mean {nearest!r}?"
        )


def _own_template(name: str) -> Template:
    """The function of a file; what it raises or returns is told with the problem."""
    function = load_function(name, what="template")
    signature = inspect.signature(function)
    with_row = "row" in signature.parameters
    try:
        signature.bind("", **({"row": {}} if with_row else {}))
    except TypeError as error:
        raise ValueError(
            f"template {name}: expected a function of (problem) or (problem, row), got {signature}"
        ) from error

    def render(problem: str, row: Mapping[str, Any]) -> str:
        try:
            prompt = function(problem, row=row) if with_row else function(problem)
        except Exception as error:
            raise ValueError(
                f"template {name}: raised {type(error).__name__}: {error} for the problem {problem[:80]!r}"
            ) from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"template {name}: expected a text for the problem {problem[:80]!r}, got {prompt!r:.80}")
        return prompt

    return render


def bare(prompt: str) -> str:
    """Take the problem out of a prompt: the reverse of `render` where a template's wording stands around it,
    else all of it."""
    for text in TEMPLATES.values():
        before, after = text.split("{problem}")
        if before + after and prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)]
    return prompt
