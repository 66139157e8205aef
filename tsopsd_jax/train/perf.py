"""A step's speed against what its devices can do, and how long the steps to come will take."""

import statistics
from collections import deque

import jax
import numpy as np

from tsopsd_jax.hardware.chips import chip_of
from tsopsd_jax.hardware.speed import decode_floor_s, update_model_flops
from tsopsd_jax.hardware.work import Split
from tsopsd_jax.model import Qwen3
from tsopsd_jax.train.metrics import Drawn
from tsopsd_jax.types import Rollout


def step_perf(
    model: Qwen3, mesh: jax.sharding.Mesh, drawn: Drawn, updated: Rollout, *, passes: float = 1.0
) -> dict[str, float]:
    """Measure a step's speed.

    Args:
        model, mesh: what ran, where.
        drawn: what the step sampled, and the times that it took.
        updated: the rows of its updates.
        passes: how often these updated on each row.

    Returns:
        Tokens sampled a second and a device (of the whole step where one program samples and updates); where the
        devices' peaks are known and sampling and update were timed apart, the update's share of the peak arithmetic,
        and the share of the rollout's time that reading weights and cache at the memory's peak takes.
    """
    split = Split(**mesh.shape)
    response = np.concatenate([scored.rollout.response_length for scored in drawn.scored])
    rollout_s = sum(scored.rollout_s for scored in drawn.scored)
    seconds = max(drawn.update_s if drawn.engine is None else rollout_s, 1e-9)
    found = {"perf/tokens_per_s_per_device": float(response.sum() / seconds / split.devices)}
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None or drawn.engine is None:
        return found
    flops = update_model_flops(model.config, np.asarray(updated.prompt_length), np.asarray(updated.response_length))
    itemsize, slots = np.dtype(model.compute_dtype).itemsize, drawn.engine.slots
    floor = sum(
        decode_floor_s(
            model.config,
            split,
            chip,
            np.asarray(rows.prompt_length),
            np.asarray(rows.response_length),
            slots=slots,
            itemsize=itemsize,
        )
        for rows in (scored.rollout for scored in drawn.scored)
    )
    return found | {
        "perf/mfu": passes * flops / (max(drawn.update_s, 1e-9) * split.devices * chip.flops),
        "perf/decode_of_floor": floor / seconds,
    }


class Pace:
    """How long the steps of a phase take, by its latest ones; the first that this process takes is slow and left out:
    programs are compiled, and memory is touched for the first time."""

    LATEST = 9

    def __init__(self):
        self._step_s: deque[float] = deque(maxlen=self.LATEST)
        self._warm = False

    def add(self, step_s: float) -> None:
        """Take in a step's seconds, compilations left out."""
        if self._warm:
            self._step_s.append(step_s)
        self._warm = True

    def left_s(self, steps: int) -> float | None:
        """The seconds that `steps` more will take, by the median; None: not known yet."""
        return steps * statistics.median(self._step_s) if self._step_s else None
