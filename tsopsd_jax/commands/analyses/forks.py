"""`tsopsd analyse forks`: stochastic rollouts against the greedy ones of the same checkpoint (figure 6, table 2)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tsopsd_jax.analysis.forks import Forks, Stochastic, measure_forks
from tsopsd_jax.commands.analyses.pair import add_pair, check_computing, on_mesh, responses_for
from tsopsd_jax.commands.asking import digest, writing
from tsopsd_jax.commands.policies import PolicySource, policy_of
from tsopsd_jax.commands.responses import Responses
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.data.encode import pad_prompts
from tsopsd_jax.display.figures import Chart, Curve, Figure
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rundir import resumable_jsonl
from tsopsd_jax.types import Prompts

GREEDY = -1
"""The sample number of a prompt's greedy rollout."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_pair(parser)
    parser.add_argument(
        "--between", nargs="*", default=[], metavar="POLICY", help="checkpoints between the two, in their order"
    )
    parser.add_argument("--samples", type=int, default=4, help="stochastic rollouts a prompt; default 4")
    parser.add_argument("--max-tokens", type=int, help="of a rollout; default: of the longest response in the file")
    parser.add_argument("--slots", type=int, default=64, help="rollouts decoded side by side; default 64")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Sample what DIR/rollouts lacks from each policy at the prompts of the file, and measure."""
    check_computing(args)
    if args.samples < 1 or args.slots < 1 or (args.max_tokens is not None and args.max_tokens < 1):
        raise ValueError("--samples, --slots and --max-tokens: expected at least 1")
    texts = [args.before, *args.between, args.after]
    policies = [policy_of(text, dtype=args.dtype, chat=args.chat) for text in texts]
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise ValueError(f"expected policies of different names, got {', '.join(names)}")
    tokenizer = Tokenizer.load(policies[0].folder, chat=policies[0].chat)
    responses = responses_for(policies[0], args)
    found: dict[str, Forks] = {}
    with LiveTable(stream=sys.stderr) as table, writing(args.out / "rollouts"):
        for policy in policies:
            file = args.out / "rollouts" / f"{policy.name}.jsonl"
            lines = _sampled(policy, responses, tokenizer, file, args, table)
            found[policy.name] = measure_forks(_drawn(lines))
    rows = {name: each._asdict() for name, each in found.items()}
    report = {
        "checkpoints": [{"name": name, **row} for name, row in rows.items()],
        "samples": args.samples,
        "encoded_again": responses.encoded_again,
    }
    return report, _figure(found, responses.note)


def _sampled(
    policy: PolicySource,
    responses: Responses,
    tokenizer: Tokenizer,
    file: Path,
    args: argparse.Namespace,
    table: LiveTable,
) -> list[dict[str, Any]]:
    """The rollouts of a policy, those in `file` and those that it lacks, which are added."""
    prompts = list(dict.fromkeys(tuple(one.prompt) for one in responses.answered))
    limit = args.max_tokens or max(len(one.response) for one in responses.answered)
    facts = {
        **policy.source,
        "dtype": policy.dtype,
        "max_tokens": limit,
        "seed": args.seed,
        "samples": args.samples,
        "prompts_sha256": digest([" ".join(map(str, prompt)) for prompt in prompts]),
    }
    resumable_jsonl.claim_output(file, facts)
    done = {(line["prompt"], line["sample"]) for line in resumable_jsonl.lines(file, "prompt", "sample")}
    numbers = (GREEDY, *range(args.samples))
    todo = [(p, s) for p in range(len(prompts)) for s in numbers if (p, s) not in done]
    table.note(f"{policy.name}: {len(done)} rollouts are there, {len(todo)} to go")
    if todo:
        tokens, lengths = pad_prompts(
            [str(p) for p in range(len(prompts))], prompts, max_prompt_tokens=max(map(len, prompts))
        )
        mesh = make_mesh(tensor=args.tensor)
        model, params = on_mesh(policy, mesh)
        for temperature in (0.0, 1.0):
            rows = [(p, s) for p, s in todo if (s == GREEDY) == (temperature == 0.0)]
            if not rows:
                continue
            engine = Engine(
                model,
                mesh,
                sampling=Sampling(sampling_temperature=temperature),
                max_prompt_tokens=tokens.shape[1],
                max_response_tokens=limit,
                stop_ids=tokenizer.stop_ids,
                slots=args.slots,
            )
            _sample(engine, engine.view(params), (tokens, lengths), rows, file, args, table)
    return resumable_jsonl.lines(file)


def _sample(
    engine: Engine,
    view: Any,
    prompts: tuple[np.ndarray, np.ndarray],
    rows: Sequence[tuple[int, int]],
    file: Path,
    args: argparse.Namespace,
    table: LiveTable,
) -> None:
    which = np.asarray([p for p, _ in rows])
    ids = np.asarray([p * (args.samples + 1) + s + 1 for p, s in rows], np.uint32)
    asked = Prompts(prompts[0][which], prompts[1][which], ids)
    stream = engine.stream(view, asked, jax.random.key(args.seed), group=which, on_progress=table.sampling)
    with resumable_jsonl.open_lines(file) as out:
        for ended in stream:
            prompt, sample = rows[ended.row]
            line = {
                "prompt": prompt,
                "sample": sample,
                "response_ids": ended.tokens.tolist(),
                "logp_nats": [round(float(x), 7) for x in ended.logp],
            }
            resumable_jsonl.append(out, line)


def _drawn(lines: Sequence[dict[str, Any]]) -> list[Stochastic]:
    greedy = {line["prompt"]: line["response_ids"] for line in lines if line["sample"] == GREEDY}
    return [
        Stochastic(line["response_ids"], line["logp_nats"], greedy[line["prompt"]])
        for line in lines
        if line["sample"] != GREEDY
    ]


def _figure(found: dict[str, Forks], note: str) -> Figure:
    curves = [
        Curve(name, *_smooth(each.logp_by_position_nats, each.rollouts_by_position)) for name, each in found.items()
    ]
    title = "(a) Log-probability of the tokens drawn"
    panels = [Chart(title, "token position", "mean log-probability, nats", curves, whole_x=True)]
    at = np.arange(1, len(found) + 1)
    for title, label, key in (
        ("(b) Edit distance to the greedy rollout", "share of the longer one", "edit_distance"),
        ("(c) Fork position", "tokens", "fork_position"),
        ("(d) |log-probability|", "nats", "logp_abs_mean_nats"),
    ):
        y = np.asarray([each._asdict()[key] for each in found.values()])
        panels.append(Chart(title, "checkpoint", label, [Curve("", at, y)], marked=True, whole_x=True))
    names = ", ".join(f"{number} {name}" for number, name in enumerate(found, start=1))
    rollouts = next(iter(found.values())).rollouts
    caption = (
        f"{rollouts} rollouts at temperature 1 of each checkpoint against the greedy rollout of the same checkpoint "
        f"and prompt. (a) is a moving mean over positions. Checkpoints: {names} (TS-OPSD, figure 6 and table 2).{note}"
    )
    return Figure(panels, caption)


def _smooth(logp: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A moving mean over a 40th of the positions, weighted by the rollouts that reach them: (positions, values)."""
    width = max(1, len(logp) // 40)
    total = np.convolve(logp * count, np.ones(width), mode="valid")
    weight = np.convolve(count, np.ones(width), mode="valid")
    return np.arange(len(total)) + (width - 1) / 2, total / weight
