"""A phase's update as the loop calls it: cut into micro-batches that fit the devices, rows packed where the objective
allows."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tsopsd_jax.distributed.sharding import put, replicated, row_multiple, row_sharding
from tsopsd_jax.hardware.tiles import head_tile_on
from tsopsd_jax.learn.micro_batches import TOKENS_PER_CPU, TOKENS_PER_DEVICE, choose_micro_batches, compile_within
from tsopsd_jax.learn.nonfinite import NonFinite, locate
from tsopsd_jax.learn.packing import LEAST_WIDTH, pack, pack_in_program, useful_fraction
from tsopsd_jax.learn.reference import abstract_reference
from tsopsd_jax.learn.update import (
    ReferencePolicy,
    Update,
    UpdateOut,
    abstract_state,
    make_gradient,
    make_reheat_step,
    make_update,
    whole_stats,
)
from tsopsd_jax.metric_names import LEARNING_RATE_FACTOR
from tsopsd_jax.model import Qwen3
from tsopsd_jax.rollout import sample
from tsopsd_jax.train.phase import Phase
from tsopsd_jax.types import AnyArray, Batch, Prompts, PyTree, TrainState


class Updater:
    """Updates of one phase.

    Args:
        model, phase, mesh: what is updated, how, where.
        max_prompt_tokens: the width of a row is this and the phase's longest response.
        limit_bytes: of each device's memory; None: no limit.
        reference_model: the functions of the phase's reference; None: the policy's.

    Attributes:
        state: shapes and shardings of the train state, which it keeps from step to step: a drifting layout would be
            compiled for again.
        update: the pure function, not jitted.
        tile_tokens: tokens that go through the head at once.
        micro_batches: into how many an update's batch is cut: the phase's, or chosen by the devices' memory.

    Raises:
        ValueError: if the update fits the devices in no way.
    """

    def __init__(
        self,
        model: Qwen3,
        phase: Phase,
        mesh: jax.sharding.Mesh,
        *,
        max_prompt_tokens: int,
        limit_bytes: int | None,
        reference_model: Qwen3 | None = None,
    ):
        self.reference_model = reference_model or model
        self.phase, self.mesh, self.model = phase, mesh, model
        self.max_prompt_tokens = max_prompt_tokens
        self.width = max_prompt_tokens + phase.max_response_tokens
        self.tile_tokens = phase.tile_tokens or head_tile_on(mesh, vocab_size=model.config.vocab_size)
        self.state = abstract_state(model, phase.optimizer, mesh)
        self._layout = jax.tree.map(lambda x: x.sharding, self.state)
        self._jitted: dict[int, Any] = {}
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.micro_batches = phase.micro_batches or choose_micro_batches(
            lambda count: compile_within(self.lowered(count))[1],
            rows=phase.update_rows,
            width=self.width,
            shards=row_multiple(mesh),
            limit_bytes=limit_bytes,
            tokens=TOKENS_PER_CPU if on_cpu else TOKENS_PER_DEVICE,
        )
        self.packs = self._packs(self.micro_batches)
        self.update = self._make(self.micro_batches)

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        return self._jit(self.micro_batches)._cache_size()

    def _packs(self, micro_batches: int) -> bool:
        return self.phase.pack and self.phase.objective.tokenwise and micro_batches > 1

    def _make(self, micro_batches: int) -> Update:
        phase = self.phase
        return make_update(
            self.model,
            phase.objective,
            phase.optimizer,
            micro_batches=micro_batches,
            tile_tokens=self.tile_tokens,
            learning_rate=phase.learning_rate,
            reference_model=self.reference_model,
            sampler_selects=phase.sampler_selects,
        )

    def _jit(self, micro_batches: int) -> Any:
        """One function for each number of micro-batches: what was compiled when it was chosen is not compiled again."""
        if micro_batches not in self._jitted:
            layout = (self._layout, replicated(self.mesh))
            self._jitted[micro_batches] = jax.jit(self._make(micro_batches), donate_argnums=0, out_shardings=layout)
        return self._jitted[micro_batches]

    def _of(self, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((self.phase.update_rows, *shape), dtype, sharding=row_sharding(self.mesh))

    def _once(self, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=replicated(self.mesh))

    def abstract_knobs(self) -> dict[str, Any]:
        """Scalars on all devices under the names that the objective turns."""
        control = self.phase.objective.control
        names = [] if control is None else list(control.init)
        names += [LEARNING_RATE_FACTOR] if self.phase.rate_controller is not None else []
        return {name: self._once(np.float32) for name in names}

    def _reference(self) -> Any:
        return abstract_reference(self.reference_model, self.mesh) if self.phase.reference else None

    def lowered(self, micro_batches: int | None = None) -> Any:
        """The update of a batch cut into `micro_batches` (None: its own), ready to be compiled; nothing is computed."""
        count = micro_batches or self.micro_batches
        fields = [self._of(dtype, self.width) for dtype in (np.int32, bool, np.float32, np.float32)]
        segment = self._of(np.int32, self.width) if self._packs(count) else None
        batch = Batch(*fields, segment=segment)
        return self._jit(count).lower(
            self.state, batch, self._once(np.float32), self.abstract_knobs(), self._reference()
        )

    def lowered_reheat_step(self, step: Any) -> Any:
        """A `reheat_step`, ready to be compiled."""
        prompts = Prompts(self._of(np.int32, self.max_prompt_tokens), self._of(np.int32), self._of(np.uint32))
        key = self._once(jax.eval_shape(lambda: jax.random.key(0)).dtype)
        return step.lower(self.state, prompts, key, self._once(np.float32), self.abstract_knobs(), self._reference())

    def reheat_step(self, stop_ids: tuple[int, ...]) -> Any:
        """The whole step of a phase without rewards as one jitted function; see `learn.update.make_reheat_step`."""
        draw = functools.partial(
            sample,
            self.model,
            sampling=self.phase.sampling,
            max_response_tokens=self.phase.max_response_tokens,
            stop_ids=stop_ids,
            group=self.phase.responses_per_prompt,
        )
        packs = self.packs and self.width >= LEAST_WIDTH
        arrange = functools.partial(pack_in_program, micro_batches=self.micro_batches) if packs else None
        step = make_reheat_step(draw, self.update, arrange)
        everywhere = replicated(self.mesh)
        return jax.jit(step, donate_argnums=0, out_shardings=(self._layout, everywhere, everywhere))

    def locate(
        self, params: PyTree, batch: Batch, knobs: Mapping[str, jax.Array], reference: PyTree | None
    ) -> NonFinite:
        """Find what is not finite of an update of `batch`, all rows of a rollout; see `learn.nonfinite`."""
        objective, pieces = self.phase.objective, self.micro_batches * self.phase.updates_per_rollout
        cut: dict[str, int] = {"micro_batches": pieces, "tile_tokens": self.tile_tokens}
        frozen = None if reference is None else ReferencePolicy(self.reference_model, reference)
        gradient = make_gradient(self.model, objective, **cut)
        return locate(
            params,
            dataclasses.replace(put(batch, row_sharding(self.mesh)), knobs=dict(knobs)),
            axes=self.model.param_axes(),
            stats=lambda params, batch: whole_stats(self.model, params, batch, objective, reference=frozen, **cut),
            gradient=lambda params, batch: gradient(params, batch, frozen)[0],
            mesh=self.mesh,
        )

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        length: AnyArray,
        hold_above_nats: jax.Array,
        knobs: Mapping[str, jax.Array],
        reference: PyTree | None = None,
    ) -> tuple[TrainState, UpdateOut, float]:
        """(state after, what the update reports, share of the computed positions that hold a token). `state` is
        consumed.

        Args:
            batch: one sequence a row; its tokens, prompt and response, are `length` [B].
            hold_above_nats, knobs, reference: see `learn.update.make_update`.
        """
        if self.packs:
            batch = pack(batch, np.asarray(length), micro_batches=self.micro_batches)
        useful = useful_fraction(batch, np.asarray(length), micro_batches=self.micro_batches)
        batch = put(batch, row_sharding(self.mesh))
        state, out = self._jit(self.micro_batches)(state, batch, hold_above_nats, knobs, reference)
        jax.block_until_ready(out)
        return state, out, useful
