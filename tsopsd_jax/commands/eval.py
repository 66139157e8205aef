"""`tsopsd eval`: a model's or a run's policy on benchmarks, every response kept, with the sampler that trains."""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.commands.generate import GenerateSettings, digest, own_digest, writing
from tsopsd_jax.commands.policies import PolicySource, of_directory, of_run
from tsopsd_jax.config.places import datasets_folder
from tsopsd_jax.data import Problem, Tokenizer, evaluation_split, load_problems
from tsopsd_jax.data.encode import encode_to_fit
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.evaluation.evaluate import Response, evaluation_key, respond
from tsopsd_jax.evaluation.scoreboard import compare, write_tables
from tsopsd_jax.loading import is_own
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rewards import Rewards, Verdict, make_checked_rewards
from tsopsd_jax.rollout import Engine
from tsopsd_jax.rundir import resumable_jsonl
from tsopsd_jax.types import Prompts

ALIKE = ("samples", "max_tokens", "sampling", "verifier", "problems_sha256")
"""Settings that all models of a benchmark share in one table."""
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
    fields: dict[str, str],
) -> Benchmark:
    """A benchmark by the name of a data source, `name:split`, or a file of JSON lines.

    Args:
        asked: without a split: `test` where the source has one, else its first.
        directory: where prepared data sets lie.
        first: the first N problems only; None: all.
        template: see `load_problems`; None: `dapo_answer` for the verifier of mathematics, which looks for an answer
            marked so; else `plain`.
        verifier: of the library, or `path/to/file.py:function`; None: countdown's for countdown, else that of
            mathematics.
        fields: problem_field and answer_field of the file's objects.

    Raises: ValueError: see `load_problems`; a name that cannot name a file; a function of one's own that breaks its
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
    verifier = verifier or ("countdown" if source == "countdown" else "math")
    template = template or ("dapo_answer" if verifier == "math" else "plain")
    problems = load_problems(
        source,
        split=split,
        path=path,
        directory=directory,
        first=first,
        template=template,
        **(fields if path is not None else {}),
    )
    _check_name("benchmark", name)
    rewards = make_checked_rewards(verifier, answer=problems[0].answer, row=problems[0].row)
    return Benchmark(name, problems, template, f"{verifier}{own_digest(verifier)}", rewards)


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{what}: expected a name of letters, digits and . _ + = @ -, got {name!r}")


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
    settings: GenerateSettings,
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
    settings: GenerateSettings,
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
        streams = [stack.enter_context(file.open("a", encoding="utf-8")) for file in files]
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
        done = {(line["id"], line["sample"]) for line in resumable_jsonl.lines(file)}
        for place, p in enumerate(benchmark.problems):
            todo = [s for s in range(samples) if (p.id, s) not in done]
            rows += [_Row(at, problem, p.id, s, p) for s in todo]
            row_id += [place * samples + s for s in todo]  # as in `every_row`: no matter what else is evaluated
            problem += 1
    which = np.asarray([row.problem for row in rows], np.int64)
    return rows, Prompts(tokens[which], lengths[which], np.asarray(row_id, np.uint32))


def _facts(policy: PolicySource, benchmark: Benchmark, settings: GenerateSettings) -> dict[str, Any]:
    """What decides the responses to a benchmark, and their scores."""
    texts = [(p.id, p.prompt, p.answer) for p in benchmark.problems]
    return {
        **settings.facts(),
        **policy.source,
        "template": benchmark.template,
        "verifier": benchmark.verifier,
        "problems": len(texts),
        "problems_sha256": digest([part for id_, _, answer in texts for part in (id_, answer)]),
        "prompts_sha256": digest([prompt for _, prompt, _ in texts]),
    }


def _check_alike(file: Path, facts: dict[str, Any]) -> None:
    """Other models' responses to the same benchmark can stand beside these in one table."""
    for other in file.parent.glob("*.jsonl"):
        theirs, mine = (
            {name: of[name] for name in ALIKE} for of in (resumable_jsonl.read_output_settings(other), facts)
        )
        if differs := resumable_jsonl.first_changed(theirs, mine):
            raise ValueError(
                f"{other} has other settings ({differs}), and one table compares like with like; choose another --out"
            )


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; the paper's settings (A.3) are the defaults."""
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model directory")
    policy.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run's checkpoint; neither: the tables only")
    parser.add_argument("--step", type=int, help="the run's checkpoint; default: the latest")
    parser.add_argument(
        "--name", help="of the model in the tables; default: its directory's, or the run's and the step"
    )
    parser.add_argument(
        "--benchmarks", metavar="A,B", help="data sets by NAME or NAME:SPLIT, or files of JSON lines (FILE.jsonl)"
    )
    parser.add_argument("--first", type=int, metavar="N", help="the first N problems of each benchmark only")
    parser.add_argument("--problem-field", default="problem", metavar="KEY", help="of a file's lines; default problem")
    parser.add_argument("--answer-field", default="answer", metavar="KEY", help="of a file's lines; default answer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="responses and tables, of all models")
    options.add_again(parser)
    parser.add_argument("--k", type=int, help="of pass@k; default: all samples")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="B less A of the tables, by paired bootstrap")
    parser.add_argument(
        "--template",
        help="text around the problem: a name, a text with {problem}, or FILE.py:FUNCTION; default: dapo_answer for "
        "the verifier math, else plain",
    )
    parser.add_argument("--chat", help="the model's chat turn: none, direct, thinking; default: the run's, else none")
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="math, countdown, last_number or FILE.py:FUNCTION; default: math, countdown for countdown",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: the run's; of a model float32 on a CPU, else bfloat16",
    )
    options.add_sampling(parser, samples=8, max_tokens=8192, top_p=0.7)


def run(args: argparse.Namespace) -> int:
    """Evaluate what is asked for, and write and print the tables of all that stands in the directory."""
    try:
        return _run(args)
    except KeyboardInterrupt:
        return exit_codes.interrupted(args.out)


def _run(args: argparse.Namespace) -> int:
    if args.model is not None or args.run is not None:
        _evaluate(args)
    print(write_tables(args.out, k=args.k), end="")
    if args.compare:
        print("\n" + compare(args.out, *args.compare, k=args.k, seed=args.seed), end="")
    return exit_codes.DONE


def _evaluate(args: argparse.Namespace) -> None:
    if args.model is not None:
        if args.step is not None:
            raise ValueError("--step: expected with --run, got it with --model; leave it out")
        policy = of_directory(args.model, name=args.name, chat=args.chat, dtype=args.dtype)
    else:
        policy = of_run(args.run, step=args.step, name=args.name, chat=args.chat, dtype=args.dtype)
    _check_name("--name", policy.name)
    settings = GenerateSettings(
        model=policy.source["model"],
        samples=args.samples,
        max_tokens=args.max_tokens,
        sampling=options.sampling_of(args),
        chat=policy.chat,
        seed=args.seed,
        dtype=policy.dtype,
    )
    if args.benchmarks is None:
        raise ValueError("--benchmarks: expected names or files, got none")
    if args.k is not None and not 1 <= args.k <= args.samples:
        raise ValueError(f"--k: expected 1 to --samples {args.samples}, got {args.k}")
    fields = {"problem_field": args.problem_field, "answer_field": args.answer_field}
    benchmarks = [
        load_benchmark(
            asked,
            directory=datasets_folder(None),
            first=args.first,
            template=args.template,
            verifier=args.verifier,
            fields=fields,
        )
        for asked in args.benchmarks.split(",")
    ]
    names = [b.name for b in benchmarks]
    if len(set(names)) < len(names):
        raise ValueError(f"--benchmarks: expected different names, got {', '.join(names)}")
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
