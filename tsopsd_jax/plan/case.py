"""One phase of a run on one mesh: what is fixed before anything is compiled, and what each part holds and does."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from tsopsd_jax.distributed.sharding import DECODE_RULES, tree_shardings
from tsopsd_jax.hardware.chips import Chip
from tsopsd_jax.hardware.tiles import head_tile_tokens
from tsopsd_jax.hardware.work import (
    Lengths,
    Split,
    UpdateShape,
    Work,
    cache_bytes_per_token,
    decode_work,
    prefill_work,
    reference_work,
    update_work,
    view_work,
)
from tsopsd_jax.learn.packing import LEAST_WIDTH
from tsopsd_jax.learn.reference import abstract_reference
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3
from tsopsd_jax.model.decoding import rollout_view, view_axes
from tsopsd_jax.plan.collectives import Moved
from tsopsd_jax.rollout.engine import segment_tokens
from tsopsd_jax.rollout.schedule import Geometry
from tsopsd_jax.train.phase import START, Phase
from tsopsd_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step: its memory on each device while it runs, by kind, and what it does in one step."""

    name: str
    phases: tuple[str, ...]
    bytes: dict[str, int]
    work: Work
    moved: tuple[Moved, ...]
    source: str
    """Where memory and traffic come from: `compiled`; `refused`, the compiler's figure of what it would need;
    `formula`."""
    micro_batches: int | None = None
    """Micro-batches of each update."""
    updates: int | None = None
    """That follow a rollout."""
    steps: float | None = None
    """Decoding steps."""
    uncounted_loops: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        return sum(self.bytes.values())


def added(*works: Work) -> Work:
    """What several works are together."""
    return Work(*(sum(x) for x in zip(*works, strict=True)))


def tree_bytes(tree: PyTree) -> int:
    """Bytes on each device of abstract arrays with their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


@dataclasses.dataclass(frozen=True)
class Case:
    """A phase on a mesh.

    Args:
        names: the phases of the run that are this one.
        model: on `mesh`; without a mesh where nothing is compiled.
        mesh: of the compiler's devices, or abstract.
        lengths: of a mean row.
        max_prompt_tokens: width of the prompts.
        platform: `tpu` or `gpu`.
        chip: what a device can do.
        reference_model: of the phase's reference, where that is another model.
    """

    names: tuple[str, ...]
    phase: Phase
    model: Qwen3
    mesh: Any
    lengths: Lengths
    max_prompt_tokens: int
    platform: str
    chip: Chip
    reference_model: Qwen3 | None = None

    @property
    def split(self) -> Split:
        return Split(**self.mesh.shape)

    @property
    def itemsize(self) -> int:
        return np.dtype(self.model.compute_dtype).itemsize

    @property
    def width(self) -> int:
        return self.max_prompt_tokens + self.phase.max_response_tokens

    @property
    def slots(self) -> int:
        asked = self.phase.rows_at_once or self.phase.rows
        return -(-asked // self.split.rows) * self.split.rows

    @property
    def one_program(self) -> bool:
        """The step is one jitted function: no rewards, a slot for every row, and one update."""
        return self.phase.reward is None and self.slots >= self.phase.rows and self.phase.updates_per_step == 1

    @functools.cached_property
    def state(self) -> Any:
        return abstract_state(self.model, self.phase.optimizer, self.mesh)

    @functools.cached_property
    def resident(self) -> dict[str, int]:
        """What lies on a device throughout."""
        found = {"parameters": tree_bytes(self.state.params), "optimizer": tree_bytes(self.state.opt_state)}
        if self.phase.reference is not None:
            found["reference"] = tree_bytes(abstract_reference(self.reference_model or self.model, self.mesh))
        return found

    @functools.cached_property
    def saved_bytes(self) -> int:
        """The arrays of a checkpoint, of all devices together and each part once."""
        saved: list[Any] = [self.state.params, self.state.opt_state]
        if self.phase.reference == START:
            saved.append(abstract_reference(self.model, self.mesh))
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(saved))

    @functools.cached_property
    def view_bytes(self) -> int:
        shapes = jax.eval_shape(functools.partial(rollout_view, self.model), self.model.param_shapes())
        layout = tree_shardings(view_axes(self.model), shapes, self.mesh, DECODE_RULES)
        return tree_bytes(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout))

    @property
    def tile_tokens(self) -> int:
        """Tokens that go through the head at once on a device."""
        vocab_size = -(-self.model.config.vocab_size // self.split.tensor)
        return self.phase.tile_tokens or head_tile_tokens(self.chip, vocab_size=vocab_size)

    @property
    def geometry(self) -> Geometry:
        limit = self.phase.max_response_tokens
        segment = segment_tokens(self.max_prompt_tokens, limit, platform=self.platform)
        return Geometry(segment, self.max_prompt_tokens, limit, self.split.rows)

    @property
    def cache_bytes(self) -> int:
        """Tails and pages on each device with every row at its full length."""
        geometry, each = self.geometry, self.slots // self.split.rows
        places = each * (geometry.home + geometry.segment_tokens)
        places += geometry.pool_sizes(each)[-1] * geometry.segment_tokens
        if self.one_program:
            places = each * self.width
        return places * cache_bytes_per_token(self.model.config, self.itemsize) // self.split.tensor

    @property
    def prefill(self) -> tuple[int, int, int]:
        """(calls in a step, prompts of a call, positions)."""
        width = self.geometry.prefill_width(self.max_prompt_tokens - 1)
        rows = self.geometry.prefill_rows(self.phase.prompts_per_step, width)
        return -(-self.phase.prompts_per_step // rows), rows, width

    @property
    def steps(self) -> float:
        """Decoding steps of a step's rows: slots are full until no row waits, so at least the tokens by the slots."""
        if self.one_program:
            return self.phase.max_response_tokens  # until the longest has ended
        return max(self.lengths.response, self.phase.rows * self.lengths.response / self.slots)

    def update_shape(self, micro_batches: int) -> UpdateShape:
        """One update, its batch cut into `micro_batches`: packed rows fill the first of them."""
        phase, rows = self.phase, self.phase.update_rows
        each = rows // micro_batches
        packed = phase.pack and phase.objective.tokenwise and micro_batches > 1
        packed = packed and (self.width >= LEAST_WIDTH or not self.one_program)
        length = sum(self.lengths) if packed else self.width
        used = min(micro_batches, -(-rows * length // (each * self.width)))
        return UpdateShape(
            sequences=rows,
            length=length,
            response=self.lengths.response,
            width=self.width,
            micro_batches=used,
            rows=each,
            tile_tokens=self.tile_tokens,
            remat=self.model.remat,
            tokenwise=phase.objective.tokenwise,
        )

    def works(self, micro_batches: int) -> dict[str, Work]:
        """What each part computes and reads in one step, by name; each update cut into `micro_batches`."""
        c, split, size, phase = self.model.config, self.split, self.itemsize, self.phase
        calls, rows, width = self.prefill
        lengths = self.lengths
        if self.one_program:  # as long as the longest, all of them in the loop
            calls, rows, width = 1, phase.prompts_per_step, self.max_prompt_tokens - 1
        found = {
            "view": view_work(c, split, size),
            "prefill": prefill_work(c, split, calls=calls, rows=rows, width=width, itemsize=size),
            "decode": decode_work(
                c, split, rows=phase.rows, slots=self.slots, steps=self.steps, lengths=lengths, itemsize=size
            ),
            "update": Work(
                *(phase.updates_per_step * x for x in update_work(c, split, self.update_shape(micro_batches)))
            ),
        }
        if self.phase.reference is not None:
            other = (self.reference_model or self.model).config
            found["update"] = added(found["update"], reference_work(other, split, self.update_shape(micro_batches)))
        if not self.one_program:
            return found
        return {"reheat_step": added(*found.values())}
