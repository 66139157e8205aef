"""`tsopsd eval`: a model's or a run's policy on benchmarks, every response kept, with the sampler that trains."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.commands.asking import (
    AskSettings,
    asked_policy,
    asked_settings,
    asked_text,
    digest,
    resumable,
    shown_responses,
    writing,
)
from tsopsd_jax.commands.benchmarks import Benchmark, check_table_name, load_benchmark, own_benchmark
from tsopsd_jax.commands.policies import PolicySource
from tsopsd_jax.config.places import datasets_folder
from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.data.encode import encode_to_fit
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.evaluation.evaluate import Response, evaluation_key, respond
from tsopsd_jax.evaluation.scoreboard import compare, write_tables
from tsopsd_jax.loading import is_own
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rewards import Verdict
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rundir import resumable_jsonl
from tsopsd_jax.types import Prompts

ALIKE = ("samples", "max_tokens", "sampling", "verifier", "problems_sha256")
"""Settings that all models of a benchmark share in one table."""
_DEFAULT = options.SamplingDefaults(8, 8192, Sampling(top_p=0.7))
"""The paper's (A.3)."""


class _Row(NamedTuple):
    """A response to be sampled: whose problem (in the list of all), and the line's keys."""

    benchmark: int
    problem: int
    id: str
    sample: int
    asked: Problem


def evaluate_policy(
    policy: PolicySource,
    benchmarks: Sequence[Benchmark],
    settings: AskSettings,
    out: Path,
    *,
    slots: int,
    tensor: int,
    again: bool,
    table: LiveTable,
) -> None:
    """Write a line {benchmark, id, sample, response, tokens, stopped, correct, entropy_nats, prompt_ids, response_ids}
    for each response that `out` lacks, to OUT/BENCHMARK/NAME.jsonl, as it is scored; with a function of one's own also
    {rewards} and, where it failed, {failed}.

    All benchmarks go through one rollout. A response depends on the seed, its problem's place in its benchmark and its
    sample, so what was interrupted ends up as what was not, in another order.

    Args:
        policy, benchmarks: who is asked what.
        settings: of the sampling; its `model` and `template` are the policy's and the benchmarks'.
        out: the directory.
        slots, tensor, again: see `generate`.
        table: where progress is shown.

    Raises:
        ValueError: files of other settings, a prompt that does not fit the model, a checkpoint that is not there.
    """
    files = [out / b.name / f"{policy.name}.jsonl" for b in benchmarks]
    facts = [_facts(policy, b, settings) for b in benchmarks]
    for file, fact in zip(files, facts, strict=True):
        if not again:
            resumable_jsonl.check_ours(file, fact)
        _check_alike(file, fact)
    tokenizer = Tokenizer.load(policy.folder, chat=settings.chat)
    prompted = _encode(policy, benchmarks, tokenizer, settings.max_tokens)
    with writing(out):
        for file in files if again else ():
            resumable_jsonl.remove(file)
        _add_missing(
            policy, benchmarks, settings, tokenizer, prompted, files, facts, slots=slots, tensor=tensor, table=table
        )


def _add_missing(
    policy: PolicySource,
    benchmarks: Sequence[Benchmark],
    settings: AskSettings,
    tokenizer: Tokenizer,
    prompted: tuple[np.ndarray, np.ndarray],
    files: Sequence[Path],
    facts: Sequence[dict[str, Any]],
    *,
    slots: int,
    tensor: int,
    table: LiveTable,
) -> None:
    """Sample the responses that `files`, which are held, do not have yet."""
    tokens, lengths = prompted
    rows, prompts = _missing(benchmarks, files, tokens, lengths, settings.samples)
    table.note(f"{policy.name}: {len(lengths) * settings.samples - len(rows)} responses are there, {len(rows)} to go")
    if not rows:
        return
    mesh = make_mesh(tensor=tensor)
    model, params = policy.load(mesh)
    for file, fact in zip(files, facts, strict=True):
        resumable_jsonl.claim_output(file, fact)
    engine = Engine(
        model,
        mesh,
        sampling=settings.sampling,
        max_prompt_tokens=tokens.shape[1],
        max_response_tokens=settings.max_tokens,
        stop_ids=tokenizer.stop_ids,
        slots=slots,
        entropy=True,
    )
    view = engine.view(params)
    del params

    def score(at: int, text: str) -> Verdict:
        asked = rows[at].asked
        return benchmarks[rows[at].benchmark].rewards(text, asked.answer, asked.row)

    found = respond(
        engine,
        view,
        prompts,
        evaluation_key(jax.random.key(settings.seed)),
        group=np.asarray([row.problem for row in rows]),
        decode=tokenizer.decode,
        score=score,
        on_progress=table.sampling,
    )
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(resumable_jsonl.open_lines(file)) for file in files]
        for response in found:
            row = rows[response.row]
            failures += [response.failures[0]] if response.failures else []
            prompt = tokens[row.problem, : lengths[row.problem]].tolist()
            line = _line(benchmarks[row.benchmark], row, response, prompt)
            resumable_jsonl.append(streams[row.benchmark], line)
    if failures:
        table.note(f"warning: the verifier failed at {len(failures)} responses, which count as wrong: {failures[0]}")


def _encode(
    policy: PolicySource, benchmarks: Sequence[Benchmark], tokenizer: Tokenizer, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """All prompts, one benchmark after the other: tokens [problems, P] and lengths."""
    shape = read_config(policy.folder / "config.json")
    tokenizer.check_fits(shape.vocab_size)
    problems = [p for b in benchmarks for p in b.problems]
    return encode_to_fit(
        [p.id for p in problems],
        [(p.prompt, p.before) for p in problems],
        tokenizer,
        max_tokens=max_tokens,
        positions=shape.max_position_embeddings,
    )


def _line(benchmark: Benchmark, row: _Row, response: Response, prompt_ids: list[int]) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "id": row.id,
        "sample": row.sample,
        "response": response.text,
        "tokens": response.tokens,
        "stopped": response.stopped,
        "correct": response.correct,
        "entropy_nats": round(response.entropy_nats, 6),
        "prompt_ids": prompt_ids,
        "response_ids": list(response.ids),
        **({"rewards": dict(response.rewards)} if is_own(benchmark.verifier) else {}),
        **({"failed": list(response.failures)} if response.failures else {}),
    }


def _missing(
    benchmarks: Sequence[Benchmark], files: Sequence[Path], tokens: np.ndarray, lengths: np.ndarray, samples: int
) -> tuple[list[_Row], Prompts]:
    """What is still to be sampled, in order."""
    rows, row_id, problem = [], [], 0
    for at, (benchmark, file) in enumerate(zip(benchmarks, files, strict=True)):
        done = {(line["id"], line["sample"]) for line in resumable_jsonl.lines(file, "id", "sample")}
        for place, p in enumerate(benchmark.problems):
            todo = [s for s in range(samples) if (p.id, s) not in done]
            rows += [_Row(at, problem, p.id, s, p) for s in todo]
            row_id += [place * samples + s for s in todo]  # as in `every_row`: no matter what else is evaluated
            problem += 1
    which = np.asarray([row.problem for row in rows], np.int64)
    return rows, Prompts(tokens[which], lengths[which], np.asarray(row_id, np.uint32))


def _facts(policy: PolicySource, benchmark: Benchmark, settings: AskSettings) -> dict[str, Any]:
    """What decides the responses to a benchmark, and their scores."""
    texts = [text for p in benchmark.problems for text in (p.id, p.answer)]
    return {
        **settings.facts(),
        **policy.source,
        "template": benchmark.template,
        "verifier": benchmark.verifier,
        "problems": len(benchmark.problems),
        "problems_sha256": digest(texts),
        "prompts_sha256": digest([asked_text(p) for p in benchmark.problems]),
    }


def _check_alike(file: Path, facts: dict[str, Any]) -> None:
    """Other models' responses to the same benchmark can stand beside these in one table."""
    for other in file.parent.glob("*.jsonl"):
        theirs, mine = (
            {name: of.get(name) for name in ALIKE} for of in (resumable_jsonl.read_output_settings(other), facts)
        )
        if differs := resumable_jsonl.first_changed(theirs, mine):
            raise ValueError(
                f"{other} has other settings ({differs}), and one table compares like with like; choose another --out"
            )


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; the paper's settings (A.3) are the defaults, with `--run` those of its evaluations."""
    options.add_asked(
        parser, required=False, run="the template, verifier, system prompt and sampling of its evaluations"
    )
    parser.add_argument(
        "--name", help="of the model in the tables; default: its directory's, or the run's and the step"
    )
    parser.add_argument(
        "--benchmarks",
        metavar="A,B",
        help="data sets by NAME or NAME:SPLIT, or files of JSON lines (FILE.jsonl); with --run: its own by default",
    )
    parser.add_argument("--problem-field", metavar="KEY", help="of a file's lines; default problem, or the run's")
    parser.add_argument("--answer-field", metavar="KEY", help="of a file's lines; default answer, or the run's")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="responses and tables, of all models")
    options.add_again(parser)
    options.add_show(parser)
    parser.add_argument("--k", type=int, help="of pass@k; default: all samples")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="B less A of the tables, by paired bootstrap")
    parser.add_argument(
        "--template",
        help="text around the problem: a name, a text with {problem}, or FILE.py:FUNCTION; default: the run's, "
        "dapo_answer for the verifier math, else plain",
    )
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="math, countdown, last_number or FILE.py:FUNCTION; default: countdown for countdown, the run's, else math",
    )
    options.add_sampling(parser, _DEFAULT, samples=f"{_DEFAULT.samples}; with --run: the run's")


def run(args: argparse.Namespace) -> int:
    """Evaluate what is asked for, and write and print the tables of all that stands in the directory."""
    return resumable(_run, args)


def _run(args: argparse.Namespace) -> int:
    if args.model is not None or args.run is not None:
        _evaluate(args)
    print(write_tables(args.out, k=args.k), end="")
    if args.compare:
        print("\n" + compare(args.out, *args.compare, k=args.k, seed=args.seed or 0), end="")
    return exit_codes.DONE


def _evaluate(args: argparse.Namespace) -> None:
    options.check_show(args)
    policy = asked_policy(args, name=args.name)
    check_table_name("--name", policy.name)
    settings = asked_settings(args, policy, _defaults(policy))
    if args.k is not None and not 1 <= args.k <= settings.samples:
        raise ValueError(f"--k: expected 1 to --samples {settings.samples}, got {args.k}")
    benchmarks = _benchmarks(args, policy)
    with LiveTable(stream=sys.stderr) as table:
        evaluate_policy(
            policy,
            benchmarks,
            settings,
            args.out,
            slots=args.slots,
            tensor=args.tensor,
            again=args.again,
            table=table,
        )
    for benchmark in benchmarks if args.show else ():
        lines = resumable_jsonl.lines(args.out / benchmark.name / f"{policy.name}.jsonl")
        print(f"{shown_responses(benchmark.problems, lines, args.show)}\n")


def _defaults(policy: PolicySource) -> options.SamplingDefaults:
    """How a policy's responses are sampled unless options say otherwise: a run's as it evaluates itself."""
    if policy.config is None:
        return _DEFAULT
    own = policy.config.evaluation
    return options.SamplingDefaults(own.samples, own.max_response_tokens, own.sampling, policy.config.seed)


def _benchmarks(args: argparse.Namespace, policy: PolicySource) -> list[Benchmark]:
    """The benchmarks that are asked for; a run's own where none are."""
    if args.benchmarks is None:
        if policy.config is None:
            raise ValueError("--benchmarks: expected names or files, got none")
        for name in ("template", "verifier", "problem_field", "answer_field"):
            if vars(args)[name] is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: the run's own problems have theirs; leave it out, or give --benchmarks")
        return [own_benchmark(policy.config, Tokenizer.load(policy.folder, chat=policy.chat), first=args.first)]
    own = policy.config and (policy.config.evaluation.data or policy.config.data)
    benchmarks = [
        load_benchmark(
            asked,
            directory=datasets_folder(policy.config and policy.config.cache_dir),
            first=args.first,
            template=args.template,
            verifier=args.verifier,
            fields=(args.problem_field, args.answer_field),
            own=own,
        )
        for asked in args.benchmarks.split(",")
    ]
    names = [b.name for b in benchmarks]
    if len(set(names)) < len(names):
        raise ValueError(f"--benchmarks: expected different names, got {', '.join(names)}")
    return benchmarks
