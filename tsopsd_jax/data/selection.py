"""Choice of the problems that a run learns from: not those it is evaluated on, not too long ones, perhaps a sample."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from tsopsd_jax.data.layouts import Problem
from tsopsd_jax.data.prompts import bare
from tsopsd_jax.data.sources import evaluation_split, load_problems

DIGESTS_ONLY = "amc_2023"
"""An evaluation set that the package knows by the fingerprints of its problems alone: it can be left out."""
_SAMPLE = 0x73616D70  # makes the draw of a sample another stream than the order of an epoch (see cursor.py)


def normalised(prompt: str) -> str:
    """Strip a problem's text of what differs between copies of one problem.

    Removed: a template's wording, white space, `$`, upper case, and braces around a single character.
    """
    text = re.sub(r"[\s$]+", "", bare(prompt)).casefold()
    return re.sub(r"\{(\w)\}", r"\1", text)


def problem_fingerprint(prompt: str) -> str:
    """Digest a problem's normalised text to 16 hexadecimal digits, equal for equal problems."""
    return hashlib.sha256(normalised(prompt).encode()).hexdigest()[:16]


def fingerprints(name: str, directory: str | Path) -> set[str]:
    """Fingerprint the problems of an evaluation set: a source's name, a path ending in .jsonl, or `amc_2023`.

    Raises:
        ValueError: as `load_problems` does.
    """
    if name == DIGESTS_ONLY:
        text = resources.files("tsopsd_jax").joinpath("assets", f"{DIGESTS_ONLY}.fingerprints").read_text("utf-8")
        return set(text.split())
    if name.endswith(".jsonl"):
        problems = load_problems("jsonl", path=name)
    else:
        problems = load_problems(name, split=evaluation_split(name), directory=directory)
    return {problem_fingerprint(problem.prompt) for problem in problems}


def without(problems: Sequence[Problem], excluded: Iterable[set[str]]) -> list[Problem]:
    """Leave out the problems that equal one of those whose fingerprints are given."""
    known = set().union(*excluded)
    return [problem for problem in problems if problem_fingerprint(problem.prompt) not in known]


def drawn(problems: Sequence[Problem], count: int, *, seed: int) -> list[Problem]:
    """Draw `count` of the problems without replacement, kept in their order; a seed always draws the same ones.

    Raises:
        ValueError: if there are fewer.
    """
    if count > len(problems):
        raise ValueError(f"sample: expected at most the {len(problems)} problems there are, got {count}")
    rng = np.random.default_rng([seed, 0, _SAMPLE])
    return [problems[at] for at in np.sort(rng.choice(len(problems), size=count, replace=False))]
