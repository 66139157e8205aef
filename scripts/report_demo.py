"""Every analysis of the demo's own checkpoints, and the page that shows them: `python scripts/report_demo.py WORK`.

WORK gets the run (`WORK/demo`, five minutes on two cores; what is there already is not done again), a policy that is
cooled from the reheated one, evaluations and analyses. `docs/report_demo/` gets the page and figures for documents.
"""

import argparse
import json
import shutil
from pathlib import Path

from tsopsd_jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "report_demo"
SHOWN = ("curves", "distributions", "reversal")
"""Analyses whose PNG stands beside the page."""
BENCHMARK = ("--benchmarks", "countdown:test", "--first", "512", "--max-tokens", "19", "--slots", "1024")


def tsopsd(*words: object) -> None:
    """Run a command of the package; raises SystemExit if it fails."""
    command = [str(word) for word in words]
    print("$ tsopsd", *command, flush=True)
    if code := main(command):
        raise SystemExit(f"tsopsd {command[0]} ended with {code}")


def once(made: Path, *words: object) -> None:
    """Run a command unless what it makes is there."""
    if not made.exists():
        tsopsd(*words)


def ends_of_phases(run: Path) -> dict[str, int]:
    """Phase -> its last step, whose checkpoint holds the policy that it left."""
    return {each["phase"]: each["step"] for each in json.loads((run / "status.json").read_text())["phases"]}


def evaluate(run: Path, ends: dict[str, int], between: list[int], work: Path) -> None:
    """Table 1 of the four stages; the checkpoints of reheating; responses of the collapsed policy at temperature 1."""
    table = work / "table"
    tsopsd("eval", "--model", ROOT / "tsopsd_jax/assets/countdown-tiny", "--name", "base", *BENCHMARK,
           "--verifier", "countdown", "--out", table)  # fmt: skip
    for name, phase in (("collapsed", "rl"), ("reheated", "reheat"), ("continued", "rl-again")):
        tsopsd("eval", "--run", run, "--step", ends[phase], "--name", name, *BENCHMARK, "--out", table)
    for step in between:
        tsopsd("eval", "--run", run, "--step", step, *BENCHMARK, "--out", work / "reheating")
    tsopsd("eval", "--run", run, "--step", ends["rl"], "--name", "collapsed", *BENCHMARK, "--samples", 2, "--top-p", 1,
           "--out", work / "responses")  # fmt: skip


def cool(run: Path, work: Path, reheated: int) -> Path:
    """Distil the reheated policy at T = 1 / 1.2 by the reverse KL until its entropy is what it was (appendix E)."""
    once(work / "reheated", "convert", run, "--step", reheated, "--dtype", "float32", "--out", work / "reheated")
    settings = (
        f"model.path={work / 'reheated'}",
        "phases.rl=null",
        "phases.rl-again=null",
        "phases.reheat.outcome=recooled",
        "phases.reheat.objective.hyperparameters={direction: reverse, teacher_temperature: 0.8333}",
        "phases.reheat.stop={collapsed_below_nats: 0.15, steps: 60}",
        "phases.reheat.guard={max_start_entropy_nats: null}",
    )
    sets = [word for setting in settings for word in ("--set", setting)]
    tsopsd("train", ROOT / "configs/demo.yaml", "--run-dir", work / "cooled", *sets)
    return work / "cooled"


def analyse(run: Path, ends: dict[str, int], between: list[int], work: Path) -> Path:
    """Every analysis of `tsopsd analyse`, into one folder."""
    out = work / "analyses"
    before, after = f"{run}@{ends['rl']}", f"{run}@{ends['reheat']}"
    responses = ("--responses", work / "responses" / "countdown-test" / "collapsed.jsonl")
    two = ("--before", before, "--after", after)
    recooled = cool(run, work, ends["reheat"])
    middle = [f"{run}@{step}" for step in between[1:-1]]
    for name, words in {
        "curves": (run,),
        "representations": (*two, *responses),
        "reasoning": (run, "--evaluations", work / "reheating"),
        "distributions": (*two, *responses),
        "forks": (*two, "--between", *middle, *responses, "--slots", 1024),
        "jump": (run,),
        "temperatures": ("--before", before, *responses, "--first", 256),
        "reversal": (*two, "--recooled", recooled),
        "cost": (run,),
        "table": (work / "table",),
    }.items():
        tsopsd("analyse", name, "--out", out, *words)
    return out


def run(work: Path) -> None:
    """Train, cool, evaluate, analyse, and write the page."""
    demo = work / "demo"
    tsopsd("demo", "--run-dir", demo, "--set", "checkpoint_every_steps=3", "--set", "keep_checkpoints=60")
    ends = ends_of_phases(demo)
    kept = sorted(int(each.name) for each in (demo / "checkpoints").iterdir() if each.name.isdigit())
    between = [step for step in kept if ends["rl"] <= step <= ends["reheat"]]
    evaluate(demo, ends, between, work)
    out = analyse(demo, ends, between, work)
    PAGE.mkdir(exist_ok=True)
    tsopsd("report", demo, "--analyses", out, "--out", PAGE / "report.html")
    for name in SHOWN:
        shutil.copyfile(out / f"{name}.png", PAGE / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, metavar="WORK")
    run(parser.parse_args().work)
