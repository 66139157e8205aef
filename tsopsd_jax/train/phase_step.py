"""A step of a phase: from the run as it stands to the run one step on. It samples, judges and updates in stages, or,
where the phase needs no reward, all its rows are decoded at once, and one update follows, in one program.

A step that is left in the midst of its rollout, by what `on_progress` raises, has changed nothing: it can be taken
again.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from tsopsd_jax.data import Problem, indices
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.distributed.sharding import put, replicated, row_sharding
from tsopsd_jax.judge.dynamic_sampling import Collected, ShortageError, collect
from tsopsd_jax.judge.groups import Groups, judge, to_batch
from tsopsd_jax.judge.scoring import Scored, score_after, score_while
from tsopsd_jax.learn.micro_batches import device_bytes
from tsopsd_jax.learn.mini_batches import mini_batch_rows
from tsopsd_jax.learn.nonfinite import NonFinite
from tsopsd_jax.learn.reference import ReferenceSource
from tsopsd_jax.learn.update import distillation_batch
from tsopsd_jax.metric_names import LEARNING_RATE_FACTOR
from tsopsd_jax.model import Qwen3
from tsopsd_jax.rewards import answers_cut_off
from tsopsd_jax.rollout import Engine, Finished, Progress, Sampling
from tsopsd_jax.rollout.distribution import checked_temperature
from tsopsd_jax.rundir.run_state import RunState
from tsopsd_jax.train.metrics import Drawn, StepFacts
from tsopsd_jax.train.perf import step_perf
from tsopsd_jax.train.phase import START, GuardError, Phase
from tsopsd_jax.train.phase_update import Updater
from tsopsd_jax.train.rollout_updates import Learnt, learnt, on_devices, report, take_updates, turned
from tsopsd_jax.train.task import Task
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Prompts, PyTree, Rollout

OnProgress = Callable[[Progress], None]


class Shared(NamedTuple):
    """What all phases of a run share."""

    model: Qwen3
    mesh: jax.sharding.Mesh
    task: Task
    key: Array
    """Random key of the run, on all devices; a step's is fold_in(key, step)."""
    limit_bytes: int | None
    """Bytes that each device's memory has (`learn.micro_batches.device_bytes`)."""
    references: Mapping[str, ReferenceSource] = {}
    """Other models that phases are compared with, by their directories."""

    @classmethod
    def of(
        cls,
        model: Qwen3,
        mesh: jax.sharding.Mesh,
        task: Task,
        *,
        seed: int,
        references: Mapping[str, ReferenceSource] | None = None,
    ) -> "Shared":
        """Make what phases of a run on the devices of `mesh` share; `seed` is that of sampling."""
        key = jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(mesh))()
        return cls(model, mesh, task, key, device_bytes(mesh), references or {})

    def engine(
        self,
        sampling: Sampling,
        max_response_tokens: int,
        slots: int,
        *,
        max_prompt_tokens: int | None = None,
        entropy: bool = False,
    ) -> Engine:
        """A sampler of the task's prompts, or of others of at most `max_prompt_tokens`."""
        return Engine(
            self.model,
            self.mesh,
            sampling=sampling,
            max_prompt_tokens=max_prompt_tokens or self.task.max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            stop_ids=self.task.tokenizer.stop_ids,
            slots=slots,
            entropy=entropy,
        )


MAX_LOCATED = 3
"""Steps of a phase, in one process, in which what is not finite is looked for."""


class PhaseStep:
    """The step of one phase, whose programs are compiled once: when first called, or by `compile`.

    Args:
        phase: what is done.
        shared: on what.

    Attributes:
        program: the whole step as one jitted function; None: it is taken in stages.

    Raises:
        ValueError: if the update fits the devices in no way.
    """

    def __init__(self, phase: Phase, shared: Shared):
        self.phase, self.shared, self.task = phase, shared, shared.task
        self.other = None if phase.reference in (None, START) else shared.references[phase.reference]
        self._loaded: PyTree | None = None
        self.located = 0
        self.update = Updater(
            shared.model,
            phase,
            shared.mesh,
            max_prompt_tokens=self.task.max_prompt_tokens,
            limit_bytes=shared.limit_bytes,
            reference_model=self.other and self.other.model,
        )
        self.engine = shared.engine(phase.sampling, phase.max_response_tokens, phase.rows_at_once or phase.rows)
        self.program = None
        if phase.reward is None and self.engine.slots >= phase.rows and phase.updates_per_step == 1:
            self.program = self.update.reheat_step(self.task.tokenizer.stop_ids)

    def __call__(
        self, run: RunState, on_progress: OnProgress, before_update: Callable[[], None]
    ) -> tuple[RunState, StepFacts]:
        """Take a step from `run`, whose train state is consumed once the update starts; its data position and leftover
        groups move on, the rest of its progress is the caller's.

        Args:
            on_progress: called after every segment of a rollout.
            before_update: called before the train state is consumed; what it raises ends the step as if it had not
                begun.

        Raises:
            GuardError: dynamic sampling found too few informative groups, or rewards of one's own failed too often.
        """
        began, killed = time.monotonic(), answers_cut_off()
        if self.program is None:
            after, rollout, updates, drawn = self._in_stages(run, on_progress, before_update)
        else:
            before_update()
            after, rollout, updates, drawn = self._in_one_program(run)
        knobs = self._knobs(run)
        if self.phase.objective.control is not None:
            after = after.at(knobs=updates.knobs)
        passes = len(updates.skipped) / self.phase.updates_per_rollout
        return after, StepFacts(
            drawn=drawn,
            update=updates.metrics | {f"control/{name}": value for name, value in knobs.items()},
            skipped=updates.skipped,
            verifier_killed=answers_cut_off() - killed,
            step_s=time.monotonic() - began,
            perf=step_perf(self.shared.model, self.shared.mesh, drawn, rollout, passes=passes),
            nonfinite=self._nonfinite(run, after, rollout, drawn) if any(updates.skipped) else None,
        )

    def _nonfinite(self, run: RunState, after: RunState, rollout: Rollout, drawn: Drawn) -> NonFinite | None:
        """Find what was not finite in a step: the first times, since it takes programs of its own."""
        self.located += 1
        if self.located > MAX_LOCATED:
            return None
        heartbeat.tick(f"step {after.step}: locating what is not finite")
        batch, rule, got = distillation_batch(rollout), self.phase.reward, drawn.collected
        if rule is not None and got is not None:
            batch = to_batch(got.groups, normalize_std=rule.normalize_std)
        _, knobs = on_devices(float("inf"), self._knobs(run), self.shared.mesh)
        return self.update.locate(after.state.params, batch, knobs, self._reference(run))

    # ---------------------------------------------------------------- compiling

    def compile(self) -> None:
        """Compile the large programs that every step calls; a call with the same shapes then finds them. Nothing is
        computed. (Prompts are prefilled in the shape of the longest allowed; batches of shorter ones have another.)"""
        for lowered in self.lowered():
            lowered.compile()

    def lowered(self) -> Iterator[Any]:
        """Lower those programs, one after the other, ready to be compiled."""
        if self.program is not None:
            yield self.update.lowered_reheat_step(self.program)
            return
        sampler, params = self.engine.on_device, self.update.state.params
        yield sampler.lower_view(params)
        yield sampler.lower_prefill(params, sampler.prefill_shape(self.phase.prompts_per_step))
        temperature = self.update.abstract_knobs().get(SAMPLING_TEMPERATURE)
        # The pool grows with the responses. Shapes of fewer slots are left to the end of a rollout.
        for size in sampler.pool_sizes():
            yield sampler.lower_segment(params, size, sampling_temperature=temperature)
        yield self.update.lowered()

    # ------------------------------------------------------------- the two ways

    def _in_stages(
        self, run: RunState, on_progress: OnProgress, before_update: Callable[[], None]
    ) -> tuple[RunState, Rollout, Learnt, Drawn]:
        """Sample with continuous batching and judge, until the batch is full; then update."""
        rule = self.phase.reward
        after, scored, judged, got = self._sample_and_judge(run, on_progress)
        before_update()
        updating = time.monotonic()
        heartbeat.tick(f"step {run.step + 1}: updating")
        if rule is None or got is None:  # every row is used
            rollout = scored[0].rollout
            batch = distillation_batch(rollout)
        else:
            rollout = got.groups.rollout
            batch = to_batch(got.groups, normalize_std=rule.normalize_std)
        state, updates, useful = take_updates(
            functools.partial(self.update, reference=self._reference(run)),
            run.state,
            batch,
            rollout.length,
            self._mini_batches(run),
            hold_above_nats=self._hold_above_nats(run),
            knobs=self._knobs(run),
            control=self.phase.objective.control,
            beside=self._rate(run),
            mesh=self.shared.mesh,
        )
        drawn = Drawn(scored, judged, got, self.engine, useful, time.monotonic() - updating)
        return after._replace(state=state, leftover=got and got.leftover), rollout, updates, drawn

    def _in_one_program(self, run: RunState) -> tuple[RunState, Rollout, Learnt, Drawn]:
        """Sample and update in one call of a jitted function; responses are scored only to be logged."""
        assert self.program is not None
        began, step = time.monotonic(), f"step {run.step + 1}"
        heartbeat.tick(f"{step}: sampling and updating")
        prompts, asked, after = self._next_prompts(run)
        prompts = put(prompts, row_sharding(self.shared.mesh))
        scalars = on_devices(self._hold_above_nats(run), self._knobs(run) | self._rate(run), self.shared.mesh)
        state, out, there = self.program(run.state, prompts, self.shared.key, *scalars, self._reference(run))
        rollout: Rollout = jax.device_get(there)
        updated = time.monotonic()
        heartbeat.tick(f"{step}: verifying")
        scored = score_after(rollout, asked, self.task.tokenizer.decode, self.task.rewards)
        update = report(out)
        updates = learnt([update], turned(self.phase.objective.control, self._knobs(run), update))
        return after._replace(state=state), rollout, updates, Drawn([scored], [], None, None, None, updated - began)

    # -------------------------------------------------------------------- parts

    def _sample_and_judge(
        self, run: RunState, on_progress: OnProgress
    ) -> tuple[RunState, list[Scored], list[Groups], Collected | None]:
        """Draw a generation batch, and more of them where dynamic sampling asks for it: the run with its cursor behind
        them, every batch as scored and as judged, and the full batch. The rollout view lives in here: the update needs
        its memory."""
        phase, rule = self.phase, self.phase.reward
        group, leftover = phase.responses_per_prompt, run.leftover
        key, view = jax.random.fold_in(self.shared.key, run.state.step), self.engine.view(run.state.params)
        decode, score = self.task.tokenizer.decode, self.task.rewards
        temperature = self._knobs(run).get(SAMPLING_TEMPERATURE)
        scored: list[Scored] = []
        judged: list[Groups] = []

        def sample() -> Scored:
            nonlocal run
            heartbeat.tick(f"step {run.step + 1}: sampling")
            prompts, asked, run = self._next_prompts(run)

            def rollout(on_finished: Callable[[Finished], None]) -> Rollout:
                result = self.engine.run(
                    view,
                    prompts,
                    key,
                    group=group,
                    sampling_temperature=temperature,
                    on_progress=on_progress,
                    on_finished=on_finished,
                )
                heartbeat.tick(f"step {run.step + 1}: verifying")
                return result

            scored.append(score_while(rollout, asked, decode, score))
            return scored[-1]

        if rule is None:
            sample()
            return run, scored, judged, None

        def generate() -> Groups:
            batch = sample()
            phase.guard.check_rewards(phase.name, batch.verdicts)  # before anything is learnt from them
            judged.append(
                judge(
                    batch.rollout,
                    batch.accuracy,
                    group=group,
                    rule=rule,
                    max_response_tokens=phase.max_response_tokens,
                    reward=batch.reward,
                )
            )
            return judged[-1]

        try:
            got = collect(generate, prompts=phase.prompts_per_step, leftover=leftover, rule=rule)
        except ShortageError as error:
            raise GuardError(f"phase {phase.name!r} stopped: {error}") from error
        return run, scored, judged, got

    def _next_prompts(self, run: RunState) -> tuple[Prompts, list[Problem], RunState]:
        """The next prompts of the data order, each repeated for its group; their problems; and the run with its cursor
        behind them."""
        phase, start = self.phase, run.progress.position
        count, group = phase.prompts_per_step, phase.responses_per_prompt
        encoded = self.task.encoded
        chosen = indices(encoded.count, seed=self.task.seed, position=start, count=count)
        rows = np.repeat(chosen, group)
        row_id = (np.arange(count * group) + start * group).astype(np.uint32)
        asked = [self.task.problems[int(i)] for i in rows]
        return Prompts(*encoded.padded(rows), row_id), asked, run.at(position=start + count)

    def _reference(self, run: RunState) -> PyTree | None:
        """Parameters of the phase's reference: the run's copy, or another model's, loaded when it is first asked
        for."""
        if self.other is None:
            return run.start
        if self._loaded is None:
            heartbeat.tick(f"loading the reference {self.phase.reference}")
            self._loaded = self.other.load()
        return self._loaded

    def _knobs(self, run: RunState) -> dict[str, float]:
        """The numbers that the objective turns, as they stand before this step."""
        control = self.phase.objective.control
        knobs = {} if control is None else dict(run.progress.knobs or control.init)
        if SAMPLING_TEMPERATURE in knobs:
            checked_temperature(knobs[SAMPLING_TEMPERATURE])
        return knobs

    def _hold_above_nats(self, run: RunState) -> float:
        """The entropy from which this step changes nothing."""
        now = run.progress
        before = now.entropies_nats[-1] if now.entropies_nats else None
        return self.phase.hold_above_nats(now.phase_step + 1, before_nats=before, baseline_nats=now.baseline_nats)

    def _rate(self, run: RunState) -> dict[str, float]:
        """The factor on the learning rate, where the phase turns it; the same for all updates of the step."""
        return {} if self.phase.rate_controller is None else {LEARNING_RATE_FACTOR: run.progress.learning_rate_factor}

    def _mini_batches(self, run: RunState) -> Iterable[np.ndarray | None]:
        """The rows of each of this step's updates; None: the batch as it is."""
        phase = self.phase
        if phase.updates_per_step == 1:
            return [None]
        return mini_batch_rows(
            groups=phase.prompts_per_step,
            responses=phase.responses_per_prompt,
            updates=phase.updates_per_rollout,
            passes=phase.passes_per_rollout,
            seed=self.task.seed,
            step=run.step,
        )
