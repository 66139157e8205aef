"""Does reheating help, at a size anybody can repeat? `python scripts/reproduce_small.py WORK [--seeds 1 2] [--arms A]`.

For each seed RL until the entropy has collapsed; then every arm of `configs/small` goes on from that policy, optimizer
included, until it has sampled the same number of tokens (a reheating's count). Policies are kept on the way and
measured on problems that no run has seen. Results go to WORK/results, a file a seed; those behind docs/small_scale.md
are in benchmarks/results/small, and `--results benchmarks/results/small --page docs/small_scale.md` writes its tables
and its figure. Whatever ends the command, the same one goes on, from the last checkpoints; `--minutes` ends it by
itself.

Seeds from 90 on are for trying settings: the page keeps them apart. ARM@RATE is an arm with another learning rate.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from small import measure, page
from small.study import COLLAPSE, COLLAPSED, REHEATED, Point, Study, course, named, train, writing_json

from tsopsd_jax.config.places import model_folder
from tsopsd_jax.policy import Policy
from tsopsd_jax.train.phase import GuardError
from tsopsd_jax.train.signals import EXIT_INTERRUPTED, Interrupted

ROOT = Path(__file__).resolve().parents[1]
FIRST_ARMS = ("dapo", "dapo_reset", "pr_fkl", "pr_fkl_frozen", "rr", "pr_rkl")
OTHER_ARMS = ("held", "pr_fkl_t15", "pr_fkl_refreshed", "adaptive_entropy_bonus", "kl_cov", "clip_cov", "cycle")
BASE = "base"
GUARD = 3


class Settings(NamedTuple):
    """What is run and measured."""

    study: Study
    problems: int
    samples: int
    end_samples: int
    """Responses a problem at the collapse, after a reheating, and at an arm's last point; elsewhere `samples`."""
    results: Path

    def samples_at(self, point: str) -> int:
        """Return the number of responses to a problem at a point."""
        many = point in (BASE, COLLAPSED, named(self.study.token_points[-1])) or point.startswith(REHEATED)
        return self.end_samples if many else self.samples

    def questions(self, point: str) -> measure.Questions:
        """Return what a policy is asked at a point."""
        config, problems = self.study.load_arm(COLLAPSE, 0), self.study.test_problems(self.problems)
        length = config.phases[0].max_response_tokens
        return measure.Questions(problems, self.samples_at(point), length, self.study.verifier())

    def file_of(self, seed: int, arm: str, point: str) -> Path:
        """Return the file of a policy's measures; the base model is the same for all seeds."""
        if arm == BASE:
            return self.study.work / "base.json"
        return self.study.work / f"seed-{seed}" / "measures" / arm / f"{point}.json"

    def is_measured(self, seed: int, arm: str, point: str) -> bool:
        """Return whether a policy answered as many problems as often as is asked for, or oftener."""
        file = self.file_of(seed, arm, point)
        if not file.is_file():
            return False
        old = json.loads(file.read_text(encoding="utf-8"))
        return old["problems"] == self.problems and old["samples"] >= self.samples_at(point)

    def is_done(self, seed: int, arm: str) -> bool:
        """Return whether there is nothing left to do for an arm of a seed."""
        if arm == BASE:
            return self.is_measured(seed, BASE, BASE)
        points = [each.point for each in self.study.points(seed, arm)]
        return self.study.is_trained(seed, arm) and all(self.is_measured(seed, arm, point) for point in points)


def measure_arm(settings: Settings, seed: int, arm: str) -> None:
    """Measure every policy of an arm that has not been measured so."""
    for point in settings.study.points(seed, arm):
        if settings.is_measured(seed, arm, point.point):
            continue
        file, questions = settings.file_of(seed, arm, point.point), settings.questions(point.point)
        policy = Policy.load(settings.study.policy_dir(seed, arm, point.point))
        with writing_json(file) as found:
            found |= point._asdict() | measure.measure(policy, questions)
            if point.point.startswith(REHEATED):
                found["reheating"] = _reheating(settings, seed, policy, questions, found["entropy_nats"])
        print(f"seed {seed}: {arm} {point.point}: {_words(found)}", flush=True)


def _reheating(
    settings: Settings, seed: int, policy: Policy, questions: measure.Questions, nats: float
) -> dict[str, Any]:
    """Beside a reheating: likeness to the collapsed policy, and that policy sampled at the same entropy."""
    collapsed = Policy.load(settings.study.policy_dir(seed, COLLAPSE, COLLAPSED))
    temperature = measure.temperature_of_entropy(collapsed, questions, nats)
    ideal = measure.measure(measure.tempered(collapsed, temperature), questions)
    return measure.likeness(collapsed, policy, questions) | {"temperature": round(temperature, 4), "ideal": ideal}


def _words(found: dict[str, Any]) -> str:
    share = {name: 100 * sum(right) / (len(right) * found["samples"]) for name, right in found["right"].items()}
    return f"{share['0.7']:.1f} % (top-p 0.7), {share['1']:.1f} % (top-p 1), {found['entropy_nats']:.3f} nats"


def run_unit(settings: Settings, seed: int, arm: str) -> None:
    """Train an arm of a seed and measure it; the base model's measures for `BASE`."""
    if arm == BASE:
        folder = model_folder(settings.study.load_arm(COLLAPSE, seed))
        with writing_json(settings.file_of(seed, BASE, BASE)) as found:
            found |= Point(BASE, BASE, 0, 0, 0.0)._asdict()
            found |= measure.measure(Policy.load(folder), settings.questions(BASE))
        return
    if not settings.study.is_trained(seed, arm):
        train(settings.study, seed, arm)
    measure_arm(settings, seed, arm)


def collect(settings: Settings, seed: int) -> None:
    """Write what is measured of a seed to its file of results; arms that stand there and are not in this WORK stay,
    if they went on from the same collapsed policy."""
    files = sorted((settings.study.work / f"seed-{seed}" / "measures").glob("*/*.json"))
    if not files:
        return
    base = settings.file_of(seed, BASE, BASE)
    policies = [json.loads(file.read_text()) for file in (*files, *([base] if base.is_file() else []))]
    arms = [arm for arm in dict.fromkeys(policy["arm"] for policy in policies) if arm != BASE]
    results = settings.results / f"seed-{seed}.json"
    earlier, courses = _of_other_arms(results, policies)
    with writing_json(results) as found:
        found["seed"] = seed
        found["policies"] = sorted([*policies, *earlier], key=lambda p: (p["arm"], p["tokens"], p["step"]))
        found["courses"] = courses | {arm: course(settings.study, seed, arm) for arm in arms}


def _of_other_arms(file: Path, policies: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return policies and courses of a file's arms that are not among these policies.

    Raises:
        ValueError: they went on from another collapsed policy.
    """
    if not file.is_file():
        return [], {}
    old, arms = json.loads(file.read_text(encoding="utf-8")), {policy["arm"] for policy in policies}
    kept = [policy for policy in old["policies"] if policy["arm"] not in arms]
    collapsed = [[p for p in each if p["arm"] == COLLAPSE] for each in (policies, old["policies"])]
    went_on = sorted({policy["arm"] for policy in kept} - {BASE})
    if went_on and all(collapsed) and collapsed[0] != collapsed[1]:
        raise ValueError(
            f"{file} holds arms {went_on} that went on from another collapsed "
            "policy than those of WORK; choose another folder by --results, or move the file away"
        )
    return kept, {arm: of for arm, of in old["courses"].items() if arm not in arms}


# ---------------------------------------------------------------- many units


def units_of(seeds: Sequence[int], arms: Sequence[str]) -> list[tuple[int, str]]:
    """Order the units: a seed after the other, its collapse first; the base model with the first."""
    return [(seed, arm) for seed in seeds for arm in (COLLAPSE, *([BASE] if seed == seeds[0] else []), *arms)]


def run_all(units: Sequence[tuple[int, str]], command: Sequence[str], settings: Settings, parallel: int) -> list[str]:
    """Run every unit in a process of its own, so many at once; an arm waits for its seed's collapse.

    Returns:
        The units that failed, in words.
    """
    waiting, running, failed = [unit for unit in units if not settings.is_done(*unit)], {}, []
    try:
        while waiting or running:
            for unit in list(_startable(waiting, running, settings))[: parallel - len(running)]:
                waiting.remove(unit)
                running[unit] = _start(unit, command, settings)
            for unit in [unit for unit, process in running.items() if process.poll() is not None]:
                code = running.pop(unit).returncode
                collect(settings, unit[0])
                if code:
                    failed.append(f"seed {unit[0]}: {unit[1]} ended with {code}; see {_log_of(unit, settings)}")
                    print(failed[-1], flush=True)
                if code and unit[1] == COLLAPSE:
                    waiting = [other for other in waiting if other[0] != unit[0] or other[1] == BASE]
            time.sleep(0.2)
        for seed in dict.fromkeys(seed for seed, _ in units):
            collect(settings, seed)
    finally:
        for process in running.values():
            process.terminate()  # it saves its last step
        for process in running.values():
            process.wait()
    return failed


def _startable(waiting: Sequence[tuple[int, str]], running: Any, settings: Settings) -> Iterator[tuple[int, str]]:
    for seed, arm in waiting:
        collapsed = settings.study.is_trained(seed, COLLAPSE) and (seed, COLLAPSE) not in running
        if collapsed or arm in (COLLAPSE, BASE):
            yield seed, arm


def _log_of(unit: tuple[int, str], settings: Settings) -> Path:
    return settings.study.work / f"seed-{unit[0]}" / f"{unit[1]}.log"


def _start(unit: tuple[int, str], command: Sequence[str], settings: Settings) -> subprocess.Popen:
    log = _log_of(unit, settings)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        words = [sys.executable, __file__, *command, "--unit", str(unit[0]), unit[1]]
        return subprocess.Popen(words, stdout=stream, stderr=stream)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="runs, policies and measures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", default=list(FIRST_ARMS), metavar="ARM", help=f"also {OTHER_ARMS}")
    parser.add_argument("--parallel", type=int, default=1, help="arms at once")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 2e6, 4e6], help="points after the collapse")
    parser.add_argument("--problems", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16, help="responses a problem at points on the way")
    parser.add_argument("--end-samples", type=int, default=64, help="and at the others")
    parser.add_argument("--task", type=Path, metavar="DIR", help="of scripts/pretrain_countdown.py")
    parser.add_argument("--configs", type=Path, default=ROOT / "configs" / "small")
    parser.add_argument("--results", type=Path, metavar="DIR", help="files of results; default: WORK/results")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write the page from the results and end")
    parser.add_argument("--table-only", action="store_true", help="print the tables of the results and end")
    parser.add_argument("--unit", nargs=2, metavar=("SEED", "ARM"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    results = args.results or args.work / "results"
    study = Study(args.work, args.configs, [int(tokens) for tokens in sorted(args.tokens)], args.task)
    settings = Settings(study, args.problems, args.samples, args.end_samples, results)
    if args.unit:
        try:
            run_unit(settings, int(args.unit[0]), args.unit[1])
        except Interrupted as reason:
            print(f"{reason}; the same command goes on")
            return EXIT_INTERRUPTED
        except GuardError as reason:
            print(f"{args.unit[1]}: {reason}")
            return GUARD
        return 0
    if args.page or args.table_only:
        text = page.write(results, args.page)
        print(text if args.table_only else f"wrote {args.page}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    if args.minutes is not None:
        signal.signal(signal.SIGALRM, lambda *_: sys.exit("time is over; the same command goes on"))
        signal.alarm(max(1, round(60 * args.minutes)))
    try:
        failed = run_all(units_of(args.seeds, args.arms), arguments, settings, args.parallel)
    except ValueError as reason:
        sys.exit(f"reproduce_small: {reason}")
    print(page.write(results, None))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
