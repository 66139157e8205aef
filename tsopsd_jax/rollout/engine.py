"""Continuous batching: rows through slots, segment by segment; a cache of pages; rows come out as they end."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from tsopsd_jax.distributed.sharding import put, replicated, row_multiple
from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.rollout.admission import Piece, pieces, placement
from tsopsd_jax.rollout.distribution import Sampling, checked_temperature
from tsopsd_jax.rollout.programs import Programs
from tsopsd_jax.rollout.schedule import Admitted, Geometry, PageTable, Schedule
from tsopsd_jax.rollout.segment import Pool, Segment, Slots
from tsopsd_jax.types import Prompts, PyTree, Rollout

SHORT_TOKENS = 128
"""Responses and prompts of at most this length are one segment: they need no pages."""


class Finished(NamedTuple):
    """A row that ended: its response tokens (stop token included), their log-probabilities, and their mean entropy."""

    row: int
    tokens: np.ndarray
    logp: np.ndarray
    stopped: bool
    entropy_nats: float = math.nan  # exact, of the policy at temperature 1; where the engine measures it


@dataclasses.dataclass
class Progress:
    """Facts of a rollout so far: rows finished, tokens, time, memory."""

    rows: int
    finished: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_s: float = 0.0  # until the first segment was over
    slot_steps: int = 0
    peak_cache_bytes: int = 0

    @property
    def left_s(self) -> float:
        """An estimate of the seconds left: the rows to come, at the mean rate at which rows finished so far."""
        return self.seconds * (self.rows - self.finished) / max(self.finished, 1)

    @property
    def slot_use(self) -> float:
        """The share of decoded slot-steps that gave a token which is kept."""
        return self.tokens / max(self.slot_steps, 1)


def segment_tokens(max_prompt_tokens: int, max_response_tokens: int, *, platform: str) -> int:
    """Choose R, the tokens of a segment: 64, or 128 on a TPU, the width of its registers.

    Short responses to short prompts are one segment.
    """
    if max(max_prompt_tokens, max_response_tokens) <= SHORT_TOKENS:
        return max_response_tokens
    return 128 if platform == "tpu" else 64


class Engine:
    """The sampler outside of jit, with continuous batching; its programs are compiled once and kept.

    Args:
        model: the policy's functions.
        mesh: slots and pages are divided over data x fsdp, heads and vocabulary over tensor.
        sampling, max_response_tokens, stop_ids: the distribution, the longest response, the tokens that end one.
        max_prompt_tokens: P, the width of the prompts.
        slots: rows decoded together, at most; rounded up to the mesh.
        segment: R, tokens between two looks at the schedule; None: `segment_tokens`.
        attention: `auto`, the best implementations of the mesh's backend; or `xla`.
        entropy: measure the policy's entropy wherever a token is drawn: one more pass over the logits.

    Attributes:
        limit: `max_response_tokens`.
        shards: groups of devices over which slots and pages are divided.
        slots, segment: as they are used.
        geometry: sizes.
        on_device: the programs, which can also be lowered before any array exists.
        progress: of the last rollout.
    """

    def __init__(
        self,
        model: Qwen3,
        mesh: jax.sharding.Mesh,
        *,
        sampling: Sampling,
        max_prompt_tokens: int,
        max_response_tokens: int,
        stop_ids: tuple[int, ...],
        slots: int,
        segment: int | None = None,
        attention: str = "auto",
        entropy: bool = False,
    ):
        self.mesh, self.limit, self.shards = mesh, max_response_tokens, row_multiple(mesh)
        self.slots = -(-slots // self.shards) * self.shards
        platform = mesh.devices.flat[0].platform
        self.segment = segment or segment_tokens(max_prompt_tokens, max_response_tokens, platform=platform)
        self.geometry = Geometry(self.segment, max_prompt_tokens, max_response_tokens, self.shards)
        self.on_device = Programs(
            model,
            mesh,
            geometry=self.geometry,
            slots=self.slots,
            sampling=sampling,
            stop_ids=stop_ids,
            attention=attention,
            entropy=entropy,
        )
        self.progress = Progress(0)

    def view(self, params: PyTree) -> PyTree:
        """Gather and cast the parameters into a rollout view, once for as many rollouts as the parameters last."""
        return self.on_device.view(params)

    @property
    def programs(self) -> int:
        """The number of programs compiled so far."""
        return self.on_device.compiled

    def run(
        self,
        view: PyTree,
        prompts: Prompts,
        key: Array,
        *,
        group: int = 1,
        sampling_temperature: float | None = None,
        on_finished: Callable[[Finished], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Rollout:
        """Sample all rows into a Rollout on the host.

        `on_finished` sees each row as it ends, while others are still decoded. The other arguments are those of
        `stream`, which also says what raises.
        """
        n, p = prompts.tokens.shape
        length = np.asarray(prompts.length, np.int32)
        tokens = np.zeros((n, p + self.limit), np.int32)
        tokens[:, :p] = np.where(np.arange(p)[None, :] < length[:, None], prompts.tokens, 0)
        logp = np.zeros(tokens.shape, np.float32)
        end, stopped = length.copy(), np.zeros(n, bool)
        stream = self.stream(
            view, prompts, key, group=group, sampling_temperature=sampling_temperature, on_progress=on_progress
        )
        for done in stream:
            at = slice(length[done.row], length[done.row] + len(done.tokens))
            tokens[done.row, at], logp[done.row, at] = done.tokens, done.logp
            end[done.row], stopped[done.row] = at.stop, done.stopped
            if on_finished is not None:
                on_finished(done)
        return Rollout(tokens=tokens, prompt_length=length, length=end, logp=logp, stopped=stopped)

    def stream(
        self,
        view: PyTree,
        prompts: Prompts,
        key: Array,
        *,
        group: int | np.ndarray = 1,
        sampling_temperature: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Finished]:
        """Yield rows as they end, in an order that follows from lengths alone.

        Args:
            view: from `view`.
            prompts: host arrays.
            group: rows with the same prompt stand side by side, in groups of this many, or [N] with a number for each
                group; a group's prompt is prefilled once.
            key: the key of the step; a row's randomness depends on it and on the row's id alone.
            sampling_temperature: in place of that of the engine's settings: an input of the programs, so that another
                one compiles nothing.
            on_progress: called after every segment; what it raises ends the rollout.

        Raises:
            ValueError: if `group` does not divide the rows, the prompts are not `max_prompt_tokens` wide, or the
                temperature is below `SMALLEST_TEMPERATURE`.
        """
        if isinstance(group, int) and len(prompts.length) % group:
            raise ValueError(f"group {group} does not divide {len(prompts.length)} rows")
        width = prompts.tokens.shape[1]
        if width != self.geometry.max_prompt_tokens:
            raise ValueError(f"prompts are {width} wide, expected max_prompt_tokens {self.geometry.max_prompt_tokens}")
        temperature = None
        if sampling_temperature is not None:
            temperature = put(np.float32(checked_temperature(sampling_temperature)), replicated(self.mesh))
        began = time.monotonic()
        rollout = _Rollout(self, prompts, group)
        schedule, self.progress = rollout.schedule, Progress(len(prompts.length))
        finished: list[Finished] = []
        while not schedule.over:
            rollout.turn(view)
            running = rollout.dispatch(view, key, temperature)
            yield from finished  # while the segment runs
            finished = rollout.collect(running)
            now = self.progress
            now.finished, now.tokens = now.finished + len(finished), schedule.kept_tokens
            now.slot_steps, now.seconds = schedule.slot_steps, time.monotonic() - began
            now.peak_cache_bytes = rollout.peak_bytes
            now.first_token_s = now.first_token_s or now.seconds
            if on_progress is not None:
                on_progress(now)
        yield from finished


class _Rollout:
    """The state of one rollout: the schedule, the cache on the device, the responses so far."""

    def __init__(self, engine: Engine, prompts: Prompts, group: int | np.ndarray):
        self.engine, self.on_device, self.prompts = engine, engine.on_device, prompts
        self.group = np.arange(len(prompts.length)) // group if isinstance(group, int) else group
        self.geometry = engine.geometry
        self.length = np.asarray(prompts.length, np.int32)
        self.schedule = Schedule(
            self.length,
            slots=engine.slots,
            geometry=self.geometry,
            group=self.group,
            shares=self.on_device.shares,
        )
        self.width = self.geometry.prefill_width(int(self.length.max()) - 1)
        slots = self.schedule.row.size
        self.tails = self.on_device.empty_tails(slots)
        self.pages = self.on_device.empty_pages(self.schedule.pool)
        # The cache and the group of the last prompt on each shard: its rows may not all have found a slot.
        self.carry: tuple[LayerCache, ...] | None = None
        self.carried = [-1] * engine.shards
        self.last = np.zeros(slots, np.int32)  # each slot's last token, and all of its response so far
        self.tokens = np.zeros((slots, engine.limit + engine.segment), np.int32)
        self.logp = np.zeros(self.tokens.shape, np.float32)
        self.nats = np.zeros(slots)  # the entropy of each slot's tokens, added up
        first: dict[int, int] = {}
        for row, g in enumerate(self.group.tolist()):
            first.setdefault(g, row)
        self.first = first  # a row of each group
        self.peak_bytes = 0

    def turn(self, view: PyTree) -> None:
        """Do what is due between two segments: keep what was drawn, make room, let rows in."""
        on_device, schedule = self.on_device, self.schedule
        size = schedule.grow()
        if size is not None and self.pages is not None:
            layers, self.pages = list(self.pages), None
            self.pages = self._by_layer(layers, lambda layer: on_device.grow(layer, size=size))
        if schedule.live.any() and self.pages is not None:
            self.pages = on_device.commit(self.pages, self.tails, self.on_device.put(schedule.commit()))
        shrink = schedule.shrink()
        if shrink is not None:
            shards = len(shrink.slot_source)
            before = np.arange(self.last.size).reshape(shards, -1)
            stay = np.take_along_axis(before, shrink.slot_source, axis=1).reshape(-1)
            self.last, self.nats = self.last[stay], self.nats[stay]
            self.tokens, self.logp = self.tokens[stay], self.logp[stay]
            slots, pages = self.on_device.put(shrink.slot_source), self.on_device.put(shrink.page_source)
            layers, self.tails = list(self.tails), ()
            self.tails = self._by_layer(layers, lambda layer: on_device.shrink_tails(layer, slots))
            if self.pages is not None:
                layers, self.pages = list(self.pages), None
                self.pages = self._by_layer(layers, lambda layer: on_device.shrink_pages(layer, pages))
        self._count_bytes()
        self._admit(view, schedule.admit())

    def dispatch(self, view: PyTree, key: Array, sampling_temperature: Array | None) -> Segment:
        """Start a segment; its results are fetched by `collect`."""
        schedule, row = self.schedule, self.schedule.row.reshape(-1)
        live, drawn = row >= 0, self.schedule.drawn.reshape(-1)
        prompt = np.where(live, self.length[row], 1)
        slots = Slots(
            token=self.last,
            position=prompt - 1 + drawn,
            tail=(prompt - 1) % self.engine.segment,
            row_id=np.where(live, np.asarray(self.prompts.row_id)[row], 0).astype(np.uint32),
            drawn=drawn,
            left=np.where(live, self.engine.limit - drawn, 0),
        )
        slots = Slots(*(self.on_device.put(x if x.dtype == np.uint32 else x.astype(np.int32)) for x in slots))
        pool = None if self.pages is None else Pool(self.pages, PageTable(*map(self.on_device.put, schedule.table)))
        segment, self.tails = self.on_device.decode_segment(view, self.tails, pool, slots, key, sampling_temperature)
        return self.on_device.gather(segment)

    def collect(self, segment: Segment) -> list[Finished]:
        """Wait for a segment and take in what it drew."""
        tokens, logp, count, stopped, nats = jax.device_get(tuple(segment))
        schedule = self.schedule
        live, drawn = np.flatnonzero(schedule.live), schedule.drawn.reshape(-1)
        at = drawn[live, None] + np.arange(len(tokens))[None, :]
        self.tokens[live[:, None], at], self.logp[live[:, None], at] = tokens.T[live], logp.T[live]
        self.last[live] = tokens[count[live] - 1, live]
        self.nats = np.where(drawn > 0, self.nats, 0.0) + (math.nan if nats is None else nats)
        length = drawn + count
        ended = schedule.advance(count.reshape(schedule.row.shape), stopped.reshape(schedule.row.shape))
        return [
            Finished(
                row,
                self.tokens[slot, : length[slot]].copy(),
                self.logp[slot, : length[slot]].copy(),
                stop,
                float(self.nats[slot] / length[slot]),
            )
            for row, slot, stop in ended
        ]

    def _admit(self, view: PyTree, admitted: list[Admitted]) -> None:
        """Prefill the prompts of new groups, in pieces, and hand their cache to the slots."""
        if not admitted:
            return
        each, r = self.schedule.row.shape[1], self.engine.segment
        rows = [entry.row for entry in admitted]
        slots = [entry.shard * each + entry.slot for entry in admitted]
        self.last[slots] = np.asarray(self.prompts.tokens)[rows, self.length[rows] - 1]
        if self.width == 0:
            return
        if self.carry is None:
            self.carry = self.on_device.empty_prompts(self.width)
        for piece in pieces(admitted, self.schedule.group, self.carried, self.geometry.prefill_most(self.width)):
            store = self._prefill(view, piece) if piece.rows else self.carry
            to = placement(piece, slots=each, pool=self.schedule.pool, r=r)
            arrays = (self.on_device.put(x) for x in to)
            self.tails, self.pages, self.carry = self.on_device.place(
                self.tails, self.pages, self.carry, store, *arrays
            )

    def _prefill(self, view: PyTree, piece: Piece) -> tuple[LayerCache, ...]:
        """Prefill a piece's new prompts, each shard's on its own devices."""
        rows = np.full((len(piece.new), piece.rows), -1)
        for shard, groups in enumerate(piece.new):
            rows[shard, : len(groups)] = [self.first[g] for g in groups]
        rows = rows.reshape(-1)
        inside = np.arange(self.width)[None, :] < np.where(rows >= 0, self.length[rows], 0)[:, None]
        take = np.asarray(self.prompts.tokens)[rows, : self.width]
        tokens = np.zeros(inside.shape, np.int32)
        tokens[:, : take.shape[1]] = np.where(inside[:, : take.shape[1]], take, 0)
        return self.on_device.prefill(view, self.on_device.put(tokens))

    def _by_layer(self, layers: list[LayerCache], change: Callable[[LayerCache], LayerCache]) -> tuple[LayerCache, ...]:
        """Change the size of a cache's layers one by one, emptying the list: only one of them ever exists twice."""
        before, new = _bytes(layers), []
        while layers:
            old = layers.pop(0)
            new.append(change(old))
            most = max(before, _bytes(new)) + min(_bytes(old), _bytes(new[-1]))
            self.peak_bytes = max(self.peak_bytes, most + _bytes((self.tails, self.pages)))
        return tuple(new)

    def _count_bytes(self) -> None:
        self.peak_bytes = max(self.peak_bytes, _bytes((self.tails, self.pages)))


def _bytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))
