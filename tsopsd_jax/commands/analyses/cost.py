"""`tsopsd analyse cost`: time and tokens of a run's phases (table 6)."""

import argparse
from pathlib import Path
from typing import Any

from tsopsd_jax.analysis.cost import STEP_PARTS, PhaseCost, cost_of, reheating_share
from tsopsd_jax.commands.analyses.runs import add_runs, reheating_phases, trajectory_of
from tsopsd_jax.config.restore import resolved_config
from tsopsd_jax.display.figures import Bars, Figure
from tsopsd_jax.train.cycle import without_round


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_runs(parser, several=True)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Add up what the steps of each run took."""
    report, rows = dict[str, Any](), dict[str, PhaseCost]()
    for run_dir in map(Path, args.run_dirs):
        log, phases = trajectory_of(run_dir), {phase.name: phase for phase in resolved_config(run_dir).phases}
        taken = dict.fromkeys(span.phase for span in log.spans)
        batch = {
            name: phase.prompts_per_step * phase.responses_per_prompt
            for name in taken
            if (phase := phases.get(without_round(name)))
        }
        reheating = [name for name in taken if without_round(name) in reheating_phases(run_dir)]
        found = cost_of(log, batch_sequences=batch, reheats=reheating)
        share = reheating_share(found)
        report[str(run_dir)] = {"phases": [each._asdict() for each in found], "reheating_share_of_the_rest": share}
        for each in found:
            rows[each.phase if len(args.run_dirs) == 1 else f"{log.name} {each.phase}"] = each
    return report, _figure(rows, report)


def _figure(rows: dict[str, PhaseCost], report: dict[str, Any]) -> Figure:
    names = [f"{name}\n{each.steps} x {each.batch_sequences}" for name, each in rows.items()]
    parts = (*STEP_PARTS, "other")

    def bars(title: str, unit: str, factor) -> Bars:
        return Bars(title, unit, names, {p: [each.part_s[p] * factor(each) for each in rows.values()] for p in parts})

    panels = [
        bars("(a) A step", "s", lambda _: 1.0),
        bars("(b) A response of the batch", "ms", lambda each: 1e3 / each.batch_sequences),
        bars("(c) The phase", "h", lambda each: each.steps / 3600),
        Bars("(d) Tokens sampled", "millions", names, {"tokens": [each.tokens / 1e6 for each in rows.values()]}),
    ]
    shares = [each["reheating_share_of_the_rest"] for each in report.values()]
    words = ", ".join("none" if share is None else f"{100 * share:.1f} %" for share in shares)
    caption = (
        f"Phases by steps x responses of a batch. Reheating takes {words} of the time of the other phases (TS-OPSD, "
        "table 6, which divides a step's time by 1024 sequences for reheating and by 64 prompts, 512 sequences, for "
        "RL; here both are by sequences)."
    )
    return Figure(panels, caption)
