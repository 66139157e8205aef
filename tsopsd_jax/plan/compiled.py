"""The parts of a step compiled ahead of time, by the functions that training jits; memory and traffic are the
compiler's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tsopsd_jax.head import TILES
from tsopsd_jax.learn.micro_batches import choose_micro_batches, compile_within
from tsopsd_jax.learn.update import MICRO_BATCHES
from tsopsd_jax.plan import estimate
from tsopsd_jax.plan.case import Case, Part
from tsopsd_jax.plan.collectives import Program
from tsopsd_jax.rollout import Engine
from tsopsd_jax.rollout.segment import STEPS
from tsopsd_jax.train.phase_update import Updater
from tsopsd_jax.types import SAMPLING_TEMPERATURE

HOPELESS = 1.3
"""An update that by formula needs this many times the memory is not compiled: smaller micro-batches are tried at
once."""

STOP_IDS = (0, 1)
"""How many tokens end a response; which ones they are changes no program."""


class Compiled(NamedTuple):
    """A program's bytes on each device, and its text; None where it does not fit."""

    bytes: int
    text: str | None


class CompiledPrograms:
    """Compiles, each program once; `note` is told before each."""

    def __init__(self, note: Callable[[str], None]):
        self._known: dict[str, Compiled] = {}
        self._note = note

    def compile(self, name: str, lowered: Any) -> Compiled:
        key = lowered.as_text()
        if key not in self._known:
            self._note(f"compiling {name}")
            program, need = compile_within(lowered)
            self._known[key] = Compiled(need, None if program is None else program.as_text())
        return self._known[key]


def compile_parts(case: Case, programs: CompiledPrograms, *, limit_bytes: int) -> list[Part]:
    """The parts of a step on the case's mesh; an update in as few micro-batches as fit into `limit_bytes`, unless the
    phase names their number."""
    micro_batches = case.phase.micro_batches or _fewest(case, programs, limit_bytes)
    updater = _updater(case, micro_batches)
    estimated = {part.name: part for part in estimate.estimate(case, micro_batches)}
    shape = case.update_shape(micro_batches)
    loops = {MICRO_BATCHES: shape.micro_batches, TILES: shape.tiles(case.split)}
    if case.one_program:
        step = programs.compile(
            f"{case.names[0]}: whole step", updater.lowered_reheat_step(updater.reheat_step(STOP_IDS))
        )
        loops[STEPS] = case.phase.max_response_tokens
        return [_measured(estimated["reheat_step"], case, step, inside=tuple(case.resident), loops=loops)]
    sampling = _sampling(case, programs, estimated, updater.abstract_knobs().get(SAMPLING_TEMPERATURE))
    inside = (*case.resident, "gradients")
    update = _update(case, programs, micro_batches)
    updates = case.phase.updates_per_step
    return [*sampling, _measured(estimated["update"], case, update, inside=inside, loops=loops, times=updates)]


def _sampling(
    case: Case,
    programs: CompiledPrograms,
    estimated: dict[str, Part],
    temperature: jax.ShapeDtypeStruct | None,
) -> list[Part]:
    engine = Engine(
        case.model,
        case.mesh,
        sampling=case.phase.sampling,
        max_prompt_tokens=case.max_prompt_tokens,
        max_response_tokens=case.phase.max_response_tokens,
        stop_ids=STOP_IDS,
        slots=case.slots,
    )
    sampler, params, name = engine.on_device, case.state.params, case.names[0]
    calls, rows, width = case.prefill
    view = programs.compile(f"{name}: view", sampler.lower_view(params))
    prefill = programs.compile(f"{name}: prefill", sampler.lower_prefill(params, (rows, width)))
    decode = programs.compile(f"{name}: decode", sampler.lower_segment(params, sampling_temperature=temperature))
    steps = {STEPS: engine.segment}
    return [
        _measured(estimated["view"], case, view, inside=("parameters", "rollout view")),
        _measured(estimated["prefill"], case, prefill, inside=("rollout view",), times=calls),
        _measured(
            estimated["decode"],
            case,
            decode,
            inside=("rollout view", "cache"),
            loops=steps,
            times=case.steps / engine.segment,
        ),
    ]


def _updater(case: Case, micro_batches: int) -> Updater:
    phase = dataclasses.replace(case.phase, micro_batches=micro_batches, tile_tokens=case.tile_tokens)
    return Updater(
        case.model,
        phase,
        case.mesh,
        max_prompt_tokens=case.max_prompt_tokens,
        limit_bytes=None,
        reference_model=case.reference_model,
    )


def _update(case: Case, programs: CompiledPrograms, micro_batches: int) -> Compiled:
    lowered = _updater(case, micro_batches).lowered()
    return programs.compile(f"{case.names[0]}: update in {micro_batches} micro-batches", lowered)


def _fewest(case: Case, programs: CompiledPrograms, limit_bytes: int) -> int:
    """The fewest micro-batches that fit, as training chooses them; one row on each device if none do."""
    rows, shards = case.phase.update_rows, case.split.rows

    def need_of(micro_batches: int) -> int:
        guess = sum(estimate.update(case, micro_batches).values())
        hopeless = guess > HOPELESS * limit_bytes and micro_batches < rows // shards
        return guess if hopeless else _update(case, programs, micro_batches).bytes

    try:
        return choose_micro_batches(need_of, rows=rows, width=case.width, shards=shards, limit_bytes=limit_bytes)
    except ValueError:
        return rows // shards


def _measured(
    part: Part,
    case: Case,
    compiled: Compiled,
    *,
    inside: tuple[str, ...],
    loops: Mapping[str, int] | None = None,
    times: float = 1.0,
) -> Part:
    """The part with the compiler's figures.

    Args:
        inside: kinds of memory that the program's own bytes hold; the other kinds lie beside it.
        loops: how often named loops run in a call.
        times: calls in a step.
    """
    temporaries = max(0, compiled.bytes - sum(part.bytes[kind] for kind in inside))
    held = part.bytes | {"temporaries": temporaries}
    if compiled.text is None:
        return dataclasses.replace(part, bytes=held, source="refused")
    program = Program(compiled.text, dict(case.mesh.shape), loops or {})
    moved = tuple(m._replace(bytes=m.bytes * times, count=m.count * times) for m in program.moved)
    return dataclasses.replace(part, bytes=held, moved=moved, source="compiled", uncounted_loops=tuple(program.unknown))
