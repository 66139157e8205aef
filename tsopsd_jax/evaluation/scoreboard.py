"""Tables of a directory of evaluations, OUT/BENCHMARK/MODEL.jsonl, in the layout of the paper's table 1;
comparisons."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.evaluation.evaluate import PairedDifference, Response, paired_bootstrap, pass_per_problem, summarise
from tsopsd_jax.rundir import files, resumable_jsonl


class Evaluated(NamedTuple):
    """A model's responses to a benchmark, those of a problem side by side, problems in order of their ids."""

    model: str
    benchmark: str
    settings: dict[str, Any]
    responses: list[Response]

    @property
    def missing(self) -> int:
        return self.settings["problems"] * self.settings["samples"] - len(self.responses)

    def passes(self, k: int | None) -> int:
        """Return the k of pass@k: as asked for, at most the samples of a problem."""
        return min(k or self.settings["samples"], self.settings["samples"])

    def summary(self, k: int | None) -> dict[str, Any]:
        """Summarise the responses, with the keys of `evaluation.evaluate.summarise`."""
        numbers = summarise(self.responses, samples=self.settings["samples"], k=self.passes(k))
        return {"model": self.model, "benchmark": self.benchmark, **numbers}

    def per_problem(self, k: int | None) -> np.ndarray:
        """Return avg@n and pass@k of each problem, [problems, 2]."""
        correct = np.asarray([r.correct for r in self.responses], np.float64).reshape(-1, self.settings["samples"])
        return np.stack([correct.mean(axis=1), pass_per_problem(correct, self.passes(k))], axis=1)


def read_out(out: Path) -> list[Evaluated]:
    """Read all evaluations in `out`, finished or not, in the order in which they were begun."""
    found = []
    for file in out.glob("*/*.jsonl"):
        # A response that two processes sampled is one response.
        keys = ("id", "sample", "tokens", "stopped", "correct", "entropy_nats")
        rows = {(line["id"], line["sample"]): line for line in resumable_jsonl.lines(file, *keys)}
        responses = [
            Response(
                at,
                "",
                row["tokens"],
                row["stopped"],
                row["correct"],
                row["entropy_nats"],
                failures=row.get("failed", ()),
            )
            for at, (_, row) in enumerate(sorted(rows.items()))
        ]
        settings = resumable_jsonl.read_output_settings(file, "problems", "samples", resumable_jsonl.BEGUN)
        found.append(Evaluated(file.stem, file.parent.name, settings, responses))
    return sorted(found, key=lambda e: (e.settings[resumable_jsonl.BEGUN], e.benchmark))


class Table(NamedTuple):
    """Titles of columns, and rows of a model's name and its numbers in percent (None: not evaluated)."""

    titles: list[str]
    rows: list[tuple[str, list[tuple[float, float] | None]]]


def make_table(finished: Sequence[Evaluated], k: int | None) -> Table:
    """Make the table of models (rows) and benchmarks (columns), cells (avg@n, pass@k);
    last the average of a model that has all."""
    benchmarks = {e.benchmark: f"{e.benchmark} avg@{e.settings['samples']}/pass@{e.passes(k)}" for e in finished}
    cells = {(e.model, e.benchmark): 100 * e.per_problem(k).mean(axis=0) for e in finished}
    rows = []
    for model in dict.fromkeys(e.model for e in finished):
        row = [cells.get((model, benchmark)) for benchmark in benchmarks]
        there = [cell for cell in row if cell is not None]
        row.append(np.mean(there, axis=0) if len(there) == len(benchmarks) else None)
        rows.append((model, [None if cell is None else (float(cell[0]), float(cell[1])) for cell in row]))
    return Table([*benchmarks.values(), "average avg/pass"], rows)


def markdown(table: Table, evaluated: Sequence[Evaluated], k: int | None) -> str:
    """Write the table, then the other measurements, then the evaluations that are not finished."""
    rows = [
        [model, *("–" if cell is None else f"{cell[0]:.2f}/{cell[1]:.2f}" for cell in cells)]
        for model, cells in table.rows
    ]
    text = _grid(["model", *table.titles], rows) + "\n"
    details = []
    for e in evaluated:
        if e.missing:
            continue
        s = e.summary(k)
        error = "" if s["avg_at_k_stderr"] is None else f" ± {100 * s['avg_at_k_stderr']:.2f}"
        details.append(
            [
                e.model,
                e.benchmark,
                str(s["problems"]),
                f"{100 * s['avg_at_k']:.2f}{error}",
                f"{100 * s['pass_at_k']:.2f}",
                f"{100 * s['truncated_fraction']:.2f}",
                f"{s['length_mean_tokens']:.1f}",
                f"{s['entropy_nats']:.4f}",
            ]
        )
    titles = ["model", "benchmark", "problems", "avg, % ± s.e.", "pass, %", "cut, %", "tokens", "entropy, nats"]
    text += _grid(titles, details)
    for e in evaluated:
        if e.missing:
            text += f"\nNot finished: {e.model} on {e.benchmark}, {e.missing} responses missing.\n"
    return text


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def as_csv(table: Table) -> str:
    """Write a table as CSV, each number in a column of its own, in percent."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    names = [title.rsplit(" ", 1) for title in table.titles]
    write(["model", *(f"{name} {part}" for name, parts in names for part in parts.split("/"))])
    for model, cells in table.rows:
        pairs = [("", "") if cell is None else tuple(f"{value:.4f}" for value in cell) for cell in cells]
        write([model, *(value for pair in pairs for value in pair)])
    return text.getvalue()


def write_tables(out: Path, *, k: int | None) -> str:
    """Write table.md, table.csv and results.jsonl (a line per model and benchmark) of finished evaluations;
    returns table.md.

    Raises:
        ValueError: none is finished.
    """
    evaluated = read_out(out)
    finished = [e for e in evaluated if not e.missing]
    if not finished:
        raise ValueError(f"{out}: expected finished evaluations, got none; name a --model or --run and --benchmarks")
    table = make_table(finished, k)
    text = markdown(table, evaluated, k)
    summaries = "".join(json.dumps(e.summary(k)) + "\n" for e in finished)
    for name, content in (("table.md", text), ("table.csv", as_csv(table)), ("results.jsonl", summaries)):
        files.replace(out / name, [content.encode()], alone=False)
    return text


def compare(out: Path, first: str, second: str, *, k: int | None, seed: int) -> str:
    """Compare two models on each benchmark that both have finished: second less first, in points, with 95 % intervals
    of the paired bootstrap.

    Raises:
        ValueError: a model that is not there, or no benchmark in common.
    """
    finished = [e for e in read_out(out) if not e.missing]
    names = list(dict.fromkeys(e.model for e in finished))
    for name in (first, second):
        if name not in names:
            raise ValueError(f"--compare: expected two of {', '.join(names) or 'no models'}, got {name!r}")
    have = {(e.model, e.benchmark): e for e in finished}
    common = [e.benchmark for e in finished if e.model == first and (second, e.benchmark) in have]
    if not common:
        raise ValueError(f"--compare: {first} and {second} have finished no benchmark in common in {out}")
    differences = [have[second, b].per_problem(k) - have[first, b].per_problem(k) for b in common]
    columns = [paired_bootstrap([d[:, at] for d in differences], seed=seed) for at in (0, 1)]
    titles = [f"{second} - {first}, points", "avg@n [95 % interval]", "pass@k [95 % interval]"]
    names = [*common, "average"] if len(common) > 1 else common
    return _grid(titles, [[name, _points(a), _points(b)] for name, a, b in zip(names, *columns, strict=False)])


def _points(d: PairedDifference) -> str:
    return f"{100 * d.mean:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
