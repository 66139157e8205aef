"""What `tsopsd generate` and `tsopsd eval` share: who is asked, how responses are sampled, and files of them that an
interrupted command goes on with."""

import argparse
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.commands.policies import PolicySource, of_directory, of_run, split_step
from tsopsd_jax.data import Problem
from tsopsd_jax.display.foreign_text import harmless
from tsopsd_jax.loading import is_own
from tsopsd_jax.rewards.named import named_functions
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.rundir.lock import locked


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskSettings:
    """What decides the responses; a file begun with other settings is not gone on with."""

    model: str
    samples: int = 1
    max_tokens: int = 1024
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    template: str = "plain"
    chat: str = "none"
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("samples", "max_tokens"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2^32-1, got {self.seed}")

    def facts(self) -> dict[str, Any]:
        """As a file's settings: what another directory with the same name must not pass for."""
        return dataclasses.asdict(self) | {"sampling": self.sampling.facts()}


def asked_policy(args: argparse.Namespace, *, name: str | None = None) -> PolicySource:
    """The policy that `--model`, or `--run` with `--step`, names.

    Args:
        name: of the policy in tables; None: its directory's, or the run's and the step.

    Raises:
        ValueError: there is no such policy, or options that do not go together.
    """
    if args.model is not None:
        if args.step is not None:
            raise ValueError("--step: expected with --run, got it with --model; leave it out")
        return of_directory(args.model, name=name, chat=args.chat, dtype=args.dtype)
    run_dir, step = split_step(args.run)
    if step is not None and args.step not in (None, step):
        raise ValueError(f"--step: expected the step of --run {args.run}, got {args.step}; leave it out")
    return of_run(run_dir, step=args.step if step is None else step, name=name, chat=args.chat, dtype=args.dtype)


def asked_settings(
    args: argparse.Namespace,
    policy: PolicySource,
    default: options.SamplingDefaults,
    *,
    template: str = "plain",
) -> AskSettings:
    """How responses are sampled: what the options say, and `default` for what they leave open."""
    return AskSettings(
        model=policy.source["model"],
        samples=default.samples if args.samples is None else args.samples,
        max_tokens=default.max_tokens if args.max_tokens is None else args.max_tokens,
        sampling=options.sampling_of(args, default.sampling),
        template=template,
        chat=policy.chat,
        seed=default.seed if args.seed is None else args.seed,
        dtype=policy.dtype,
    )


def resumable(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command that goes on with what stands in `args.out`; returns its exit code, also where it is
    interrupted."""
    try:
        return command(args)
    except KeyboardInterrupt:
        return exit_codes.interrupted(args.out)


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of a list of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def asked_text(problem: Problem) -> str:
    """All that a problem asks, for digests: its prompt, after the messages before it."""
    return "\0".join([*(f"{role}: {content}" for role, content in problem.before), problem.prompt])


def verifier_label(verifier: str | Mapping[str, str]) -> str:
    """Verifiers by their names; functions of one's own with the digest of their file, which tells them from others."""
    named = {name: f"{each}{_own_digest(each)}" for name, each in named_functions(verifier).items()}
    return next(iter(named.values())) if isinstance(verifier, str) else ", ".join(f"{n}: {v}" for n, v in named.items())


def _own_digest(verifier: str) -> str:
    if not is_own(verifier):
        return ""
    file = Path(verifier.rpartition(":")[0])
    return f" sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Keep other processes from writing a file of JSON lines, or a folder of them.

    Raises:
        ValueError: one writes there, or nothing can be written there.
    """
    file = out.with_name(f".{out.name}.lock") if out.suffix == ".jsonl" else out / ".lock"
    taken = f"another process writes {out}; wait for it, or choose another --out"
    with locked(file, taken=taken, unwritable=f"{out}: cannot be written ({{reason}}); choose another --out"):
        yield


def shown_responses(problems: Sequence[Problem], lines: Sequence[Mapping[str, Any]], first: int) -> str:
    """The responses to the first problems, for a person to read: whether each is right, its text, the answer.

    Args:
        problems: in their order.
        lines: what `generate` or `eval` wrote, in any order.
        first: problems that are shown.
    """
    parts: list[str] = []
    for problem in problems[:first]:
        parts.append(f"=== {problem.id}\n{harmless(problem.prompt)}")
        ours = sorted((line for line in lines if line["id"] == problem.id), key=lambda line: line["sample"])
        for line in ours:
            verdict = {True: "right", False: "wrong", None: "not scored"}[line.get("correct")]
            cut = "" if line["stopped"] else ", cut off"
            parts.append(f"--- {verdict}, {line['tokens']} tokens{cut}\n{harmless(line['response'])}")
        if any("correct" in line for line in ours):
            parts.append(f"--- answer: {harmless(problem.answer)}")
    return "\n".join(parts)
