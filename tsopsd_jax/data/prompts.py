"""Prompt templates: the text around a problem."""

import difflib

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


def render(template: str, problem: str) -> str:
    """Put `problem` into the template of that name; braces in `problem` are left alone.

    Raises:
        ValueError: if there is no template of that name.
    """
    if template not in TEMPLATES:
        nearest = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"prompt template: expected one of {', '.join(TEMPLATES)}, got {template!r}: did you mean {nearest!r}?"
        )
    # Not str.format: problems are full of LaTeX braces, and so are templates.
    return TEMPLATES[template].replace("{problem}", problem)


def bare(prompt: str) -> str:
    """Take the problem out of a prompt: the reverse of `render` where a template's wording stands around it, else all of it."""
    for text in TEMPLATES.values():
        before, after = text.split("{problem}")
        if before + after and prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)]
    return prompt
