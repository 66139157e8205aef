"""Sources of problems by name, each a sequence of problems with random access."""

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tsopsd_jax.data import arithmetic, countdown
from tsopsd_jax.data.layouts import (
    LAYOUTS,
    Layout,
    Problem,
    Tally,
    fields,
    numbered_rows,
    prepared_folder,
    read_problems,
)
from tsopsd_jax.data.prompts import make_template


class Source(NamedTuple):
    """A way to get problems: its splits (the first is the default; `a+b` is both), and its own prompt template."""

    splits: tuple[str, ...]
    template: str = "plain"
    needs_path: bool = False
    takes_path: bool = True
    takes_template: bool = True
    """Whether a prompt template may be put around its problems; False where they carry their instructions."""


SOURCES: dict[str, Source] = {
    "arithmetic": Source(("train", "test"), takes_path=False),
    "countdown": Source(("train", "test"), takes_path=False, takes_template=False),
    "dapo_math_17k": Source(("train",), template="dapo_answer"),
    "math_500": Source(("test",)),
    "aime_2024": Source(("test",)),
    "aime_2025": Source(("test",)),
    "aime_2026": Source(("test",)),
    "olymmath_en": Source(("easy+hard", "easy", "hard")),
    "gsm8k": Source(("train", "test")),
    "gpqa": Source(("main",)),
    "jsonl": Source(("all",), needs_path=True),
}


def load_problems(
    name: str,
    *,
    split: str | None = None,
    path: str | Path | None = None,
    directory: str | Path | None = None,
    first: int | None = None,
    template: str | None = None,
    problem_field: str = "problem",
    answer_field: str = "answer",
) -> Sequence[Problem]:
    """Load the problems of the source called `name` (a key of `SOURCES`), in the source's own order.

    Args:
        name: a published data set, prepared before (`tsopsd data prepare NAME`) or read from `path`;
            `countdown`, made under `directory` on first use; or `jsonl`, a user's file of objects.
        split: one of the source's splits; None for its first.
        path: the published file or a folder that holds it (see `layouts.LAYOUTS`); for `jsonl` the file.
        directory: where prepared data sets are.
        first: at most this many problems; the rest is not read. None for all.
        template: what is put around every problem (`prompts.make_template`): a name, a text with `{problem}`, or
            `path/to/file.py:function`; None for the source's own: `dapo_answer` for `dapo_math_17k`,
            `plain` for the others.
        problem_field: name of the problem's text in a row of `jsonl`.
        answer_field: name of the answer in a row of `jsonl`.

    Raises:
        ValueError: for an unknown name, split or template, a missing or unreadable file, a data set that is not
            prepared or has no rows, and malformed rows (how many, and which): no row is ever dropped silently.
    """
    source = known_source(name)
    split = source.splits[0] if split is None else split
    template = source.template if template is None else template
    if split not in source.splits:
        raise ValueError(f"data source {name}: expected a split of {', '.join(source.splits)}, got {split!r}")
    if first is not None and first < 1:
        raise ValueError(f"data source {name}: expected first >= 1 problems, got {first}: leave it out for all")
    if path is not None and not source.takes_path:
        raise ValueError(f"data source {name}: expected no path, got {path}: its rows are generated, leave it out")
    if not source.takes_template and template != "plain":
        raise ValueError(
            f"data source {name}: expected template 'plain', got {template!r}: "
            "its prompts carry their instructions already"
        )
    if name != "jsonl" and (problem_field, answer_field) != ("problem", "answer"):
        raise ValueError(f"data source {name}: its fields have fixed names; leave problem_field and answer_field out")
    render = make_template(template)  # before anything is read
    if path is not None or source.needs_path:
        layout = LAYOUTS.get(name) or Layout({"all": ()}, fields((problem_field,), (answer_field,), own=True))
        problems = _read_path(name, layout, path, split=split, first=first)
    else:
        problems = _read_prepared(name, directory, split=split, first=first)
    if not problems:
        raise ValueError(f"data source {name}: expected at least one row, got none in {path or directory}")
    rendered = [problem._replace(prompt=render(problem.prompt, problem.row)) for problem in problems]
    if rendered[0].prompt != render(problems[0].prompt, problems[0].row):
        raise ValueError(f"prompt template {template}: expected the same text for the same problem, got two")
    return rendered


def known_source(name: str) -> Source:
    """Look up a source in `SOURCES`.

    Raises:
        ValueError: with the nearest name, if there is none.
    """
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.0)[0]
        raise ValueError(f"data source: expected one of {', '.join(SOURCES)}, got {name!r}: did you mean {nearest!r}?")
    return SOURCES[name]


def evaluation_split(name: str) -> str | None:
    """Choose the split to evaluate on: `test` where it exists, else None, the source's first."""
    return "test" if "test" in known_source(name).splits else None


def find_files(name: str, layout: Layout, path: str | Path | None) -> dict[str, list[Path]]:
    """Find the files of each split: `path` itself, or those in the folder `path`; splits without files are left out.

    Raises:
        ValueError: if there is nothing at `path`, no file of the layout in it, or files of a split in several folders:
            they may be of several data sets.
    """
    if path is None:
        raise ValueError(f"data source {name}: expected the path of a file, got none: set the path")
    path = Path(path)
    if path.is_file():
        named = [split for split, patterns in layout.splits.items() if any(map(path.match, patterns))]
        if len(layout.splits) == 1 or named:
            return {(named or list(layout.splits))[0]: [path]}
    elif not path.is_dir():
        raise ValueError(f"data source {name}: expected a file at {path}, found none: download it or correct the path")
    found = {}
    for split, patterns in layout.splits.items():
        matches = (sorted(path.rglob(pattern)) for pattern in patterns)
        if files := next(filter(None, matches), None):
            folders = sorted({str(file.parent) for file in files})
            if len(folders) > 1:
                raise ValueError(
                    f"data source {name}: expected the files of {split} in one folder, got {len(files)} in "
                    f"{len(folders)}: {', '.join(folders[:4])}{', ...' if len(folders) > 4 else ''}; name one of them"
                )
            found[split] = files
    if not found:
        expected = ", ".join(pattern for patterns in layout.splits.values() for pattern in patterns) or "a file"
        raise ValueError(f"data source {name}: expected {expected} at {path}, found none: correct the path")
    return found


def _read_path(name: str, layout: Layout, path: str | Path | None, *, split: str, first: int | None) -> list[Problem]:
    files = find_files(name, layout, path)
    problems: list[Problem] = []
    for part in split.split("+"):
        if part not in files:
            raise ValueError(f"data source {name}: expected files of the split {part} at {path}, found none")
        tally = Tally(f"data source {name}: {path}", (layout.sizes or {}).get(part))
        prefix = files[part][0].stem if name == "jsonl" else f"{name}-{part}"
        rows = read_problems(layout, numbered_rows(files[part], layout.columns), prefix, tally)
        problems += itertools.islice(rows, None if first is None else first - len(problems))
        tally.check()
    return problems


def _read_prepared(name: str, directory: str | Path | None, *, split: str, first: int | None) -> list[Problem]:
    if directory is None:
        raise ValueError(f"data source {name}: expected a directory of prepared data sets or a path, got none: set one")
    from tsopsd_jax.data import builders

    if not prepared_folder(name, directory).exists():
        if name not in GENERATED:
            raise ValueError(
                f"data set {name} is not prepared in {directory}: run `tsopsd data prepare {name}` "
                "(with --from PATH for files that you have), or set the path of its file"
            )
        builders.build_dataset(name, GENERATED[name](), directory)
    return builders.read_dataset(name, directory, split=split, first=first)


def countdown_splits() -> dict[str, list[Problem]]:
    """Make the countdown-steps problems: 20,000 training and 1,024 test problems, disjoint, from fixed seeds."""
    splits = {}
    for split, count, seed, held_out in (("train", 20_000, 17, False), ("test", 1_024, 18, True)):
        rows = countdown.distinct_problems(count, seed=seed, held_out=held_out)
        splits[split] = [Problem(f"countdown-{split}-{at}", *row) for at, row in enumerate(rows)]
    return splits


def arithmetic_splits() -> dict[str, list[Problem]]:
    """Make the problems of arithmetic in words: 512 training and 128 test problems without a common calculation."""
    return {split: [Problem(*row) for row in arithmetic.rows(split)] for split in arithmetic.SPLITS}


GENERATED = {"arithmetic": arithmetic_splits, "countdown": countdown_splits}
"""Sources that are made, not read: name -> their splits."""
