"""The steps of a phase: from the run as it stands to the run one step on. Three kinds: RL, and the reheater's step as one
program, or in stages where fewer rows are decoded at once than it has.

A step that is left in the midst of its rollout, by what `on_progress` raises, has changed nothing: it can be taken again.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from tsopsd_jax.data import indices
from tsopsd_jax.distributed import processes
from tsopsd_jax.distributed.sharding import put, replicated, row_sharding
from tsopsd_jax.judge.dynamic_sampling import ShortageError, collect
from tsopsd_jax.judge.groups import Groups, judge, to_batch
from tsopsd_jax.judge.scoring import Scored, accuracies, score_while
from tsopsd_jax.learn.start_kl import StartKL
from tsopsd_jax.learn.update import ENTROPY, UpdateOut, distillation_batch
from tsopsd_jax.model import Qwen3
from tsopsd_jax.rollout import Engine, Progress, Sampling, ahead
from tsopsd_jax.rundir.checkpoints import Saved
from tsopsd_jax.train.metrics import engine_metrics, reward_metrics, rollout_metrics
from tsopsd_jax.train.phase import GuardError, Phase
from tsopsd_jax.train.phase_update import Updater
from tsopsd_jax.train.task import Task
from tsopsd_jax.types import Prompts, PyTree, Rollout, TrainState

OnProgress = Callable[[Progress], None]


class Where(NamedTuple):
    """What all phases of a run share."""

    model: Qwen3
    mesh: jax.sharding.Mesh
    task: Task
    key: Array
    """Of the run, on all devices; a step's is fold_in(key, step)."""
    limit_bytes: int | None
    """Of each device's memory (`learn.micro_batches.device_bytes`)."""

    def engine(self, sampling: Sampling, max_response_tokens: int, slots: int, *, entropy: bool = False) -> Engine:
        """A sampler of the task's prompts."""
        return Engine(
            self.model,
            self.mesh,
            sampling=sampling,
            max_prompt_tokens=self.task.max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            stop_ids=self.task.tokenizer.stop_ids,
            slots=slots,
            entropy=entropy,
        )


class Taken(NamedTuple):
    """The run after a step, the step's line of the log, and the policy's entropy where it was sampled."""

    saved: Saved
    line: dict[str, Any]
    entropy_nats: float


class Steps:
    """The steps of one phase, whose programs are compiled once: when first called, or by `compile`.

    Args:
        phase: what is done.
        where: on what.

    Raises:
        ValueError: if the update fits the devices in no way.
    """

    def __init__(self, phase: Phase, where: Where):
        self.phase, self.where, self.task = phase, where, where.task
        self.update = Updater(
            where.model,
            phase,
            where.mesh,
            max_prompt_tokens=self.task.max_prompt_tokens,
            limit_bytes=where.limit_bytes,
        )
        self.engine = where.engine(phase.sampling, phase.max_response_tokens, phase.rows_at_once or phase.rows)
        self.start_kl = StartKL(where.model, pieces=self.update.micro_batches, tile_tokens=phase.tile_tokens)
        self.rows = row_sharding(where.mesh)
        self._take = self._learn
        if phase.reward is None:
            self._take = self._reheat_in_stages
            if self.engine.slots >= phase.rows:
                self._step = self.update.reheat_step(self.task.tokenizer.stop_ids)
                self._take = self._reheat

    def __call__(self, saved: Saved, on_progress: OnProgress) -> Taken:
        """Take a step from `saved`, whose train state is consumed once the update starts; its data position and leftover
        groups move on, the rest of its progress is the caller's.

        Args:
            on_progress: called after every segment of a rollout.

        Raises:
            GuardError: dynamic sampling found too few informative groups.
        """
        return self._take(saved, on_progress)

    # ---------------------------------------------------------------- compiling

    def compile(self) -> None:
        """Compile the large programs that every step calls; a call with the same shapes then finds them. Nothing is computed.
        (Prompts are prefilled in the shape of the longest allowed; batches of shorter ones have another.)"""
        for lowered in self.lowered():
            lowered.compile()

    def lowered(self) -> Iterator[Any]:
        """Those programs, one after the other, ready to be compiled."""
        if self._take == self._reheat:
            yield self.update.lowered_reheat_step(self._step)
            return
        engine, params = self.engine, self.update.state.params
        yield ahead.lower_view(engine, params)
        yield ahead.lower_prefill(engine, params, ahead.prefill_shape(engine, self.phase.prompts_per_step))
        # The pool grows with the responses. Shapes of fewer slots are left to the end of a rollout.
        for size in ahead.pool_sizes(engine):
            yield ahead.lower_segment(engine, params, size)
        yield self.update.lowered()

    # --------------------------------------------------------------- the three

    def _reheat(self, saved: Saved, _on_progress: OnProgress) -> Taken:
        """One step without rewards, one call of a jitted function; responses are scored only to be logged."""
        began = time.monotonic()
        prompts, answers, after = self._next_prompts(saved)
        state, out, rollout = self._step(saved.state, put(prompts, self.rows), self.where.key, self._hold(saved))
        host: Rollout = jax.device_get(rollout)
        stepped = time.monotonic()
        score = accuracies(host, answers, self.task.tokenizer.decode, self.task.verify)
        judged = time.monotonic()
        line = rollout_metrics([host], stepped - began)
        line |= {"reward/accuracy_fraction": float(score.mean()), "reward/mean": float(score.mean())}
        # Every group is used. One program samples and updates: its time is the update's, and tokens/s are of the whole step.
        line |= {"rollout/groups_kept_fraction": 1.0}
        line |= {"time/rollout_s": None, "time/update_s": stepped - began, "time/judge_s": judged - stepped}
        return self._taken(after._replace(state=state), host, out, line, began)

    def _reheat_in_stages(self, saved: Saved, on_progress: OnProgress) -> Taken:
        """The same step where fewer rows are decoded at once than it has: continuous batching, then the update."""
        began = time.monotonic()
        view = self.engine.view(saved.state.params)
        prompts, answers, after = self._next_prompts(saved)
        scored = self._sample(view, prompts, answers, self._step_key(saved.state), on_progress)
        del view  # the update needs its memory
        updating = time.monotonic()
        batch = distillation_batch(scored.rollout)
        state, out, useful = self.update(saved.state, batch, scored.rollout.length, self._hold(saved))
        score = float(scored.accuracy.mean())
        line = rollout_metrics([scored.rollout], scored.rollout_s) | engine_metrics(self.engine)
        line |= {"reward/accuracy_fraction": score, "reward/mean": score, "rollout/groups_kept_fraction": 1.0}
        line |= {"learner/useful_fraction": useful, "time/rollout_s": scored.rollout_s, "time/judge_s": scored.waited_s}
        line |= {"time/update_s": time.monotonic() - updating}
        return self._taken(after._replace(state=state), scored.rollout, out, line, began)

    def _learn(self, saved: Saved, on_progress: OnProgress) -> Taken:
        """One RL step: generation batches until the batch is full, then one update."""
        phase, rule = self.phase, self.phase.reward
        assert rule is not None
        began = time.monotonic()
        key, view = self._step_key(saved.state), self.engine.view(saved.state.params)
        after = saved
        every: list[Scored] = []
        judged: list[Groups] = []

        def generate() -> Groups:
            nonlocal after
            prompts, answers, after = self._next_prompts(after)
            scored = self._sample(view, prompts, answers, key, on_progress)
            every.append(scored)
            judged.append(
                judge(
                    scored.rollout,
                    scored.accuracy,
                    group=phase.responses_per_prompt,
                    rule=rule,
                    max_response_tokens=phase.max_response_tokens,
                )
            )
            return judged[-1]

        try:
            got = collect(generate, prompts=phase.prompts_per_step, leftover=saved.leftover, rule=rule)
        except ShortageError as error:
            raise GuardError(f"phase {phase.name!r} stopped: {error}") from error
        del view  # the update needs its memory
        updating = time.monotonic()
        batch = to_batch(got.groups, normalize_std=rule.normalize_std)
        state, out, useful = self.update(saved.state, batch, got.groups.rollout.length, self._hold(saved))
        seconds = sum(scored.rollout_s for scored in every)
        line = rollout_metrics([scored.rollout for scored in every], seconds)
        line |= reward_metrics(got, judged) | engine_metrics(self.engine)
        line |= {
            "learner/useful_fraction": useful,
            "time/rollout_s": seconds,
            "time/judge_s": sum(scored.waited_s for scored in every),
            "time/update_s": time.monotonic() - updating,
        }
        after = after._replace(state=state, leftover=got.leftover)
        return self._taken(after, got.groups.rollout, out, line, began)

    # -------------------------------------------------------------------- parts

    def _next_prompts(self, saved: Saved) -> tuple[Prompts, list[str], Saved]:
        """The next prompts of the data order, each repeated for its group; their answers; and the cursor behind them."""
        phase, start = self.phase, saved.progress.position
        count, group = phase.prompts_per_step, phase.responses_per_prompt
        tokens, lengths = self.task.encoded
        chosen = indices(len(lengths), seed=self.task.seed, position=start, count=count)
        rows = np.repeat(chosen, group)
        row_id = (np.arange(count * group) + start * group).astype(np.uint32)
        answers = [self.task.problems[int(i)].answer for i in rows]
        return Prompts(tokens[rows], lengths[rows], row_id), answers, saved.moved(start + count)

    def _sample(
        self, view: PyTree, prompts: Prompts, answers: Sequence[str], key: Array, on_progress: OnProgress
    ) -> Scored:
        """Sample, and score each response while others are still decoded."""
        run = functools.partial(
            self.engine.run, view, prompts, key, group=self.phase.responses_per_prompt, on_progress=on_progress
        )
        return score_while(lambda seen: run(on_finished=seen), answers, self.task.tokenizer.decode, self.task.verify)

    def _step_key(self, state: TrainState) -> Array:
        return jax.random.fold_in(self.where.key, state.step)

    def _hold(self, saved: Saved) -> Array:
        limit = np.float32(self.phase.hold_above_nats(saved.progress.phase_step + 1))
        return put(limit, replicated(self.where.mesh))

    def _taken(self, after: Saved, rollout: Rollout, out: UpdateOut, line: dict[str, Any], began: float) -> Taken:
        """Fetch the update's scalars in one transfer. They are fetched before the next step starts: a stop rule that looks
        a step late would reheat a step too far."""
        if after.start is not None:  # how far the policy that drew the rollout is from the phase's start
            line |= {"policy/start_kl_nats": self.start_kl.nats(after.start, rollout)}
        metrics = {name: float(value) for name, value in jax.device_get(out.metrics).items()}
        metrics = processes.from_first(metrics)
        line = metrics | line | {"time/step_s": time.monotonic() - began}
        return Taken(after, line, metrics.get(ENTROPY, float("nan")))
