"""Problems on which policies are evaluated: a data set by name, a file of JSON lines, or a run's own."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tsopsd_jax.commands.asking import verifier_label
from tsopsd_jax.config import Config, DataSettings
from tsopsd_jax.config.build import evaluation_plan
from tsopsd_jax.data import Problem, Tokenizer, evaluation_split, load_problems
from tsopsd_jax.rewards import Rewards, make_checked_rewards
from tsopsd_jax.rewards.named import named_functions

NAME = re.compile(r"\w[\w.+=@-]*")
"""Names of models and benchmarks, which name files and columns."""


class Benchmark(NamedTuple):
    """Problems with their prompts rendered, and how responses are scored."""

    name: str
    problems: Sequence[Problem]
    template: str
    verifier: str
    """Its name; of a function of one's own with the digest of its file."""
    rewards: Rewards


def load_benchmark(
    asked: str,
    *,
    directory: Path,
    first: int | None,
    template: str | None,
    verifier: str | None,
    fields: tuple[str | None, str | None],
    own: DataSettings | None = None,
) -> Benchmark:
    """A benchmark by the name of a data source, `name:split`, or a file of JSON lines.

    Args:
        asked: without a split: `test` where the source has one, else its first.
        directory: where prepared data sets lie.
        first: the first N problems only; None: all.
        template: see `load_problems`; None: `own`'s, else `dapo_answer` for the verifier of mathematics, which looks
            for an answer marked so; else `plain`.
        verifier: of the library, or `path/to/file.py:function`; None: countdown's for countdown, `own`'s accuracy,
            else that of mathematics.
        fields: names of the problem and the answer in the file's objects; None: `own`'s, else problem and answer.
        own: the data section of the run that is evaluated, with its system prompt; None: a model's.

    Raises:
        ValueError: see `load_problems`; a name that cannot name a file; a function of one's own that breaks its
            contract.
    """
    source, path, split = asked, None, None
    name = asked.replace(":", "-")
    if asked.endswith(".jsonl"):
        source, path, name = "jsonl", Path(asked), Path(asked).stem
    elif ":" in asked:
        source, split = asked.split(":", 1)
    else:
        split = evaluation_split(asked)
    if verifier is None:
        verifier = "countdown" if source == "countdown" else "math" if own is None else _accuracy_of(own)
    if template is None:
        template = own.template if own is not None and source != "countdown" else None
        template = template or ("dapo_answer" if verifier == "math" else "plain")
    keys = {}
    if path is not None:
        known = (own.problem_field, own.answer_field) if own is not None else ("problem", "answer")
        keys = dict(zip(("problem_field", "answer_field"), map(_given, fields, known), strict=True))
    problems = load_problems(
        source, split=split, path=path, directory=directory, first=first, template=template, **keys
    )
    if own is not None and own.system_prompt is not None:
        problems = [problem.with_system(own.system_prompt) for problem in problems]
    check_table_name("benchmark", name)
    rewards = make_checked_rewards(verifier, answer=problems[0].answer, row=problems[0].row)
    return Benchmark(name, problems, template, verifier_label(verifier), rewards)


def _given(asked: str | None, otherwise: str) -> str:
    return otherwise if asked is None else asked


def _accuracy_of(data: DataSettings) -> str:
    """The verifier of a data section at which evaluations look; the first, where one function returns several
    rewards."""
    named = named_functions(data.verifier)
    return named.get(data.accuracy or "") or next(iter(named.values()))


def own_benchmark(config: Config, tokenizer: Tokenizer, *, first: int | None) -> Benchmark:
    """The problems that a run evaluates itself on, scored as it scores them.

    Raises:
        ValueError: it evaluates itself on none, or see `config.build.evaluation_plan`.
    """
    plan, data = evaluation_plan(config, tokenizer), config.evaluation.data
    if plan is None or data is None:
        raise ValueError("--benchmarks: expected names or files, got none, and the run has no evaluation.data")
    name = Path(data.path).stem if data.path is not None else "-".join(filter(None, (data.name, data.split)))
    check_table_name("benchmark", name)
    template = data.template or "the data set's own"
    return Benchmark(name, plan.problems[:first], template, verifier_label(data.verifier), plan.rewards)


def check_table_name(what: str, name: str) -> None:
    """Check that a name can name a file and a column.

    Raises:
        ValueError: naming `what` it is of.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{what}: expected a name of letters, digits and . _ + = @ -, got {name!r}")
