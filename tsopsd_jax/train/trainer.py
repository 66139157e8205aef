"""The loop: phases on one train state, stop rules, guards, checkpoints, evaluation between phases.

for phase in schedule:
    while not over:  run, seen = step(run);  log(seen);  save and evaluate when due
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tsopsd_jax.distributed import heartbeat, processes
from tsopsd_jax.distributed.sharding import put, replicated
from tsopsd_jax.learn.reference import start_policy
from tsopsd_jax.learn.update import abstract_state, fresh_optimizer_state
from tsopsd_jax.metric_names import ENTROPY, TRUNCATED
from tsopsd_jax.rewards import failure_words
from tsopsd_jax.rundir import object_store, status
from tsopsd_jax.rundir.checkpoints import Checkpoints
from tsopsd_jax.rundir.log import RunLog
from tsopsd_jax.rundir.run_state import RunProgress, RunState
from tsopsd_jax.rundir.trackers import Tracker
from tsopsd_jax.train.compile_ahead import Compilations, PhaseSteps
from tsopsd_jax.train.cycle import ONCE, Cycle, Place
from tsopsd_jax.train.evaluations import Evaluations
from tsopsd_jax.train.host_memory import give_back
from tsopsd_jax.train.metrics import StepFacts, step_line
from tsopsd_jax.train.perf import Pace
from tsopsd_jax.train.phase import GuardError, Phase
from tsopsd_jax.train.phase_step import Shared
from tsopsd_jax.train.profiling import StepProfile
from tsopsd_jax.train.samples import Samples, kept_samples
from tsopsd_jax.train.signals import Interrupted, StopRequest, leave
from tsopsd_jax.train.task import EvaluationPlan
from tsopsd_jax.types import PyTree, TrainState


class Screen(Protocol):
    """Where a person watches the run; `display.live_table.LiveTable` is one."""

    def phase(self, name: str, until: str) -> None: ...

    def step(self, line: Mapping[str, Any], time_left_s: float | None = None) -> None: ...

    def sampling(self, progress: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Trainer:
    """Runs a schedule in a run directory, from wherever its checkpoints stand.

    Args:
        shared: model, devices, task.
        load_params: called once if there is no checkpoint: float32 parameters on the mesh.
        phases, cycle: the schedule; the phases of the cycle may come again and again.
        baseline_steps: steps of the run whose mean entropy stop rules may be relative to.
        evaluation: None for no evaluation.
        run_dir: see DESIGN of a run directory in docs/architecture.md.
        checkpoint_every_steps, keep_checkpoints: periodic saves and how many stay.
        tracker: where the log is mirrored.
        table: where progress is shown.
        profile_steps: the first and the last step to trace into the run directory; None: none.
        samples: which responses are kept in samples.jsonl.
        after_step: called after each step was logged.
    """

    def __init__(
        self,
        shared: Shared,
        phases: Sequence[Phase],
        *,
        load_params: Callable[[], PyTree],
        evaluation: EvaluationPlan | None,
        run_dir: Path,
        checkpoint_every_steps: int,
        keep_checkpoints: int,
        tracker: Tracker,
        table: Screen,
        samples: Samples = Samples(),  # noqa: B008 - frozen
        profile_steps: tuple[int, int] | None = None,
        cycle: Cycle = ONCE,
        baseline_steps: int = 10,
        after_step: Callable[[], None] = lambda: None,
    ):
        self.shared, self.phases, self.run_dir, self.table = shared, phases, run_dir, table
        self.cycle, self.baseline_steps, self.after_step = cycle, baseline_steps, after_step
        self.every, self.samples = checkpoint_every_steps, samples
        self.profile = StepProfile(profile_steps, run_dir / "profile")
        heartbeat.tick("looking for checkpoints")
        self.checkpoints = Checkpoints(object_store.checkpoints_address(run_dir), keep=keep_checkpoints)
        self.run_state = self._start(load_params)
        self.saved_step = self.run_state.step
        self.began = time.monotonic() - self.progress.elapsed_s
        self.log = None
        if processes.is_first():
            self.log = RunLog(run_dir, last_step=self.run_state.step, tracker=tracker)
            if missing := self.log.missing_steps:
                table.note(
                    f"warning: the log lacks {missing:,} of the {self.run_state.step:,} steps that were taken; was it "
                    "copied while the run went on?"
                )
            self._saved()
        self.signals = StopRequest(table.note, table.close)
        self.compilations, self.pace = Compilations(), Pace()
        self._given_back = (0.0, self.saved_step)
        """Seconds of compilations, and the step saved last, when freed memory was given back."""
        self.steps = PhaseSteps(phases, shared, cycle)
        self.evaluations = Evaluations(evaluation, shared, self._name, run_dir, self.log)

    # ------------------------------------------------------------------- loop

    def run(self) -> None:
        """Run what is left of the schedule.

        Raises:
            Interrupted: SIGTERM or SIGINT arrived, and everything up to the last finished step is saved.
            GuardError: a guard of a phase stopped the run; nothing was saved after the last checkpoint.
            SaveError: a checkpoint could not be written.
        """
        with contextlib.ExitStack() as closing:
            closing.enter_context(self.signals.heard())  # until all is closed: a signal must not cut off the last save
            if self.log is not None:
                closing.callback(self.log.close)
            closing.callback(self._saved)
            closing.callback(self.checkpoints.close)
            closing.callback(heartbeat.tick, "writing the last checkpoint")
            closing.callback(self.steps.close)
            closing.callback(self.profile.close)
            closing.enter_context(self.compilations.told())
            self._evaluate()
            while self.progress.phase < len(self.phases):
                self._leave("took no step after")  # asked while it evaluated
                self._run_phase(self.phases[self.progress.phase])
                self._evaluate()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Write into the run directory how what is done inside ends: the state and its reason."""
        state, reason = status.ENDED, None
        try:
            yield
        except BaseException as error:
            state = status.GUARD if isinstance(error, GuardError) else status.FAILED
            state = status.STOPPED if isinstance(error, Interrupted | KeyboardInterrupt) else state
            kind = f"{type(error).__name__}: " if state == status.FAILED else ""
            reason = " ".join(f"{kind}{error}".split()) or "a second signal, which does not wait for the step"
            raise
        finally:
            if self.log is not None:
                with contextlib.suppress(OSError):  # a full disk: the error that it caused is the one to be told
                    self.log.status.state(state, reason)
                if state == status.FAILED:  # nobody else will
                    with contextlib.suppress(Exception):
                        object_store.push(self.run_dir)

    def _run_phase(self, phase: Phase) -> None:
        """Take what is left of a phase, then advance to the next and save."""
        name = self._name(self.run_state)
        heartbeat.tick(f"preparing phase {name}")
        self.table.phase(name, phase.stop.words())
        # A run that goes on may have other rules: they hold before its first step.
        over = self._over(phase) or self._take_steps(phase)
        self.table.note(f"phase {name!r} ends at step {self.run_state.step}: {over}")
        if self.log is not None:
            self.log.status.phase_ended(name, self.run_state.step, over)
        self.run_state = RunState(self.state, self._next_phase(phase))
        self._pause(save=True)

    def _next_phase(self, phase: Phase) -> RunProgress:
        """The progress at the beginning of what follows a phase that is over."""
        now, here = self.progress, self._place(self.run_state)
        collapsed = phase.stop.entropy_reason(
            phase_step=now.phase_step, entropies_nats=now.entropies_nats, baseline_nats=now.baseline_nats
        )
        then = self.cycle.after(here, missed_collapse=phase.stop.waits_for_collapse and collapsed is None)
        if here.phase in self.cycle and then.phase > self.cycle.last:
            why = "without a collapse" if then.phase > here.phase + 1 else f"of {self.cycle.times} allowed"
            self.table.note(f"the cycle ends after round {here.round} {why}")
        stage = self.cycle.named(phase.outcome, here)
        return now.next_phase(phase=then.phase, round=then.round, stage=stage)

    @staticmethod
    def _place(run: RunState) -> Place:
        return Place(run.progress.phase, run.progress.round)

    def _name(self, run: RunState) -> str:
        """The name of the phase that a run is in, with its round."""
        here = self._place(run)
        return self.cycle.named(self.phases[here.phase].name, here)

    def _take_steps(self, phase: Phase) -> str:
        """Take steps until the phase is over; returns why it is."""
        self._begin(phase)
        self.pace = Pace()
        at = self.progress.phase
        step = self.steps.of(at)
        while True:
            if self._evaluate():  # also where a run goes on that was stopped while it evaluated
                self._leave("took no step after")
            self._check_saved()
            self._renew_reference(phase)
            heartbeat.tick(f"step {self.run_state.step + 1}")
            compiled_s = self.compilations.seconds
            with self.profile.step(self.run_state.step + 1):
                self.run_state, seen = step(self.run_state, self._between_segments, self._before_update)
            self.pace.add(seen.step_s - (self.compilations.seconds - compiled_s))
            self.steps.compile_after(at)
            self._log(phase, seen)
            self.after_step()
            if over := self._over(phase):
                return over
            evaluates = self.evaluations.stage(self.run_state) is not None
            self._pause(save=evaluates or self.run_state.step % self.every == 0)

    def _pause(self, *, save: bool) -> None:
        """Save if that is due, or if a signal asks the run to stop, which it then does."""
        asked = self.signals.asked()
        if save or asked:
            self._save()
        leave(asked, f"saved step {self.run_state.step}")

    def _begin(self, phase: Phase) -> None:
        """Make ready what a phase begins with."""
        run = self.run_state
        if run.progress.phase_step == 0 and phase.reset_optimizer and run.step:
            like = abstract_state(self.shared.model, phase.optimizer, self.shared.mesh)
            opt_state = fresh_optimizer_state(phase.optimizer, like, run.state.params)
            run = run._replace(state=dataclasses.replace(run.state, opt_state=opt_state))
        self.run_state = run

    def _renew_reference(self, phase: Phase) -> None:
        """Copy the policy before the steps that ask for it. (A step that was left and is taken again asks again, and
        gets the same copy: a run that resumes goes on as one that did not stop.)"""
        if phase.renews_reference(self.progress.phase_step):
            self.run_state = self.run_state._replace(start=None)  # two copies might not fit
            self.run_state = self.run_state._replace(start=start_policy(self.shared.model, self.state.params))

    def _between_segments(self, progress: Any) -> None:
        """Show a rollout, and leave it if that is asked: a step that was not finished has changed nothing."""
        self._check_saved()
        self.table.sampling(progress)
        if asked := self.signals.asked():
            self._save()
            leave(asked, f"left the rollout after step {self.run_state.step}")

    def _before_update(self) -> None:
        """Make room on a CPU, where an update takes the most memory. A checkpoint is written from the state's own
        memory, and an update that cannot take that over needs a second copy of the state: so it waits."""
        if self.shared.mesh.devices.flat[0].platform != "cpu":
            return
        heartbeat.tick(f"step {self.run_state.step + 1}: making room for the update")
        self.checkpoints.settle()
        if (now := (self.compilations.seconds, self.saved_step)) != self._given_back:
            self._given_back = now
            give_back()

    def _log(self, phase: Phase, seen: StepFacts) -> None:
        """Count a step that was taken, and write its line.

        Raises:
            GuardError: it broke a limit of the phase.
        """
        phase.check_measured(ENTROPY in seen.update)
        entropy = seen.entropy_nats
        now = self.progress.after_step(
            entropy_nats=entropy,
            skipped=seen.skipped,
            window_steps=phase.stop.remembered_steps,
            baseline_steps=self.baseline_steps,
        )
        now = dataclasses.replace(now, learning_rate_factor=phase.turned_rate(self.progress, entropy))
        self.run_state = self.run_state._replace(progress=now)
        name = self._name(self.run_state)
        line = step_line(name, self.run_state, seen, time_s=time.monotonic() - self.began)
        refused = phase.guard.broken(
            phase=name,
            phase_step=now.phase_step,
            entropy_nats=entropy,
            skipped_in_row=now.skipped_in_row,
            truncated_fraction=line[TRUNCATED],
        )
        if decision := refused or self._over(phase):
            line["phase_end"] = decision
        if words := failure_words([verdict for scored in seen.drawn.scored for verdict in scored.verdicts]):
            self.table.note(f"warning: step {self.run_state.step}: {words}")
        if seen.nonfinite is not None:
            self.table.note(f"warning: step {self.run_state.step} was not finite: {seen.nonfinite.words}")
            if self.log is not None:
                self.log.write_nonfinite(line["step"], *seen.nonfinite)
        if self.log is not None:
            group, decode = phase.responses_per_prompt, self.shared.task.tokenizer.decode
            self.log.write_samples(
                kept_samples(self.samples, seen.drawn, step=line["step"], phase=name, group=group, decode=decode)
            )
            self.log.write(line)
        left = None if phase.stop.steps is None else self.pace.left_s(phase.stop.steps - now.phase_step)
        self.table.step(line, left)
        if refused:
            raise GuardError(refused)

    def _over(self, phase: Phase) -> str | None:
        """Why the phase is over, or None."""
        now = self.progress
        epochs = (now.position - now.phase_position) / len(self.shared.task.problems)
        return phase.stop.reason(
            phase_step=now.phase_step,
            epochs=epochs,
            entropies_nats=now.entropies_nats,
            baseline_nats=now.baseline_nats,
        )

    def _evaluate(self) -> bool:
        """Evaluate the policy if that is due, and tell of it; whether it was due."""
        stage = self.evaluations.stage(self.run_state)
        if stage is None:
            return False

        def watch(progress: Any) -> None:
            self.table.sampling(progress)
            self._leave("left the evaluation of")  # no step is lost: the next start evaluates again

        if scores := self.evaluations.evaluate(self.run_state, stage, watch):
            self.table.note(scores)
        return True

    # ------------------------------------------------------------------ state

    @property
    def state(self) -> TrainState:
        """Parameters, optimizer, step."""
        return self.run_state.state

    @property
    def progress(self) -> RunProgress:
        """Where the run stands."""
        return self.run_state.progress

    @property
    def phase_name(self) -> str | None:
        """The name of the phase that the run is in; None: its schedule is done."""
        return None if self.progress.phase == len(self.phases) else self._name(self.run_state)

    def _start(self, load_params: Callable[[], PyTree]) -> RunState:
        """The latest checkpoint's state, or step 0 from the pretrained weights."""
        model, mesh = self.shared.model, self.shared.mesh
        optimizer = self.phases[0].optimizer  # every phase's optimizer state has the same structure
        like = abstract_state(model, optimizer, mesh)
        heartbeat.tick("restoring a checkpoint")
        self.checkpoints.remove_unfinished()
        run, damaged = self.checkpoints.restore_newest(like, start_like=like.params)
        if run is None:
            heartbeat.tick("loading the weights")
            params = load_params()
            step = put(np.zeros((), np.int32), replicated(mesh))
            return RunState(TrainState(step, params, fresh_optimizer_state(optimizer, like, params)), RunProgress())
        for line in damaged:
            self.table.note(f"{line}; it is kept aside, and the run goes on from step {run.step}")
        self.checkpoints.set_aside(run.step)
        return run

    def _save(self) -> None:
        """Save the run as it stands, unless that was done. The start needs no checkpoint: it can be loaded again."""
        if (step := self.run_state.step) == self.saved_step:
            return
        heartbeat.tick("saving a checkpoint")
        self.run_state = self.run_state.at(elapsed_s=time.monotonic() - self.began)
        if self.log is not None:  # first: the log must not be behind the checkpoint
            self.log.push()
        self.checkpoints.save(self.run_state)  # which waits for the one before
        self.saved_step = step
        self._saved()

    def _check_saved(self) -> None:
        """See whether the last save is over, and whole."""
        self.checkpoints.check()
        self._saved()

    def _saved(self) -> None:
        """Write down which checkpoint there is: a run whose checkpoints vanish must not pass for a new one."""
        if self.log is not None:
            self.log.status.saved(self.checkpoints.whole_step)

    def _leave(self, what: str) -> None:
        """Stop where a signal asked for it; `what` says what was done before."""
        leave(self.signals.asked(), f"{what} step {self.run_state.step}")
