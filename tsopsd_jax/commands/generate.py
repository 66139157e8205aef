"""`tsopsd generate`: responses of a model or a run's policy to prompts, with the sampler that trains."""

import argparse
import json
import sys
import tempfile
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
    verifier_label,
    writing,
)
from tsopsd_jax.commands.policies import PolicySource
from tsopsd_jax.config import Config, DataSettings
from tsopsd_jax.config.build import chosen_problems, rewards_of
from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.data.encode import encode_to_fit
from tsopsd_jax.data.prompts import make_template
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rewards import Rewards, make_checked_rewards
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rundir import resumable_jsonl
from tsopsd_jax.types import Prompts

_DEFAULT = options.SamplingDefaults(1, 1024, Sampling())


class Asked(NamedTuple):
    """Prompts, and how responses to them are scored."""

    texts: Sequence[str]
    """What the lines of the output call the prompt: of a file without the template."""
    problems: Sequence[Problem]
    rewards: Rewards | None = None
    """None: responses are not scored."""
    verifier: str | None = None
    """What `rewards` are called in the file's settings."""

    def facts(self) -> dict[str, Any]:
        """As settings of a file."""
        facts: dict[str, Any] = {"score": self.verifier}
        facts["prompts_sha256"] = digest(
            [part for text, p in zip(self.texts, self.problems, strict=True) for part in (p.id, text)]
        )
        if any(problem.before for problem in self.problems):
            facts["conversations_sha256"] = digest([asked_text(problem) for problem in self.problems])
        if self.rewards is not None:
            facts["answers_sha256"] = digest([problem.answer for problem in self.problems])
        return facts


def generate(
    policy: PolicySource,
    settings: AskSettings,
    asked: Asked,
    out: Path,
    *,
    slots: int = 64,
    tensor: int = 1,
    again: bool = False,
    table: LiveTable,
) -> tuple[int, int]:
    """Write a line {id, sample, prompt, response, tokens, stopped, prompt_ids, response_ids} for every prompt and
    sample, as responses end; the ids are those that the model saw and drew, the stop token included. Where responses
    are scored, also {answer, correct, rewards} and, where a function of one's own failed, {failed}.

    What `out` holds already is kept and not sampled again; a response depends on the seed, its prompt's place among
    the prompts and its sample alone, so an interrupted file ends up as an uninterrupted one, in another order.

    Args:
        policy: who is asked.
        settings: sampling, seed.
        asked: what.
        out: JSON lines; `out`.settings.json beside it remembers the settings.
        slots: responses decoded side by side.
        tensor: devices over which heads and vocabulary are divided; the others take rows.
        again: replace what `out` holds instead of adding what it lacks.
        table: where progress is shown.

    Returns:
        (responses written now, responses in the file).

    Raises:
        ValueError: a file of other settings or of another policy, a prompt that does not fit the model, another process
            that writes `out`.
    """
    facts = settings.facts() | policy.source | asked.facts()
    tokenizer = Tokenizer.load(policy.folder, chat=settings.chat)
    shape = read_config(policy.folder / "config.json")
    tokenizer.check_fits(shape.vocab_size)
    prompted = encode_to_fit(
        [p.id for p in asked.problems],
        [(p.prompt, p.before) for p in asked.problems],
        tokenizer,
        max_tokens=settings.max_tokens,
        positions=shape.max_position_embeddings,
    )
    if not again:
        resumable_jsonl.check_ours(out, facts)
    with writing(out):
        if again:
            resumable_jsonl.remove(out)
        resumable_jsonl.claim_output(out, facts)
        return _add_missing(policy, settings, asked, tokenizer, prompted, out, slots=slots, tensor=tensor, table=table)


def _add_missing(
    policy: PolicySource,
    settings: AskSettings,
    asked: Asked,
    tokenizer: Tokenizer,
    prompted: tuple[np.ndarray, np.ndarray],
    out: Path,
    *,
    slots: int,
    tensor: int,
    table: LiveTable,
) -> tuple[int, int]:
    """Sample the responses that `out`, which is ours and held, does not have yet."""
    tokens, lengths = prompted
    done = {(line["id"], line["sample"]) for line in resumable_jsonl.lines(out, "id", "sample")}
    rows = np.asarray(
        [
            i * settings.samples + k
            for i, problem in enumerate(asked.problems)
            for k in range(settings.samples)
            if (problem.id, k) not in done
        ],
        np.uint32,
    )
    which = (rows // settings.samples).astype(np.int64)
    if len(rows):
        mesh = make_mesh(tensor=tensor)
        # Laid out as in training: each device reads its part; the view below is what decoding needs.
        model, params = policy.load(mesh)
        engine = Engine(
            model,
            mesh,
            sampling=settings.sampling,
            max_prompt_tokens=tokens.shape[1],
            max_response_tokens=settings.max_tokens,
            stop_ids=tokenizer.stop_ids,
            slots=slots,
        )
        view = engine.view(params)
        del params
        todo = Prompts(tokens[which], lengths[which], rows)
        stream = engine.stream(view, todo, jax.random.key(settings.seed), group=which, on_progress=table.sampling)
        with resumable_jsonl.open_lines(out) as file:
            for ended in stream:
                at = int(which[ended.row])
                problem = asked.problems[at]
                line = {
                    "id": problem.id,
                    "sample": int(rows[ended.row] % settings.samples),
                    "prompt": asked.texts[at],
                    "response": tokenizer.decode(ended.tokens),
                    "tokens": len(ended.tokens),
                    "stopped": ended.stopped,
                    "prompt_ids": tokens[at, : lengths[at]].tolist(),
                    "response_ids": ended.tokens.tolist(),
                }
                if asked.rewards is not None:
                    verdict = asked.rewards(line["response"], problem.answer, problem.row)
                    line |= {"answer": problem.answer, "correct": verdict.right, "rewards": verdict.parts}
                    line |= {"failed": list(verdict.failures)} if verdict.failures else {}
                resumable_jsonl.append(file, line)
        now = engine.progress
        table.note(
            f"{now.tokens:,} tokens in {now.seconds:.1f} s ({now.tokens / max(now.seconds, 1e-9):,.0f} tokens/s), "
            f"slots used {100 * now.slot_use:.0f} %"
        )
    return len(rows), len(asked.problems) * settings.samples


def _read_prompts(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """The (id, prompt, whole row) of a file's lines.

    Raises:
        ValueError: no file, no line, or a line that is no object with a prompt; names the line.
    """
    if not path.is_file():
        raise ValueError(f"--prompts: expected a file of JSON lines, got {path}: no such file")
    found: list[tuple[str, str, dict[str, Any]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f'{path}, line {number}: expected an object with a text "prompt", got {line[:80]}')
        found.append((str(row.get("id", number)), prompt, row))
    repeated = _first_repeated([name for name, _, _ in found])
    if repeated is not None:
        raise ValueError(f"{path}: id {repeated!r} stands in two lines; ids must differ")
    if not found:
        raise ValueError(f"{path}: expected at least one prompt")
    return found


def _first_repeated(ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((i for i in ids if i in seen or seen.add(i)), None)


def asked_of_file(
    path: Path, *, first: int | None, template: str | None, score: str | None, own: DataSettings | None
) -> Asked:
    """The prompts of a file of JSON lines.

    Args:
        first: the first N lines only; None: all.
        template: around each prompt; None: that of `own`, else none.
        score: the verifier; None: `own`'s, where all lines have an answer.
        own: the data section of the run that is asked, with its system prompt; None: a model is asked.

    Raises:
        ValueError: a malformed line; no answer where responses are scored; an unknown template or verifier.
    """
    lines = _read_prompts(path)[:first]
    render = make_template(template or (own and own.template) or "plain")
    lacking = [name for name, _, row in lines if not isinstance(row.get("answer"), str)]
    if score is not None and lacking:
        raise ValueError(f'{path}, id {lacking[0]}: --score expects a text "answer" too, got none')
    problems = [Problem(name, render(text, row), str(row.get("answer", "")), row) for name, text, row in lines]
    if own is not None and own.system_prompt is not None:
        problems = [problem.with_system(own.system_prompt) for problem in problems]
    texts = [text for _, text, _ in lines]
    if score is not None:
        rewards = make_checked_rewards(score, answer=problems[0].answer, row=problems[0].row)
        return Asked(texts, problems, rewards, verifier_label(score))
    if own is not None and not lacking:
        return Asked(texts, problems, rewards_of(own, problems), verifier_label(own.verifier))
    return Asked(texts, problems)


def asked_of_run(config: Config, tokenizer: Tokenizer, *, first: int | None, notes: list[str]) -> Asked:
    """The problems that a run evaluates itself on; of a run that does not, those that it learns from.

    Args:
        first: the first N only; None: all.
        notes: sentences on what is left out are added.
    """
    data = config.evaluation.data or config.data
    problems = chosen_problems(data, config, tokenizer, notes)[:first]
    return Asked([p.prompt for p in problems], problems, rewards_of(data, problems), verifier_label(data.verifier))


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_asked(parser, required=True, run="its template, verifier, system prompt and sampling")
    parser.add_argument(
        "--score",
        metavar="NAME",
        help="also score: math, countdown, last_number or FILE.py:FUNCTION; prompts have an answer; with --run: the "
        "run's, where all prompts have one",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines with "prompt", maybe "id"; with --run: by default the problems of its evaluations, or else '
        "those it learns from",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON lines, in the order of ending; with --show N it may be left out"
    )
    parser.add_argument(
        "--template",
        help="text around the prompt: plain, boxed, dapo_answer, a text with {problem}, or FILE.py:FUNCTION; default: "
        "the run's, else plain",
    )
    options.add_again(parser)
    options.add_show(parser)
    options.add_sampling(parser, _DEFAULT)


def run(args: argparse.Namespace) -> int:
    """Sample what the file lacks, and say how many responses it has."""
    return resumable(_run, args)


def _run(args: argparse.Namespace) -> int:
    options.check_show(args)
    if args.out is None and args.show is None:
        raise ValueError("--out: expected a file for the responses, got none; give one, or --show N to see some")
    if args.model is not None and args.prompts is None:
        raise ValueError("--prompts: expected a file of JSON lines, got none; only --run has prompts of its own")
    policy = asked_policy(args)
    own = policy.config and (policy.config.evaluation.data or policy.config.data)
    with LiveTable(stream=sys.stderr) as table, tempfile.TemporaryDirectory() as nowhere:
        # What nobody keeps is not sampled.
        first = min(filter(None, (args.first, None if args.out else args.show)), default=None)
        if args.prompts is not None:
            asked = asked_of_file(args.prompts, first=first, template=args.template, score=args.score, own=own)
        else:
            asked = _own_problems(args, policy, first, table)
        template = args.template or (own and own.template) or "plain"
        settings = asked_settings(args, policy, _defaults(policy), template=template)
        out = args.out or Path(nowhere) / "shown.jsonl"
        now, total = generate(
            policy, settings, asked, out, slots=args.slots, tensor=args.tensor, again=args.again, table=table
        )
        lines = resumable_jsonl.lines(out) if args.show else []
    if args.show:
        print(shown_responses(asked.problems, lines, args.show))
    if args.out is not None:
        print(f"{args.out}: {total} responses, {now} of them new")
    return exit_codes.DONE


def _own_problems(args: argparse.Namespace, policy: PolicySource, first: int | None, table: LiveTable) -> Asked:
    assert policy.config is not None
    for name in ("template", "score"):
        if vars(args)[name] is not None:
            raise ValueError(f"--{name}: the run's own problems have theirs; leave it out, or give --prompts")
    notes: list[str] = []
    tokenizer = Tokenizer.load(policy.folder, chat=policy.chat)
    asked = asked_of_run(policy.config, tokenizer, first=first, notes=notes)
    for note in notes:
        table.note(note)
    return asked


def _defaults(policy: PolicySource) -> options.SamplingDefaults:
    """How responses are sampled unless options say otherwise: a run's as in its evaluations, else as in its first
    phase."""
    if policy.config is None:
        return _DEFAULT
    evaluation, phase, seed = policy.config.evaluation, policy.config.phases[0], policy.config.seed
    if evaluation.data is not None:
        return options.SamplingDefaults(1, evaluation.max_response_tokens, evaluation.sampling, seed)
    return options.SamplingDefaults(1, phase.max_response_tokens, phase.sampling, seed)
