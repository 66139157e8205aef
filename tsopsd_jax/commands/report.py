"""`tsopsd report`: the page of a run directory, or of several runs side by side."""

import argparse
import base64
import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax.analysis.trajectories import read_trajectory
from tsopsd_jax.commands import exit_codes
from tsopsd_jax.commands.analyse import ANALYSES
from tsopsd_jax.commands.analyses.curves import groups_asked, over_steps
from tsopsd_jax.config import claim
from tsopsd_jax.display.comparison import (
    ComparedRun,
    accuracy_table,
    comparison_page,
    final_table,
)
from tsopsd_jax.display.figure_html import Section, figure_html
from tsopsd_jax.display.figures import figure_from_json
from tsopsd_jax.display.html_parts import details, escape, shorten
from tsopsd_jax.display.page import write_report
from tsopsd_jax.rundir import files, object_store
from tsopsd_jax.rundir.log import read_evaluations, read_metrics
from tsopsd_jax.writing import WriteError, is_full

MAX_JSON_CHARACTERS = 60_000
SEE = {
    "curves": "Does the entropy that reheating restored last, and does the reward go on rising from there?",
    "representations": "The diagonal compares layers of equal number: 1 is the same representation up to a rotation. "
    "Which layers moved at all?",
    "reasoning": "Does accuracy hold while entropy rises from checkpoint to checkpoint?",
    "distributions": "Is the change small at most tokens, and that of the entropy skewed to the right? Are the "
    "likeliest tokens still the same ones?",
    "forks": "Do stochastic rollouts leave the greedy one earlier from checkpoint to checkpoint, and are their tokens "
    "less likely?",
    "jump": "Does the entropy leave a smooth course at one step?",
    "temperatures": "Do teachers of all temperatures pull one way (cosines near 1), and how far from entropy ascent?",
    "reversal": "Cosine -1 and reverse projection 1: cooling went back the way that heating came.",
    "cost": "What share of the time does reheating take beside the RL that it serves?",
    "table": "Which policy is best on average, and does its lead grow or shrink with k?",
}
"""Analysis -> the question that its figure answers."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="of several runs one page, side by side")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run directory; of several runs ./report.html",
    )
    parser.add_argument(
        "--analyses",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="what tsopsd analyse --out DIR wrote, beside RUN_DIR/analyses; may be given again",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, and print where it is."""
    for folder in args.analyses:
        if not folder.is_dir():
            raise ValueError(f"--analyses: expected a directory that tsopsd analyse wrote, got {folder}")
    try:
        print(_write_one(args) if len(args.run_dirs) == 1 else _write_several(args))
    except WriteError as error:
        if is_full(error):
            raise
        raise ValueError(f"{error}, or name another file with --out") from error
    except OSError as error:
        place = args.out or (args.run_dirs[0] if len(args.run_dirs) == 1 else "report.html")
        raise ValueError(f"{place}: cannot write the page ({error.strerror}); name another file with --out") from error
    return exit_codes.DONE


def _write_one(args: argparse.Namespace) -> str:
    """The page of a run; its analyses, if there are any, are its last sections."""
    run_dir = args.run_dirs[0]
    with object_store.opened(run_dir) as folder:
        report = write_report(folder, args.out, sections=analysis_sections([folder / "analyses", *args.analyses]))
        if args.out is None:
            object_store.push(folder)
    return str(args.out or f"{run_dir}/{report.name}")


def _write_several(args: argparse.Namespace) -> str:
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(object_store.opened(run_dir)) for run_dir in args.run_dirs]
        logs = [ComparedRun(read_metrics(folder), read_evaluations(folder)) for folder in folders]
        names = _names(args.run_dirs)
        groups = same_but_seed([_settings(folder) for folder in folders], names)
        runs = [read_trajectory(name, log.lines) for name, log in zip(names, logs, strict=True)]
        _, figure = over_steps([str(folder) for folder in folders], runs, groups)
        mine = [folder / "analyses" for folder in folders]
        analyses = analysis_sections([*mine, *args.analyses])
    grouped = {name: [logs[at] for at in members] for name, members in groups.items()}
    ends = "Means of the last five steps that measured it; of evaluations the latest. Hours are those of the steps."
    spread = (
        " ± is the standard deviation over runs that differ in their seed alone." if len(groups) < len(runs) else ""
    )
    sections = [
        Section("Final values", ends + spread, final_table(grouped)),
        Section("Courses of the runs", SEE["curves"], figure_html(figure)),
    ]
    if accuracies := accuracy_table(grouped):
        says = "Evaluations between phases, in the layout of the paper's table 1, in %."
        sections.append(Section("Accuracies", says, accuracies))
    out = args.out or Path("report.html")
    page = comparison_page(" · ".join(groups), f"{len(runs)} runs: {', '.join(names)}", [*sections, *analyses])
    files.replace(out, [page.encode("utf-8", "replace")], alone=False)
    return str(out)


def _names(run_dirs: Sequence[str]) -> list[str]:
    """Names of the runs: of their directories, or of more of their paths where those are the same."""
    names = [run_dir.rstrip("/").rsplit("/", 1)[-1] for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [run_dir.rstrip("/") for run_dir in run_dirs]


def _settings(folder: Path) -> dict[str, Any] | None:
    """The configuration of a run without its seed; None if it has none."""
    found = claim.settings_of(folder)
    return None if found is None else {**found, "seed": None}


def same_but_seed(settings: Sequence[dict[str, Any] | None], names: Sequence[str]) -> dict[str, list[int]]:
    """Group runs whose settings differ in nothing but the seed: name of the group -> places of its runs.

    A group is called as the first of its runs, without the number of a seed at the end.
    """
    groups: list[list[int]] = []
    for at, mine in enumerate(settings):
        group = next((group for group in groups if mine is not None and settings[group[0]] == mine), None)
        if group is None:
            groups.append([at])
        else:
            group.append(at)
    if all(len(group) == 1 for group in groups):
        return groups_asked([], names)
    called = dict[str, list[int]]()
    for group in groups:
        first = names[group[0]]
        name = first if len(group) == 1 else re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", first) or f"{first} and others"
        called[name if name not in called else f"{name} ({group[0] + 1})"] = group
    return called


def analysis_sections(folders: Sequence[Path]) -> list[Section]:
    """A section for each NAME.json in the folders, in the order of `ANALYSES`."""
    sections = []
    for name, about in ANALYSES.items():
        for folder in folders:
            if (folder / f"{name}.json").is_file():
                where = f", {folder.parent.name}" if len(folders) > 2 and folder.name == "analyses" else ""
                says = f"{about[0].upper()}{about[1:]}. {SEE[name]}"
                sections.append(Section(name.capitalize() + where, says, _body(folder, name)))
    return sections


def _body(folder: Path, name: str) -> str:
    """The figure of an analysis, drawn again where its panels are there, else the picture; and folded its JSON."""
    found = (folder / f"{name}.json").read_text("utf-8", errors="replace")
    drawn, picture = folder / f"{name}.figure.json", folder / f"{name}.png"
    body = ""
    if drawn.is_file():
        try:
            body = figure_html(figure_from_json(json.loads(drawn.read_text("utf-8"))))
        except ValueError as error:
            raise ValueError(f"{drawn}: {error}") from error
    elif picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        body = f'<figure><img alt="{escape(ANALYSES[name])}" src="data:image/png;base64,{data}"></figure>'
    return body + details(f"{name}.json", f"<pre>{shorten(found, MAX_JSON_CHARACTERS)}</pre>")
