"""The evaluations of a run: between its phases, and within them at steps that the plan's `every_steps` divides."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsopsd_jax.data.encode import encode_prompts
from tsopsd_jax.distributed import heartbeat, processes
from tsopsd_jax.evaluation.evaluate import evaluate, evaluation_key
from tsopsd_jax.rollout import Engine
from tsopsd_jax.rundir.log import RunLog, read_evaluations
from tsopsd_jax.rundir.run_state import RunState
from tsopsd_jax.train.phase_step import Shared
from tsopsd_jax.train.task import EvaluationPlan


class Evaluations:
    """Evaluates the policy of a run, and records it in the run directory.

    Args:
        plan: what is evaluated; None: nothing is.
        shared: by which model, on what.
        name: of the phase that a run is in.
        run_dir: where records are.
        log: where they go; None: another process writes them.
    """

    def __init__(
        self,
        plan: EvaluationPlan | None,
        shared: Shared,
        name: Callable[[RunState], str],
        run_dir: Path,
        log: RunLog | None,
    ):
        self.plan, self.shared, self.name, self.run_dir, self.log = plan, shared, name, run_dir, log

    def stage(self, run: RunState) -> str | None:
        """The name of the stage at which the policy is to be evaluated now; None: at none."""
        if self.plan is None:
            return None
        if not run.progress.phase_step:
            return run.progress.stage
        every = self.plan.every_steps
        return f"during {self.name(run)}" if every and run.step % every == 0 else None

    def evaluate(self, run: RunState, stage: str, on_progress: Callable[[Any], None]) -> str | None:
        """Evaluate the policy and record it, unless that stands in the log already; returns its scores in words.

        Args:
            run: whose policy; it is saved.
            stage: the name in the record.
            on_progress: called after every segment; what it raises leaves the evaluation, which has no record then.
        """
        plan, task, done = self.plan, self.shared.task, read_evaluations(self.run_dir)
        assert plan is not None
        if processes.from_first(any(r["stage"] == stage and r["step"] == run.step for r in done)):
            return None
        heartbeat.tick(f"evaluating {stage}")
        record = evaluate(
            self._engine,
            self._engine.view(run.state.params),
            evaluation_key(self.shared.key),
            prompts=encode_prompts(plan.problems, task.tokenizer, max_prompt_tokens=plan.max_prompt_tokens),
            problems=plan.problems,
            samples=plan.samples,
            decode=task.tokenizer.decode,
            score=plan.rewards,
            on_progress=on_progress,
        )
        where = {"stage": stage, "step": run.step, "phase_step": run.progress.phase_step, **plan.facts()}
        if self.log is not None:
            self.log.write_evaluation(where | record)
            self.log.push()
        scores = (f"{name}@{plan.samples} {100 * record[f'{name}_at_k']:.1f} %" for name in ("avg", "pass"))
        failed = record["reward_failed_fraction"]
        note = f"; rewards of {100 * failed:.1f} % of the responses failed: they count as wrong" if failed else ""
        return f"{stage}: {', '.join(scores)}{note}"

    @functools.cached_property
    def _engine(self) -> Engine:
        """Compiled once: every stage is evaluated by the same programs."""
        plan = self.plan
        assert plan is not None
        return self.shared.engine(
            plan.sampling,
            plan.max_response_tokens,
            plan.rows_at_once,
            max_prompt_tokens=plan.max_prompt_tokens,
            entropy=True,
        )
