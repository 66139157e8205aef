"""What follows a rollout: one update of its whole batch, or several of mini-batches, knobs turned in between."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from tsopsd_jax.distributed import processes
from tsopsd_jax.distributed.sharding import put, replicated
from tsopsd_jax.learn.mini_batches import Reported, take_mini_batch, together
from tsopsd_jax.learn.update import UpdateOut
from tsopsd_jax.metric_names import HELD, SKIPPED
from tsopsd_jax.objectives.base import Control
from tsopsd_jax.types import SAMPLING_TEMPERATURE, AnyArray, Batch, TrainState

_Knobs = dict[str, float]


OneUpdate = Callable[[TrainState, Batch, AnyArray, Array, Mapping[str, Array]], tuple[TrainState, UpdateOut, float]]
"""An update of one mini-batch; `train.phase_update.Updater` is one."""


class Learnt(NamedTuple):
    """What the updates of a rollout report together, and how they left the knobs."""

    metrics: dict[str, float]
    """See `learn.mini_batches.together`."""
    skipped: tuple[bool, ...]
    """Whether each update was not finite and changed nothing."""
    knobs: _Knobs


def report(out: UpdateOut) -> Reported:
    """Fetch what an update reports: in one transfer, and in all processes what the first one has."""
    metrics, weights = jax.device_get((out.metrics, out.weights))
    return Reported(*processes.from_first(tuple({k: float(v) for k, v in x.items()} for x in (metrics, weights))))


def learnt(updates: list[Reported], knobs: _Knobs) -> Learnt:
    """Sum up a rollout's updates, after which the knobs are `knobs`."""
    return Learnt(together(updates), tuple(bool(update.metrics[SKIPPED]) for update in updates), knobs)


def turned(control: Control | None, knobs: _Knobs, update: Reported) -> _Knobs:
    """The knobs of the next update; they follow what was learnt, and stay where nothing was."""
    if control is None or update.metrics[SKIPPED] or update.metrics[HELD]:
        return knobs
    return dict(control.update(knobs, update.metrics))


def on_devices(limit: float, knobs: _Knobs, mesh: jax.sharding.Mesh) -> tuple[Array, dict[str, Array]]:
    """An update's scalars on all devices: the entropy from which it holds, and the objective's knobs."""
    return put((np.float32(limit), {name: np.float32(x) for name, x in knobs.items()}), replicated(mesh))


def take_updates(
    update: OneUpdate,
    state: TrainState,
    batch: Batch,
    length: AnyArray,
    mini_batches: Iterable[Int[np.ndarray, " rows"] | None],
    *,
    hold_above_nats: float,
    knobs: _Knobs,
    control: Control | None,
    beside: _Knobs,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Learnt, float]:
    """Take all updates of a rollout: (state, what they report, share of the computed positions that hold a token).

    `state` is consumed. Its step counts rollouts and rises by one. The limit of the entropy is the first update's
    alone: only there is the policy measured on responses of its own. Where it holds no other update follows, so that
    the policy kept is the policy measured.

    Args:
        batch: of the whole rollout, a sequence a row; its tokens are `length` [B].
        mini_batches: rows of each update; None: the batch as it is.
        hold_above_nats: the entropy from which the step changes nothing.
        knobs, control: the objective's numbers before the step, and what turns them after each update; all updates
            are at the sampling temperature of the rollout.
        beside: numbers that stay as they are over the step.
        mesh: of the devices that hold `state`.
    """
    step, limit = int(state.step), hold_above_nats
    sampled = {name: x for name, x in knobs.items() if name == SAMPLING_TEMPERATURE}  # whatever the knob is turned to
    updates: list[Reported] = []
    useful: list[float] = []
    tokens: list[int] = []
    for rows in mini_batches:
        part, lengths = (batch, length) if rows is None else (take_mini_batch(batch, rows), np.asarray(length)[rows])
        state, out, fraction = update(state, part, lengths, *on_devices(limit, knobs | sampled | beside, mesh))
        updates.append(report(out))
        knobs, limit = turned(control, knobs, updates[-1]), float("inf")
        useful.append(fraction)
        tokens.append(int(np.sum(lengths)))
        if updates[-1].metrics[HELD]:
            break
    if len(updates) == 1:
        return state, learnt(updates, knobs), useful[0]
    state = dataclasses.replace(state, step=put(np.asarray(step + 1, np.int32), replicated(mesh)))
    computed = sum(n / share for n, share in zip(tokens, useful, strict=True))
    return state, learnt(updates, knobs), sum(tokens) / computed
