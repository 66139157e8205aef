"""The loop: phases on one train state, stop rules, guards, checkpoints, evaluation between phases.

for phase in schedule:
    while not over:  run = step(run);  log
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from tsopsd_jax.data.encode import encode_prompts
from tsopsd_jax.distributed import heartbeat, processes
from tsopsd_jax.distributed.sharding import put, replicated
from tsopsd_jax.evaluation.evaluate import evaluate, evaluation_key
from tsopsd_jax.learn.micro_batches import device_bytes
from tsopsd_jax.learn.start_kl import start_policy
from tsopsd_jax.learn.update import ENTROPY, abstract_state, fresh_optimizer_state
from tsopsd_jax.model import Qwen3
from tsopsd_jax.rewards import answers_cut_off
from tsopsd_jax.rollout import Engine
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.checkpoints import Checkpoints, Progress, Saved
from tsopsd_jax.rundir.log import RunLog, append_evaluation, read_evaluations
from tsopsd_jax.train.phase import Phase
from tsopsd_jax.train.phase_step import Steps, Where
from tsopsd_jax.train.task import EvaluationPlan, Task
from tsopsd_jax.types import PyTree, TrainState


class Screen(Protocol):
    """Where a person watches the run; `display.live_table.LiveTable` is one."""

    def phase(self, name: str, until: str) -> None: ...

    def step(self, line: Mapping[str, Any], time_left_s: float | None = None) -> None: ...

    def sampling(self, progress: Any) -> None: ...

    def note(self, text: str) -> None: ...


class Interrupted(Exception):
    """A signal asked the run to stop: after a step, or in a rollout or an evaluation, which are left. The state is saved."""


class Trainer:
    """Runs a schedule in a run directory, from wherever its checkpoints stand.

    Args:
        model: the policy's functions.
        load_params: called once if there is no checkpoint: float32 parameters on the mesh.
        phases: the schedule.
        task: problems, tokenizer, verifier.
        evaluation: None for no evaluation.
        mesh: where everything lies.
        seed: of sampling; data order uses `task.seed`.
        run_dir: see DESIGN of a run directory in docs/architecture.md.
        checkpoint_every_steps, keep_checkpoints: periodic saves and how many stay.
        wandb_project: optional mirror of the log.
        table: where progress is shown.
    """

    def __init__(
        self,
        *,
        model: Qwen3,
        load_params: Callable[[], PyTree],
        phases: Sequence[Phase],
        task: Task,
        evaluation: EvaluationPlan | None,
        mesh: jax.sharding.Mesh,
        seed: int,
        run_dir: Path,
        checkpoint_every_steps: int,
        keep_checkpoints: int,
        wandb_project: str | None,
        table: Screen,
    ):
        self.model, self.phases, self.task, self.evaluation = model, phases, task, evaluation
        self.mesh, self.run_dir, self.table = mesh, run_dir, table
        self.every = checkpoint_every_steps
        key = jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(mesh))()
        self.where = Where(model, mesh, task, key, device_bytes(mesh))
        heartbeat.tick("looking for checkpoints")
        self.checkpoints = Checkpoints(object_store.checkpoints_of(run_dir), keep=keep_checkpoints)
        self.saved_step = self.checkpoints.latest() or 0
        self.run_state = self._start(load_params)
        self.began = time.monotonic() - self.progress.elapsed_s
        self.log = None
        if processes.is_first():
            self.log = RunLog(run_dir, last_step=int(self.state.step), wandb_project=wandb_project)
        self.stop_signal: int | None = None
        self._ahead: dict[int, Future[Steps]] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")

    # ------------------------------------------------------------------ state

    @property
    def state(self) -> TrainState:
        """Parameters, optimizer, step."""
        return self.run_state.state

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.run_state.progress

    def _now(self, **changes: Any) -> None:
        """Change the progress."""
        self.run_state = self.run_state._replace(progress=dataclasses.replace(self.progress, **changes))

    def _start(self, load_params: Callable[[], PyTree]) -> Saved:
        """The latest checkpoint's state, or step 0 from the pretrained weights."""
        phase = self.phases[0]  # every phase's optimizer state has the same structure
        like = abstract_state(self.model, phase.optimizer, self.mesh)
        if self.checkpoints.latest() is None:
            heartbeat.tick("loading the weights")
            params = load_params()
            step = put(np.zeros((), np.int32), replicated(self.mesh))
            return Saved(TrainState(step, params, fresh_optimizer_state(phase.optimizer, like, params)), Progress())
        heartbeat.tick("restoring a checkpoint")
        start_like = jax.tree.map(lambda x: x.update(dtype=self.model.compute_dtype), like.params)
        return self.checkpoints.restore(like, start_like=start_like)

    def _save(self) -> None:
        """Save the run as it stands, unless that was done. The start needs no checkpoint: it can be loaded again."""
        if (step := int(self.state.step)) == self.saved_step:
            return
        heartbeat.tick("saving a checkpoint")
        self._now(elapsed_s=time.monotonic() - self.began)
        self._push()  # first: the log must not be behind the checkpoint
        self.checkpoints.save(self.run_state)
        self.saved_step = step

    def _push(self) -> None:
        if processes.is_first():
            object_store.push(self.run_dir)

    # ------------------------------------------------------------------- loop

    def run(self) -> None:
        """Run what is left of the schedule.

        Raises:
            Interrupted: SIGTERM or SIGINT arrived, and everything up to the last finished step is saved.
            GuardError: a guard of a phase stopped the run; nothing was saved after the last checkpoint.
        """
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._evaluate_stage()
            while self.progress.phase < len(self.phases):
                self._leave(self._asked(), "took no step after")  # asked while it evaluated
                self._run_phase(self.phases[self.progress.phase])
                self._evaluate_stage()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._compiler.shutdown(wait=False, cancel_futures=True)
            heartbeat.tick("writing the last checkpoint")
            self.checkpoints.close()
            if self.log is not None:
                self.log.close()

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.stop_signal is not None:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.stop_signal = number

    def _asked(self) -> int:
        """The signal that reached any of the processes, 0 for none: the same answer in all."""
        return max(processes.exchange(self.stop_signal or 0))

    def _leave(self, asked: int, what: str) -> None:
        if asked:
            raise Interrupted(f"{signal.Signals(asked).name}: {what} step {int(self.state.step)}")

    def _sampling(self, progress: Any) -> None:
        """Between two segments of a rollout: a step that was not finished has changed nothing."""
        self.table.sampling(progress)
        if asked := self._asked():
            self._save()
            self._leave(asked, "left the rollout after")

    def _run_phase(self, phase: Phase) -> None:
        """Take steps until the phase is over, then advance to the next and save."""
        self.table.phase(phase.name, phase.stop.words())
        if self.progress.phase_step == 0 and phase.reset_optimizer and int(self.state.step):
            like = abstract_state(self.model, phase.optimizer, self.mesh)
            opt_state = fresh_optimizer_state(phase.optimizer, like, self.state.params)
            state = dataclasses.replace(self.state, opt_state=opt_state)
            self.run_state = self.run_state._replace(state=state)
        if phase.measure_start_kl and self.run_state.start is None:
            self.run_state = self.run_state._replace(start=start_policy(self.model, self.state.params))
        take_step = self._steps()
        while True:
            cut_off = answers_cut_off()
            if self._evaluation_due():  # also where a run goes on that was stopped while it evaluated
                self._evaluate(f"during {phase.name}")
                self._leave(self._asked(), "took no step after")
            heartbeat.tick(f"step {int(self.state.step) + 1}")
            self.run_state, line, entropy = take_step(self.run_state, self._sampling)
            self._compile_ahead()
            line["judge/verifier_killed"] = answers_cut_off() - cut_off
            reason = self._after_step(phase, line, entropy)
            if reason is not None:
                self.table.note(f"phase {phase.name!r} ends at step {int(self.state.step)}: {reason}")
                at, position = self.progress.phase + 1, self.progress.position
                self.run_state = Saved(self.state, Progress(phase=at, position=position, phase_position=position))
            due = int(self.state.step) % self.every == 0 or self._evaluation_due()
            asked = self._asked()
            if reason is not None or due or asked:
                self._save()
            self._leave(asked, "saved")
            if reason is not None:
                return

    def _steps(self) -> Steps:
        """The current phase's steps, compiled already or to be compiled when first called."""
        at = self.progress.phase
        if at in self._ahead:
            with contextlib.suppress(Exception):  # whatever it was, it happens again below if it matters
                return self._ahead.pop(at).result()
        return Steps(self.phases[at], self.where)

    def _compile_ahead(self) -> None:
        """Compile the phases to come in a thread while this one runs. Not on a GPU, whose compiler measures kernels on the
        device, in the memory that the run needs."""
        if self.mesh.devices.flat[0].platform == "gpu":
            return

        def compiled(phase: Phase) -> Steps:
            steps = Steps(phase, self.where)
            steps.compile()
            return steps

        for at in range(max(self._ahead, default=self.progress.phase) + 1, len(self.phases)):
            self._ahead[at] = self._compiler.submit(compiled, self.phases[at])

    def _after_step(self, phase: Phase, line: dict[str, Any], entropy: float) -> str | None:
        """Book-keeping of one step: progress, log, guards. Returns why the phase is over, or None."""
        skipped = self.progress.skipped_in_row + 1 if line["optim/skipped"] else 0
        window = (*self.progress.entropies_nats, entropy)[-phase.stop.window_steps :]
        self._now(phase_step=self.progress.phase_step + 1, entropies_nats=window, skipped_in_row=skipped)
        step = self.progress.phase_step
        phase.check_measured(ENTROPY in line)
        head = {
            "step": int(self.state.step),
            "phase": phase.name,
            "phase_step": step,
            "time_s": time.monotonic() - self.began,
        }
        if self.log is not None:
            self.log.write(head | line)
        left = None
        if phase.stop.steps is not None:
            left = (phase.stop.steps - step) * (line["time/step_s"])
        self.table.step(head | line, left)
        phase.guard.check(phase=phase.name, phase_step=step, entropy_nats=entropy, skipped_in_row=skipped)
        epochs = (self.progress.position - self.progress.phase_position) / len(self.task.problems)
        return phase.stop.reason(phase_step=step, epochs=epochs, entropies_nats=window)

    # ------------------------------------------------------------- evaluation

    def _evaluation_due(self) -> bool:
        """Within a phase; at its end it is evaluated anyway."""
        every = self.evaluation and self.evaluation.every_steps
        return bool(every and self.progress.phase_step and int(self.state.step) % every == 0)

    def _evaluate_stage(self) -> None:
        """Evaluate the policy between phases."""
        if not self.progress.phase_step:
            at = self.progress.phase
            self._evaluate("base" if at == 0 else self.phases[at - 1].outcome)

    def _evaluate(self, stage: str) -> None:
        """Evaluate the policy, which is saved, unless that stands in the log already."""
        plan, step, done = self.evaluation, int(self.state.step), read_evaluations(self.run_dir)
        if plan is None or processes.from_first(any(r["stage"] == stage and r["step"] == step for r in done)):
            return

        heartbeat.tick(f"evaluating {stage}")

        def watch(progress: Any) -> None:
            self.table.sampling(progress)
            self._leave(self._asked(), "left the evaluation of")  # no step is lost: the next start evaluates again

        engine, width = self._evaluation_engine, self.task.max_prompt_tokens
        record = evaluate(
            engine,
            engine.view(self.state.params),
            evaluation_key(self.where.key),
            prompts=encode_prompts(plan.problems, self.task.tokenizer, max_prompt_tokens=width),
            answers=[p.answer for p in plan.problems],
            samples=plan.samples,
            decode=self.task.tokenizer.decode,
            verify=self.task.verify,
            on_progress=watch,
        )
        where = {"stage": stage, "step": step, "phase_step": self.progress.phase_step, **plan.facts()}
        if processes.is_first():
            append_evaluation(self.run_dir, where | record)
        self._push()
        self.table.note(
            f"{stage}: avg@{plan.samples} {100 * record['avg_at_k']:.1f} %, "
            f"pass@{plan.samples} {100 * record['pass_at_k']:.1f} %"
        )

    @functools.cached_property
    def _evaluation_engine(self) -> Engine:
        """Compiled once: every stage is evaluated by the same programs."""
        plan = self.evaluation
        assert plan is not None
        return self.where.engine(plan.sampling, plan.max_response_tokens, plan.rows_at_once, entropy=True)
